"""Shapes of common models. See `benchmarks/kernel_case.py`."""

from functools import partial

import torch
from kernel_case import Case, Run
from torch.nn import functional as F

from hf_efficiency.kernels.quant_linear import awq_linear, gptq_linear, reference

_HALF = 2  # bytes of a bfloat16
_GROUP = 128


def cases() -> list[Case]:
    """Decode, small batches and prefill; other bits and AWQ at one shape."""
    shapes = ((4096, 4096), (4096, 14336), (8192, 28672))
    made = [_case(n, d_in, d_out, 4) for d_in, d_out in shapes for n in (1, 16, 64, 2048)]
    made += [_case(1, 4096, 14336, bits) for bits in (2, 3, 8)]
    return made + [_case(n, 4096, 14336, 4, awq=True) for n in (1, 64, 2048)]


def _goal(n: int, bits: int) -> str:
    if n == 1 and bits == 4:
        return "at least 75 % of the bandwidth of a copy"
    return "not slower than cuBLAS" if n <= 64 else ""


def _case(n: int, d_in: int, d_out: int, bits: int, awq: bool = False) -> Case:
    groups = d_in // _GROUP

    def make(device: torch.device, seed: int) -> dict[str, Run]:
        torch.manual_seed(seed)
        words = partial(torch.randint, -(1 << 31), 1 << 31, dtype=torch.int32, device=device)
        packed = (d_in, d_out // 8) if awq else (d_in * bits // 32, d_out)
        qweight, qzeros = words(packed), words((groups, d_out * bits // 32))
        scales = (torch.rand(groups, d_out, device=device) / 100).half()
        x = torch.randn(n, d_in, device=device, dtype=torch.bfloat16)
        if awq:
            kernel = partial(awq_linear, x, qweight, qzeros, scales, group_size=_GROUP)
            plain = partial(reference.awq_linear, x, qweight, qzeros, scales, None, _GROUP)
            weight = reference.awq_weight(qweight, qzeros, scales, _GROUP)
        else:
            kernel = partial(gptq_linear, x, qweight, qzeros, scales, bits=bits, group_size=_GROUP)
            plain = partial(reference.gptq_linear, x, qweight, qzeros, scales, None, None, bits, _GROUP, 1)
            weight = reference.gptq_weight(qweight, qzeros, scales, None, bits, _GROUP, 1)
        dense = weight.T.to(torch.bfloat16).contiguous()
        return {"kernel": kernel, "reference": plain, "cuBLAS bf16": partial(F.linear, x, dense)}

    name = "awq" if awq else f"gptq {bits} bits"
    moved = d_in * d_out * bits // 8 + groups * d_out * (_HALF + bits / 8) + n * (d_in + d_out) * _HALF
    return Case(f"{name} {n} x {d_in} x {d_out}", int(moved), 2 * n * d_in * d_out, make, goal=_goal(n, bits))
