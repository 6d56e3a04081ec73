"""`DistillTrainer`: its loss, its teachers, and that it is a `Trainer` in all else."""

import copy
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainerCallback, TrainingArguments

from hf_efficiency import DistillConfig, DistillTrainer, GPTQConfig, NF4Config, RTNConfig, cache_teacher, make_student
from hf_efficiency.integrations.transformers.distillation_state import STATE_FILE
from tests import tiny
from tests.fake_hub import FakeHub

ROOT = Path(__file__).parents[3]
ROWS = [
    {"input_ids": row[: 16 - i % 5].tolist()}
    for i, row in enumerate(torch.randint(3, 256, (16, 16), generator=torch.Generator().manual_seed(7)))
]


@pytest.fixture(scope="module")
def teacher():
    return tiny.build_llama(num_hidden_layers=4, attn_implementation="eager")


@pytest.fixture
def student(teacher):
    return make_student(teacher, 2)


def config(folder, **fields):
    given = {
        "max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3, "use_cpu": True,
        "report_to": [], "disable_tqdm": True, "save_strategy": "no", "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant",
    }  # fmt: skip
    return DistillConfig(output_dir=str(folder), **{**given, **fields})


def trained(student, teacher, folder, rows=ROWS, **fields):
    trainer = DistillTrainer(student, teacher, config(folder, **fields), train_dataset=rows)
    trainer.train()
    return trainer


def batch_of(rows, labels=None):
    width = max(len(r["input_ids"]) for r in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row["input_ids"])], mask[i, : len(row["input_ids"])] = torch.tensor(row["input_ids"]), 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def definition(student, teacher, batch, alpha=1.0, temperature=1.0):
    """Hinton's objective, mean over tokens with a label, from whole logits."""
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    valid = batch["labels"][:, 1:] != -100
    q, p = (model(**inputs).logits[:, :-1][valid] for model in (student, teacher))
    t = temperature
    soft = F.kl_div((q / t).log_softmax(-1), (p / t).log_softmax(-1), reduction="batchmean", log_target=True) * t**2
    return alpha * soft + (1 - alpha) * F.cross_entropy(q, batch["labels"][:, 1:][valid])


# The loss.


@pytest.mark.parametrize("chunked", [True, False])
@pytest.mark.parametrize("fields", [{}, {"alpha": 0.25, "temperature": 3.0}, {"alpha": 0.0}])
def test_loss_and_gradients(student, teacher, tmp_path, fields, chunked):
    trainer = DistillTrainer(student, teacher, config(tmp_path, chunked=chunked, **fields), train_dataset=ROWS)
    batch = batch_of(ROWS[:5])
    expected = definition(student, teacher, batch, **fields)
    slopes = torch.autograd.grad(expected, list(student.parameters()))
    loss = trainer.compute_loss(student, batch)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(torch.autograd.grad(loss, list(student.parameters())), slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)


def test_gkd_without_samples_is_the_forward_kl(student, teacher, tmp_path):
    """GKD at lmbda = 0, beta = 0, temperature = 1."""
    losses = []
    for fields in ({"divergence": "jsd", "lmbda": 0.0, "beta": 0.0, "temperature": 1.0}, {"divergence": "forward_kl"}):
        trainer = DistillTrainer(student, teacher, config(tmp_path, **fields), train_dataset=ROWS)
        losses.append(trainer.compute_loss(student, batch_of(ROWS[:5])))
    assert torch.equal(*losses)
    torch.testing.assert_close(losses[0], definition(student, teacher, batch_of(ROWS[:5])))


def test_accumulation_is_one_large_batch(student, teacher, tmp_path):
    """Rows differ in length, so that a mean of means would differ."""
    weights = []
    for batch, steps in ((8, 1), (2, 4)):
        fields = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": steps, "hidden_weight": 0.5}
        trainer = trained(copy.deepcopy(student), teacher, tmp_path, optim="sgd", learning_rate=0.1, **fields)
        weights.append([*trainer.model.parameters(), *trainer.features.parameters()])
        assert trainer.state.log_history[0]["loss"] > 0
    for one, other in zip(*weights, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    start = list(student.parameters())
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(start, weights[0], strict=False))


