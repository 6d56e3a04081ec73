"""Tiny random models of many families, for what must work on any decoder."""

import torch
import transformers

_SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2}
_GEMMA = {**_GROUPED, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}

# Family: its config class and the keys of the config.
FAMILIES = {
    "llama": ("LlamaConfig", _GROUPED),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 256, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.1},
    ),
    "gpt_neox": ("GPTNeoXConfig", _SIZES),
    "opt": ("OPTConfig", {**_SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "init_std": 0.1}),
    "qwen2": ("Qwen2Config", _GROUPED),
    "qwen3": ("Qwen3Config", {**_GROUPED, "head_dim": 16}),
    # Their layers differ in the mask: every other one sees a window of 8 tokens.
    "gemma2": ("Gemma2Config", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma3": ("Gemma3TextConfig", {**_GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi": ("PhiConfig", _SIZES),
    "phi3": ("Phi3Config", _GROUPED),
    "mixtral": ("MixtralConfig", {**_GROUPED, "num_local_experts": 4}),
    # Its linear layers are a subclass that writes the product out.
    "falcon": ("FalconConfig", {**_SIZES, "ffn_hidden_size": 64}),
    # Its ALiBi bias has batch and heads in one axis.
    "bloom": ("BloomConfig", {"vocab_size": 256, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
}


def build_family(family, **overrides):
    """A random model of two layers in float32 and eval mode, its norms and biases away from one and zero."""
    name, settings = FAMILIES[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, name)(**{**settings, **overrides})
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()
