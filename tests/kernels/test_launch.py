"""Which implementation runs: kernel or reference, and what happens where a kernel does not compile."""

import logging

import pytest
import torch
from triton.errors import TritonError

from hf_efficiency.kernels.decoder_layers import _launch, kernel, reference
from hf_efficiency.quantization.layers.affine import AffineLinear
from hf_efficiency.quantization.layers.base import default_kernel_devices

PACKAGE = "hf_efficiency.kernels.decoder_layers"


@pytest.fixture
def arguments():
    return torch.randn(2, 8), torch.randn(8), 1e-6


@pytest.fixture
def on_a_card(monkeypatch):
    """As if the tensors lay on a GPU: the kernel is tried, and its errors are not the interpreter's."""
    monkeypatch.setattr(_launch, "_failed", {})
    monkeypatch.setattr(_launch, "kernel_runs", lambda package, name, *_: f"{package}.{name}" not in _launch._failed)
    monkeypatch.setattr(_launch, "INTERPRETED", False)


def test_kernel_that_does_not_compile_is_replaced_with_one_warning(arguments, on_a_card, monkeypatch, caplog):
    calls = []

    def broken(*_):
        calls.append(1)
        raise TritonError("too many registers")

    monkeypatch.setattr(kernel, "rms_norm", broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(_launch.run(PACKAGE, "rms_norm", *arguments), reference.rms_norm(*arguments))
    assert len(calls) == 1
    (record,) = caplog.records
    assert "rms_norm does not compile" in record.getMessage()
    assert "too many registers" in record.getMessage()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("full"), ValueError("shapes"), RuntimeError("illegal access")]
)
def test_other_errors_are_not_hidden(error, arguments, on_a_card, monkeypatch):
    def broken(*_):
        raise error

    monkeypatch.setattr(kernel, "rms_norm", broken)
    with pytest.raises(type(error), match=str(error)):
        _launch.run(PACKAGE, "rms_norm", *arguments)


def test_environment_turns_kernels_off(arguments, monkeypatch):
    monkeypatch.setattr(kernel, "rms_norm", lambda *_: pytest.fail("the kernel ran"))
    monkeypatch.setenv("HF_EFFICIENCY_KERNELS", "reference")
    assert torch.equal(_launch.run(PACKAGE, "rms_norm", *arguments), reference.rms_norm(*arguments))
    assert default_kernel_devices() == frozenset()
    assert AffineLinear(32, 32, bits=4, group_size=32).kernel_devices == frozenset()


def test_layers_use_kernels_on_gpus_only(monkeypatch):
    monkeypatch.delenv("HF_EFFICIENCY_KERNELS", raising=False)
    assert default_kernel_devices() == {"cuda"}


def test_namespaces_follow_the_name_of_the_package():
    assert _launch.namespace("a.b-c") == "a_b_c"


@pytest.mark.parametrize("busy", [False, True])
def test_nothing_is_measured_while_a_graph_is_captured_or_traced(busy, monkeypatch):
    """Then the first of the configurations runs; else what `triton.autotune` finds."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(_launch, "INTERPRETED", False)
    monkeypatch.setattr(_launch, "_may_measure", lambda: not busy)
    configs = [triton.Config({"BLOCK": 1}), triton.Config({"BLOCK": 2})]
    measured = []

    class Tuner:
        def __init__(self):
            self.cache = {}

        def check_disk_cache(self, key, configs, measure):
            measure()
            self.cache[key] = configs[1]

    monkeypatch.setattr(triton, "autotune", lambda configs, key, **_: lambda function: Tuner())
    tuner = _launch.tuned(configs, ["size"])(None)
    tuner.check_disk_cache((1,), configs, lambda: measured.append(1))
    assert tuner.cache == {(1,): configs[0 if busy else 1]}
    assert len(measured) == (not busy)


def test_measuring_stops_under_compile(monkeypatch):
    assert _launch._may_measure()
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not _launch._may_measure()


def test_interpreted_kernels_have_one_configuration():
    """So that nothing is left to measure."""
    from hf_efficiency.kernels.lut_linear import kernel as lut
    from hf_efficiency.kernels.quant_linear import kernel as quant

    for tuner in (quant._tuned_many, quant._tuned_gradient, *lut._TUNERS.values()):
        assert len(tuner.configs) == 1


def test_classes_of_shapes_know_their_device():
    cpu, meta = torch.zeros(1), torch.zeros(1, device="meta")
    assert _launch.shape_class(cpu, 2) - _launch.shape_class(cpu, 0) == 2
    assert _launch.shape_class(cpu, 0) != _launch.shape_class(meta, 0)
    assert 0 <= _launch.shape_class(cpu, 15) < 1 << 31