def test_reported_loss_is_the_mean_over_tokens(student, teacher, tmp_path):
    before = definition(student, teacher, batch_of(ROWS)).item()
    fields = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "max_steps": 1}
    log = trained(student, teacher, tmp_path, **fields).state.log_history[0]
    assert log["loss"] == pytest.approx(before, rel=1e-4)
    assert log["teacher_kl"] == pytest.approx(before, rel=1e-4)


@pytest.mark.parametrize("lmbda", [1.0, 0.0])
def test_written_text_counts_its_own_tokens(student, teacher, tmp_path, lmbda):
    """The texts have fewer tokens than the data; normalised by the data's count the loss would be too small."""
    fields = {"lmbda": lmbda, "seq_kd": True, "max_new_tokens": 3, "prompt_length": 5, "gradient_accumulation_steps": 2}
    trainer = DistillTrainer(student, teacher, config(tmp_path, **fields), train_dataset=ROWS)
    data = [batch_of(ROWS[:4]), batch_of(ROWS[4:8])]
    batches, count = trainer.get_batch_samples(iter(data), 2, torch.device("cpu"))
    assert count == sum(int((b["labels"] != -100).sum()) for b in batches) <= 24
    for written, given in zip(batches, data, strict=True):
        assert torch.equal(written["input_ids"][:, :5], given["input_ids"][:, :5])
    total = sum(trainer.compute_loss(student, dict(b), num_items_in_batch=count) for b in batches)
    sums = [definition(student, teacher, b) * (b["labels"] != -100).sum() for b in batches]
    torch.testing.assert_close(total, sum(sums) / count, rtol=1e-4, atol=1e-6)


def test_who_writes(student, teacher, tmp_path):
    """Greedy text is that of the student on-policy, and of the teacher in sequence-level distillation."""
    for lmbda, writer in ((1.0, student), (0.0, teacher)):
        writer.generation_config.eos_token_id = None
        fields = {"lmbda": lmbda, "seq_kd": True, "max_new_tokens": 2, "sampling_temperature": 0.0, "prompt_length": 4}
        trainer = DistillTrainer(student, teacher, config(tmp_path, **fields), train_dataset=ROWS)
        (batch,), _ = trainer.get_batch_samples(iter([batch_of(ROWS[:3])]), 1, torch.device("cpu"))
        prompt = batch_of(ROWS[:3])["input_ids"][:, :4]
        assert torch.equal(batch["input_ids"][:, 4], writer.eval()(prompt).logits[:, -1].argmax(-1))


def test_share_of_on_policy_batches(student, teacher, tmp_path, monkeypatch):
    from hf_efficiency.integrations.transformers import distillation

    trainer = DistillTrainer(student, teacher, config(tmp_path, lmbda=0.3), train_dataset=ROWS)
    monkeypatch.setattr(distillation, "continue_prompts", lambda *args, **kwargs: {"written": True})
    batches = []
    for trainer.state.global_step in range(300):
        batches += [trainer._rewritten(batch_of(ROWS[:1]), micro) for micro in range(2)]
    assert sum("written" in b for b in batches) / 600 == pytest.approx(0.3, abs=0.06)


def test_prompts_have_no_loss(student, teacher, tmp_path):
    rows = [{"input_ids": r["input_ids"], "labels": [-100] * 6 + r["input_ids"][6:]} for r in ROWS[:4]]
    trainer = DistillTrainer(student, teacher, config(tmp_path), train_dataset=rows)
    batch = batch_of(ROWS[:4])
    batch["labels"][:, :6] = -100
    torch.testing.assert_close(
        trainer.compute_loss(student, trainer.data_collator(rows)),
        definition(student, teacher, batch),
        rtol=1e-5,
        atol=0,
    )


