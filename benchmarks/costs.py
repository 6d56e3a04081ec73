"""What each kernel must cost: bytes moved and operations done, and the floor of its time on an H100.

    python benchmarks/costs.py            # writes benchmarks/COSTS.md
    python benchmarks/costs.py --check    # exits with 1 where the page is out of date

The floor is the larger of two times: the bytes at the bandwidth that a copy reaches, and the operations at the rate
that large bfloat16 products reach. Both were seen on an H100; what a kernel reaches of it is measured by `gpu.py`.
"""

import argparse
import sys
from pathlib import Path

from kernel_case import Case, cases_of, projects

BANDWIDTH = 3.0e12  # bytes a second, read and written together
RATE = 790e12  # bfloat16 operations a second on tensor cores
PAGE = Path(__file__).with_name("COSTS.md")


def floor(case: Case) -> float:
    """Seconds."""
    return max(case.bytes / BANDWIDTH, case.flops / RATE)


def page() -> str:
    """The whole page as Markdown."""
    lines = [
        "# What the kernels must cost",
        "",
        "Made by `python benchmarks/costs.py` from `kernels/*/benchmarks/cases.py`; do not edit. Bytes: inputs read,",
        "outputs written, once. Floor on an H100: bytes at 3.0 TB/s or operations at 790 TFLOP/s, whichever is longer.",
        "What is reached of it: not measured.",
    ]
    for folder in projects():
        lines += ["", f"## {folder.name.replace('_', '-')}", ""]
        lines += ["| case | MB | GFLOP | floor, µs | bound by | goal |", "|---|---|---|---|---|---|"]
        for case in cases_of(folder):
            bound = "bytes" if case.bytes / BANDWIDTH >= case.flops / RATE else "operations"
            lines.append(
                f"| {case.label} | {case.bytes / 1e6:,.2f} | {case.flops / 1e9:,.2f} | {floor(case) * 1e6:,.2f} "
                f"| {bound} | {case.goal} |"
            )
        lines += memory([case for case in cases_of(folder) if case.memory])
    return "\n".join(lines) + "\n"


def memory(cases: list[Case]) -> list[str]:
    """A table of the bytes that are held, for cases where these count; the last column of names is the rival's."""
    if not cases:
        return []
    *names, rival = cases[0].memory
    lines = ["", "Held beyond inputs and results at the worst moment, MB, and its share of the last column:", ""]
    lines += ["| case | " + " | ".join([*names, rival]) + " |", "|" + "---|" * (len(names) + 2)]
    for case in cases:
        whole = case.memory[rival]
        parts = [f"{case.memory[name] / 1e6:,.0f} ({case.memory[name] / whole:.1%})" for name in names]
        lines.append("| " + " | ".join([case.label, *parts, f"{whole / 1e6:,.0f}"]) + " |")
    return lines


def main() -> int:
    """Writes or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    if parser.parse_args().check:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
