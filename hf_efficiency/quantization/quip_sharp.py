"""QuIP#: Hadamard incoherence, lattice codebooks, block LDLQ and fine-tuning.

Tseng et al., "QuIP#: Even Better LLM Quantization with Hadamard Incoherence and Lattice Codebooks" (ICML 2024).
Shape legend: n rows of activations, d_in, d_out features, d_pad: d_in rounded up to a multiple of 8.
"""

import hashlib
import logging
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hf_efficiency.calibration.method import BlockContext, BlockMethod, InputGroup
from hf_efficiency.quantization.e8p import CODEBOOKS, DIM
from hf_efficiency.quantization.hadamard import hadamard_transform
from hf_efficiency.quantization.layers.base import QuantizedLinear
from hf_efficiency.quantization.layers.lattice import LatticeLinear, signs
from hf_efficiency.quantization.ldlq import block_ldl, damped_cholesky, ldlq, sweep
from hf_efficiency.quantization.quip_tuning import tune_block

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class QuIPSharp(BlockMethod):
    """Lattice quantization to 2, 3 or 4 bits a weight, with no group constants.

    Attributes:
        bits: 2 (E8P), 3 (E8P and a 1-bit codebook of its residual) or 4 (E8P twice).
        seed: Of the random signs. Every layer stores a seed of its own that follows from this one.
        damp_percent: Share of the Hessian's mean diagonal that is added to the diagonal.
        sweeps: Passes of coordinate descent over the codes after LDLQ (beyond the paper; one lowers the proxy loss by
            3 to 14 %, and costs as much again as LDLQ).
        true_sequential: Layers inside a block see inputs that passed through the quantized layers before them.
        fine_tune_steps: Updates of each block's sign vectors and norms against the dense block's outputs; 0 for none.
        fine_tune_learning_rate: Of these updates.
        fine_tune_batches: Micro-batches (of `batch_size` sequences) that an update averages.
    """

    calibrated: ClassVar[bool] = True
    statistics: ClassVar[frozenset[str]] = frozenset({"hessian"})

    bits: int = 2
    seed: int = 0
    damp_percent: float = 0.01
    sweeps: int = 1
    true_sequential: bool = True
    fine_tune_steps: int = 0
    fine_tune_learning_rate: float = 5e-3
    fine_tune_batches: int = 1

    def __post_init__(self) -> None:
        self.validate()

    def validate(self) -> None:
        """ValueError for values out of range."""
        if self.bits not in CODEBOOKS:
            raise ValueError(
                f"bits={self.bits!r} has no lattice codebook: choose one of {', '.join(map(str, CODEBOOKS))}."
            )
        if not 0 < self.damp_percent < 1:
            raise ValueError(f"damp_percent={self.damp_percent} must lie between 0 and 1 (0.01 is usual).")
        for name in ("sweeps", "fine_tune_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative; 0 turns it off.")
        if self.fine_tune_batches < 1:
            raise ValueError(f"fine_tune_batches={self.fine_tune_batches} must be at least 1.")
        if not self.fine_tune_learning_rate > 0:
            raise ValueError(f"fine_tune_learning_rate={self.fine_tune_learning_rate} must be positive.")

    @property
    def keep_dense(self) -> bool:
        """Fine-tuning compares with the dense model."""
        return self.fine_tune_steps > 0

    @property
    def refines(self) -> bool:
        """Fine-tuning changes the block after its layers are stored."""
        return self.fine_tune_steps > 0

    def finish_block(self, ctx: BlockContext) -> None:
        """Fine-tunes the block."""
        if self.fine_tune_steps and ctx.layers:
            before, after = tune_block(
                ctx,
                steps=self.fine_tune_steps,
                learning_rate=self.fine_tune_learning_rate,
                micro_batches=self.fine_tune_batches,
                seed=self.seed,
            )
            logger.info("%s: fine-tuning took the relative error from %.4g to %.4g", ctx.name, before, after)

    def empty_layer(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        compute_dtype: torch.dtype,
        device: torch.device | str | None,
        conv1d: bool,
    ) -> QuantizedLinear:
        """A `LatticeLinear`; with fine-tuning, one that stores its vectors and not the seed."""
        return LatticeLinear(
            in_features,
            out_features,
            bits=self.bits,
            tuned=self.fine_tune_steps > 0,
            bias=bias,
            compute_dtype=compute_dtype,
            device=device,
            conv1d=conv1d,
        )

    def compress_group(self, group: InputGroup) -> None:
        """Rotates the members together, for they share the input's signs, and quantizes all their rows at once."""
        seed = layer_seed(self.seed, group.names[0])
        weights = group.weights()
        rotated = [rotate_weight(w, seed) for w in weights]
        scales = [w.square().mean().sqrt().clamp_min(torch.finfo(w.dtype).tiny) for w in rotated]
        codebook = CODEBOOKS[self.bits]
        target = torch.cat([w * (codebook.scale / s) for w, s in zip(rotated, scales, strict=True)])
        hessian = rotate_hessian(group.hessian, seed)
        factor, damped = damped_cholesky(hessian, self.damp_percent, group.names[0])
        codes, quantized = ldlq(target, block_ldl(factor), codebook.quantize)
        for _ in range(self.sweeps):
            sweep(target, codes, quantized, damped, codebook.quantize)
        start = 0
        for i, (name, scale) in enumerate(zip(group.names, scales, strict=True)):
            rows = slice(start, start + len(rotated[i]))
            start = rows.stop
            fit = best_scale(target[rows], quantized[rows], hessian)
            layer = group.new_layer(self, name)
            _fill(layer, [c[rows] for c in codes], fit * scale / codebook.scale, seed)
            group.store(name, layer)


