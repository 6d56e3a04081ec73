"""How codes become weights inside a Triton program. Shape legend: a chunk is 32 consecutive weights of a row."""

# Triton types the arguments of what it compiles.
# ruff: noqa: ANN001, ANN201
# mypy: disallow_untyped_defs=False, disallow_incomplete_defs=False

from typing import Any

import triton
import triton.language as tl

# Each lane keeps one entry of the table, lanes 16 to 31 once more, and gets that of the lane which the low 4 bits of
# its code name. All but the shuffle depends on the lane alone, so that the assembler does it once. Triton's programs
# never diverge around it: all lanes take part, and which element lies in which lane does not matter.
_SHUFFLE = tl.constexpr("""{
    .reg .b32 lane, entry;
    .reg .b64 at;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 at, lane, 4, $2;
    ld.global.nc.b32 entry, [at];
    shfl.sync.idx.b32 $0, entry, $1, 0x101f, 0xffffffff;
}""")
_SHUFFLE_HALF = tl.constexpr("""{
    .reg .b32 lane, entry;
    .reg .b16 half;
    .reg .b64 at;
    mov.u32 lane, %laneid;
    and.b32 lane, lane, 15;
    mad.wide.u32 at, lane, 2, $2;
    ld.global.nc.b16 half, [at];
    cvt.f32.f16 entry, half;
    shfl.sync.idx.b32 $0, entry, $1, 0x101f, 0xffffffff;
}""")


def _has_shuffle(_semantic: Any = None) -> tl.constexpr:
    """Whether the code is compiled, which is when Triton hands `_semantic` over, and for a card by NVIDIA."""
    return tl.constexpr(_semantic is not None and _semantic.builder.options.backend_name == "cuda")


_has_shuffle.__triton_builtin__ = True  # type: ignore[attr-defined]


@triton.jit
def octet_shifts():
    """Where the 8 codes of a word lie: two a byte, the first in the high nibble."""
    octet = tl.arange(0, 8)
    return octet // 2 * 8 + (1 - octet % 2) * 4


@triton.jit
def lookup(table_ptr, codes):
    """float32 entries of one table for all elements; bits of `codes` above the lowest 4 may be anything."""
    if _has_shuffle():
        if table_ptr.dtype.element_ty == tl.float16:
            return tl.inline_asm_elementwise(
                _SHUFFLE_HALF, "=f,r,l", [codes, table_ptr.to(tl.int64)], tl.float32, True, 1
            )
        else:
            return tl.inline_asm_elementwise(_SHUFFLE, "=f,r,l", [codes, table_ptr.to(tl.int64)], tl.float32, True, 1)
    else:
        return tl.load(table_ptr + (codes & 15)).to(tl.float32)


@triton.jit
def scale_of(block, mask, absmax_ptr, map_ptr, nested_ptr, offset_ptr):
    """float32 scales of blocks; in 8 bits where there is a map: map[code] * nested[block // 256] + offset."""
    scale = tl.load(absmax_ptr + block, mask, 0)
    if map_ptr is not None:
        wide = tl.load(map_ptr + scale.to(tl.int32)) * tl.load(nested_ptr + (block >> 8), mask, 0.0)
        return wide + tl.load(offset_ptr)
    else:
        return scale


@triton.jit
def stack(parts, LENGTH: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tensors (LENGTH,), a power of two of them up to 8, side by side: (LENGTH, COUNT)."""
    if COUNT == 1:
        return tl.reshape(parts[0], (LENGTH, 1))
    elif COUNT == 2:
        return tl.join(parts[0], parts[1])
    else:
        both = tl.join(stack(parts[0::2], LENGTH, COUNT // 2), stack(parts[1::2], LENGTH, COUNT // 2))
        return tl.reshape(both, (LENGTH, COUNT))


@triton.jit
def weight_tile(
    packed_ptr, table_ptr, absmax_ptr, map_ptr, nested_ptr, offset_ptr, row, column, d_in, d_out,
    SHIFT: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """float32 weights [row, row + ROWS) x [column, column + COLUMNS). Beyond d_out or d_in: finite, no more.

    ALIGNED: rows are whole chunks, which never cross a block, 2^SHIFT chunks a block: wide loads, one scale a chunk.
    """
    rows = tl.minimum(row + tl.arange(0, ROWS), d_out - 1)
    if ALIGNED:
        word = column // 8 + tl.arange(0, COLUMNS // 8)
        at = packed_ptr.to(tl.pointer_type(tl.int32)) + rows[:, None] * (d_in // 8) + word[None, :]
        words = tl.load(at, (word < d_in // 8)[None, :], 0)
        # Joined and not broadcast: then a thread holds the 8 weights of a word, and writes them at once.
        halves = tl.join(words, words >> 16)
        octets = tl.join(halves, halves >> 8)
        codes = tl.reshape(tl.join(octets >> 4, octets), (ROWS, COLUMNS))
    else:
        inside = (column + tl.arange(0, COLUMNS) < d_in)[None, :]
        flat = rows[:, None].to(tl.int64) * d_in + column + tl.arange(0, COLUMNS)[None, :]
        codes = tl.load(packed_ptr + (flat >> 1), inside, 0).to(tl.int32) >> ((1 - flat % 2) * 4).to(tl.int32)
    if absmax_ptr is None:
        return tl.load(table_ptr + rows[:, None] * 16 + (codes & 15)).to(tl.float32)
    else:
        values = lookup(table_ptr, codes)
        if ALIGNED:
            chunk = column // 32 + tl.arange(0, COLUMNS // 32)
            block = (rows[:, None] * (d_in // 32) + chunk[None, :]) >> SHIFT
            inside = (chunk < d_in // 32)[None, :]
            scale = scale_of(block, inside, absmax_ptr, map_ptr, nested_ptr, offset_ptr)
            wide = tl.reshape(values, (ROWS, COLUMNS // 32, 32)) * scale[:, :, None]
            return tl.reshape(wide, (ROWS, COLUMNS))
        else:
            return values * scale_of(flat >> (SHIFT + 5), inside, absmax_ptr, map_ptr, nested_ptr, offset_ptr)
