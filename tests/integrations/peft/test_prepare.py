"""`prepare_for_training`."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hf_efficiency import merge_adapters, prepare_for_training
from tests import families
from tests.integrations.peft.conftest import logits

NORMS = ("llama", "gpt2", "gpt_neox", "opt", "gemma3", "bloom", "qwen3")


def norms(model):
    return {name: m for name, m in model.named_modules() if "norm" in type(m).__name__.lower()}


@pytest.mark.parametrize("method", ["rtn-group", "awq-4", "nf4-double", "quip-2", "dense"])
def test_prepared_base_trains(method, load_base, base_tokens):
    torch.manual_seed(0)
    model = load_base(method, "bfloat16")
    prepared = prepare_for_training(model)
    assert prepared is model
    assert not any(p.requires_grad for p in model.parameters())
    assert all(p.dtype == torch.float32 for norm in norms(model).values() for p in norm.parameters())
    assert model.is_gradient_checkpointing
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        loss = adapted(input_ids=base_tokens, labels=base_tokens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[2] < losses[0]


@pytest.mark.parametrize("family", NORMS)
def test_norms_of_many_families(family):
    """In float32 inside, in the model's dtype outside; nearer to the float32 model than bfloat16 alone."""
    exact, model = families.build_family(family), families.build_family(family).to(torch.bfloat16)
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(0))
    prepare_for_training(model, gradient_checkpointing=False)
    assert norms(model)
    assert {p.dtype for norm in norms(model).values() for p in norm.parameters()} == {torch.float32}
    out = logits(model, tokens)
    assert out.dtype == torch.bfloat16
    assert (out.float() - logits(exact, tokens)).abs().max() < 0.1 * logits(exact, tokens).abs().max()


def test_gradients_are_those_without_checkpointing(load_base, base_tokens):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = prepare_for_training(load_base("nf4-double"), gradient_checkpointing=checkpointing)
        adapted = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False)).train()
        adapted(input_ids=base_tokens, labels=base_tokens, use_cache=False).loss.backward()
        gradients.append([p.grad for p in adapted.parameters() if p.requires_grad])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_merging_undoes_it(load_base, base_tokens):
    model = prepare_for_training(load_base("nf4-double", "bfloat16"))
    merged = merge_adapters(get_peft_model(model, LoraConfig(r=4)))
    assert {p.dtype for p in merged.parameters()} == {torch.bfloat16}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in norms(merged).values())


def test_twice_is_once(load_base):
    model = prepare_for_training(prepare_for_training(load_base("nf4-double", "bfloat16")))
    assert all(len(m._forward_hooks) == 1 for m in norms(model).values())


def test_bad_input(load_base):
    adapted = get_peft_model(load_base("nf4-double"), LoraConfig(r=4))
    with pytest.raises(ValueError, match="call prepare_for_training before adding them"):
        prepare_for_training(adapted)
    with pytest.raises(TypeError, match="not Linear"):
        prepare_for_training(torch.nn.Linear(2, 2))