def layer_seed(seed: int, name: str) -> int:
    """A seed below 2^63 for the group of layers whose first is called `name`."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def rotate_weight(weight: Tensor, seed: int) -> Tensor:
    """`H_m diag(SU) W diag(SV) H_n^T` of W (d_out, d_in), padded: (d_out, d_pad)."""
    su, sv = (v.to(weight.device) for v in signs(seed, weight.shape[1], weight.shape[0]))
    padded = torch.nn.functional.pad(weight * sv * su[:, None], (0, -weight.shape[1] % DIM))
    return hadamard_transform(hadamard_transform(padded), dim=0)


def rotate_hessian(hessian: Tensor, seed: int) -> Tensor:
    """The Hessian of the rotated inputs: (d_in, d_in) to (d_pad, d_pad)."""
    n = len(hessian)
    sv = signs(seed, n, n)[1].to(hessian.device)
    pad = -n % DIM
    padded = torch.nn.functional.pad(hessian * sv * sv[:, None], (0, pad, 0, pad))
    rotated = hadamard_transform(hadamard_transform(padded), dim=0)
    return (rotated + rotated.T) / 2


def best_scale(target: Tensor, quantized: Tensor, hessian: Tensor) -> Tensor:
    """The factor on `quantized` (r, n) that brings its outputs closest to those of `target`, a scalar."""
    outputs = quantized @ hessian
    power = (outputs * quantized).sum()
    factor = (outputs * target).sum() / power
    return torch.where(power > 0, factor, torch.ones_like(factor))


def _fill(layer: QuantizedLinear, codes: list[Tensor], scale: Tensor, seed: int) -> None:
    if not isinstance(layer, LatticeLinear):
        raise TypeError(f"QuIP# stores into LatticeLinear, got {type(layer).__name__}.")
    for stored, stage in zip(layer.stages(), codes, strict=True):
        stored.copy_(stage)
    layer.scale.copy_(scale)
    if layer.tuned:
        su, sv = signs(seed, layer.in_features, layer.out_features)
        layer.su.copy_(su)
        layer.sv.copy_(sv)
    else:
        layer.seed.fill_(seed)
