"""Data selection measured on two public texts, on planted duplicates, noise and garbage, and on a million short texts.

    PYTHONPATH=. python benchmarks/selection.py --wikitext wikitext2-valid.txt --shakespeare tinyshakespeare.txt \
        --output selection.md

Parts, to be named after `--only`: dsir, minhash, facility, noise, garbage, scale. Seeds are fixed. CPU seconds are
those of one thread; memory is the peak of a process of its own. The hard pool of DSIR: documents of 30 to 600 words;
22 % of the documents have a quarter of their words from the target's text, all others have none.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_efficiency.selection import select
from hf_efficiency.selection.d2_pruning import D2
from hf_efficiency.selection.dsir import DSIR, segment_sums
from hf_efficiency.selection.embedding import normalized
from hf_efficiency.selection.facility_location import greedy, similarity
from hf_efficiency.selection.hashing import hash_words, n_grams, shingles
from hf_efficiency.selection.minhash import MinHash, unique_per_document

Rows = list[tuple[str, str]]
Pool = tuple[list[str], NDArray[np.bool_], list[str]]  # documents, which are wanted, examples of the wanted
PARTS = ("dsir", "minhash", "facility", "noise", "garbage", "scale")


def pieces(words: list[str], size: int, limit: int) -> list[str]:
    return [" ".join(words[i : i + size]) for i in range(0, min(len(words), limit) - size, size)]


def plain_pool(target: list[str], other: list[str], size: int) -> Pool:
    """Documents of either text, `size` words each, and which are the target's; and other text of the target."""
    half = len(target) // 2
    wanted, rest = pieces(target[half:], size, 100_000), pieces(other, size, 100_000)
    return [*wanted, *rest], np.arange(len(wanted) + len(rest)) < len(wanted), pieces(target[:half], 200, half)


def hard_pool(target: list[str], other: list[str], seed: int, n: int = 3000, rate: float = 0.22) -> Pool:
    generator = np.random.default_rng(seed)
    half = len(target) // 2
    documents, wanted = [], []
    for _ in range(n):
        length, good = int(generator.integers(30, 601)), bool(generator.random() < rate)
        start = int(generator.integers(0, len(other) - length))
        words = list(other[start : start + length])
        if good:
            quarter = length // 4
            start = int(generator.integers(half, len(target) - quarter))
            places = np.sort(generator.choice(length, quarter, replace=False))
            for place, word in zip(places, target[start : start + quarter], strict=True):
                words[place] = word
        documents.append(" ".join(words))
        wanted.append(good)
    return documents, np.array(wanted), pieces(target[:half], 200, half)


def summed(documents: list[str], target: list[str]) -> NDArray[np.float64]:
    """DSIR as published: sums over tokens, and next to no smoothing."""
    config = DSIR(buckets=10_000, smoothing=1e-8, share=1.0)
    log_ratio = config.log_ratio(config.count([target]), config.count([documents]))
    words = hash_words(documents)
    return sum(segment_sums(log_ratio[config._bucket(g)], g.offsets) for g in (n_grams(words, n) for n in (1, 2)))


def dsir(args: argparse.Namespace) -> Rows:
    texts = {"WikiText": args.wikitext, "Shakespeare": args.shakespeare}
    words = {name: Path(file).read_text(encoding="utf-8").split() for name, file in texts.items()}
    rows = []
    for target, other in (("WikiText", "Shakespeare"), ("Shakespeare", "WikiText")):
        for size in (30, 100):
            documents, wanted, examples = plain_pool(words[target], words[other], size)
            chosen = select(documents, "dsir", int(wanted.sum()), target=examples).indices
            rows.append(
                (f"DSIR, plain pool, {size} words, target {target}: precision at k", f"{wanted[chosen].mean():.3f}")
            )
        found, published, seconds, size = [], [], 0.0, 0
        for seed in range(3):
            documents, wanted, examples = hard_pool(words[target], words[other], seed)
            start = time.process_time()
            chosen = select(documents, "dsir", int(wanted.sum()), target=examples).indices
            seconds, size = seconds + time.process_time() - start, size + sum(len(d.encode()) for d in documents)
            found.append(wanted[chosen].mean())
            published.append(wanted[np.argsort(-summed(documents, examples))[: wanted.sum()]].mean())
        name = f"DSIR, hard pool, target {target}, 3 seeds"
        rows.append((f"{name}: precision at k", f"{np.mean(found):.3f} ({min(found):.3f} to {max(found):.3f})"))
        rows.append((f"{name}: with sums over tokens and without smoothing", f"{np.mean(published):.3f}"))
        rows.append((f"{name}: CPU seconds a MB, all passes", f"{seconds / size * 1e6:.3f}"))
    return rows


