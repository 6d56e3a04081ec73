"""Students cut out of their teachers, averaged teachers, and text that models write."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_efficiency import RTNConfig
from hf_efficiency.distillation import EMATeacher, continue_prompts, decoder_blocks, make_student, write_sequences
from hf_efficiency.distillation.sampling import prompts_of
from hf_efficiency.distillation.student import block_influence, most_influential
from tests.families import FAMILIES, build_family
from tests.tiny import build_llama


@pytest.fixture(scope="module")
def teacher():
    return build_llama(num_hidden_layers=6)


@pytest.mark.parametrize(("keep", "blocks"), [("uniform", [0, 2, 5]), ("last", [3, 4, 5]), ([0, 1, 4], [0, 1, 4])])
def test_keeps_the_blocks_that_were_asked_for(teacher, keep, blocks):
    student = make_student(teacher, 3, keep=keep)
    assert student.config.num_hidden_layers == len(decoder_blocks(student)) == 3
    for ours, index in zip(decoder_blocks(student), blocks, strict=True):
        theirs = decoder_blocks(teacher)[index]
        for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(a, b), name
    assert torch.equal(student.lm_head.weight, teacher.lm_head.weight)
    assert student.training


def test_all_blocks_make_the_teacher_again(teacher, tiny_tokens):
    assert torch.equal(make_student(teacher).eval()(tiny_tokens).logits, teacher(tiny_tokens).logits)


def test_similarity_drops_the_block_that_does_nothing(tiny_tokens):
    teacher = build_llama(num_hidden_layers=4)
    idle = decoder_blocks(teacher)[2]
    for linear in (idle.self_attn.o_proj, idle.mlp.down_proj):
        linear.weight.data.mul_(1e-3)
    influence = block_influence(teacher, tiny_tokens)
    assert int(influence.argmin()) == 2
    assert most_influential(influence, 3) == [0, 1, 3]
    student = make_student(teacher, 3, keep="similarity", calibration=tiny_tokens, num_samples=8, seq_len=32)
    kept = decoder_blocks(student)[2].mlp.up_proj.weight
    assert torch.equal(kept, decoder_blocks(teacher)[3].mlp.up_proj.weight)
    error = (student.eval()(tiny_tokens).logits - teacher(tiny_tokens).logits).abs().max()
    assert error < 0.05


def test_influence_is_one_minus_the_cosine(teacher, tiny_tokens):
    states = teacher(tiny_tokens, output_hidden_states=True).hidden_states
    expected = 1 - torch.nn.functional.cosine_similarity(states[1], states[2], dim=-1).mean()
    assert block_influence(teacher, tiny_tokens)[1].item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_decoder(family):
    """Half as deep; and half as wide: it runs, saves and starts from cut weights."""
    teacher = build_family(family)
    ids = torch.randint(3, 256, (2, 9))
    student = make_student(teacher, 1)
    assert student(ids).logits.shape == (2, 9, 256)
    narrow = make_student(teacher, hidden_size=16)
    assert narrow(ids).logits.shape == (2, 9, 256)
    whole = narrow.config.num_attention_heads == teacher.config.num_attention_heads
    norms = teacher.get_input_embeddings().weight.norm(dim=0)
    columns = norms.topk(16).indices.sort().values if whole else torch.arange(16)
    assert torch.equal(narrow.get_input_embeddings().weight, teacher.get_input_embeddings().weight[:, columns])


def test_lists_in_the_config_follow():
    student = make_student(build_family("gemma2"), 1)
    assert student.config.layer_types == ["full_attention"]


def test_fused_projections_are_cut_part_by_part():
    teacher = build_family("gpt2")
    narrow = make_student(teacher, hidden_size=16)
    fused = teacher.transformer.h[0].attn.c_attn.weight.view(32, 3, 32)
    expected = fused[:16, :, :16].reshape(16, 48)
    assert torch.equal(narrow.transformer.h[0].attn.c_attn.weight, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 7}, "num_layers=7 must be a whole number from 1 to the teacher's 6"),
        ({"num_layers": 0}, "num_layers=0 must be"),
        ({"hidden_size": 65}, "hidden_size=65 must be a whole number from 1 to the teacher's 64"),
        ({"keep": "first"}, "keep='first' is unknown: choose one of uniform, last, similarity"),
        ({"keep": [0, 6]}, r"keep=\[0, 6\] must name blocks from 0 to 5"),
        ({"keep": [0, 1], "num_layers": 3}, "num_layers=3, but keep names 2 blocks"),
        ({"intermediate_size": 161}, "intermediate_size=161 must be"),
    ],
)
def test_sizes_that_can_not_be(teacher, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_student(teacher, **arguments)


def test_heads_keep_their_size():
    with pytest.raises(ValueError, match="hidden_size=20 must be a multiple of the teacher's head size 8"):
        make_student(build_family("gpt2"), hidden_size=20)


def test_quantized_teacher(tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    quantized = AutoModelForCausalLM.from_pretrained(
        tiny_llama_dir, quantization_config=RTNConfig(bits=4, group_size=32)
    )
    with pytest.raises(ValueError, match=r"pass teacher\.dequantize"):
        make_student(quantized, 1)


# The averaged teacher.


def test_ema_follows(tiny_llama):
    ema = EMATeacher(tiny_llama, 0.75)
    before = tiny_llama.lm_head.weight.detach().clone()
    tiny_llama.lm_head.weight.data += 1
    ema.update()
    torch.testing.assert_close(ema.model.lm_head.weight, before + 0.25)
    ema.update()
    torch.testing.assert_close(ema.model.lm_head.weight, before + 0.4375)


def test_ema_shares_what_is_frozen(tiny_llama):
    model = get_peft_model(tiny_llama, LoraConfig(target_modules=["q_proj"]))
    ema = EMATeacher(model, 0.9)
    ours, theirs = dict(model.named_parameters()), dict(ema.model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all((theirs[name] is p) == (not p.requires_grad) for name, p in ours.items())
    assert not any(p.requires_grad for name, p in theirs.items() if "lora" in name)
    assert not ema.model.training


def test_ema_decay_out_of_range(tiny_llama):
    with pytest.raises(ValueError, match=r"ema_decay=1\.0 must be at least 0 and below 1"):
        EMATeacher(tiny_llama, 1.0)


# Writing.


def test_greedy_writing_is_that_of_each_prompt_alone(tiny_llama):
    """Prompts of different lengths in one batch."""
    tiny_llama.generation_config.eos_token_id = None
    prompts = [torch.arange(5, 5 + n) for n in (3, 7, 1)]
    batch = continue_prompts(tiny_llama, prompts, max_new_tokens=6, temperature=0)
    for i, prompt in enumerate(prompts):
        ids = prompt[None]
        for _ in range(6):
            ids = torch.cat([ids, tiny_llama(ids).logits[:, -1:].argmax(-1)], 1)
        row = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert row.tolist() == ids[0].tolist()
        labels = batch["labels"][i]
        assert labels[: len(prompt)].eq(-100).all()
        assert labels[len(prompt) : len(prompt) + 6].tolist() == row[len(prompt) :].tolist()
        assert labels[len(prompt) + 6 :].eq(-100).all()
        assert batch["attention_mask"][i].sum() == len(prompt) + 6


def test_writing_stops_at_the_end_token(tiny_llama):
    ids = continue_prompts(tiny_llama, [torch.tensor([5, 6])], max_new_tokens=4, temperature=0)["input_ids"][0]
    tiny_llama.generation_config.eos_token_id = int(ids[3])
    batch = continue_prompts(tiny_llama, [torch.tensor([5, 6]), torch.tensor([9])], max_new_tokens=4, temperature=0)
    row = batch["input_ids"][0][batch["attention_mask"][0].bool()].tolist()
    assert row == ids[: row.index(int(ids[3]), 2) + 1].tolist()
    assert batch["labels"][0][len(row) - 1] == ids[3]


def test_sampling_follows_its_seed_and_leaves_the_global_generator(tiny_llama):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    runs = [
        continue_prompts(tiny_llama, [torch.tensor([5])], max_new_tokens=12, seed=s)["input_ids"] for s in (1, 1, 2)
    ]
    assert torch.equal(torch.rand(4), expected)
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_prompts_end_where_labels_begin():
    ids = torch.tensor([[0, 5, 6, 7, 8], [5, 6, 7, 8, 9]])
    mask = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    labels = torch.tensor([[-100, -100, -100, 7, 8], [5, 6, 7, 8, 9]])
    assert [p.tolist() for p in prompts_of(ids, mask, labels, 3)] == [[5, 6], [5, 6, 7]]


def test_data_of_the_teacher(tiny_llama):
    tiny_llama.generation_config.eos_token_id = None
    rows = list(write_sequences(tiny_llama, [[5, 6, 7], [8]], max_new_tokens=4, batch_size=1))
    assert [row["input_ids"][:n] for row, n in zip(rows, (3, 1), strict=True)] == [[5, 6, 7], [8]]
    assert [row["labels"][:n] for row, n in zip(rows, (3, 1), strict=True)] == [[-100] * 3, [-100]]
    free = list(write_sequences(tiny_llama, num_sequences=5, max_new_tokens=4, batch_size=2))
    assert len(free) == 5
    assert all(row["input_ids"][0] == 1 and len(row["input_ids"]) == 5 for row in free)  # from the start token


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"num_sequences": 0}, "num_sequences=0 must be at least 1"),
        ({"prompts": [[]]}, "A prompt is empty"),
    ],
)
def test_nothing_to_write(tiny_llama, arguments, message):
    with pytest.raises(ValueError, match=message):
        list(write_sequences(tiny_llama, **arguments))