def test_hidden_states_and_attention(student, teacher, tmp_path):
    fields = {"hidden_weight": 0.5, "attention_weight": 2.0, "hidden_loss": "mse", "attention_map": [(0, 1), (1, 3)]}
    trainer = DistillTrainer(student, teacher, config(tmp_path, **fields), train_dataset=ROWS)
    trainer.create_optimizer()
    batch = batch_of(ROWS[:5])
    inputs = {k: batch[k] for k in ("input_ids", "attention_mask")}
    valid = batch["labels"][:, 1:] != -100
    ours, theirs = (m(**inputs, output_hidden_states=True, output_attentions=True) for m in (student, teacher))
    blocks = {}
    handles = [
        model.model.layers[i].register_forward_hook(lambda m, a, out, key=(name, i): blocks.__setitem__(key, out))
        for name, model, at in (("s", student, (0, 1)), ("t", teacher, (1, 3)))
        for i in at
    ]
    student(**inputs), teacher(**inputs)
    for handle in handles:
        handle.remove()
    mse = sum(F.mse_loss(blocks["s", s][:, :-1][valid], blocks["t", t][:, :-1][valid]) for s, t in ((0, 1), (1, 3))) / 2
    rows = [
        (a.transpose(1, 2)[:, :-1][valid], b.transpose(1, 2)[:, :-1][valid])
        for a, b in ((ours.attentions[0], theirs.attentions[1]), (ours.attentions[1], theirs.attentions[3]))
    ]
    kl = sum(torch.where(p > 0, p * (p / q).log(), 0).sum(-1).mean() for q, p in rows) / 2
    expected = definition(student, teacher, batch) + 0.5 * mse + 2 * kl
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected, rtol=1e-4, atol=1e-5)


def test_projections_learn_and_are_logged(teacher, tmp_path):
    student = make_student(teacher, 2, hidden_size=32)
    trainer = trained(student, teacher, tmp_path, hidden_weight=1.0, layer_map="last-1", projection_learning_rate=0.01)
    assert trainer.features.layer_map == ((1, 3),)
    assert trainer.optimizer.param_groups[-1]["lr"] == 0.01
    fresh = type(trainer.features)(((1, 3),), 32, 64, seed=trainer.args.seed)
    assert not torch.equal(trainer.features.projections[0].weight, fresh.projections[0].weight)
    assert trainer.state.log_history[0]["alignment_error_1_3"] > 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.features.parameters())


# Teachers and students.


def test_layers_by_similarity(teacher, tmp_path):
    """Blocks of the teacher itself find themselves, for their states are the same as long as all before them are."""
    student = make_student(teacher, keep=[0, 1])
    trainer = trained(student, teacher, tmp_path, hidden_weight=0.1, layer_map="similarity")
    assert trainer.features.layer_map[:2] == ((0, 0), (1, 1))


def test_padded_embeddings(student, teacher, tiny_tokenizer, tmp_path):
    padded = copy.deepcopy(teacher)
    padded.resize_token_embeddings(448)
    padded.lm_head.weight.data[384:] += 5  # what padding holds must not matter
    trainer = DistillTrainer(student, padded, config(tmp_path), train_dataset=ROWS, processing_class=tiny_tokenizer)
    batch = batch_of(ROWS[:4])
    torch.testing.assert_close(trainer.compute_loss(student, batch), definition(student, teacher, batch))


def test_cached_teacher(student, teacher, tmp_path):
    """With nearly the whole vocabulary kept it is the teacher; no teacher is in memory, and batches are shuffled."""
    cache = cache_teacher(teacher, [row["input_ids"] for row in ROWS], tmp_path / "cache", top_k=383)
    logs = []
    for who, rows in ((teacher, ROWS), (cache, cache.dataset())):
        trainer = trained(copy.deepcopy(student), who, tmp_path, rows, max_steps=3, alpha=0.7)
        logs.append([entry["loss"] for entry in trainer.state.log_history[:3]])
    assert logs[1] == pytest.approx(logs[0], rel=1e-3)
    assert not hasattr(trainer.teacher, "model")


def test_average_of_the_student_teaches(student, tmp_path):
    start = copy.deepcopy(student)
    trainer = trained(student, None, tmp_path, ema_decay=0.5, max_steps=1, alpha=0.5)
    torch.testing.assert_close(
        trainer.teacher.model.lm_head.weight, (start.lm_head.weight + student.lm_head.weight) / 2
    )
    assert trainer.state.log_history[0]["teacher_kl"] == pytest.approx(0, abs=1e-5)


