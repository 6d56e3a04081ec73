"""GaLore through `Trainer(optimizer_cls_and_kwargs=galore(...))`: grouping, training, resuming, bad input."""

import copy

import pytest
import torch
from torch.utils.data import Dataset
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from hf_efficiency import RTNConfig
from hf_efficiency.integrations.transformers.galore import GaLoreFactory, galore, galore_param_groups
from hf_efficiency.optim import formula_bytes, optimizer_bytes
from tests.families import FAMILIES, build_family
from tests.tiny import build_llama


class Tokens(Dataset):
    def __init__(self, ids):
        self.ids = ids

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def arguments(folder, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "lr_scheduler_type": "linear",
    }
    return TrainingArguments(**{**settings, **overrides})


def make_trainer(model, tokens, folder, *, training=None, **options):
    args = arguments(folder, **(training or {}))
    chosen = galore(model, lr=0.02, update_proj_gap=2, **{"rank": 8, **options})
    return Trainer(model, args, train_dataset=Tokens(tokens), optimizer_cls_and_kwargs=chosen)


def names_of(model, groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_groups_are_those_of_trainer_split_by_projection(tiny_llama, tmp_path):
    groups = galore_param_groups(tiny_llama, options={"rank": 8, "state_bits": 32}, weight_decay=0.1)
    stock = Trainer(tiny_llama, arguments(tmp_path, weight_decay=0.1)).create_optimizer()
    projected, decayed, rest = names_of(tiny_llama, groups)
    assert len(projected) == 14
    assert all("_proj.weight" in name for name in projected)
    assert decayed == ["model.embed_tokens.weight", "lm_head.weight"]
    assert all("norm" in name for name in rest)
    named = dict(tiny_llama.named_parameters())
    assert {named[name] for name in projected + decayed} == set(stock.param_groups[0]["params"])
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]
    assert [group.get("rank") for group in groups] == [8, None, None]


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_on_every_family(family):
    """Each trainable parameter is in one group; every projected one is a linear layer of a block."""
    model = build_family(family)
    factory, settings = galore(model, rank=4)
    optimizer = factory()(model, **settings)
    grouped = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(grouped) == len(set(grouped)) == len(list(model.parameters()))
    projected = [name for group in optimizer.param_groups if group["rank"] for name in group["param_names"]]
    assert len(projected) >= 8
    assert not any("embed" in name or "head" in name or "wte" in name for name in projected)
    model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
    optimizer.step()
    assert optimizer_bytes(optimizer) == formula_bytes(optimizer.param_groups)


def test_targets_by_name_by_expression_and_without_some(tiny_llama):
    def count(**choice):
        factory, settings = galore(tiny_llama, rank=8, **choice)
        return next(len(g["params"]) for g in factory()(tiny_llama, **settings).param_groups if g["rank"])

    assert count(target_modules=["q_proj", "layers.1.mlp.down_proj"]) == 3
    assert count(target_modules=r".*\.0\..*_proj") == 7
    assert count(exclude_modules=["q_proj"]) == 12
    assert count(exclude_modules=r".*mlp.*") == 8
    assert count(embeddings=True) == 16
    assert count(target_modules=["lm_head"]) == 1


def test_tied_embeddings_are_projected_once():
    model = build_llama(tie_word_embeddings=True)
    groups = galore_param_groups(model, options={"rank": 8, "state_bits": 32}, embeddings=True)
    projected, rest = names_of(model, groups)
    assert "model.embed_tokens.weight" in projected
    assert len(projected) == 15
    assert all("norm" in name for name in rest)


def test_heads_of_other_tasks_are_heads(tiny_llama):
    config = copy.deepcopy(tiny_llama.config)
    config.num_labels = 3
    model = LlamaForSequenceClassification(config)
    projected, rest, _ = names_of(model, galore_param_groups(model, options={"rank": 8, "state_bits": 32}))
    assert len(projected) == 14
    assert "score.weight" in rest


ROWS = {
    "galore": {},
    "8-bit": {"state_bits": 8, "embeddings": True},
    "q-galore": {"variant": "q-galore", "lazy_patience": 1},
    "apollo": {"variant": "apollo", "rank": 8},
    "per-layer": {"per_layer": True, "training": {"max_grad_norm": 0}},
}


