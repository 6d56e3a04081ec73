"""The pages and scripts under `benchmarks/` that a test can judge: the costs page, and the GPU benchmark's own code."""

import ast
import importlib
import sys
from functools import partial
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


def test_kernels_are_measured_with_torch_and_the_checkout_alone():
    """On the machine with the GPU nothing else is installed."""
    allowed = sys.stdlib_module_names | {"torch", "triton", "costs", "kernel_case"}
    modules = ("hf_efficiency.kernels", "hf_efficiency.quantization.hadamard")  # which import torch alone
    names = [BENCHMARKS / f"{name}.py" for name in ("gpu", "costs", "kernel_case")]
    for path in [*names, *BENCHMARKS.parent.glob("kernels/*/benchmarks/cases.py")]:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom):
                found = node.module
            elif isinstance(node, ast.Import):
                found = node.names[0].name
            else:
                continue
            assert found.split(".")[0] in allowed or found.startswith(modules), f"{path} imports {found}"


def test_distillation_keeps_the_goal_for_memory(benchmark):
    """Under 10 % of the plain loss where gradients are recomputed; at most that where they are kept."""
    case = benchmark("kernel_case")
    counted = [c.memory for c in case.cases_of(case.ROOT / "kernels" / "distill_loss")]
    assert len(counted) == 9
    for held in counted:
        assert held["gradients recomputed"] <= 0.05 * held["plain loss"]
        assert held["gradients kept"] <= 0.1 * held["plain loss"]


def test_what_fails_fails_alone(benchmark, monkeypatch):
    """One competitor, one case, one project: the rest of the table stands."""
    gpu, case = benchmark("gpu"), benchmark("kernel_case")

    def broken():
        raise RuntimeError("no such kernel")

    def make(device, seed):
        x = torch.full((3,), float(seed))
        return {"kernel": lambda: x + 1, "reference": lambda: x + 1, "rival": broken}

    monkeypatch.setattr(gpu, "peak_bytes", lambda run: 7)
    monkeypatch.setattr(gpu, "seconds", lambda runs, budget: len(runs) * 1e-6)
    cases = [case.Case("good", 3 * 10**6, 0, make, goal="fast"), case.Case("bad", 1, 0, lambda *_: broken())]
    monkeypatch.setattr(gpu, "cases_of", lambda folder: cases)
    rows = gpu._rows(Path("x"), torch.device("cpu"), 0.1)
    assert rows[0]["failed"] == {"rival": "RuntimeError: no such kernel"}
    assert rows[0]["seconds"] == {"kernel": pytest.approx(45e-6), "reference": pytest.approx(45e-6)}
    assert rows[1]["failure"] == "RuntimeError: no such kernel"
    page = gpu.table("x", rows)
    assert "| good | 0.0e+00 | 45.0 | 2% | 0.0 | 45.0 (1.00×) | failed | fast |" in page
    assert "- good, rival: RuntimeError: no such kernel" in page
    monkeypatch.setattr(gpu, "cases_of", lambda folder: broken())
    assert gpu._rows(Path("x"), torch.device("cpu"), 0.1)[0]["case"] == "its cases"


def test_the_reference_is_compiled_once_for_all_copies(benchmark, monkeypatch):
    gpu, compiled = benchmark("gpu"), []
    monkeypatch.setattr(torch, "compile", lambda function, **_: compiled.append(function) or function)
    made = [{"reference": partial(torch.add, torch.ones(1), i)} for i in range(3)]
    gpu._add_compiled(made)
    assert compiled == [torch.add]
    assert [runs["torch.compile"]().item() for runs in made] == [1, 2, 3]
    made = [{"reference": lambda: None}]
    gpu._add_compiled(made)
    assert "torch.compile" not in made[0]
