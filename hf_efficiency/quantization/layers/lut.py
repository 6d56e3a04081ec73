"""4-bit lookup tables with blockwise scales, in bitsandbytes' tensors: w = table[code] * absmax[block].

A block is `block_size` consecutive elements of the flattened weight, so it may cross rows. With double quantization the
block scales are 8-bit codes into a second table: absmax[i] = nested_quant_map[code[i]] * nested_absmax[i // 256]
+ nested_offset (QLoRA, https://arxiv.org/abs/2305.14314). Shape legend: d_out, d_in features; m blocks.
"""

import json
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.quantization.layers.base import QuantizedLinear, TensorSpec

BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
QUANT_TYPES = ("nf4", "fp4")
NESTED_BLOCK = 256


class LUTLinear(QuantizedLinear):
    """Storage layer of NF4, and of FP4 checkpoints: two 4-bit codes a byte, the first in the high nibble.

    Args:
        in_features: d_in.
        out_features: d_out.
        block_size: Elements that share a scale, one of `BLOCK_SIZES`. The last block may be smaller.
        double_quant: Whether the block scales are stored in 8 bits.
        quant_type: What bitsandbytes calls the table, `"nf4"` or `"fp4"`; the table itself is the buffer `quant_map`.
        quant_storage: dtype as which the bytes of the codes are stored (FSDP wants that of the other weights).
        bias: Whether the layer has a bias.
        compute_dtype: dtype of `dequantize()`.
        device: Device of the tensors.
        conv1d: See `QuantizedLinear`.

    Raises:
        ValueError: If `block_size` or `quant_type` is none that bitsandbytes knows.
    """

    weight: Tensor
    absmax: Tensor
    quant_map: Tensor
    nested_absmax: Tensor
    nested_quant_map: Tensor
    nested_offset: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        bias: bool = False,
        compute_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        conv1d: bool = False,
    ) -> None:
        check_table(block_size, quant_type)
        self.block_size = block_size
        self.double_quant = double_quant
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        self.in_features, self.out_features = in_features, out_features
        super().__init__(
            in_features, out_features, bias=bias, compute_dtype=compute_dtype, device=device, conv1d=conv1d
        )

    def declare(self) -> TensorSpec:
        """bitsandbytes' tensors by the part of their names after `weight.`; `nested_offset` stands for its JSON."""
        numel = self.in_features * self.out_features
        blocks = -(-numel // self.block_size)
        spec: TensorSpec = {
            "weight": ((-(-numel // (2 * self.quant_storage.itemsize)), 1), self.quant_storage),
            "absmax": ((blocks,), torch.uint8 if self.double_quant else torch.float32),
            "quant_map": ((16,), torch.float32),
            "nested_offset": ((), torch.float32),
        }
        if self.double_quant:
            spec["nested_absmax"] = ((-(-blocks // NESTED_BLOCK),), torch.float32)
            spec["nested_quant_map"] = ((256,), torch.float32)
        return spec

    def store(self, tensors: dict[str, Tensor]) -> None:
        """Copies tensors named as in `declare()` into the layer; `quant_map` and the rest must have their shapes."""
        for name, value in tensors.items():
            getattr(self, name).copy_(value)

    def scales(self, first: int = 0, last: int | None = None) -> Tensor:
        """The float32 scales of blocks [first, last), (last - first,)."""
        codes = self.absmax[first:last]
        if not self.double_quant:
            return codes
        block = torch.arange(first, first + codes.shape[0], device=codes.device) // NESTED_BLOCK
        return self.nested_quant_map[codes.int()] * self.nested_absmax[block] + self.nested_offset

    def dequantize(self) -> Tensor:
        """table[code] * scale in float32, rounded once to `compute_dtype`; (d_out, d_in)."""
        return self.dequantize_rows(0, self.out_features)

    def dequantize_rows(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of the weight, decoding only the blocks that they touch."""
        size = self.block_size
        begin, end = start * self.in_features, stop * self.in_features
        first, last = begin // size, -(-end // size)
        octets = self.weight.view(torch.uint8).flatten()[first * size // 2 : last * size // 2]
        values = self._pairs().index_select(0, octets.int()).view(torch.float32)
        scales = self.scales(first, last)
        whole = values.numel() // size * size
        values[:whole].view(-1, size).mul_(scales[: whole // size, None])
        if whole < values.numel():  # the ragged last block
            values[whole:].mul_(scales[-1])
        rows = values[begin - first * size : end - first * size].view(stop - start, self.in_features)
        return rows.to(self.compute_dtype)

    def kernel_forward(self, x: Tensor) -> Tensor | None:
        """See `QuantizedLinear`; None for a dtype that the kernel lacks."""
        from hf_efficiency.kernels.lut_linear import lut_linear

        if x.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            return None
        nested = ("nested_quant_map", "nested_absmax", "nested_offset") if self.double_quant else ()
        octets = self.weight.view(torch.uint8).view(-1)[: -(-self.in_features * self.out_features // 2)]
        return lut_linear(
            x,
            octets,
            self.quant_map,
            self.absmax,
            self.bias,
            out_features=self.out_features,
            block_size=self.block_size,
            **{name.replace("quant_", ""): getattr(self, name) for name in nested},
        )

    def _pairs(self) -> Tensor:
        """(256,) int64: the two float32 values that a byte stands for, as one word. One gather decodes two codes."""
        octet = torch.arange(256, device=self.quant_map.device)
        return torch.stack([self.quant_map[octet >> 4], self.quant_map[octet & 15]], dim=-1).view(torch.int64).view(-1)

    def quant_state(self, nested_offset: Tensor | None = None) -> Tensor:
        """bitsandbytes' `quant_state.bitsandbytes__nf4`: uint8 bytes of the JSON that says how to decode.

        Args:
            nested_offset: () to write instead of the layer's own, where that one is offloaded.
        """
        state: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": self.block_size,
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "shape": [self.out_features, self.in_features],
        }
        if self.double_quant:
            offset = (self.nested_offset if nested_offset is None else nested_offset).item()
            state |= {"nested_blocksize": NESTED_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    def read_quant_state(self, octets: Tensor) -> Tensor:
        """Takes block size and table name from a checkpoint's `quant_state` and returns its `nested_offset` ().

        Raises:
            ValueError: If the bytes are no such JSON, or describe a weight that this layer can't hold.
        """
        try:
            state = json.loads(bytes(octets.tolist()))
            size, kind, shape = state["blocksize"], state["quant_type"], tuple(state["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"quant_state is not the JSON of bitsandbytes ({error!r}): the file is damaged."
            ) from error
        if shape != (self.out_features, self.in_features):
            raise ValueError(
                f"quant_state says shape {shape}, the layer is ({self.out_features}, {self.in_features}): the "
                "checkpoint belongs to another architecture."
            )
        if ("nested_offset" in state) != self.double_quant or state.get("nested_blocksize", 256) != NESTED_BLOCK:
            raise ValueError(
                f"quant_state {state} contradicts bnb_4bit_use_double_quant={self.double_quant} of config.json "
                f"(scales in blocks of {NESTED_BLOCK}); correct the config."
            )
        check_table(size, kind)
        self.block_size, self.quant_type = size, kind
        for name, (expected, dtype) in self.declare().items():
            if getattr(self, name).is_meta and getattr(self, name).shape != expected:  # not loaded yet
                setattr(self, name, torch.empty(expected, dtype=dtype, device="meta"))
        return torch.tensor(float(state.get("nested_offset", 0.0)), dtype=torch.float32, device=octets.device)

    def extra_repr(self) -> str:
        """Sizes, table and block size."""
        return (
            f"{super().extra_repr()}, quant_type={self.quant_type}, block_size={self.block_size}, "
            f"double_quant={self.double_quant}"
        )


def check_table(block_size: int, quant_type: str) -> None:
    """ValueError for a block size or table that bitsandbytes does not have."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}.")
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type={quant_type!r} must be one of {', '.join(QUANT_TYPES)}.")
