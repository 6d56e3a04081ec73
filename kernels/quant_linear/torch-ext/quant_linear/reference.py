"""Plain torch: the truth in tests, and what runs without a kernel.

Shape legend: n rows, d_in, d_out features, g groups along d_in. w[i, o] = scales[group of i, o] * (code - zero point).
"""

import torch
from torch import Tensor

# Where the nibble of output 8 j + c lies in word j of an AWQ tensor.
AWQ_SHIFTS = (0, 16, 4, 20, 8, 24, 12, 28)


def gptq_linear(
    x: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> Tensor:
    """x W + bias, (n, d_out) in the dtype of x. Arguments as for the public function, x (n, d_in)."""
    weight = gptq_weight(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset).to(x.dtype)
    y = x @ weight
    return y if bias is None else y + bias.to(y.dtype)


def gptq_linear_backward(
    grad: Tensor,
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> Tensor:
    """The gradient with respect to x (n, d_in) for grad (n, d_out)."""
    weight = gptq_weight(qweight, qzeros, scales, g_idx, bits, group_size, zero_offset).to(grad.dtype)
    return grad @ weight.T


def awq_linear(
    x: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, bias: Tensor | None, group_size: int
) -> Tensor:
    """x W + bias, (n, d_out) in the dtype of x. Arguments as for the public function, x (n, d_in)."""
    y = x @ awq_weight(qweight, qzeros, scales, group_size).to(x.dtype)
    return y if bias is None else y + bias.to(y.dtype)


def awq_linear_backward(grad: Tensor, qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The gradient with respect to x (n, d_in) for grad (n, d_out)."""
    return grad @ awq_weight(qweight, qzeros, scales, group_size).to(grad.dtype).T


def gptq_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    bits: int,
    group_size: int,
    zero_offset: int,
) -> Tensor:
    """The dense weight in float32, (d_in, d_out)."""
    codes = unpack(qweight, bits)
    if bits == 3:  # a code may cross words there: what was subtracted never borrows from a neighbour
        zeros = (unpack(qzeros.T, bits).T + zero_offset) & 7
    else:
        zeros = unpack((qzeros + zero_offset * sum(1 << bit for bit in range(0, 32, bits))).T, bits).T
    return _scaled(codes, zeros, scales, _groups(codes, group_size) if g_idx is None else g_idx.long())


def awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """The dense weight in float32, (d_in, d_out)."""
    shifts = torch.tensor(AWQ_SHIFTS, device=qweight.device, dtype=torch.int32)
    codes, zeros = (((words.unsqueeze(-1) >> shifts) & 15).flatten(1) for words in (qweight, qzeros))
    return _scaled(codes, zeros, scales, _groups(codes, group_size))


def unpack(words: Tensor, bits: int) -> Tensor:
    """int32 words (w, k), one bit string a column with its low end first, to int32 codes (w * 32 / bits, k)."""
    if bits == 3:
        a, b, c = (words[i::3].long() & 0xFFFFFFFF for i in range(3))
        # 96 bits are four parts of 24, of 8 whole codes each.
        parts, step = [a, a >> 24 | b << 8, b >> 16 | c << 16, c >> 8], 24
    else:
        parts, step = [words], 32
    codes = [(part >> shift) & ((1 << bits) - 1) for part in parts for shift in range(0, step, bits)]
    return torch.stack(codes, dim=1).flatten(0, 1).int()


def _groups(codes: Tensor, group_size: int) -> Tensor:
    index = torch.arange(codes.shape[0], device=codes.device)
    return index // (group_size if group_size > 0 else codes.shape[0])


def _scaled(codes: Tensor, zeros: Tensor, scales: Tensor, group: Tensor) -> Tensor:
    return (codes - zeros[group]).float() * scales.float()[group]
