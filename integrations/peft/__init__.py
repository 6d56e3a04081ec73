"""PEFT types that PEFT lacks, and what makes PEFT's own work on every quantized base."""

from hf_efficiency.integrations.peft.adadora import AdaDoRAConfig
from hf_efficiency.integrations.peft.adalora import AdaLoRACallback
from hf_efficiency.integrations.peft.bitfit import BitFitConfig
from hf_efficiency.integrations.peft.bottleneck import BottleneckConfig
from hf_efficiency.integrations.peft.compacter import CompacterConfig
from hf_efficiency.integrations.peft.dvora import DVoRAConfig
from hf_efficiency.integrations.peft.dylora import DyLoRAConfig
from hf_efficiency.integrations.peft.galore import GaLoreConfig
from hf_efficiency.integrations.peft.intrinsic import IntrinsicConfig
from hf_efficiency.integrations.peft.register import register
from hf_efficiency.integrations.peft.snell import SNELLConfig
from hf_efficiency.integrations.peft.sora import SoRACallback, SoRAConfig

__all__ = [
    "AdaDoRAConfig",
    "AdaLoRACallback",
    "BitFitConfig",
    "BottleneckConfig",
    "CompacterConfig",
    "DVoRAConfig",
    "DyLoRAConfig",
    "GaLoreConfig",
    "IntrinsicConfig",
    "SNELLConfig",
    "SoRACallback",
    "SoRAConfig",
    "register",
]

# Whoever imports PEFT through this package gets here before the hook that `import hf_efficiency` has set.
register()
