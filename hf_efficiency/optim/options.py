"""What a group of weights may be told about its low-rank states, and the published variants as rows of a table.

- GaLore: Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (ICML 2024).
- Q-GaLore: Zhang et al., "Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients"
  (2024).
- APOLLO: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance" (MLSys 2025).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

PROJECTIONS = ("power", "randomized", "svd", "random")
UPDATES = ("project_back", "channel", "tensor")
SIDES = ("auto", "left", "right")


@dataclass(frozen=True, kw_only=True)
class GaLoreOptions:
    """The options of one parameter group. Each is a key of the group, so that a checkpoint holds them.

    Attributes:
        rank: r, the columns of the projection; None for a group that is not projected (plain AdamW).
        update_proj_gap: T, steps between two refreshes of the subspace.
        scale: α, multiplies the update on its way back to the weight.
        side: Where the projection stands: `"left"` (r, n), `"right"` (m, r) or `"auto"`, the shorter side, which
            makes the projection small.
        projection: How the subspace is found. `"svd"`: the first r singular vectors of the gradient, exactly.
            `"randomized"`: by a randomized SVD (Halko et al. 2011). `"power"`: by one block power step from the old
            basis, which also keeps the meaning of the moments' coordinates; the first basis is a randomized SVD.
            `"random"`: Gaussian numbers from a seed; only the seed is kept.
        update: `"project_back"` (GaLore), or the raw gradient scaled by what Adam does in the low-rank space, by
            `"channel"` (APOLLO) or by one number for the whole `"tensor"` (APOLLO-Mini).
        state_bits: 32, or 8 for block-wise 8-bit moments (Dettmers et al. 2022). In a group that is not projected
            parameters below 4,096 elements keep 32 bits.
        projection_bits: None: the projection has the dtype of the weight. 8 or 4: integer codes (Q-GaLore).
        lazy_threshold: Q-GaLore's lazy update: a weight whose subspace stayed this similar `lazy_patience` times
            running is refreshed half as often from then on. Similarity is the mean squared cosine of the principal
            angles, from 0 to 1. None: every T steps, always.
        lazy_patience: k of the lazy update.
        growth_limit: γ, bounds how much the norm of an update by channel or tensor may grow in one step (APOLLO's
            norm-growth limiter). None: no bound.
        seed: Of what is drawn.
    """

    rank: int | None = None
    update_proj_gap: int = 200
    scale: float = 0.25
    side: str = "auto"
    projection: str = "power"
    update: str = "project_back"
    state_bits: int = 32
    projection_bits: int | None = None
    lazy_threshold: float | None = None
    lazy_patience: int = 5
    growth_limit: float | None = 1.01
    seed: int = 0

    def __post_init__(self) -> None:
        """ValueError or TypeError for values out of range."""
        for name, least in (("rank", 1), ("update_proj_gap", 1), ("lazy_patience", 1), ("seed", 0)):
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be an integer.")
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        for name, choices in (
            ("side", SIDES),
            ("projection", PROJECTIONS),
            ("update", UPDATES),
            ("state_bits", (32, 8)),
            ("projection_bits", (None, 8, 4)),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(repr(choice) for choice in choices)
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {listed}.")
        if not self.scale > 0 or math.isinf(self.scale):
            raise ValueError(f"scale={self.scale} must be a positive number (0.25 is GaLore's).")
        if self.lazy_threshold is not None and not 0 < self.lazy_threshold <= 1:
            raise ValueError(
                f"lazy_threshold={self.lazy_threshold} must lie in (0, 1] (0.4 is Q-GaLore's), or be None."
            )
        if self.growth_limit is not None and not self.growth_limit > 1:
            raise ValueError(f"growth_limit={self.growth_limit} must be above 1 (1.01 is APOLLO's), or None.")
        if self.projection == "random" and (self.projection_bits is not None or self.lazy_threshold is not None):
            raise ValueError(
                "projection='random' keeps a seed and no projection, and its subspaces are never similar: leave out "
                "projection_bits and lazy_threshold."
            )

    @classmethod
    def of(cls, group: dict[str, Any]) -> "GaLoreOptions":
        """The options that stand in a parameter group."""
        return cls(**{name: group[name] for name in OPTION_NAMES})


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(GaLoreOptions))

# Rank and scale as the papers pretrain with; each can be overridden.
VARIANTS: dict[str, dict[str, Any]] = {
    "galore": {"rank": 128},
    "galore-8bit": {"rank": 128, "state_bits": 8},
    "q-galore": {"rank": 128, "state_bits": 8, "projection_bits": 4, "lazy_threshold": 0.4},
    "apollo": {"rank": 256, "projection": "random", "update": "channel", "scale": 1.0},
    "apollo-mini": {"rank": 1, "projection": "random", "update": "tensor", "scale": math.sqrt(128)},
}


def variant_options(variant: str, **overrides: Any) -> GaLoreOptions:
    """The options of a row of `VARIANTS`.

    Args:
        variant: A name in `VARIANTS`.
        **overrides: Fields of `GaLoreOptions` that differ from the row.

    Raises:
        ValueError: For an unknown name, or values out of range.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant={variant!r} is unknown: choose one of {', '.join(VARIANTS)}.")
    return GaLoreOptions(**{**VARIANTS[variant], **overrides})
