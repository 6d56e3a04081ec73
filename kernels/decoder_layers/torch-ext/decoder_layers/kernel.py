"""The Triton code. Imported on the first launch only.

Nothing is tuned: a width sets the block and its warps (`_warps`), and no other reads a row once.

Shape legend: n rows, d features; a program takes whole rows, or a block of elements.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import Variant

_BLOCK = 1024  # elements of a program of `silu_mul`
# Programs that share the rows of `rms_norm_backward`: each sums its own part of the weight's gradient.
_PARTS = 132


def _warps(columns: int) -> int:
    """16 bytes a lane and load: 8 half-precision elements."""
    return max(1, min(16, columns // 256))


@triton.jit
def _rms_norm(x_ptr, w_ptr, y_ptr, d, stride, eps, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    mask = column < d
    x = tl.load(x_ptr + row * stride + column, mask, 0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask, 0.0).to(tl.float32)
    scaled = x * tl.rsqrt(tl.sum(x * x) / d + eps)
    y = scaled.to(x_ptr.dtype.element_ty).to(tl.float32) * w
    tl.store(y_ptr + row * d + column, y, mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As in `reference.py`."""
    n, d = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    y = torch.empty(n, d, dtype=torch.promote_types(x.dtype, weight.dtype), device=x.device)
    columns = triton.next_power_of_2(d)
    if n:
        _rms_norm[(n,)](x, weight.contiguous(), y, d, x.stride(0), eps, columns, num_warps=_warps(columns))
    return y


@triton.jit
def _rms_norm_backward(g_ptr, x_ptr, w_ptr, gx_ptr, gw_ptr, n, d, eps, COLUMNS: tl.constexpr):
    part, parts = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, COLUMNS)
    mask = column < d
    w = tl.load(w_ptr + column, mask, 0.0).to(tl.float32)
    total = tl.zeros((COLUMNS,), tl.float32)
    for row in range(part, n, parts):
        start = tl.cast(row, tl.int64) * d
        x = tl.load(x_ptr + start + column, mask, 0.0).to(tl.float32)
        g = tl.load(g_ptr + start + column, mask, 0.0).to(tl.float32)
        inverse = tl.rsqrt(tl.sum(x * x) / d + eps)
        scaled = x * inverse
        inner = g * w
        gx = inverse * (inner - scaled * (tl.sum(inner * scaled) / d))
        tl.store(gx_ptr + start + column, gx, mask)
        total += g * scaled.to(x_ptr.dtype.element_ty).to(tl.float32)
    tl.store(gw_ptr + part * d + column, total, mask)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    n, d = x.shape
    parts = max(1, min(n, _PARTS))
    grad_x = torch.empty(n, d, dtype=x.dtype, device=x.device)
    sums = torch.empty(parts, d, dtype=torch.float32, device=x.device)
    columns = triton.next_power_of_2(d)
    _rms_norm_backward[(parts,)](
        grad.contiguous(), x.contiguous(), weight.contiguous(), grad_x, sums, n, d, eps, columns,
        num_warps=_warps(columns),
    )  # fmt: skip
    return grad_x, sums.sum(0).to(weight.dtype)


@triton.jit
def _silu_mul(gate_ptr, up_ptr, y_ptr, d, gate_stride, up_stride, BLOCK: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < d
    gate = tl.load(gate_ptr + row * gate_stride + column, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + column, mask, 0.0).to(tl.float32)
    tl.store(y_ptr + row * d + column, gate * tl.sigmoid(gate) * up, mask)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As in `reference.py`. Rows may lie apart, as the halves of one fused projection do."""
    gate, up = (t if t.stride(1) == 1 else t.contiguous() for t in (gate, up))
    n, d = gate.shape
    y = torch.empty(n, d, dtype=gate.dtype, device=gate.device)
    for start in range(0, n, 65535):  # the limit of a grid's second dimension
        a, b, c = (t[start : start + 65535] for t in (gate, up, y))
        _silu_mul[(triton.cdiv(d, _BLOCK), len(a))](a, b, c, d, a.stride(0), b.stride(0), _BLOCK)
    return y


@triton.jit
def _silu_mul_backward(g_ptr, gate_ptr, up_ptr, g_gate_ptr, g_up_ptr, count, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < count
    g = tl.load(g_ptr + index, mask, 0.0).to(tl.float32)
    gate = tl.load(gate_ptr + index, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + index, mask, 0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    tl.store(g_gate_ptr + index, g * up * s * (1 + gate * (1 - s)), mask)
    tl.store(g_up_ptr + index, g * gate * s, mask)


def silu_mul_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As in `reference.py`."""
    grad_gate, grad_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
    count = gate.numel()
    if count:
        _silu_mul_backward[(triton.cdiv(count, _BLOCK),)](
            grad.contiguous(), gate.contiguous(), up.contiguous(), grad_gate, grad_up, count, _BLOCK
        )
    return grad_gate, grad_up


def variants() -> list[Variant]:
    """Every compilation that a launch may ask for, at the sizes of common models."""
    columns = (1024, 4096, 8192)
    norm = {"x_ptr": "*bf16", "w_ptr": "*bf16", "y_ptr": "*bf16", "d": "i32", "stride": "i32", "eps": "fp32"}
    back = dict.fromkeys(("g_ptr", "x_ptr", "w_ptr", "gx_ptr"), "*bf16")
    back |= {"gw_ptr": "*fp32", "n": "i32", "d": "i32", "eps": "fp32"}
    gate = {"gate_ptr": "*bf16", "up_ptr": "*bf16", "y_ptr": "*bf16", "d": "i32", "gate_stride": "i32"}
    gate |= {"up_stride": "i32"}
    gates = dict.fromkeys(("g_ptr", "gate_ptr", "up_ptr", "g_gate_ptr", "g_up_ptr"), "*bf16") | {"count": "i32"}

    def streaming(
        label: str, function: Any, signature: dict[str, str], constexprs: dict[str, int], warps: int = 4
    ) -> Variant:
        divisible = [name for name, kind in signature.items() if kind != "fp32"]
        return Variant(label, function, signature, constexprs, warps, bandwidth_bound=True, divisible=divisible)

    made = [streaming(f"rms_norm {c}", _rms_norm, norm, {"COLUMNS": c}, _warps(c)) for c in columns]
    made += [streaming(f"rms_norm_backward {c}", _rms_norm_backward, back, {"COLUMNS": c}, _warps(c)) for c in columns]
    made.append(streaming("silu_mul", _silu_mul, gate, {"BLOCK": _BLOCK}))
    made.append(streaming("silu_mul_backward", _silu_mul_backward, gates, {"BLOCK": _BLOCK}))
    return made
