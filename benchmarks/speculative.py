"""Speculative decoding on SmolLM2-135M: CPU-seconds against plain greedy decoding, and tokens a forward.

    PYTHONPATH=. .venv/bin/python benchmarks/speculative.py TEXT.txt [--prompts 1] [--tokens 64] [--part lookup|draft]

Greedy, float32, one thread; every text is compared with the plain one, token by token.
"""

import argparse
import re
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from hf_efficiency import RTNConfig, SkipLayers, load_demo_model, speculative
from hf_efficiency.demo import demo_model_path

CHAT = (
    "Tell me something surprising about the sea.",
    "What should I cook tonight with rice and eggs?",
    "How do I make new friends in a new city?",
    "Why do cats sleep so much?",
)


def prompts_of(path: str, count: int) -> dict[str, Any]:
    """Three kinds of prompt."""
    text = Path(path).read_text(encoding="utf-8")
    blocks = [" ".join(block.split()) for block in re.split(r"\n\s*\n|\n", text)]
    blocks = [block[:700] for block in blocks if len(block) > 500][:count]
    return {
        "open chat": CHAT[:count],
        "summary": [f"Summarize this text in three sentences.\n\n{block}" for block in blocks],
        "copy/edit": [f"Repeat this text word for word, in quotation marks.\n\n{block}" for block in blocks],
    }


def encoded(tokenizer: Any, prompt: str) -> Any:
    """Ids through the chat template."""
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def timed(model: Any, inputs: Any, tokens: int, **kwargs: Any) -> tuple[list[int], float]:
    """The new tokens, and CPU seconds."""
    began = time.process_time()
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **kwargs)
    return out[0, inputs["input_ids"].shape[1] :].tolist(), time.process_time() - began


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("text")
    parser.add_argument("--prompts", type=int, default=1, help="of each kind")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--part", choices=("lookup", "draft"), default="lookup")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_demo_model(dtype=torch.float32)
    if args.part == "lookup":
        settings = {
            "transformers prompt_lookup, 10 tokens": lambda: {"prompt_lookup_num_tokens": 10},
            "lookup": lambda: {"custom_generate": speculative("lookup")},
            "the target as its own draft, k=8": lambda: {"custom_generate": speculative("self", adapt=False)},
        }
    else:
        quantized = AutoModelForCausalLM.from_pretrained(
            demo_model_path(), dtype=torch.float32, quantization_config=RTNConfig(bits=3, group_size=64, clip=True)
        )
        draft = quantized.dequantize().eval()
        settings = {
            "3-bit draft, chain of 3": lambda: {"custom_generate": speculative(draft, k=3, adapt=False)},
            "3-bit draft, tree (3, 2, 1)": lambda: {
                "custom_generate": speculative(draft, branching=(3, 2, 1), adapt=False)
            },
            "10 of 30 blocks, untrained": lambda: {"custom_generate": speculative(SkipLayers(10))},
        }
    print("| prompts | setting | CPU s, plain | CPU s | ratio | tokens a forward | acceptance | differences |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for kind, prompts in prompts_of(args.text, args.prompts).items():
        inputs = [encoded(tokenizer, prompt) for prompt in prompts]
        timed(model, inputs[0], 4)
        before = [timed(model, one, args.tokens) for one in inputs]
        rows = {}
        for name, make in settings.items():
            taken, different, statistics = 0.0, 0, []
            for one, (plain, _) in zip(inputs, before, strict=True):
                kwargs = make()
                text, seconds = timed(model, one, args.tokens, **kwargs)
                taken, different = taken + seconds, different + (text != plain)
                statistics.append(getattr(kwargs.get("custom_generate"), "statistics", None))
            rows[name] = taken, different, statistics
        after = [timed(model, one, args.tokens) for one in inputs]
        plain = sum(seconds for _, seconds in (*before, *after)) / 2
        for name, (taken, different, statistics) in rows.items():
            if statistics[0] is None:
                rates = "- | -"
            else:
                forwards = sum(s.target_forwards for s in statistics)
                verified = max(1, sum(sum(s.drafted) for s in statistics))
                rates = (
                    f"{sum(s.tokens for s in statistics) / max(1, forwards):.2f} | "
                    f"{sum(sum(s.accepted) for s in statistics) / verified:.2f}"
                )
            print(
                f"| {kind} | {name} | {plain:.2f} | {taken:.2f} | {plain / taken:.2f} | {rates} | "
                f"{different} of {len(inputs)} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
