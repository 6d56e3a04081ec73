"""GaLoreConfig: whole weights trained in place or beside the base, saved and loaded by PEFT."""

import copy

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from hf_efficiency import GaLoreConfig, galore, merge_adapters
from hf_efficiency.optim import formula_bytes, optimizer_bytes
from tests.families import build_family
from tests.tiny import build_llama

KEPT = pytest.mark.parametrize("keep_base", [False, True], ids=["in-place", "kept"])


def config(**overrides):
    return GaLoreConfig(**{"r": 4, "task_type": "CAUSAL_LM", "update_proj_gap": 2, **overrides})


def train(model, tokens, steps=4, **settings):
    """Losses."""
    factory, kwargs = galore(model, lr=0.02, **settings)
    optimizer = factory()(model, **kwargs)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    return optimizer


@torch.no_grad()
def logits(model, tokens):
    return model.eval()(input_ids=tokens).logits


@KEPT
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "phi3"])
def test_trains_saves_and_reloads(family, keep_base, tiny_tokens, tmp_path):
    model = build_family(family)
    base, before = copy.deepcopy(model), logits(model, tiny_tokens)
    peft_model = get_peft_model(model, config(keep_base=keep_base))
    torch.testing.assert_close(logits(peft_model, tiny_tokens), before, rtol=0, atol=1e-6)
    trainable, _ = peft_model.get_nb_trainable_parameters()
    optimizer = train(peft_model, tiny_tokens)
    projected, *rest = optimizer.param_groups
    assert not rest  # what is trained are the targets
    assert sum(p.numel() for p in projected["params"]) == trainable
    assert (projected["rank"], projected["update_proj_gap"]) == (4, 2)
    assert optimizer_bytes(optimizer) == formula_bytes(optimizer.param_groups)
    after = logits(peft_model, tiny_tokens)
    assert not torch.allclose(after, before, atol=1e-2)
    peft_model.save_pretrained(tmp_path)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        torch.testing.assert_close(logits(loaded, tiny_tokens), after, rtol=0, atol=1e-6)
    train(loaded, tiny_tokens)


def test_in_place_adds_no_memory(tiny_llama, tiny_tokens):
    weight = tiny_llama.model.layers[0].mlp.down_proj.weight
    count = sum(p.numel() for p in tiny_llama.parameters())
    model = get_peft_model(tiny_llama, config())
    assert sum(p.numel() for p in model.parameters()) == count
    assert any(p is weight and p.requires_grad for p in model.parameters())
    before = weight.detach().clone()
    train(model, tiny_tokens)
    assert not torch.equal(weight, before)
    assert not model.get_input_embeddings().weight.requires_grad


def test_equals_training_without_peft(tiny_llama, tiny_tokens):
    other = copy.deepcopy(tiny_llama)
    peft_model = get_peft_model(tiny_llama, config())
    train(peft_model, tiny_tokens)
    for name, parameter in other.named_parameters():
        parameter.requires_grad_("_proj" in name)
    train(other, tiny_tokens, rank=4, update_proj_gap=2)
    assert torch.equal(logits(peft_model, tiny_tokens), logits(other, tiny_tokens))


@pytest.mark.parametrize("safe_merge", [False, True])
@KEPT
def test_merges(keep_base, safe_merge, tiny_llama, tiny_tokens):
    before = logits(tiny_llama, tiny_tokens)
    model = get_peft_model(tiny_llama, config(keep_base=keep_base))
    train(model, tiny_tokens)
    after = logits(model, tiny_tokens)
    model.merge_adapter(safe_merge=safe_merge)
    assert torch.equal(logits(model, tiny_tokens), after)
    model.unmerge_adapter()
    assert torch.equal(logits(model, tiny_tokens), after)
    if keep_base:
        with model.disable_adapter():
            assert torch.equal(logits(model, tiny_tokens), before)
    dense = model.merge_and_unload(safe_merge=safe_merge)
    assert torch.equal(logits(dense, tiny_tokens), after)
    assert not any("galore" in name for name, _ in dense.named_parameters())


@KEPT
def test_merge_adapters(keep_base, tiny_llama, tiny_tokens):
    model = get_peft_model(tiny_llama, config(keep_base=keep_base))
    train(model, tiny_tokens)
    after = logits(model, tiny_tokens)
    torch.testing.assert_close(logits(merge_adapters(model), tiny_tokens), after, rtol=0, atol=4e-7)


