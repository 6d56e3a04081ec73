"""The pages and scripts under `benchmarks/` that a test can judge: the costs page, and the GPU benchmark's own code."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Imports a script of `benchmarks/` by name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name in ("costs", "gpu", "kernel_case") or name.startswith("cases_"):
            del sys.modules[name]


def test_costs_page_is_up_to_date(benchmark):
    """`python benchmarks/costs.py` makes it."""
    assert (BENCHMARKS / "COSTS.md").read_text() == benchmark("costs").page()


def test_every_case_has_a_cost_and_something_to_run(benchmark):
    case = benchmark("kernel_case")
    for folder in case.projects():
        cases = case.cases_of(folder)
        assert len({c.label for c in cases}) == len(cases)
        assert all(c.bytes > 0 and c.flops >= 0 for c in cases)


def test_floor_is_the_slower_of_memory_and_arithmetic(benchmark):
    costs, case = benchmark("costs"), benchmark("kernel_case")
    assert costs.floor(case.Case("copy", 3 * 10**12, 0, dict)) == pytest.approx(1.0)
    assert costs.floor(case.Case("product", 1, 790 * 10**12, dict)) == pytest.approx(1.0)


def test_wrong_results_are_seen(benchmark):
    difference = benchmark("gpu").difference
    ones = torch.ones(3)
    assert difference((ones, 2 * ones), (ones, 2 * ones)) == 0
    assert difference(ones, 2 * ones) == pytest.approx(0.5)
    assert difference(torch.full((3,), float("nan")), ones) == float("inf")
    assert difference(torch.ones(2), ones) == float("inf")