def test_teachers_one_after_the_other(student, teacher, tmp_path):
    teacher.save_pretrained(tmp_path / "big")
    small = tiny.build_llama(seed=3)
    seen = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(trainer.teacher.model.config.num_hidden_layers)

    args = config(tmp_path, max_steps=4, teacher_starts=[0.0, 0.75])
    trainer = DistillTrainer(
        student, [small, str(tmp_path / "big")], args, train_dataset=ROWS, callbacks=[Watch()],
        teacher_processing_class=None, processing_class=None,
    )  # fmt: skip
    trainer.teachers.tokenizer = lambda: None
    trainer.train()
    assert seen == [2, 2, 2, 4]


@pytest.mark.parametrize("quantization", [RTNConfig(bits=4, group_size=32), NF4Config()], ids=["rtn", "nf4"])
def test_quantized_teacher_and_student_with_adapters(tiny_llama_dir, tmp_path, quantization):
    quantized = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=quantization)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir, quantization_config=copy.deepcopy(quantization))
    model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    trainer = trained(model, quantized, tmp_path, hidden_weight=0.1, max_steps=8, learning_rate=3e-3)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]
    assert trainer.features.layer_map == ((0, 0), (1, 1))


def test_student_with_virtual_tokens(student, teacher, tmp_path):
    """Prompt tuning puts tokens before the text, which have no labels; the head is still taken out."""
    model = get_peft_model(student, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    trainer = DistillTrainer(model, teacher, config(tmp_path), train_dataset=ROWS)
    batch = batch_of(ROWS[:4])
    valid, inputs = batch["labels"][:, 1:] != -100, {k: batch[k] for k in ("input_ids", "attention_mask")}
    q, p = (
        model(**inputs).logits[:, 3:-1][valid].log_softmax(-1),
        teacher(**inputs).logits[:, :-1][valid].log_softmax(-1),
    )
    expected = F.kl_div(q, p, reduction="batchmean", log_target=True)
    torch.testing.assert_close(trainer.compute_loss(model, batch), expected, rtol=1e-4, atol=1e-6)
    assert trainer._plain_student


def test_student_that_is_aware_of_its_quantization(student, teacher, tmp_path):
    """Weights rounded in the forward pass, with straight-through gradients, head included."""

    class Rounded(torch.nn.Module):
        def forward(self, weight):
            step = weight.detach().abs().amax(-1, keepdim=True) / 7
            return weight + ((weight / step).round() * step - weight).detach()

    for module in list(student.modules()):
        if isinstance(module, torch.nn.Linear):
            torch.nn.utils.parametrize.register_parametrization(module, "weight", Rounded())
    trainer = DistillTrainer(student, teacher, config(tmp_path), train_dataset=ROWS)
    batch = batch_of(ROWS[:4])
    torch.testing.assert_close(trainer.compute_loss(student, batch), definition(student, teacher, batch))
    before = student.lm_head.parametrizations.weight.original.detach().clone()
    trainer.train()
    assert not torch.equal(student.lm_head.parametrizations.weight.original, before)


def test_offloaded_teacher(student, teacher, tmp_path):
    from accelerate import cpu_offload

    batch = batch_of(ROWS[:4])
    expected = definition(student, teacher, batch)
    offloaded = cpu_offload(copy.deepcopy(teacher), execution_device=torch.device("cpu"))
    offloaded.hf_device_map = {"": "cpu"}
    assert offloaded.lm_head.weight.is_meta
    trainer = DistillTrainer(student, offloaded, config(tmp_path), train_dataset=ROWS)
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(student, teacher, tmp_path, reentrant):
    fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain = trained(copy.deepcopy(student), teacher, tmp_path, hidden_weight=0.5)
    saving = trained(student, teacher, tmp_path, hidden_weight=0.5, **fields)
    for one, other in zip(plain.model.parameters(), saving.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# A Trainer in all else.


def test_evaluate_and_predict(student, teacher, tmp_path):
    def accuracy(prediction):
        shifted, labels = prediction.predictions[:, :-1].argmax(-1), prediction.label_ids[:, 1:]
        return {"accuracy": (shifted == labels)[labels != -100].mean()}

    trainer = DistillTrainer(
        student, teacher, config(tmp_path, per_device_eval_batch_size=16), train_dataset=ROWS, eval_dataset=ROWS,
        compute_metrics=accuracy,
    )  # fmt: skip
    metrics, expected = trainer.evaluate(), definition(student.eval(), teacher, batch_of(ROWS)).item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-4)
    assert metrics["eval_teacher_kl"] == pytest.approx(expected, rel=1e-4)
    nll = definition(student, teacher, batch_of(ROWS), alpha=0.0).item()
    assert metrics["eval_student_perplexity"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert 0 <= metrics["eval_top1_agreement"] <= 1
    assert 0 < metrics["eval_expected_acceptance"] <= 1
    output = trainer.predict(ROWS[:3], metric_key_prefix="test")
    batch = batch_of(ROWS[:3])
    logits = student(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(torch.from_numpy(output.predictions), logits.detach(), rtol=1e-4, atol=1e-5)
    assert output.metrics["test_accuracy"] == pytest.approx(accuracy(output)["accuracy"])
    assert "test_teacher_kl" in output.metrics


@pytest.mark.parametrize(
    "fields",
    [
        {"hidden_weight": 0.5, "layer_map": "similarity"},
        {"lmbda": 0.5, "max_new_tokens": 4, "prompt_length": 4},
        {"ema_decay": 0.5, "alpha": 0.5},
    ],
    ids=["projections", "on-policy", "average"],
)
def test_resumes_to_the_bit(teacher, tmp_path, fields):
    teacher = None if "ema_decay" in fields else teacher
    student = tiny.build_llama(seed=5, attention_dropout=0.1, hidden_size=32, attn_implementation="eager").train()
    fields = {**fields, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    fields["per_device_train_batch_size"] = 2
    whole = trained(copy.deepcopy(student), teacher, tmp_path / "whole", **fields)
    assert (tmp_path / "whole/checkpoint-2" / STATE_FILE).exists() == ("lmbda" not in fields)
    rest = DistillTrainer(copy.deepcopy(student), teacher, config(tmp_path / "rest", **fields), train_dataset=ROWS)
    rest.train(resume_from_checkpoint=str(tmp_path / "whole/checkpoint-2"))
    parts = [[*t.model.parameters(), *(t.features.parameters() if t.features else [])] for t in (whole, rest)]
    for part, trainer in zip(parts, (whole, rest), strict=True):
        part += trainer.teachers.ema.state_dict().values() if trainer.teachers.ema else []
    assert all(torch.equal(one, other) for one, other in zip(*parts, strict=True))
    assert [e["loss"] for e in rest.state.log_history if "loss" in e] == [
        e["loss"] for e in whole.state.log_history if "loss" in e
    ]


def test_resuming_with_another_map_is_refused(student, teacher, tmp_path):
    fields = {"hidden_weight": 0.5, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    trained(student, teacher, tmp_path, **fields)
    again = DistillTrainer(
        student, teacher, config(tmp_path, **{**fields, "max_steps": 2, "layer_map": "last"}), train_dataset=ROWS
    )
    with pytest.raises(
        ValueError, match=r"matches the blocks \(\(0, 1\), \(1, 3\)\), the config \(\(0, 2\), \(1, 3\)\)"
    ):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_saved_student_is_an_ordinary_checkpoint(student, teacher, tmp_path):
    trainer = trained(student, teacher, tmp_path, hidden_weight=0.5)
    trainer.save_model(tmp_path / "student")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys"))
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(loaded(ids).logits, student.eval()(ids).logits)


TWO_PROCESSES = """
    import json, sys, torch
    from hf_efficiency import DistillTrainer, make_student
    from tests import tiny
    from tests.integrations.transformers.test_distillation import ROWS, config

    teacher = tiny.build_llama(num_hidden_layers=4, attn_implementation="eager")
    args = config(
        sys.argv[1], per_device_train_batch_size=int(sys.argv[2]), gradient_accumulation_steps=2, optim="sgd",
        learning_rate=0.1, hidden_weight=0.5, per_device_eval_batch_size=8, layer_map="similarity",
    )
    trainer = DistillTrainer(make_student(teacher, 2), teacher, args, train_dataset=ROWS, eval_dataset=ROWS)
    trainer.train()
    metrics = trainer.evaluate()
    if trainer.is_world_process_zero():
        from safetensors.torch import save_file
        tensors = {**trainer.model.state_dict(), **{"f." + k: v for k, v in trainer.features.state_dict().items()}}
        save_file({k: v.contiguous() for k, v in tensors.items()}, sys.argv[1] + "/end.safetensors")
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        json.dump({"logs": logs, "metrics": metrics}, open(sys.argv[1] + "/logs.json", "w"))
"""


@pytest.mark.slow
def test_two_processes_match_one(tmp_path):
    from safetensors.torch import load_file

    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(TWO_PROCESSES))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    results = []
    for processes, batch in ((1, 4), (2, 2)):
        folder = tmp_path / str(processes)
        folder.mkdir()
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"] if processes == 2 else []
        done = subprocess.run(
            [sys.executable, *launch, str(script), str(folder), str(batch)], cwd=ROOT, env=environment,
            capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        results.append((load_file(folder / "end.safetensors"), json.loads((folder / "logs.json").read_text())))
    (one, logs_one), (two, logs_two) = results
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
    for a, b in zip(logs_one["logs"], logs_two["logs"], strict=True):
        assert a.keys() == b.keys() >= {"loss", "teacher_kl", "student_perplexity", "top1_agreement"}
        for key in a:
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-6), key
    for key in ("eval_loss", "eval_teacher_kl", "eval_expected_acceptance"):
        assert logs_two["metrics"][key] == pytest.approx(logs_one["metrics"][key], rel=1e-3), key


# Bad input, found before training starts.


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"divergence": "kl"}, "divergence='kl' is unknown"),
        ({"lmbda": 1.5}, "lmbda=1.5 must be from 0"),
        ({"hidden_weight": -1.0}, "hidden_weight=-1.0 must be at least 0"),
        ({"hidden_loss": "l1"}, "hidden_loss='l1' is unknown"),
        ({"attention_loss": "l1"}, "attention_loss='l1' is unknown"),
        ({"ema_decay": 1.0}, "ema_decay=1.0 must be at least 0 and below 1"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"chunk_rows": 0}, "chunk_rows=0 must be at least 1"),
        ({"teacher_starts": [0.5]}, r"teacher_starts=\[0.5\] must begin with 0"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor has no part in distillation"),
    ],
)
def test_settings_out_of_range(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_trainer_refuses(student, teacher, tiny_tokenizer, texts, tmp_path):
    cache = cache_teacher(
        teacher, [row["input_ids"] for row in ROWS], tmp_path / "c", top_k=4, tokenizer=tiny_tokenizer
    )
    other, wide = tiny.build_tokenizer(texts[:5], 300), tiny.build_llama(vocab_size=500)
    flash = tiny.build_llama()
    cases = [
        ((teacher, {}), {"args": TrainingArguments(str(tmp_path), report_to=[])}, TypeError, "takes a DistillConfig"),
        ((None, {}), {}, ValueError, "There is no teacher: pass teacher_model="),
        ((teacher, {"ema_decay": 0.9}), {}, ValueError, "Both teacher_model and ema_decay are given"),
        ((3, {}), {}, TypeError, "A teacher is a int; give a model"),
        (([], {}), {}, ValueError, "The chain of teachers is empty"),
        ((student, {}), {}, ValueError, "shares trained weights with the student: pass a copy"),
        (([teacher] * 2, {"teacher_starts": [0.0]}), {}, ValueError, "teacher_starts has 1 entries for 2 teachers"),
        (([teacher] * 2, {"hidden_weight": 1.0}), {}, ValueError, "match the blocks of one teacher"),
        ((teacher, {}), {"train_dataset": []}, ValueError, "train_dataset is empty"),
        ((wide, {}), {}, ValueError, "has 384 logits a token and the teacher 500.*GOLD"),
        ((teacher, {}), {"processing_class": tiny_tokenizer, "teacher_processing_class": other}, ValueError, "GOLD"),
        ((teacher, {"layer_map": [(0, 4)], "hidden_weight": 1.0}), {}, ValueError, "the teacher 0 to 3"),
        ((flash, {"attention_weight": 1.0}), {}, ValueError, "attn_implementation='eager'.*'sdpa'"),
        ((cache, {"lmbda": 0.5}), {}, ValueError, "a cache can't judge or write new text"),
        ((cache, {"hidden_weight": 0.5}), {}, ValueError, "holds neither hidden states nor attention maps"),
        ((cache, {"temperature": 2.0}), {}, ValueError, "made at temperature 1.0, training asks for 2.0"),
        ((cache, {}), {"processing_class": other}, ValueError, "was made with another tokenizer"),
        (
            (cache, {}),
            {"train_dataset": [{"input_ids": [9, 9]}]},
            ValueError,
            "train_dataset .* not in the teacher cache",
        ),
        (
            (cache, {}),
            {"eval_dataset": [{"input_ids": [9, 9]}]},
            ValueError,
            "eval_dataset .* not in the teacher cache",
        ),
        ((teacher, {}), {"compute_loss_func": print}, ValueError, "compute_loss_func has no part here"),
    ]
    for (who, fields), more, error, message in cases:
        given = {"args": config(tmp_path, **fields), "train_dataset": ROWS, **more}
        with pytest.raises(error, match=message):
            DistillTrainer(student, who, **given)


def test_batches_without_tokens(student, teacher, tmp_path):
    trainer = DistillTrainer(
        student, teacher, config(tmp_path, remove_unused_columns=False), train_dataset=[{"text": "a"}] * 4
    )
    with pytest.raises(ValueError, match="hold text, but no input_ids: tokenize the text first"):
        trainer.train()


def test_a_model_without_a_head(student, teacher, tmp_path):
    with pytest.raises(ValueError, match="has no output embeddings"):
        DistillTrainer(student, teacher.model, config(tmp_path), train_dataset=ROWS)


def test_gptq_teacher_by_name(student, tiny_llama_dir, tmp_path, our_loaders):
    """A teacher given by its folder is loaded, and its tokenizer compared."""
    data = {"calibration": torch.randint(3, 256, (4, 16)), "num_samples": 4, "seq_len": 16, "progress": False}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=GPTQConfig(bits=4, group_size=32, **data)
    )
    model.save_pretrained(tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "teacher" / name).write_bytes((tiny_llama_dir / name).read_bytes())
    trainer = trained(student, str(tmp_path / "teacher"), tmp_path)
    assert trainer.state.log_history[0]["teacher_kl"] > 0