@pytest.mark.parametrize("options", ROWS.values(), ids=ROWS)
def test_trainer_resumes_to_the_same_bit(options, tiny_llama, tiny_tokens, tmp_path):
    start = copy.deepcopy(tiny_llama)
    straight = make_trainer(tiny_llama, tiny_tokens, tmp_path / "a", **options)
    straight.train()
    losses = [entry["loss"] for entry in straight.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    optimizer = straight.optimizer.optimizer
    assert optimizer_bytes(optimizer) == formula_bytes(optimizer.param_groups)
    # two refreshes before the checkpoint, one after it
    resumed = make_trainer(start, tiny_tokens, tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-3"))
    for (name, weight), expected in zip(start.named_parameters(), tiny_llama.parameters(), strict=True):
        assert torch.equal(weight, expected), name


def test_trainer_per_layer_equals_the_ordinary_step(tiny_llama, tiny_tokens, tmp_path):
    other = copy.deepcopy(tiny_llama)
    training = {"max_grad_norm": 0, "gradient_checkpointing": True}
    make_trainer(tiny_llama, tiny_tokens, tmp_path / "a", training=training).train()
    make_trainer(other, tiny_tokens, tmp_path / "b", training=training, per_layer=True).train()
    for weight, expected in zip(other.parameters(), tiny_llama.parameters(), strict=True):
        assert torch.equal(weight, expected)


def test_trainer_refuses_to_resume_with_another_config(tiny_llama, tiny_tokens, tmp_path):
    make_trainer(tiny_llama, tiny_tokens, tmp_path, training={"max_steps": 3}).train()
    other = make_trainer(tiny_llama, tiny_tokens, tmp_path, rank=4)
    with pytest.raises(ValueError, match=r"other options in group 0: rank=8 \(now 4\). Resume with the options"):
        other.train(resume_from_checkpoint=True)
    other = make_trainer(tiny_llama, tiny_tokens, tmp_path, exclude_modules=["q_proj"])
    with pytest.raises(ValueError, match=r"groups of \[14, 2, 5\] parameters, this one of \[12, 4, 5\]"):
        other.train(resume_from_checkpoint=True)


def test_training_arguments_are_read_and_can_be_overridden(tiny_llama, tmp_path):
    args = arguments(tmp_path, learning_rate=0.5, weight_decay=0.2, adam_beta2=0.9, adam_epsilon=1e-3)
    _, settings = galore(tiny_llama, args=args, rank=8)
    assert (settings["lr"], settings["weight_decay"]) == (0.5, 0.2)
    assert (settings["betas"], settings["eps"]) == ((0.9, 0.9), 1e-3)
    _, settings = galore(tiny_llama, args=args, rank=8, lr=0.1, weight_decay=0.0)
    assert (settings["lr"], settings["weight_decay"]) == (0.1, 0.0)
    _, settings = galore(tiny_llama, rank=8)
    assert (settings["lr"], settings["weight_decay"], settings["eps"]) == (0.01, 0.0, 1e-8)


def test_a_second_optimizer_is_grouped_in_the_same_way(tiny_llama, tmp_path):
    """Trainer builds another one when it looks for a batch size: the settings must not be used up."""
    factory, settings = galore(tiny_llama, rank=8)
    sizes = [[len(g["params"]) for g in factory()(tiny_llama, **settings).param_groups] for _ in range(2)]
    assert sizes[0] == sizes[1] == [14, 2, 5]
    assert factory is GaLoreFactory


def test_bad_targets(tiny_llama):
    with pytest.raises(ValueError, match=r"target_modules=\['q_porj'\] match no linear layer.*Did you mean .*q_proj"):
        galore(tiny_llama, rank=8, target_modules=["q_porj"])
    with pytest.raises(ValueError, match="Its linear layers are called down_proj, gate_proj, k_proj, lm_head, o_proj"):
        galore(tiny_llama, rank=8, target_modules="xyz")
    with pytest.raises(ValueError, match=r"rank=100 is above 64, all the rank that the weight 'model.layers.0.*q_proj"):
        galore(tiny_llama, rank=100)
    with pytest.raises(ValueError, match="update_proj_gap=0 must be at least 1"):
        galore(tiny_llama, rank=8, update_proj_gap=0)
    with pytest.raises(TypeError, match="ranks"):
        galore(tiny_llama, ranks=8)


def test_frozen_weights(tiny_llama):
    for layer in tiny_llama.model.layers[:1]:
        layer.requires_grad_(False)
    projected = names_of(tiny_llama, galore_param_groups(tiny_llama, options={"rank": 8, "state_bits": 32}))[0]
    assert len(projected) == 7
    with pytest.raises(
        ValueError, match=r"weight of model.layers.0.self_attn.q_proj is frozen, as are 0 other targets"
    ):
        galore(tiny_llama, rank=8, target_modules=["q_proj"])
    tiny_llama.requires_grad_(False)
    with pytest.raises(ValueError, match=r"as are 13 other targets: call requires_grad_\(True\)"):
        galore(tiny_llama, rank=8)
    with pytest.raises(ValueError, match="no trainable token embeddings"):
        galore_param_groups(build_frozen_embeddings(), options={"rank": 8, "state_bits": 32}, embeddings=True)


def build_frozen_embeddings():
    model = build_llama()
    model.model.embed_tokens.requires_grad_(False)
    model.lm_head.requires_grad_(False)
    return model


def test_quantized_weights_are_refused_and_dense_ones_beside_them_train(tiny_llama_dir, tiny_tokens):
    from transformers import AutoModelForCausalLM

    config = RTNConfig(bits=4, group_size=32, modules_to_not_convert=["down_proj"])
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=config)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn.q_proj is a \w+ quantized: there is no weight to"):
        galore(model, rank=8)
    factory, settings = galore(model, rank=8, target_modules=["down_proj"], lr=0.01)
    optimizer = factory()(model, **settings)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tiny_tokens, labels=tiny_tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses == sorted(losses, reverse=True)


def test_per_layer_refuses_arguments_that_need_gradients_afterwards(tiny_llama, tmp_path):
    for name, value in (("gradient_accumulation_steps", 2), ("max_grad_norm", 1.0)):
        args = arguments(tmp_path, **{"max_grad_norm": 0, name: value})
        with pytest.raises(ValueError, match=rf"per_layer=True frees each gradient .* {name}={value} needs them"):
            galore(tiny_llama, args=args, rank=8, per_layer=True)
    galore(tiny_llama, args=arguments(tmp_path, max_grad_norm=0), rank=8, per_layer=True)
