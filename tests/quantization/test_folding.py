"""What feeds what: found by structure in the layouts of many model families, and refused where a scale would show.

Shape legend: b sequences, t tokens, d features.
"""

import pytest
import torch
import transformers
from torch import nn

from hf_efficiency.calibration.capture import trace
from hf_efficiency.calibration.method import BlockContext
from hf_efficiency.calibration.structure import find_blocks, first_tensor, linears_of
from hf_efficiency.quantization.folding import Fold, Trial, find_folds, holds

SIZES = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA = {**SIZES, "intermediate_size": 160}
OPT = {**SIZES, "ffn_dim": 160, "word_embed_proj_dim": 64, "init_std": 0.1}
GPT2 = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "initializer_range": 0.1}

GATED = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "input_layernorm",
    ("self_attn.o_proj",): "self_attn.v_proj",
    ("mlp.gate_proj", "mlp.up_proj"): "post_attention_layernorm",
    ("mlp.down_proj",): "mlp.up_proj",
}
SANDWICH = {**GATED, ("mlp.gate_proj", "mlp.up_proj"): "pre_feedforward_layernorm"}
OPT_POST = {("self_attn.out_proj",): "self_attn.v_proj", ("fc2",): "fc1"}
OPT_PRE = {
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"): "self_attn_layer_norm",
    ("fc1",): "final_layer_norm",
    **OPT_POST,
}
NEOX = {
    ("attention.query_key_value",): "input_layernorm",
    ("attention.dense",): "attention.query_key_value",
    ("mlp.dense_h_to_4h",): "post_attention_layernorm",
}

# Family: the keys of its config, and which tensor's maker is expected for which layers (a GELU lets no scale through).
FAMILIES = {
    "Llama": ({**LLAMA, "num_key_value_heads": 2}, GATED),
    "Qwen2": ({**LLAMA, "num_key_value_heads": 2}, GATED),
    "Qwen3": ({**LLAMA, "num_key_value_heads": 2, "head_dim": 32}, GATED),
    "Gemma2": ({**LLAMA, "num_key_value_heads": 2, "head_dim": 32}, SANDWICH),
    "Gemma3": ({**LLAMA, "num_key_value_heads": 1, "head_dim": 32}, SANDWICH),
    "Phi": (
        LLAMA,
        {
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"): "input_layernorm",
            ("self_attn.dense",): "self_attn.v_proj",
        },
    ),
    "Phi3": (
        {**LLAMA, "num_key_value_heads": 2},
        {
            ("self_attn.qkv_proj",): "input_layernorm",
            ("self_attn.o_proj",): "self_attn.qkv_proj",
            ("mlp.gate_up_proj",): "post_attention_layernorm",
            ("mlp.down_proj",): "mlp.gate_up_proj",
        },
    ),
    # The second norm feeds the router and the fused experts as well, so no scale goes into it.
    "Mixtral": (
        {**LLAMA, "num_key_value_heads": 2, "num_local_experts": 4},
        {readers: maker for readers, maker in GATED.items() if "mlp" not in readers[0]},
    ),
    "GPTNeoX": (LLAMA, NEOX),
    "GPT2": ({**GPT2}, {("attn.c_attn",): "ln_1", ("attn.c_proj",): "attn.c_attn", ("mlp.c_fc",): "ln_2"}),
    # Its ALiBi bias holds batch times heads in one axis, so the batch can't be cut.
    "Bloom": (
        {"vocab_size": 384, "hidden_size": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.1},
        {
            ("self_attention.query_key_value",): "input_layernorm",
            ("self_attention.dense",): "self_attention.query_key_value",
            ("mlp.dense_h_to_4h",): "post_attention_layernorm",
        },
    ),
    "OPT": (OPT, OPT_PRE),
    # Norms behind the residual sum feed the residual stream, too.
    "OPT after": ({**OPT, "do_layer_norm_before": False}, OPT_POST),
}


def build(family, dtype=torch.float32):
    """A tiny random model of a family, its norms away from one."""
    name = family.split()[0]
    config_class = getattr(transformers, f"{name}{'Text' if name == 'Gemma3' else ''}Config")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = config_class(**FAMILIES[family][0])
        model = transformers.AutoModelForCausalLM.from_config(config)
        for module in model.modules():
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
                module.weight.data += 0.3 * torch.randn_like(module.weight)
    return model.eval().to(dtype)


def context(model, tokens, index=0):
    """The context of a block as the engine makes it, with one micro-batch."""
    prefix, blocks = find_blocks(model)
    seen = trace(model, blocks, tokens)
    name = f"{prefix}.{index}"
    return BlockContext(
        name,
        index,
        blocks[index],
        [seen.hidden],
        None,
        linears_of(name, blocks[index]),
        lambda module, x, i: first_tensor(seen.calls[index](module, x)),
    )


