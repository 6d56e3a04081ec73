"""Quantization configs: each is a method of `hf_efficiency.quantization` under transformers' config class.

A config has a run-time name of its own, so that `from_pretrained` finds our quantizer whatever else is installed, and
is written to `config.json` under the name of the standard format it is stored in.
"""

import copy
import dataclasses
import re
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from hf_efficiency import __version__
from hf_efficiency.calibration.data import check_calibration
from hf_efficiency.calibration.hidden import OFFLOADS
from hf_efficiency.calibration.method import BlockMethod
from hf_efficiency.integrations.transformers.bnb_format import from_bnb_config, to_bnb_config
from hf_efficiency.quantization.awq import AWQ
from hf_efficiency.quantization.gptq import GPTQ
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.nf4 import NF4
from hf_efficiency.quantization.pack_quantized import PackQuantized
from hf_efficiency.quantization.quip_sharp import QuIPSharp
from hf_efficiency.quantization.rtn import RTN
from hf_efficiency.quantization.scheme import AffineMethod
from transformers.utils.quantization_config import QuantizationConfigMixin

# Of the quip_sharp format, which is our own.
FORMAT_VERSION = 1

# gptqmodel loads an asymmetric version-1 file only where `meta.quantizer` names a gptqmodel of at least this version,
# whose convention for zero points the file then follows. Ours do.
_ZERO_CONVENTION = "gptqmodel:0.9.0"

# What a run needs and a checkpoint must not hold.
RUN_FIELDS = ("calibration", "tokenizer", "batch_size", "offload", "resume_dir", "progress")
_NOT_META = {"quant_method", "bits", "group_size", "sym", "dynamic", "format", "modules_to_not_convert", *RUN_FIELDS}


@dataclass(kw_only=True, repr=False, eq=False)
class EfficiencyConfig(QuantizationConfigMixin, BlockMethod):
    """What all configs share.

    Attributes:
        quant_method: The run-time name; leave it alone.
        modules_to_not_convert: Names (or parts, or regular expressions, as in transformers) of layers that stay dense,
            besides those that always do: the output head, tied weights, embeddings and norms.
        calibration: A list of texts, a `datasets.Dataset` with a text column, token ids, `"default"` (prose of
            Python's language reference) or `"self"` (text that the model samples itself). Never saved.
        tokenizer: A tokenizer, or the name or folder of one; by default the one beside the model. Never saved.
        num_samples: Calibration sequences.
        seq_len: Tokens of each.
        batch_size: Sequences that run through a block together.
        seed: Seed of the draw of sequences, and of what the method draws.
        offload: Where hidden states wait between blocks: `"none"`, `"cpu"` or `"disk"`.
        resume_dir: Folder for finished blocks; an interrupted run started again with the same folder goes on.
        progress: Show a progress bar.
    """

    calibrated: ClassVar[bool] = False
    default_name: ClassVar[str]
    # Set while a model is loaded; stock formats write them down.
    compute_dtype: ClassVar[torch.dtype] = torch.float32
    skipped_modules: ClassVar[list[str] | None] = None
    # What a checkpoint that was read says of its making, to be written back.
    stored_meta: ClassVar[dict[str, Any] | None] = None
    # Whether the groups of a checkpoint that was read are permuted, so that its readers must heed `g_idx`.
    permuted: ClassVar[bool] = False
    # Tensors that mark a layer as packed in a checkpoint.
    packed_names: ClassVar[frozenset[str]] = frozenset({"qweight"})

    quant_method: str = ""  # type: ignore[assignment]  # transformers' enum has no member for a plug-in
    modules_to_not_convert: list[str] | None = None
    calibration: Any = "default"
    tokenizer: Any = None
    num_samples: int = 64
    seq_len: int = 512
    batch_size: int = 1
    seed: int = 0
    offload: str = "none"
    resume_dir: str | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        self.quant_method = self.default_name
        self.validate()

    def validate(self) -> None:
        """ValueError or TypeError for what can be checked before anything is loaded."""
        super().validate()  # the method's, next in the order of resolution
        if self.offload not in OFFLOADS:
            raise ValueError(f"offload={self.offload!r} is unknown: choose one of {', '.join(OFFLOADS)}.")
        if self.needs_calibration:
            check_calibration(self.calibration, self.num_samples, self.seq_len, self.batch_size)

    @property
    def needs_calibration(self) -> bool:
        """Whether quantizing needs data. A data-free method needs it only to be refined."""
        return self.calibrated or bool(getattr(self, "refine_steps", 0))

    def without_run_fields(self) -> "EfficiencyConfig":
        """A copy that no longer holds the calibration data or the tokenizer."""
        fresh = copy.copy(self)
        fresh.calibration, fresh.tokenizer, fresh.resume_dir = "default", None, None
        return fresh

    def stored_shapes(self, layer: QuantizedLinear) -> dict[str, tuple[int, ...]]:
        """Names in the file, below the layer's, and shapes of the tensors that a layer's checkpoint must hold."""
        return {name: shape for name, (shape, _) in layer.declare().items()}

    def meta(self) -> dict[str, Any]:
        """What made the checkpoint, for `config.json`: every field of the method that the format does not name."""
        if self.stored_meta is not None:
            return self.stored_meta
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _NOT_META}
        return {"quantizer": [f"hf_efficiency:{__version__}"], "method": type(self).__name__, **own}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "EfficiencyConfig | tuple[EfficiencyConfig, dict[str, Any]]":
        """Reads what `to_dict` wrote, and what others write in the same format; unknown keys are left out."""
        names = {f.name for f in dataclasses.fields(cls)} - {"quant_method"}
        meta = config_dict.get("meta") or {}
        merged = {**{k: v for k, v in meta.items() if k != "format"}, **config_dict, **kwargs}
        config = cls(**{k: v for k, v in cls.translate(merged).items() if k in names})
        config.stored_meta = meta or None  # type: ignore[misc]  # shadows the class's default
        unused = {k: v for k, v in kwargs.items() if k not in names}
        return (config, unused) if return_unused_kwargs else config

    @classmethod
    def translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """From the keys of the standard format to our fields."""
        return config_dict


