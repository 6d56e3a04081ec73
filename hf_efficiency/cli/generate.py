"""`hf-efficiency generate MODEL`: write, and show how fast."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any

import torch

from hf_efficiency.cli.generation import Drafts, Setting, encode, pad_token, read_branching, read_cache
from hf_efficiency.cli.models import load_model, load_tokenizer, resolve
from hf_efficiency.evaluation import read_text
from hf_efficiency.evaluation.metrics import GREEDY, evaluating
from hf_efficiency.integrations.transformers.compression import compress_prompt

if TYPE_CHECKING:
    import argparse


def run(args: argparse.Namespace) -> int:
    """Carry out the command."""
    if args.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1")
    if args.compress is None and args.compress_with is not None:
        raise ValueError(
            "--compress-with says who shortens the prompt, and by how much is missing: add --compress 0.5, say"
        )
    setting = _setting(args)
    choosing = _choosing(args)
    prompt = args.prompt if args.prompt_file is None else read_text(args.prompt_file).text
    with resolve(args.model) as source:
        tokenizer = load_tokenizer(source)
        model = load_model(source.path, args.dtype, args.device)
        inputs = encode(tokenizer, _shortened(args, prompt, model, tokenizer), raw=args.raw)
        with Drafts(tokenizer, args.dtype, args.device) as drafts:
            live = Live(tokenizer)
            arguments = drafts.arguments(setting, model, live)
            live.method = arguments.get("custom_generate")
            torch.manual_seed(args.seed)
            inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
            generator: Any = model
            with evaluating(model), live:
                generator.generate(
                    **inputs,
                    max_new_tokens=args.max_new_tokens,
                    pad_token_id=pad_token(model, tokenizer),
                    **choosing,
                    **arguments,
                )
    print(live.summary(), file=sys.stderr)
    return 0


def _shortened(args: argparse.Namespace, prompt: str, model: Any, tokenizer: Any) -> str:
    """The prompt as the model gets it, compressed if asked for, with the question at its end."""
    text = prompt
    if args.compress is not None:
        with contextlib.ExitStack() as stack:
            small, reader = model, tokenizer
            if args.compress_with is not None:
                source = stack.enter_context(resolve(args.compress_with))
                small, reader = load_model(source.path, args.dtype, args.device), load_tokenizer(source)
            result = compress_prompt(
                prompt,
                ratio=args.compress,
                question=args.question,
                model=small,
                tokenizer=reader,
                target_tokenizer=tokenizer,
            )
        print(f"prompt: {result.original_tokens} tokens, {result.tokens} kept ({result.method})", file=sys.stderr)
        text = result.text
    return text if args.question is None or args.question in text else f"{text}\n\n{args.question}"


def _setting(args: argparse.Namespace) -> Setting:
    cache, options = (None, {}) if args.cache is None else read_cache(args.cache)
    drafting: dict[str, Any] = {"k": args.k, "adapt": not args.no_adapt, "log": args.log}
    if args.branching is not None:
        drafting["branching"] = read_branching(args.branching)
    if args.draft is None:
        unused = [name for name in ("branching", "log") if getattr(args, name) is not None]
        if unused:
            raise ValueError(f"--{unused[0]} is of a draft, and none is given: add --draft lookup, say")
        drafting = {}
    return Setting(args.draft, drafting, cache, options)


def _choosing(args: argparse.Namespace) -> dict[str, Any]:
    """How the next token is chosen."""
    if args.temperature is None:
        if args.top_k is not None or args.top_p is not None:
            raise ValueError("--top-k and --top-p are of sampling: give --temperature 1, say")
        return GREEDY
    if args.temperature <= 0:
        raise ValueError(f"--temperature is {args.temperature}; it must be above 0 (leave it out for greedy decoding)")
    given = {"top_k": 0 if args.top_k is None else args.top_k, "top_p": args.top_p}
    return {"do_sample": True, "num_beams": 1, "temperature": args.temperature, **given}


class Live:
    """A streamer that prints the text as it comes, and on a terminal the speed in the window's title line.

    A context manager: the screen is left in order after an interrupt.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.method: Any = None
        self.ids: list[int] = []
        self.shown = ""
        self.prompt_seen = False
        self.began = self.ended = 0.0
        self.terminal = sys.stderr.isatty() and sys.stdout.isatty()

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *error: object) -> None:
        self._print(final=True)
        if self.terminal:
            sys.stderr.write("\x1b]0;\x07")
            sys.stderr.flush()

    def put(self, value: Any) -> None:
        """The prompt, and then new tokens."""
        now = time.perf_counter()
        if not self.prompt_seen:
            self.prompt_seen, self.began = True, now
            return
        if not self.ids:
            self.began = now  # the first token ends the prompt's reading
        self.ids += value.flatten().tolist()
        self.ended = now
        self._print(final=False)
        if self.terminal:
            sys.stderr.write(f"\x1b]0;{self.status()}\x07")
            sys.stderr.flush()

    def end(self) -> None:
        """Nothing more comes."""

    def _print(self, *, final: bool) -> None:
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        # a character may come in several tokens
        stable = text if final else text[: max(len(self.shown), text.rfind(" ") + 1)]
        if stable.startswith(self.shown) and len(stable) > len(self.shown):
            sys.stdout.write(stable[len(self.shown) :])
            self.shown = stable
        if final:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def status(self) -> str:
        """Tokens a second after the first token, and the acceptance."""
        speed = (len(self.ids) - 1) / max(1e-9, self.ended - self.began) if len(self.ids) > 1 else 0.0
        line = f"{speed:.1f} tokens/s"
        if self.method is not None:
            line += f", acceptance {self.method.statistics.mean_acceptance:.2f}"
        return line

    def summary(self) -> str:
        """What the last line says."""
        line = f"{len(self.ids)} tokens, {self.status()}"
        return line if self.method is None else f"{line}\n{self.method.statistics.summary()}"