def plain_context(block, x):
    """The context of a module that takes hidden states and nothing else."""
    return BlockContext("layers.0", 0, block, [x], None, linears_of("layers.0", block), lambda module, x, i: module(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_finds_what_makes_each_input(family, dtype):
    tokens = torch.randint(3, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    model = build(family, dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = find_folds(context(model, tokens))
    assert {fold.readers: fold.producer for fold in found} == FAMILIES[family][1]
    assert all(torch.equal(p, before[name]) and p.dtype == dtype for name, p in model.named_parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_folding_keeps_the_function(family):
    tokens = torch.randint(3, 256, (2, 24), generator=torch.Generator().manual_seed(1))
    model = build(family)
    expected = model(tokens).logits
    _, blocks = find_blocks(model)
    generator = torch.Generator().manual_seed(2)
    for index in range(len(blocks)):
        for fold in find_folds(context(model, tokens, index)):
            before = blocks[index].get_submodule(fold.readers[0]).weight.clone()
            fold.apply_(blocks[index], torch.exp(torch.randn(fold.channels, generator=generator)))
            assert not torch.allclose(blocks[index].get_submodule(fold.readers[0]).weight, before, rtol=0.1)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)


def test_grouped_query_heads_share_a_channel():
    """4 query heads of 16 on 2 value heads: inputs of head h come from value head h // 2."""
    fold = next(
        f for f in find_folds(context(build("Llama"), torch.arange(3, 51).view(2, 24))) if "o_proj" in f.readers[0]
    )
    assert fold.channels == 32
    assert fold.index.tolist() == [(j // 16) // 2 * 16 + j % 16 for j in range(64)]


def test_fused_projections_show_the_value_part():
    """GPT-2 lays queries, keys and values one after the other; NeoX keeps the three of each head (of 16) together."""
    tokens = torch.arange(3, 27).view(1, 24)
    gpt2 = next(f for f in find_folds(context(build("GPT2"), tokens)) if f.producer == "attn.c_attn")
    assert gpt2.index.tolist() == list(range(128, 192))
    neox = next(f for f in find_folds(context(build("GPTNeoX"), tokens)) if f.producer == "attention.query_key_value")
    assert neox.index.tolist() == [j // 16 * 48 + 32 + j % 16 for j in range(64)]


class _Net(nn.Module):
    """norm -> a -> function -> b, with whatever else reads on the way."""

    def __init__(self, function, router=False):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.b = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.function = function
        self.router = nn.Parameter(torch.randn(16)) if router else None

    def forward(self, x):
        h = self.norm(x)
        y = self.b(self.function(self.a(h)))
        return x + (y if self.router is None else y * torch.sigmoid(h @ self.router).unsqueeze(-1))


@pytest.mark.parametrize(
    ("function", "router", "producers"),
    [
        (nn.Identity(), False, ["norm", "a"]),
        (nn.ReLU(), False, ["norm", "a"]),
        (nn.SiLU(), False, ["norm"]),
        (lambda h: torch.relu(h) ** 2, False, ["norm"]),
        (lambda h: h.flip(-1), False, ["norm", "a"]),
        (lambda h: h + 1, False, ["norm"]),
        (nn.Identity(), True, ["a"]),  # the router reads the norm and would see the scale
    ],
)
def test_only_what_scales_through_is_taken(function, router, producers):
    block = _Net(function, router)
    folds = find_folds(plain_context(block, torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(0))))
    assert [fold.producer for fold in folds] == producers


def test_reversed_channels_are_mapped():
    folds = find_folds(plain_context(_Net(lambda h: h.flip(-1)), torch.randn(1, 8, 16)))
    assert folds[1].index.tolist() == list(range(15, -1, -1))


def test_apply_by_hand():
    """A scale of (2, 4): the reader's columns times 2 and 4, the norm's weight and bias divided by them."""
    block = nn.Sequential(nn.LayerNorm(2), nn.Linear(2, 1))
    block[0].weight.data = torch.tensor([1.0, 2.0])
    block[0].bias.data = torch.tensor([3.0, -4.0])
    block[1].weight.data = torch.tensor([[5.0, 6.0]])
    Fold(("1",), "0", 2, torch.arange(2)).apply_(block, torch.tensor([2.0, 4.0]))
    assert block[0].weight.tolist() == [0.5, 0.5]
    assert block[0].bias.tolist() == [1.5, -1.0]
    assert block[1].weight.tolist() == [[10.0, 24.0]]


def test_norm_of_one_plus_weight_by_hand():
    """1 + 0.5 divided by 3 is 0.5, which such a norm stores as -0.5."""
    block = nn.Sequential(nn.LayerNorm(1, bias=False), nn.Linear(1, 1))
    block[0].weight.data = torch.tensor([0.5])
    Fold(("1",), "0", 1, torch.arange(1), offset=1).apply_(block, torch.tensor([3.0]))
    assert block[0].weight.tolist() == [-0.5]


def test_known_folds_are_checked_again():
    """A block of the same form with other weights reuses what was found; one where it does not hold is searched."""
    x = torch.randn(1, 8, 16)
    known = {}
    first = find_folds(plain_context(_Net(nn.Identity()), x), known)
    same = _Net(nn.Identity())
    assert find_folds(plain_context(same, x), known) is first
    same.register_forward_hook(lambda module, args, out: out + module.norm(args[0]))  # a second reader of the norm
    assert [fold.producer for fold in find_folds(plain_context(same, x), known)] == ["a"]


def test_nothing_holds_for_nan():
    block = _Net(nn.Identity())
    block.a.weight.data[0, 0] = torch.nan
    ctx = plain_context(block, torch.randn(1, 8, 16))
    assert not holds(Trial(ctx), [Fold(("b",), "a", 16, torch.arange(16))])
    assert find_folds(ctx) == []
