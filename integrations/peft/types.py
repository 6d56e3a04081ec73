"""The names of our PEFT types."""

import enum


class EfficiencyPeftType(enum.StrEnum):
    """Beside `peft.PeftType`, which offers no way to add a member; both hash and compare as their string."""

    ADADORA = "ADADORA"
    BITFIT = "BITFIT"
    BOTTLENECK = "BOTTLENECK"
    COMPACTER = "COMPACTER"
    DVORA = "DVORA"
    DYLORA = "DYLORA"
    GALORE = "GALORE"
    INTRINSIC = "INTRINSIC"
    SNELL = "SNELL"
    SORA = "SORA"
