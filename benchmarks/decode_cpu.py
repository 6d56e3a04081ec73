"""Decode speed on the CPU in bfloat16: 4-bit weights against the dense model, side by side in one run.

    python benchmarks/decode_cpu.py                     # SmolLM2-135M and a random model of 1B shape
    python benchmarks/decode_cpu.py --shapes smollm2 --json benchmarks/results/decode_cpu.json

Each variant generates greedily from the same prompt; the time of a token is the difference between a long and a short
generation, so that the prompt's time drops out. The variants take turns and the median counts. llama.cpp decodes the
wheel's own GGUF file where `llama_cpp` is installed (`pip install llama-cpp-python`).
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from hf_efficiency import RTNConfig
from hf_efficiency.demo import demo_model_path

PROMPT = 16
SHORT = 4

Timer = Callable[[int], float]


def one_billion() -> LlamaForCausalLM:
    """A random Llama with the sizes of Llama-3.2-1B, in bfloat16."""
    config = LlamaConfig(
        vocab_size=128256,
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
    for timer in variants.values():  # both lengths: a static cache of another length compiles anew
        timer(SHORT)
        timer(SHORT + tokens)
    for _ in range(repeats):
        for name, timer in variants.items():
            short, long = timer(SHORT), timer(SHORT + tokens)
            speeds[name].append(tokens / (long - short))
    return {name: statistics.median(values) for name, values in speeds.items()}


def variants_of(path: str, *, compiled: bool) -> dict[str, Timer]:
    """Dense, 4-bit, and 4-bit with a static cache and `torch.compile`, of the checkpoint at `path`."""
    dense = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    config = RTNConfig(bits=4, group_size=64)
    quantized = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    variants = {"dense": generation_timer(dense), "4-bit": generation_timer(quantized)}
    if compiled:
        again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
        again.forward = torch.compile(again.forward, dynamic=False, fullgraph=True)
        timer = generation_timer(again, cache_implementation="static", disable_compile=True)
        variants["4-bit, static cache, torch.compile"] = timer
    return variants


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=("smollm2", "1b"), default=("smollm2", "1b"))
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, dict[str, float]] = {}
    for shape in args.shapes:
        results[shape] = run_shape(shape, args)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.processor() or platform.machine()}")
    for shape, speeds in results.items():
        for name, speed in speeds.items():
            print(f"{shape:8} {name:36} {speed:7.1f} tokens/s  {speed / speeds['dense']:5.2f}x")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"torch": torch.__version__, "tokens_per_second": results}, indent=2) + "\n")


def run_shape(shape: str, args: argparse.Namespace) -> dict[str, float]:
    """Speeds of all variants of one model."""
    if shape == "smollm2":
        variants = variants_of(demo_model_path(), compiled=not args.no_compile)
        try:
            from hf_efficiency.demo import demo_gguf_path

            variants["llama.cpp, Q4_1"] = llama_cpp_timer(demo_gguf_path())
        except ImportError:
            print("llama_cpp is not installed: its figure is left out.")
        return measure(variants, args.tokens, args.repeats)
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        one_billion().save_pretrained(folder)
        return measure(variants_of(folder, compiled=not args.no_compile), args.tokens, args.repeats)


if __name__ == "__main__":
    main()