def test_several_adapters_beside_the_base(tiny_llama, tiny_tokens):
    before = logits(tiny_llama, tiny_tokens)
    model = get_peft_model(tiny_llama, config(keep_base=True))
    train(model, tiny_tokens)
    first = logits(model, tiny_tokens)
    model.add_adapter("second", config(keep_base=True, target_modules=["q_proj"]))
    model.set_adapter("second")
    assert torch.equal(logits(model, tiny_tokens), before)
    train(model, tiny_tokens)
    second = logits(model, tiny_tokens)
    model.set_adapter("default")
    assert torch.equal(logits(model, tiny_tokens), first)
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="Adapters default, second are active at once, and each is a whole weight"):
        logits(model, tiny_tokens)
    with pytest.raises(ValueError, match="Adapters default, second are whole weights, which can't be merged into one"):
        model.merge_adapter()
    model.set_adapter("default")
    model.delete_adapter("default")
    model.set_adapter("second")
    assert torch.equal(logits(model, tiny_tokens), second)


def test_through_trainer_with_resume(tiny_llama, tiny_tokens, tmp_path):
    def make(model):
        args = TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True,
            disable_tqdm=True, seed=1,
        )  # fmt: skip
        data = [{"input_ids": row, "labels": row} for row in tiny_tokens]
        chosen = galore(model, lr=0.02)
        return Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=chosen)

    start = copy.deepcopy(tiny_llama)
    model = get_peft_model(tiny_llama, config(variant="q-galore"))
    make(model).train()
    resumed = get_peft_model(start, config(variant="q-galore"))
    make(resumed).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed, tiny_tokens), logits(model, tiny_tokens))
    assert resumed.base_model.galore_settings["variant"] == "q-galore"


def test_auto_peft_model_generates(tiny_llama_dir, tiny_tokens, tmp_path):
    from transformers import AutoModelForCausalLM

    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama_dir), config())
    train(model, tiny_tokens)
    model.save_pretrained(tmp_path)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    expected = model.generate(input_ids=tiny_tokens[:1], max_new_tokens=4, do_sample=False)
    assert torch.equal(loaded.generate(input_ids=tiny_tokens[:1], max_new_tokens=4, do_sample=False), expected)


def test_bfloat16_stays_bfloat16(tiny_llama, tiny_tokens, tmp_path):
    model = get_peft_model(tiny_llama.bfloat16(), config())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    train(model, tiny_tokens)


def test_modules_to_save_are_trained_by_ordinary_adamw(tiny_llama, tiny_tokens):
    model = get_peft_model(tiny_llama, config(modules_to_save=["lm_head"]))
    optimizer = train(model, tiny_tokens)
    assert [(group["rank"], len(group["params"])) for group in optimizer.param_groups] == [(4, 14), (None, 1)]


def test_bad_input(tiny_llama, tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    from hf_efficiency import RTNConfig

    untouched = copy.deepcopy(tiny_llama)
    with pytest.raises(ValueError, match=r"r=100 is above 64, the rank of .*q_proj"):
        get_peft_model(tiny_llama, config(r=100))
    with pytest.raises(ValueError, match=r"target_modules=.*'q_porj'.* match no layer of the model. Did you mean"):
        get_peft_model(tiny_llama, config(target_modules=["q_porj"]))
    with pytest.raises(ValueError, match="update_proj_gap=0 must be at least 1"):
        config(update_proj_gap=0)
    with pytest.raises(ValueError, match="variant='galor' is unknown"):
        config(variant="galor")
    assert [n for n, _ in tiny_llama.named_modules()] == [n for n, _ in untouched.named_modules()]
    quantized = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=RTNConfig(bits=4, group_size=32)
    )
    with pytest.raises(ValueError, match=r"GaLore trains weights themselves, and .*q_proj is a \w+, quantized: name"):
        get_peft_model(quantized, config())


def test_in_place_has_no_way_back(tiny_llama):
    model = get_peft_model(tiny_llama, config())
    with (
        pytest.raises(ValueError, match=r"trained in place, so there is none to show .*keep_base=True"),
        model.disable_adapter(),
    ):
        pass
    with pytest.raises(ValueError, match=r"has the adapter 'default', is trained in place: several adapters need"):
        model.add_adapter("second", config(keep_base=True))
    assert list(model.peft_config) == ["default"]
    kept = get_peft_model(build_llama(), config(keep_base=True))
    with pytest.raises(ValueError, match=r"has the adapter 'default', would be trained in place"):
        kept.add_adapter("second", config())
    with pytest.raises(ValueError, match=r"r=100 is above 64, the rank of"):
        kept.add_adapter("second", config(r=100, keep_base=True))
    with pytest.raises(ValueError, match="The model's GaLoreConfig says which weights are trained"):
        galore(model, target_modules=["q_proj"])