def minhash(args: argparse.Namespace) -> Rows:
    words = Path(args.wikitext).read_text(encoding="utf-8").split()
    generator = np.random.default_rng(0)
    originals = []
    for _ in range(3000):
        start = int(generator.integers(0, len(words) - 100))
        originals.append(words[start : start + 100])
    copies = []
    for document in originals:
        copy, share = list(document), generator.uniform(0, 0.2)
        for place in np.flatnonzero(generator.random(100) < share):
            copy[place] = words[int(generator.integers(len(words)))]
        copies.append(copy)
    documents = [" ".join(document) for document in (*originals, *copies)]
    rows = []
    for ngram in (1, 3, 5):
        expected = true_pairs(documents, ngram)
        for backend in ("numpy", "rensa"):
            config = MinHash(ngram=ngram, backend=backend)
            start = time.process_time()
            found = set(config.pairs(documents))
            seconds = time.process_time() - start
            f1 = 2 * len(found & expected) / (len(found) + len(expected))
            speed = f"F1 {f1:.4f}, {len(documents) / seconds:,.0f} documents/s"
            rows.append((f"MinHash ({backend}), {ngram} word(s) a shingle, {len(expected):,} true pairs", speed))
    return rows


def true_pairs(documents: list[str], ngram: int) -> set[tuple[int, int]]:
    """All pairs of Jaccard similarity .7 or more, from the product of the incidence matrix with itself."""
    import scipy.sparse

    grams = unique_per_document(shingles(documents, ngram))
    _, columns = np.unique(grams.hashes, return_inverse=True)
    matrix = scipy.sparse.csr_matrix((np.ones(len(columns), np.float32), columns, grams.offsets))
    pairs = set()
    for start in range(0, len(documents), 500):
        block = (matrix[start : start + 500] @ matrix.T).tocoo()
        rows = block.row + start
        union = grams.counts[rows] + grams.counts[block.col] - block.data
        kept = (block.data / union >= 0.7) & (rows < block.col)
        pairs |= set(zip(rows[kept].tolist(), block.col[kept].tolist(), strict=True))
    return pairs


def facility(args: argparse.Namespace) -> Rows:
    generator = np.random.default_rng(0)
    centers = generator.normal(size=(40, 64))
    blobs = normalized(
        (centers[generator.integers(0, 40, 3000)] + 0.5 * generator.normal(size=(3000, 64))).astype("f4")
    )
    rows = []
    for name, features in (
        ("40 blobs", blobs),
        ("no structure", normalized(generator.normal(size=(3000, 64)).astype("f4"))),
    ):
        times = []
        for _ in range(3):
            start = time.process_time()
            sim = similarity(features)
            middle = time.process_time()
            greedy(sim, 150)
            times.append((middle - start, time.process_time() - middle))
        matrix, choosing = min(times, key=sum)
        rows.append(
            (
                f"Facility location, n = 3,000, k = 150, d = 64, {name}: CPU seconds",
                f"{choosing:.3f} and {matrix:.3f} for the matrix",
            )
        )
    return rows


def noise(args: argparse.Namespace) -> Rows:
    """Digits of scikit-learn, 30 % of the labels of the training rows wrong; a small network; clean test rows."""
    import torch
    from sklearn.datasets import load_digits

    from hf_efficiency.selection.el2n import classifier_el2n
    from hf_efficiency.selection.influence import directions, influence
    from hf_efficiency.selection.perplexity import choose_band

    torch.set_num_threads(1)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)

    def train(inputs: Any, labels: Any, seed: int, steps: int) -> Any:
        torch.manual_seed(seed)
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 10))
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(steps):
            rows = torch.randint(len(inputs), (64,))
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs[rows]), labels[rows]).backward()
            optimizer.step()
        return model

    def gradients(model: Any, inputs: Any, labels: Any) -> Any:
        hidden = model[1](model[0](inputs))
        error = model[2](hidden).softmax(-1) - torch.nn.functional.one_hot(labels, 10)
        return torch.einsum("nc,nd->ncd", error, hidden).flatten(1)[:, None]

    results = {
        name: []
        for name in ("random", "EL2N band", "D2", "influence (LESS)", "influence (DataInf)", "influence (TRAK)")
    }
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(x), generator=generator)
        test, clean, pool = order[:500], order[500:550], order[550:]
        labels = y[pool].clone()
        wrong = torch.rand(len(pool), generator=generator) < 0.3
        labels[wrong] = (labels[wrong] + torch.randint(1, 10, (int(wrong.sum()),), generator=generator)) % 10
        k = len(pool) // 4
        early = [train(x[pool], labels, 100 + i, 60) for i in range(3)]
        with torch.no_grad():
            el2n = torch.stack([classifier_el2n(model(x[pool]), labels) for model in early]).mean(0).numpy()
            cross = torch.nn.functional.cross_entropy
            loss = torch.stack([cross(m(x[pool]), labels, reduction="none") for m in early]).mean(0).numpy()
            g, target = gradients(early[0], x[pool], labels), gradients(early[0], x[clean], y[clean])
        features = normalized((x[pool] - x[pool].mean(0)).numpy())
        chosen = {
            "random": np.random.default_rng(seed).permutation(len(pool))[:k],
            "EL2N band": choose_band(el2n, k, 0.1, 0.6, seed),
            "D2": D2(drop_easy=0.1, drop_hard=0.4).choose(loss, k, features),
        }
        for name, method in (
            ("influence (LESS)", "less"),
            ("influence (DataInf)", "datainf"),
            ("influence (TRAK)", "trak"),
        ):
            scores = influence(g, directions(method, target, g))
            chosen[name] = scores.topk(k).indices.numpy()
        for name, rows in chosen.items():
            model = train(x[pool][rows], labels[rows], seed, 400)
            results[name].append(float((model(x[test]).argmax(-1) == y[test]).float().mean()))
    return [
        (
            f"Digits, 30 % wrong labels, a quarter of the rows by {name}: accuracy, 5 seeds",
            f"{np.mean(found):.3f} ± {np.std(found):.3f}",
        )
        for name, found in results.items()
    ]


