"""How many planted facts survive prompt compression, at what ratio and for how many CPU seconds.

    python benchmarks/compression.py --model PATH --prompts 20

Each prompt is prose (Python's language reference, or --text FILE) of about 465 tokens with one fact in it, placed by a
fixed seed. A fact survives where its value is in the compressed text; the second number also asks for its subject.
"""

import argparse
import random
import re
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_efficiency import compress_prompt
from hf_efficiency.calibration.data import default_texts

# sentence, question, subject; the value is put into the braces
FACTS = (
    ("The night guard keeps the spare key of the observatory in locker {}.",
     "Which locker holds the spare key of the observatory?", "key"),
    ("The ferry to the northern island leaves from pier {} on weekdays.",
     "From which pier does the ferry to the northern island leave?", "ferry"),
    ("The old lighthouse was painted {} by the villagers last spring.",
     "What colour was the old lighthouse painted?", "lighthouse"),
    ("My grandmother's bakery is known for its {} bread.",
     "What kind of bread is the bakery of my grandmother known for?", "bakery"),
    ("The winner of the chess tournament was a teacher called {}.",
     "What is the name of the teacher who won the chess tournament?", "chess"),
)  # fmt: skip
WORDS = {2: ("purple", "yellow", "scarlet", "turquoise"), 3: ("walnut", "rye", "pumpkin", "garlic"),
         4: ("Oswin", "Marta", "Ilse", "Tobias")}  # fmt: skip


def prompts(tokenizer: Any, text: list[str], count: int, tokens: int) -> list[tuple[str, str, str, str]]:
    """Prompt, question, value and subject of each fact."""
    generator = random.Random(0)
    made = []
    for i in range(count):
        kind = i % len(FACTS)
        sentence, question, subject = FACTS[kind]
        value = generator.choice(WORDS[kind]) if kind in WORDS else str(generator.randint(1000, 9999))
        start, prose, used = generator.randrange(len(text) - 20), [], 0
        for paragraph in text[start:] + text:
            for piece in re.split(r"(?<=[.!?])\s+", paragraph):
                length = len(tokenizer(piece, add_special_tokens=False)["input_ids"])
                if used + length <= tokens:
                    prose.append(piece)
                    used += length
            if used > tokens - 15:
                break
        prose.insert(generator.randint(1, len(prose) - 1), sentence.format(value))
        made.append((" ".join(prose), question, value, subject))
    return made


def row(made: list[tuple[str, str, str, str]], ratio: float, asked: bool, **arguments: Any) -> str:
    """A line of the table."""
    values = facts = tokens = 0
    worst = seconds = 0.0
    for text, question, value, subject in made:
        start = time.process_time()
        found = compress_prompt(text, ratio=ratio, question=question if asked else None, **arguments)
        seconds += time.process_time() - start
        held = re.search(rf"\b{value}\b", found.text) is not None
        values += held
        facts += held and subject in found.text
        tokens += found.original_tokens
        worst = max(worst, abs(found.ratio / ratio - 1))
    cells = (arguments["method"], "known" if asked else "unknown", f"{ratio:.2f}", f"{values / len(made):.2f}",
             f"{facts / len(made):.2f}", f"{100 * worst:.1f} %", f"{1000 * seconds / tokens:.1f}")  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of the small model")
    parser.add_argument("--text", help="plain text with an empty line between paragraphs")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=450, help="of prose in a prompt")
    parser.add_argument("--methods", default="auto", help="names, with a comma between them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    if args.text:
        with open(args.text) as file:
            text = [" ".join(p.split()) for p in file.read().split("\n\n") if len(p) > 200]
    else:
        text = [" ".join(p.split()) for t in default_texts() for p in t.split("\n\n") if len(p) > 200]
    made = prompts(tokenizer, text, args.prompts, args.tokens)
    print(
        "| method | question | ratio | value | value and subject | worst ratio error | CPU s / 1,000 tokens |",
        flush=True,
    )
    print("|---|---|---|---|---|---|---|", flush=True)
    for method in args.methods.split(","):
        for asked in (True, False):
            for ratio in (0.5, 0.33, 0.2):
                print(row(made, ratio, asked, method=method, model=model, tokenizer=tokenizer), flush=True)


if __name__ == "__main__":
    main()
