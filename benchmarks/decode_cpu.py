"""Decode speed on the CPU in bfloat16: 4-bit weights against the dense model, side by side in one run.

    python benchmarks/decode_cpu.py                     # SmolLM2-135M and a random model of 1B shape
    python benchmarks/decode_cpu.py --shapes smollm2 --json benchmarks/results/decode_cpu.json

Each variant generates greedily from the same prompt; the time of a token is the difference between a long and a short
generation, so that the prompt's time drops out. The variants take turns and the median counts. llama.cpp decodes the
wheel's own GGUF file where `llama_cpp` is installed (`pip install llama-cpp-python`).

A token reads every weight once, so bytes bound what packing can win: b bits a weight in the blocks, and 16 bits in the
output head, which stays dense. The last column is that bound, the dense model's bytes over the packed model's.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LlamaForCausalLM, StaticCache

from hf_efficiency import RTNConfig
from hf_efficiency.demo import demo_gguf_path, demo_model_path

PROMPT = 16
SHORT = 4
# Rows of the output head: of Llama 2 (and most models of this size), and of Llama 3.
VOCABULARIES = {"1b": 32000, "1b-llama3": 128256}

Timer = Callable[[int], float]


def one_billion(vocab_size: int) -> LlamaForCausalLM:
    """A random Llama with the blocks of Llama-3.2-1B, in bfloat16."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(torch.float32)


def generation_timer(model: torch.nn.Module, **kwargs: object) -> Timer:
    """Seconds that `model.generate` takes for n new tokens."""
    prompt = torch.arange(100, 100 + PROMPT).unsqueeze(0)

    def timer(tokens: int) -> float:
        start = time.perf_counter()
        model.generate(prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **kwargs)
        return time.perf_counter() - start

    return timer


def compiled_timer(model: torch.nn.Module, tokens: int) -> Timer:
    """The same with a static cache, where `generate` compiles the step of one token (and not the prompt)."""
    # One cache for all lengths: another length would be another graph.
    cache = StaticCache(config=model.config, max_cache_len=PROMPT + SHORT + tokens)
    settings = CompileConfig(fullgraph=True, dynamic=False)
    settings._compile_all_devices = True  # transformers' own switch for the CPU
    timer = generation_timer(model, past_key_values=cache, compile_config=settings)

    def reset_and_time(count: int) -> float:
        cache.reset()
        return timer(count)

    return reset_and_time


def llama_cpp_timer(path: Path) -> Timer:
    """The same for llama.cpp on a GGUF file."""
    from llama_cpp import Llama

    model = Llama(str(path), n_ctx=512, n_threads=torch.get_num_threads(), verbose=False)

    def timer(tokens: int) -> float:
        model.reset()
        model.eval(list(range(100, 100 + PROMPT)))
        start = time.perf_counter()
        for _ in range(tokens):
            model.eval([model.sample(temp=0.0)])
        return time.perf_counter() - start

    return timer


def measure(variants: dict[str, Timer], tokens: int, repeats: int) -> dict[str, float]:
    """Median tokens per second of each variant, taken in turn."""
    speeds: dict[str, list[float]] = {name: [] for name in variants}
    for name, timer in variants.items():
        start = time.perf_counter()
        timer(SHORT)
        print(f"{name}: ready after {time.perf_counter() - start:.0f} s", flush=True)
    for _ in range(repeats):
        for name, timer in variants.items():
            short, long = timer(SHORT), timer(SHORT + tokens)
            speeds[name].append(tokens / (long - short))
    return {name: statistics.median(values) for name, values in speeds.items()}


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of the weights that a token reads: the blocks and the output head, not the embedding's other rows."""
    tensors = [*model.model.layers.parameters(), *model.model.layers.buffers(), model.lm_head.weight]
    return sum(t.numel() * t.element_size() for t in tensors)


def variants_of(path: str, *, compiled: bool, tokens: int) -> tuple[dict[str, Timer], float]:
    """Dense, 4-bit, and 4-bit with a static cache and `torch.compile`; the bytes' ratio."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    config = RTNConfig(bits=4, group_size=64)
    quantized = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    variants = {"dense": generation_timer(dense), "4-bit": generation_timer(quantized)}
    if compiled:
        variants["dense, static cache, torch.compile"] = compiled_timer(dense, tokens)
        variants["4-bit, static cache, torch.compile"] = compiled_timer(quantized, tokens)
    return variants, weight_bytes(dense) / weight_bytes(quantized)


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("smollm2", *VOCABULARIES), default=("smollm2", "1b"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    bounds: dict[str, float] = {}
    for shape in args.shapes:
        results[shape], bounds[shape] = run_shape(shape, args)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for shape, speeds in results.items():
        for name, speed in speeds.items():
            ratio = speed / speeds["dense"]
            print(f"{shape:10} {name:36} {speed:7.1f} tokens/s  {ratio:5.2f}x  (bytes {bounds[shape]:.2f}x)")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        report = {"torch": torch.__version__, "tokens_per_second": results, "bytes_ratio": bounds}
        args.json.write_text(json.dumps(report, indent=2) + "\n")


def run_shape(shape: str, args: argparse.Namespace) -> tuple[dict[str, float], float]:
    """Speeds of all variants of one model, and the bound by bytes."""
    compiled = not args.no_compile
    if shape == "smollm2":
        variants, bound = variants_of(demo_model_path(), compiled=compiled, tokens=args.tokens)
        try:
            variants["llama.cpp, Q4_1"] = llama_cpp_timer(demo_gguf_path())
        except ImportError:
            print("llama_cpp is not installed: its figure is left out.")
        return measure(variants, args.tokens, args.repeats), bound
    with TemporaryDirectory() as folder:
        one_billion(VOCABULARIES[shape]).save_pretrained(folder)
        variants, bound = variants_of(folder, compiled=compiled, tokens=args.tokens)
        return measure(variants, args.tokens, args.repeats), bound


if __name__ == "__main__":
    main()
