"""compressed-tensors' `pack-quantized` layout (what llm-compressor writes), and its `quantization_config`.

Codes are unsigned: the signed integer of the format plus 2^(bits-1), for weights and zero points alike. They are packed
as one dense little-endian bit string a row, so that codes may straddle words; weights along d_in, zero points along
d_out. Shape legend: d_in, d_out features; g groups along d_in.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_efficiency.quantization.formats import AffineTensors, default_g_idx, group_count, pack_dense, unpack_dense
from hf_efficiency.quantization.layers.base import TensorSpec

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class PackQuantizedLayout:
    """`weight_packed`, `weight_scale`, `weight_zero_point` if asymmetric, `weight_shape`, `weight_g_idx` if ordered.

    Attributes:
        symmetric: No zero points are stored; they are all 2^(bits-1).
        act_order: The group of each column is stored in `weight_g_idx` (`actorder: "group"` of the format).
        group_size: Needed to tell the groups of a ragged last group apart; without it only whole groups are accepted.
        scale_dtype: dtype of the scales. float32 holds those of every checkpoint exactly.
    """

    symmetric: bool = False
    act_order: bool = False
    group_size: int | None = None
    scale_dtype: torch.dtype = torch.float32

    def check(self, in_features: int, out_features: int, bits: int, group_size: int) -> None:
        """ValueError for bits outside 1 .. 8 or groups that the stored tensors can't tell."""
        if not 1 <= bits <= 8:
            raise ValueError(f"the {FORMAT} format holds 1- to 8-bit codes, got bits={bits}.")
        if group_size != -1 and group_size < 1:
            raise ValueError(f"group_size must be -1 (one group a row) or at least 1, got {group_size}.")
        known = self.act_order or self.group_size == group_size
        if group_size != -1 and in_features % group_size and not known:
            raise ValueError(
                f"in_features={in_features} is no multiple of group_size={group_size}: give the layout the group size, "
                f"PackQuantizedLayout(group_size={group_size}), for the {FORMAT} tensors alone do not tell it."
            )

    def declare(self, in_features: int, out_features: int, bits: int, group_size: int) -> TensorSpec:
        """The tensors of one layer, the packed codes first."""
        groups = group_count(in_features, group_size)
        spec: TensorSpec = {
            "weight_packed": ((out_features, -(-in_features * bits // 32)), torch.int32),
            "weight_scale": ((out_features, groups), self.scale_dtype),
        }
        if not self.symmetric:
            spec["weight_zero_point"] = ((-(-out_features * bits // 32), groups), torch.int32)
        spec["weight_shape"] = ((2,), torch.int64)
        if self.act_order:
            spec["weight_g_idx"] = ((in_features,), torch.int32)
        return spec

    def pack(self, tensors: AffineTensors, bits: int) -> dict[str, Tensor]:
        """Plain form to stored tensors.

        Raises:
            ValueError: If the layout is symmetric and a zero point is not 2^(bits-1), or groups are permuted and the
                layout does not store them.
        """
        middle = 1 << (bits - 1)
        stored = {
            "weight_packed": pack_dense(tensors.codes, bits),
            "weight_scale": tensors.scales.to(self.scale_dtype),
        }
        if not self.symmetric:
            stored["weight_zero_point"] = pack_dense(tensors.zeros.T.contiguous(), bits).T.contiguous()
        elif not bool((tensors.zeros == middle).all()):
            raise ValueError(f"a symmetric {FORMAT} weight has zero point {middle} everywhere; use symmetric=False.")
        stored["weight_shape"] = torch.tensor(tensors.codes.shape, dtype=torch.int64, device=tensors.codes.device)
        if self.act_order:
            stored["weight_g_idx"] = tensors.g_idx.to(torch.int32)
        elif bool((tensors.g_idx.diff() < 0).any()):
            raise ValueError(f"the groups are permuted (desc_act); the {FORMAT} layout needs act_order=True for that.")
        return stored

    def unpack(self, stored: dict[str, Tensor], bits: int, in_features: int, out_features: int) -> AffineTensors:
        """Stored tensors to plain form; a `weight_shape` that contradicts the layer is a ValueError."""
        scales = stored["weight_scale"]
        shape = stored.get("weight_shape")
        if shape is not None and tuple(shape.tolist()) != (out_features, in_features):
            raise ValueError(
                f"weight_shape says {tuple(shape.tolist())}, the layer is ({out_features}, {in_features}): the "
                "checkpoint belongs to another architecture."
            )
        if self.symmetric:
            zeros = torch.full(scales.shape, 1 << (bits - 1), dtype=torch.uint8, device=scales.device)
        else:
            zeros = unpack_dense(stored["weight_zero_point"].T.contiguous(), bits, out_features).T.contiguous()
        codes = unpack_dense(stored["weight_packed"], bits, in_features)
        return AffineTensors(codes, scales, zeros, self._g_idx(stored, in_features, scales))

    def _g_idx(self, stored: dict[str, Tensor], in_features: int, scales: Tensor) -> Tensor:
        """Group of each column. Old checkpoints store -1 where no order was used."""
        index = stored.get("weight_g_idx")
        if index is not None and int(index[0]) >= 0:
            return index.to(torch.int32)
        size = self.group_size or in_features // scales.shape[1]
        return default_g_idx(in_features, size, scales.device)


@dataclass(frozen=True)
class WeightScheme:
    """How the weights of one config group are quantized.

    Attributes:
        bits: 1 .. 8.
        group_size: Columns that share a scale; -1 for one a row.
        symmetric: No zero points.
        act_order: `weight_g_idx` is stored.
    """

    bits: int
    group_size: int
    symmetric: bool
    act_order: bool = False

    def layout(self) -> PackQuantizedLayout:
        """The layout that reads a layer of this scheme."""
        return PackQuantizedLayout(self.symmetric, self.act_order, self.group_size)


@dataclass(frozen=True)
class PackQuantizedConfig:
    """The part of a `compressed-tensors` `quantization_config` that says which layer is stored how.

    Attributes:
        groups: (target, scheme) pairs; a target is a module name, `re:` and a regular expression, or a class name.
        ignore: Targets that stay dense.
    """

    groups: tuple[tuple[str, WeightScheme], ...]
    ignore: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "PackQuantizedConfig":
        """Parses the `quantization_config` of a checkpoint.

        Raises:
            ValueError: If a group is not weight-only integer `pack-quantized`, with what it is and the cure.
        """
        config_groups = config.get("config_groups")
        if not isinstance(config_groups, Mapping) or not config_groups:
            raise ValueError("a compressed-tensors quantization_config needs config_groups; none was found.")
        groups = []
        for name, group in config_groups.items():
            if not isinstance(group, Mapping):
                raise ValueError(f"config group {name!r} is no scheme but {group!r}; presets by name are not read.")
            scheme = _parse_scheme(name, group, group.get("format") or config.get("format"))
            groups += [(target, scheme) for target in group.get("targets", ())]
        return cls(tuple(groups), tuple(config.get("ignore") or ()))

    def scheme_for(self, name: str, classes: Iterable[str] = ("Linear",)) -> WeightScheme | None:
        """The scheme of the module called `name` whose classes are called `classes`, or None if it stays dense.

        As in the format, an exact name beats a regular expression, which beats a class.
        """
        names = set(classes)
        if any(_matches(target, name) or target in names for target in self.ignore):
            return None
        exact = [scheme for target, scheme in self.groups if target == name]
        pattern = [scheme for target, scheme in self.groups if target.startswith("re:") and _matches(target, name)]
        by_class = [scheme for target, scheme in self.groups if target in names]
        return next(iter(exact + pattern + by_class), None)


def _matches(target: str, name: str) -> bool:
    """`re:` targets match from the start of the name, others match the whole name."""
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def _parse_scheme(name: str, group: Mapping[str, Any], fmt: str | None) -> WeightScheme:
    """One entry of `config_groups`."""
    cure = "Load it with the compressed-tensors package, or quantize the dense model again."
    if fmt != FORMAT:
        raise ValueError(f"config group {name!r} is stored as {fmt!r}; only {FORMAT!r} is read here. {cure}")
    if group.get("input_activations") or group.get("output_activations"):
        raise ValueError(f"config group {name!r} quantizes activations too; only weights are read here. {cure}")
    weights = group.get("weights") or {}
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    if kind != "int" or not isinstance(bits, int) or not 1 <= bits <= 8:
        raise ValueError(f"config group {name!r} holds {kind!r} weights of {bits} bits, not 1 to 8 bit 'int'. {cure}")
    if strategy not in ("group", "channel"):
        raise ValueError(
            f"config group {name!r} has strategy {strategy!r}; 'group' and 'channel' are read here. {cure}"
        )
    size = weights.get("group_size") if strategy == "group" else -1
    if not isinstance(size, int) or (strategy == "group" and size < 1):
        raise ValueError(f"config group {name!r} has strategy 'group' and group_size {size!r}; it must be at least 1.")
    act_order = str(weights.get("actorder")).lower() in ("group", "dynamic", "true")
    return WeightScheme(bits, size, bool(weights.get("symmetric", True)), act_order)
