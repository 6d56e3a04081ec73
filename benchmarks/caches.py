"""Perplexity, a passkey test, bytes and decode time of the key-value caches, on one model and one text.

    python benchmarks/caches.py --model PATH --text wikitext2-valid.txt --only evict,passkey,quant,stream

`evict`: 1,024 tokens of context in one forward, then the cache holds half or a quarter of them, then the perplexity of
256 further tokens in one forward; windows do not overlap. `passkey`: five digits in the middle of filler text, greedy.
`quant`: the 256 tokens come one by one; CPU seconds of one thread. `stream`: perplexity of a long text, a chunk at a
time, in constant memory. `gqa`: key-value heads pooled, and a short training.

Bytes are those of the cache's tensors after the context, measured as whole storages, beside transformers' DynamicCache.
"""

import argparse
import math
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

from hf_efficiency.integrations.transformers.caches import convert_attention, make_cache

CONTEXT, NEXT = 1024, 256
DIGITS = 5

Make = Callable[[Any], Any]


def rows(share: float, context: int) -> dict[str, Make]:
    """The caches that hold a share of the context."""
    tokens = round(share * context)
    return {
        "random": lambda m: make_cache("random", m, budget=tokens),
        "StreamingLLM": lambda m: make_cache("streaming", m, sinks=4, window=tokens - 4, full_prefill=True),
        "TOVA": lambda m: make_cache("tova", m, budget=tokens),
        "SnapKV": lambda m: make_cache("snapkv", m, budget=tokens, window=min(64, tokens // 2)),
        "H2O": lambda m: make_cache("h2o", m, budget=tokens),
        "H2O, pyramid": lambda m: make_cache("h2o", m, budget=tokens, schedule="pyramid"),
    }


def nbytes(cache: Any) -> int:
    """Bytes of a cache's tensors, ours or transformers'."""
    if hasattr(cache, "nbytes"):
        return int(cache.nbytes())
    tensors = [t for layer in cache.layers for t in vars(layer).values() if isinstance(t, Tensor)]
    tensors += [t for layer in cache.layers for v in vars(layer).values() if isinstance(v, tuple) for t in v]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if isinstance(t, Tensor)}
    return sum(storages.values())


def windows(tokens: Tensor, count: int) -> Iterator[Tensor]:
    """Windows (1, CONTEXT + NEXT) spread over the text."""
    step = (tokens.shape[1] - CONTEXT - NEXT) // max(1, count)
    for i in range(count):
        yield tokens[:, i * step : i * step + CONTEXT + NEXT]


def losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each label."""
    return F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")


def continued(model: Any, cache: Any, window: Tensor) -> tuple[Tensor, int]:
    """Losses of the tokens after the context, and the cache's bytes in between."""
    first = model(window[:, :CONTEXT], past_key_values=cache, logits_to_keep=1).logits
    held = nbytes(cache)
    rest = model(window[:, CONTEXT:-1], past_key_values=cache).logits
    return losses(torch.cat((first, rest), 1), window[:, CONTEXT:]), held


def evict(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> None:
    """Perplexity at half and a quarter of the cache."""
    chosen = list(windows(tokens, args.windows))

    def perplexity(make: Make) -> tuple[float, int]:
        found = [continued(model, make(model), window) for window in chosen]
        return math.exp(torch.cat([loss for loss, _ in found]).mean().item()), found[0][1]

    dense, full = perplexity(lambda m: DynamicCache(config=m.config))
    print(
        f"\nPerplexity of {NEXT} tokens after {CONTEXT}, {args.windows} windows; dense {dense:.2f}, {full:,} bytes.\n"
    )
    print("| cache | half | ratio | bytes | quarter | ratio | bytes |\n|---|---|---|---|---|---|---|")
    for name in rows(0.5, CONTEXT):
        line = f"| {name} "
        for share in (0.5, 0.25):
            value, held = perplexity(rows(share, CONTEXT)[name])
            line += f"| {value:.2f} | {value / dense:.3f} | {held / full:.3f} "
        print(line + "|", flush=True)


def passkey(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> None:
    """Digits recalled from the middle of a text."""
    draw = random.Random(0)
    prompts = []
    for i in range(args.prompts):
        key = "".join(draw.choice("0123456789") for _ in range(DIGITS))
        start = draw.randrange(tokens.shape[1] - 1000)
        before = tokenizer.decode(tokens[0, start : start + 80 + 60 * (i % 5)])
        after = tokenizer.decode(tokens[0, start + 400 : start + 400 + 320 - 60 * (i % 5)])
        needle = f" The pass key is {key}. Remember it. {key} is the pass key. "
        prompts.append((f"{before}{needle}{after} What is the pass key? The pass key is ", key))

    def score(make: Callable[[Any, int], Any]) -> tuple[int, float]:
        exact, digits = 0, 0
        for prompt, key in prompts:
            ids = tokenizer(prompt, return_tensors="pt").input_ids
            cache = make(model, ids.shape[1])
            out = model.generate(ids, past_key_values=cache, max_new_tokens=DIGITS + 1, do_sample=False)
            said = tokenizer.decode(out[0, ids.shape[1] :]).strip()[:DIGITS]
            exact += said == key
            digits += sum(a == b for a, b in zip(said, key, strict=False))
        return exact, digits / (DIGITS * len(prompts))

    exact, digits = score(lambda m, n: DynamicCache(config=m.config))
    print(f"\nPasskey, {len(prompts)} prompts of about 450 tokens; dense {exact} exact, {digits:.2f} of the digits.\n")
    print("| cache | half: exact | digits | quarter: exact | digits |\n|---|---|---|---|---|")
    for name in rows(0.5, CONTEXT):
        line = f"| {name} "
        for share in (0.5, 0.25):
            exact, digits = score(lambda m, n, share=share, name=name: rows(share, n)[name](m))
            line += f"| {exact} | {digits:.2f} "
        print(line + "|", flush=True)


def quant(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> None:
    """Perplexity and time, token by token."""
    makes: dict[str, Make] = {"DynamicCache": lambda m: DynamicCache(config=m.config)}
    makes |= {f"{b} bits": lambda m, b=b: make_cache("quantized", m, bits=b) for b in (8, 4, 2)}
    makes["transformers' QuantizedCache, fp8"] = lambda m: QuantizedCache("fp8", m.config)
    makes["H2O at half, as a comparison"] = lambda m: make_cache("h2o", m, budget=CONTEXT // 2)
    chosen = list(windows(tokens, args.quant_windows))
    print(f"\nPerplexity of {NEXT} tokens one by one after {CONTEXT}, {len(chosen)} windows.\n")
    print("| cache | perplexity | ratio | bytes | CPU ms a token | ratio |\n|---|---|---|---|---|---|")
    dense: tuple[float, int, float] | None = None
    for name, make in makes.items():
        all_losses, spent, held = [], 0.0, 0
        for window in chosen:
            cache = make(model)
            logits = [model(window[:, :CONTEXT], past_key_values=cache, logits_to_keep=1).logits]
            start = time.process_time()
            for i in range(CONTEXT, CONTEXT + NEXT - 1):
                logits.append(model(window[:, i : i + 1], past_key_values=cache).logits)
            spent += time.process_time() - start
            held = nbytes(cache)
            all_losses.append(losses(torch.cat(logits, 1), window[:, CONTEXT:]))
        value, each = math.exp(torch.cat(all_losses).mean().item()), 1000 * spent / len(chosen) / (NEXT - 1)
        dense = dense or (value, held, each)
        print(
            f"| {name} | {value:.2f} | {value / dense[0]:.3f} | {held / dense[1]:.3f} | {each:.1f} | "
            f"{each / dense[2]:.2f} |",
            flush=True,
        )


def stream(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> None:
    """A long text in constant memory."""
    length, chunk = args.stream, 512
    print(f"\nPerplexity of a stream, sinks 4, window 508, by quarter of {length:,} tokens.\n")
    print("| positions | 1st | 2nd | 3rd | 4th | bytes after each |\n|---|---|---|---|---|---|")
    for positions in ("cache", "absolute"):
        cache = make_cache("streaming", model, sinks=4, window=508, positions=positions)
        found, held = [], []
        for i in range(0, length, chunk):
            logits = model(tokens[:, i : i + chunk], past_key_values=cache).logits
            found.append(losses(logits, tokens[:, i + 1 : i + chunk + 1]))
            held.append(nbytes(cache))
        quarters = torch.cat(found).chunk(4)
        shown = " | ".join(f"{math.exp(q.mean().item()):.2f}" for q in quarters)
        print(f"| {positions} | {shown} | {sorted(set(held))} |", flush=True)


def generate(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> None:
    """A long generated text: does it stay text, and does memory stay."""
    cache = make_cache("streaming", model, sinks=4, window=252)
    ids = tokens[:, :64]
    torch.manual_seed(0)
    held, text = set(), ids
    for _ in range(args.generate // 500):
        text = model.generate(text, past_key_values=cache, max_new_tokens=500, min_new_tokens=500, temperature=1.0)
        held.add(nbytes(cache))
    new = text[0, 64:].tolist()
    print(f"\nGenerated {len(new):,} tokens in {sorted(held)} bytes. Distinct tokens in each 500:")
    print([len(set(new[i : i + 500])) for i in range(0, len(new), 500)])
    print(repr(tokenizer.decode(new[-40:])))


def gqa(model: Any, tokenizer: Any, tokens: Tensor, args: argparse.Namespace) -> None:
    """Three key-value heads pooled into one."""
    training = tokens[0, : 256 * 250].view(-1, 256)
    print(convert_attention(model, 1, calibration=training, steps=args.steps, batch_size=2))


PARTS = {"evict": evict, "passkey": passkey, "quant": quant, "stream": stream, "generate": generate, "gqa": gqa}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", required=True)
    parser.add_argument("--only", default="evict,passkey,quant,stream")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--quant-windows", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--stream", type=int, default=20_480)
    parser.add_argument("--generate", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    with open(args.text, encoding="utf-8") as file:
        tokens = tokenizer(file.read(), return_tensors="pt", verbose=False).input_ids
    for name in args.only.split(","):
        start = time.process_time()
        if name == "gqa":
            gqa(model, tokenizer, tokens, args)
        else:
            with torch.no_grad():
                PARTS[name](model, tokenizer, tokens, args)
        print(f"\n({name}: {time.process_time() - start:.0f} CPU seconds)", flush=True)


if __name__ == "__main__":
    main()
