"""Makes our PEFT types known to PEFT."""

from typing import Any

from hf_efficiency.integrations.peft.adadora import AdaDoRAModel
from hf_efficiency.integrations.peft.bitfit import BitFitModel
from hf_efficiency.integrations.peft.bottleneck import BottleneckModel
from hf_efficiency.integrations.peft.compacter import CompacterModel
from hf_efficiency.integrations.peft.dvora import DVoRAModel
from hf_efficiency.integrations.peft.dylora import DyLoRAModel
from hf_efficiency.integrations.peft.galore import GaLoreModel
from hf_efficiency.integrations.peft.intrinsic import IntrinsicModel
from hf_efficiency.integrations.peft.snell import SNELLModel
from hf_efficiency.integrations.peft.sora import SoRAModel
from hf_efficiency.integrations.peft.watch import watch_new_adalora_models
from peft import mapping

# The tuner of each type; its config says its name.
TUNERS: tuple[Any, ...] = (
    AdaDoRAModel,
    BitFitModel,
    BottleneckModel,
    CompacterModel,
    DVoRAModel,
    DyLoRAModel,
    GaLoreModel,
    IntrinsicModel,
    SNELLModel,
    SoRAModel,
)


def register() -> None:
    """Enters the types into the tables that `get_peft_model` and `PeftModel.from_pretrained` read.

    PEFT's own `register_peft_method` takes members of its enum only. Doing this twice changes nothing.
    """
    for tuner in TUNERS:
        kind = tuner.config_class.kind
        mapping.PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(kind, tuner.prefix)
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, tuner.config_class)
        mapping.PEFT_TYPE_TO_TUNER_MAPPING.setdefault(kind, tuner)
    watch_new_adalora_models()