def garbage(args: argparse.Namespace) -> Rows:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from hf_efficiency.demo import demo_model_path

    path = demo_model_path()
    model = AutoModelForCausalLM.from_pretrained(path, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    words = Path(args.wikitext).read_text(encoding="utf-8").split()
    generator = np.random.default_rng(0)
    prose = pieces(words, 80, 80 * 121)
    noise_ = ["".join(chr(c) for c in generator.integers(33, 126, 300)) for _ in range(20)]
    starts = generator.integers(0, len(words) - 8, 20)
    repeated = [" ".join(words[start : start + 8] * 20) for start in starts]
    pool = [*prose, *noise_, *repeated]
    rows = []
    for name, settings in (
        ("band from 0.15 to 0.85", {"low": 0.15, "high": 0.85}),
        ("nearest to the median", {"nearest": "median"}),
    ):
        selection = select(pool, "perplexity", 0.6, model=model, tokenizer=tokenizer, max_length=128, **settings)
        kept = [int((selection.indices >= len(prose)).sum()), len(selection)]
        rows.append(
            (f"Perplexity, {name}, 40 of {len(pool)} planted: planted among the chosen", f"{kept[0]} of {kept[1]}")
        )
    return rows


def scale(args: argparse.Namespace) -> Rows:
    rows = []
    for strategy in ("dsir", "minhash"):
        found = {}
        for n in (10_000, 100_000, 1_000_000):
            command = [sys.executable, __file__, "--wikitext", args.wikitext, "--shakespeare", args.shakespeare]
            done = subprocess.run([*command, "--one", strategy, str(n)], capture_output=True, text=True, check=True)
            found[n] = json.loads(done.stdout)
            one = found[n]
            what = f"{one['seconds']:.1f} CPU s, peak {one['memory'] / 2**20:.0f} MiB, {one['chosen']:,} kept"
            rows.append((f"{strategy}, {n:,} texts, {one['bytes'] / 1e6:.0f} MB", what))
        slope = (found[1_000_000]["memory"] - found[100_000]["memory"]) / 900_000
        size = (found[1_000_000]["bytes"] - found[100_000]["bytes"]) / 900_000
        rows.append((f"{strategy}: bytes of memory for each more text of {size:.0f} bytes", f"{slope:.0f}"))
    return rows


def one(strategy: str, n: int, args: argparse.Namespace) -> None:
    """Selects from n texts in a file, and prints what it took."""
    from hf_efficiency.cli.select_data import LineFile

    words = Path(args.wikitext).read_text(encoding="utf-8").split()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "pool.txt"
        generator = np.random.default_rng(0)
        with file.open("w", encoding="utf-8") as out:
            for _ in range(n):
                start, length = int(generator.integers(0, len(words) - 40)), int(generator.integers(20, 41))
                line = list(words[start : start + length])
                for place in np.flatnonzero(generator.random(length) < 0.5):
                    line[place] = words[int(generator.integers(len(words)))]
                out.write(" ".join(line) + "\n")
        size = file.stat().st_size
        start = time.process_time()
        target = Path(args.shakespeare).read_text(encoding="utf-8").split("\n\n")[:2000]
        arguments = {"k": 0.1, "target": target} if strategy == "dsir" else {}
        selection = select(LineFile(file), strategy, **arguments)
        seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": seconds, "memory": memory, "bytes": size, "chosen": len(selection)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", required=True, metavar="FILE")
    parser.add_argument("--shakespeare", required=True, metavar="FILE")
    parser.add_argument(
        "--only", default=",".join(PARTS), help=f"parts with commas between (default: {','.join(PARTS)})"
    )
    parser.add_argument("--output", metavar="FILE", help="append the table there; by default it is printed")
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args.one[0], int(args.one[1]), args)
        return
    lines = ["| | |", "|---|---|"]
    for name in args.only.split(","):
        if name not in PARTS:
            parser.error(f"no part {name!r}; there are {', '.join(PARTS)}")
        lines += [f"| {label} | {value} |" for label, value in globals()[name](args)]
    table = "\n".join(lines) + "\n"
    if args.output:
        with Path(args.output).open("a", encoding="utf-8") as file:
            file.write(table)
    else:
        print(table)


if __name__ == "__main__":
    main()