def _keep_order(dynamic: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The same overrides, named so that they keep their order: the first match counts, and saving sorts the keys."""
    skips: dict[str, dict[str, Any]] = {pattern: {} for pattern in dynamic if pattern.startswith("-:")}
    others = [(pattern.removeprefix("+:"), value) for pattern, value in dynamic.items() if pattern not in skips]
    ordered = {**skips, **dict(others)}
    if sorted(ordered) == [*sorted(skips), *dict(others)]:
        return ordered
    numbered = {}
    for i, (pattern, value) in enumerate(others):
        flags = re.match(r"\(\?([aimsux]+)\)", pattern)  # flags of a whole expression may stand at its start only
        group = f"(?{flags[1]}:{pattern[flags.end() :]})" if flags else f"(?:{pattern})"
        numbered[f"^(?#{i:03d}){group}"] = value
    return {**skips, **numbered}


class _AffineConfig(EfficiencyConfig):
    """Configs that are stored in the gptq or awq format."""

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a GPTQ or AWQ checkpoint, as gptqmodel, AutoAWQ and vLLM read it."""
        if not isinstance(self, AffineMethod):
            raise TypeError(f"{type(self).__name__} is no affine method.")
        if self.format == "awq":
            return {
                "quant_method": "awq",
                "version": "gemm",
                "bits": self.bits,
                "group_size": self.group_size,
                "zero_point": True,
                "modules_to_not_convert": self.modules_to_not_convert,
                "meta": self.meta(),
            }
        skipped: dict[str, dict[str, Any]] = {f"-:.*{name}": {} for name in self.modules_to_not_convert or []}
        meta = self.meta()
        if self.stored_meta is None:
            meta["quantizer"] = [*meta["quantizer"], _ZERO_CONVENTION]
        return {
            "quant_method": "gptq",
            "bits": self.bits,
            "group_size": self.group_size,
            "sym": self.sym,
            # Our static groups leave the columns in place, so readers need no index; `meta` says what was asked for.
            "desc_act": self.permuted,
            "checkpoint_format": self.format,
            "pack_dtype": "int32",
            "lm_head": False,
            "dynamic": _keep_order({**self.dynamic, **skipped}),
            "modules_to_not_convert": self.modules_to_not_convert,
            "meta": meta,
        }

    @classmethod
    def translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps `checkpoint_format` and AWQ's `version` to `format`."""
        out = dict(config_dict)
        # Where both are given, older writers put the method ("gptq") under `format`.
        layout = config_dict.get("checkpoint_format") or config_dict.get("format")
        if config_dict.get("quant_method") == "awq":
            version = str(config_dict.get("version") or layout or "gemm").lower()
            if version != "gemm":
                raise ValueError(f"awq version {version!r} is not supported: only 'gemm' checkpoints can be read.")
            if not config_dict.get("zero_point", True):
                raise ValueError("awq checkpoints without zero points (zero_point=false) are not supported.")
            layout = "awq"
        if layout is not None:
            out["format"] = str(layout).lower()
        out["dynamic"] = config_dict.get("dynamic") or {}
        return out


@dataclass(kw_only=True, repr=False, eq=False)
class RTNConfig(_AffineConfig, RTN):
    """Round to nearest; no data needed. See `hf_efficiency.quantization.rtn.RTN` for the method's fields."""

    calibrated: ClassVar[bool] = False
    default_name: ClassVar[str] = "hf_efficiency_rtn"


@dataclass(kw_only=True, repr=False, eq=False)
class GPTQConfig(_AffineConfig, GPTQ):
    """GPTQ. See `hf_efficiency.quantization.gptq.GPTQ` for the method's fields."""

    calibrated: ClassVar[bool] = True
    default_name: ClassVar[str] = "hf_efficiency_gptq"


@dataclass(kw_only=True, repr=False, eq=False)
class AWQConfig(_AffineConfig, AWQ):
    """AWQ. See `hf_efficiency.quantization.awq.AWQ` for the method's fields."""

    calibrated: ClassVar[bool] = True
    default_name: ClassVar[str] = "hf_efficiency_awq"


@dataclass(kw_only=True, repr=False, eq=False)
class NF4Config(EfficiencyConfig, NF4):
    """NF4; no data needed. See `hf_efficiency.quantization.nf4.NF4` for the method's fields."""

    calibrated: ClassVar[bool] = False
    default_name: ClassVar[str] = "hf_efficiency_nf4"
    packed_names: ClassVar[frozenset[str]] = frozenset({"weight.absmax"})

    def stored_shapes(self, layer: QuantizedLinear) -> dict[str, tuple[int, ...]]:
        """bitsandbytes' names; the JSON of the quantization state has no fixed length."""
        spec = {name: shape for name, (shape, _) in layer.declare().items() if name != "nested_offset"}
        return {name if name == "weight" else f"weight.{name}": shape for name, shape in spec.items()}

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` of a 4-bit bitsandbytes checkpoint."""
        # A checkpoint that was read names them all; one made here knows them once the model is built.
        skipped = self.modules_to_not_convert if self.skipped_modules is None else self.skipped_modules
        return to_bnb_config(self, self.compute_dtype, skipped, self.meta())

    @classmethod
    def translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """From bitsandbytes' keys."""
        return from_bnb_config(config_dict) if "load_in_4bit" in config_dict else config_dict


@dataclass(kw_only=True, repr=False, eq=False)
class QuIPSharpConfig(EfficiencyConfig, QuIPSharp):
    """QuIP#. See `hf_efficiency.quantization.quip_sharp.QuIPSharp` for the method's fields."""

    calibrated: ClassVar[bool] = True
    default_name: ClassVar[str] = "quip_sharp"
    packed_names: ClassVar[frozenset[str]] = frozenset({"codes"})

    def to_dict(self) -> dict[str, Any]:
        """Our own format: no standard exists."""
        return {
            "quant_method": self.default_name,
            "format_version": FORMAT_VERSION,
            "bits": self.bits,
            "modules_to_not_convert": self.modules_to_not_convert,
            **{k: v for k, v in self.meta().items() if k not in ("num_samples", "seq_len")},
        }

    @classmethod
    def translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """ValueError for checkpoints of a later version of the format."""
        version = config_dict.get("format_version", FORMAT_VERSION)
        if version > FORMAT_VERSION:
            raise ValueError(
                f"This checkpoint has quip_sharp format_version={version}; hf_efficiency {__version__} reads up to "
                f"{FORMAT_VERSION}. Upgrade hf_efficiency."
            )
        return config_dict


@dataclass(kw_only=True, repr=False, eq=False)
class PackQuantizedConfig(EfficiencyConfig, PackQuantized):
    """Reads checkpoints that llm-compressor wrote (`compressed-tensors`, `pack-quantized`), and writes them back.

    It makes none: quantize with one of the other configs.
    """

    default_name: ClassVar[str] = "hf_efficiency_pack_quantized"
    packed_names: ClassVar[frozenset[str]] = frozenset({"weight_packed"})

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` as it was read."""
        return copy.deepcopy(self.config)

    @classmethod
    def translate(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        """Keeps the whole config, which says for each layer how it is stored."""
        return {"config": {k: v for k, v in config_dict.items() if v is not None}}


__all__ = [
    "AWQConfig",
    "EfficiencyConfig",
    "GPTQConfig",
    "NF4Config",
    "PackQuantizedConfig",
    "QuIPSharpConfig",
    "RTNConfig",
]