def test_arguments_from_a_command_line(tmp_path):
    words = ["--output_dir", str(tmp_path), "--divergence", '{"forward_kl": 0.5, "jsd": 2}', "--alpha", "0.5"]
    (args,) = HfArgumentParser(DistillConfig).parse_args_into_dataclasses(
        [*words, "--layer_map", '{"0": 1}', "--seq_kd"]
    )
    assert args.objective().parts == (("forward_kl", 0.5), ("jsd", 2.0))
    assert (args.alpha, args.layer_map, args.seq_kd, args.monitor) == (0.5, {0: 1}, True, True)
    assert json.loads(args.to_json_string())["divergence"] == {"forward_kl": 0.5, "jsd": 2}


PUSH = """
    import sys
    from hf_efficiency import DistillTrainer, make_student
    from tests import tiny
    from tests.integrations.transformers.test_distillation import ROWS, config

    teacher = tiny.build_llama(num_hidden_layers=4)
    args = config(sys.argv[1], push_to_hub=True, hub_model_id="tester/student", hidden_weight=0.5)
    trainer = DistillTrainer(make_student(teacher, 2), teacher, args, train_dataset=ROWS)
    trainer.train()
    trainer.push_to_hub()
"""


@pytest.mark.slow
def test_push_to_hub(tmp_path):
    with FakeHub() as hub:
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(PUSH), str(tmp_path / "out")], cwd=ROOT,
            env={**os.environ, **hub.environment(tmp_path / "home")}, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert {"README.md", "config.json", "model.safetensors"} <= hub.repos["tester/student"].files.keys()
