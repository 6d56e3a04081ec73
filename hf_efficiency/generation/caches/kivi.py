"""KIVI (Liu et al. 2024): keys quantized per channel, values per token, the newest tokens in full precision.

Tokens are quantized once, in whole groups, when enough newer ones have come; what is quantized is never touched again.
Groups are counted in a row's own text, so that a padded row is quantized as it would be alone.

Shape legend: b batch, k key-value heads, n tokens seen, r residual tokens, m groups, g group size, d head size.
"""

import torch
from torch import Tensor

from hf_efficiency.kernels.kv_attention import (
    Quantized,
    dequantize_keys,
    dequantize_values,
    quantize_keys,
    quantize_values,
)

_GROUPS = (256, 128, 64, 32, 16)


def value_group(head_size: int, group_size: int) -> int:
    """The largest group of channels, at most `group_size`, that a head of this size holds a whole number of.

    Raises:
        ValueError: There is none.
    """
    for size in _GROUPS:
        if size <= group_size and head_size % size == 0:
            return size
    raise ValueError(
        f"A head of size {head_size} can't be cut into groups of 16 or more channels, as quantized values need: use "
        "another cache for this model."
    )


class KiviStore:
    """Quantized groups of old tokens, and a residual of new ones.

    Attributes:
        keys: Codes and ranges, groups of g tokens of one channel; a row's text starts at its first group.
        values: Codes and ranges, groups of channels of one token, in the same order.
        residual: Keys and values (b, k, r, d) in full precision, ending with the newest token.
        groups: Quantized groups of each row.
        pads: Padding before each row's text, which is not stored once it is old.
        seen: n.
    """

    def __init__(self, keys: Tensor, values: Tensor, bits: int, group_size: int, window: int) -> None:
        """Empty, for tokens like those of keys and values.

        Raises:
            ValueError: A head size that the groups don't fit.
        """
        b, k, _, d = keys.shape
        self.bits, self.group_size, self.window = bits, group_size, window
        self.value_group = value_group(values.shape[3], group_size)
        self.keys = quantize_keys(keys.new_empty(b, k, 0, d), bits, group_size)
        self.values = quantize_values(values.new_empty(b, k, 0, values.shape[3]), bits, self.value_group)
        self.residual = (keys.new_empty(b, k, 0, d), values.new_empty(b, k, 0, values.shape[3]))
        self.groups, self.pads, self.seen = [0] * b, [0] * b, 0

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Adds new tokens (b, k, t, d) in full precision."""
        self.residual = (torch.cat((self.residual[0], keys), 2), torch.cat((self.residual[1], values), 2))
        self.seen += keys.shape[2]

    def full_precision(self) -> list[int]:
        """Tokens of each row that are not quantized."""
        return [self.seen - start for start in self.starts()]

    def starts(self) -> list[int]:
        """The place of each row's first token that is not quantized."""
        return [pad + count * self.group_size for pad, count in zip(self.pads, self.groups, strict=True)]

    def due(self, seen: int) -> list[int]:
        """Groups of each row that are to be quantized when so many tokens have been seen: all beyond the window."""
        return [max(0, (seen - start - self.window) // self.group_size) for start in self.starts()]

    def flush(self) -> None:
        """Quantizes the groups that are due."""
        due = self.due(self.seen)
        if not any(due):
            return
        r, g, starts = self.residual[0].shape[2], self.group_size, self.starts()
        first = [start - (self.seen - r) for start in starts]
        if len(set(first)) == len(set(due)) == len(set(self.groups)) == 1:
            span = slice(first[0], first[0] + due[0] * g)
            self.keys = _joined(self.keys, quantize_keys(self.residual[0][:, :, span], self.bits, g))
            new = quantize_values(self.residual[1][:, :, span], self.bits, self.value_group)
            self.values = _joined(self.values, new)
        else:
            self._flush_rows(due, first)
        self.groups = [count + more for count, more in zip(self.groups, due, strict=True)]
        left = max(0, min(self.seen, max(self.full_precision())))
        self.residual = tuple(x[:, :, r - left :].clone() for x in self.residual)  # type: ignore[assignment]

    def _flush_rows(self, due: list[int], first: list[int]) -> None:
        """As `flush`, where rows have different groups."""
        g, most = self.group_size, max(count + more for count, more in zip(self.groups, due, strict=True))
        keys, values = _widened(self.keys, most * g * self.bits // 32, most), _widened(self.values, most * g, most * g)
        for row, (more, start) in enumerate(zip(due, first, strict=True)):
            if more == 0:
                continue
            span, at = slice(start, start + more * g), self.groups[row]
            new = quantize_keys(self.residual[0][row : row + 1, :, span], self.bits, g)
            words = slice(at * g * self.bits // 32, (at + more) * g * self.bits // 32)
            keys.codes[row, :, words], keys.ranges[row, :, at : at + more] = new.codes[0], new.ranges[0]
            new = quantize_values(self.residual[1][row : row + 1, :, span], self.bits, self.value_group)
            tokens = slice(at * g, (at + more) * g)
            values.codes[row, :, tokens], values.ranges[row, :, tokens] = new.codes[0], new.ranges[0]
        self.keys, self.values = keys, values

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values (b, k, n, d) of all tokens; zeros for old padding."""
        stored = (unpack_keys(self.keys, self.residual[0].dtype), unpack_values(self.values, self.residual[1].dtype))
        both = tuple(torch.cat((old, new), 2) for old, new in zip(stored, self.residual, strict=True))
        if self.is_aligned():
            return both[0], both[1]
        places = self.places()
        order = places.new_full((places.shape[0], self.seen + 1), -1)
        count = torch.arange(places.shape[1], device=places.device).expand_as(places)
        order.scatter_(1, torch.where(places < 0, self.seen, places), count)
        order = order[:, None, : self.seen, None]
        out = [x.gather(2, order.clamp(min=0).expand(-1, x.shape[1], -1, x.shape[3])) for x in both]
        return out[0].masked_fill(order < 0, 0), out[1].masked_fill(order < 0, 0)

    def is_aligned(self) -> bool:
        """Whether the stored order is that of the tokens: no row has padding."""
        return not any(self.pads) and len(set(self.groups)) == 1

    def places(self) -> Tensor:
        """(b, m * g + r): which token each stored one is; -1 for none."""
        device, r, stored = self.residual[0].device, self.residual[0].shape[2], self.values.codes.shape[2]
        rows = []
        for pad, start in zip(self.pads, self.starts(), strict=True):
            old = torch.arange(pad, pad + stored, device=device)
            new = torch.arange(self.seen - r, self.seen, device=device)
            rows.append(torch.cat((old.masked_fill(old >= start, -1), new.masked_fill(new < start, -1))))
        return torch.stack(rows)

    def flushed(self, keys: Tensor, values: Tensor, due: list[int]) -> tuple[Tensor, Tensor]:
        """Dense keys and values (b, k, n, d) as they will be once the next `due` groups of each row are quantized."""
        keys, values = keys.clone(), values.clone()
        for row, (more, start) in enumerate(zip(due, self.starts(), strict=True)):
            if more:
                span = slice(start, start + more * self.group_size)
                new = quantize_keys(keys[row : row + 1, :, span], self.bits, self.group_size)
                keys[row : row + 1, :, span] = unpack_keys(new, keys.dtype)
                new = quantize_values(values[row : row + 1, :, span], self.bits, self.value_group)
                values[row : row + 1, :, span] = unpack_values(new, values.dtype)
        return keys, values

    def crop(self, remove: int) -> None:
        """Takes the newest tokens away; all of them must be in full precision."""
        self.residual = tuple(x[:, :, : x.shape[2] - remove].clone() for x in self.residual)  # type: ignore[assignment]
        self.seen -= remove

    def select(self, rows: Tensor) -> None:
        """Takes the batch's rows in this order."""
        tensors = {name: tensor.index_select(0, rows) for name, tensor in self.tensors().items()}
        self.set_tensors(tensors)
        order = rows.tolist()
        self.groups, self.pads = [self.groups[i] for i in order], [self.pads[i] for i in order]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name: what is saved, and what takes memory."""
        return {
            "key_codes": self.keys.codes,
            "key_ranges": self.keys.ranges,
            "value_codes": self.values.codes,
            "value_ranges": self.values.ranges,
            "residual_keys": self.residual[0],
            "residual_values": self.residual[1],
        }

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Takes tensors that `tensors` gave."""
        self.keys = Quantized(tensors["key_codes"], tensors["key_ranges"], self.bits)
        self.values = Quantized(tensors["value_codes"], tensors["value_ranges"], self.bits)
        self.residual = (tensors["residual_keys"], tensors["residual_values"])


def unpack_keys(keys: Quantized, dtype: torch.dtype) -> Tensor:
    """`dequantize_keys`, with fewer passes over memory on a CPU."""
    if keys.codes.device.type != "cpu" or keys.codes.numel() == 0:
        return dequantize_keys(keys, dtype)
    b, k, words, d = keys.codes.shape
    groups, in_byte = keys.ranges.shape[2], 8 // keys.bits
    # Byte j of a word holds the codes of its tokens from j * in_byte on.
    packed = keys.codes.view(torch.uint8).view(b, k, words, d, 4).movedim(4, 3).contiguous()
    numbers = torch.empty(b, k, words, 4, in_byte, d)
    for i in range(in_byte):
        numbers[:, :, :, :, i] = (packed >> (i * keys.bits)) & (2**keys.bits - 1)
    scale, minimum = (x.unsqueeze(3).float() for x in keys.ranges.unbind(-1))
    grouped = numbers.view(b, k, groups, -1, d)
    return torch.addcmul(minimum, grouped, scale, out=grouped).to(dtype).view(b, k, -1, d)


def unpack_values(values: Quantized, dtype: torch.dtype) -> Tensor:
    """`dequantize_values`, with fewer passes over memory on a CPU."""
    if values.codes.device.type != "cpu" or values.codes.numel() == 0:
        return dequantize_values(values, dtype)
    b, k, n, _ = values.codes.shape
    groups, in_byte = values.ranges.shape[3], 8 // values.bits
    packed = values.codes.view(torch.uint8)
    if in_byte > 1:
        codes = [(packed >> (i * values.bits)) & (2**values.bits - 1) for i in range(in_byte)]
        packed = torch.stack(codes, -1)
    scale, minimum = (x.unsqueeze(4).float() for x in values.ranges.unbind(-1))
    # Broadcast along the last dimension, where `addcmul` is slow.
    grouped = packed.view(b, k, n, groups, -1).float().mul_(scale).add_(minimum)
    return grouped.to(dtype).view(b, k, n, -1)


def _joined(old: Quantized, new: Quantized) -> Quantized:
    return Quantized(torch.cat((old.codes, new.codes), 2), torch.cat((old.ranges, new.ranges), 2), old.bits)


def _widened(x: Quantized, codes: int, ranges: int) -> Quantized:
    """With room for so many codes and ranges along the tokens; copies."""
    wide = []
    for tensor, size in ((x.codes, codes), (x.ranges, ranges)):
        new = tensor.new_zeros(*tensor.shape[:2], size, *tensor.shape[3:])
        new[:, :, : tensor.shape[2]] = tensor
        wide.append(new)
    return Quantized(wide[0], wide[1], x.bits)
