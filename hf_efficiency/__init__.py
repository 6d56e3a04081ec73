"""Compress, fine-tune and run large language models inside existing Hugging Face scripts.

Importing this package registers its methods with the host libraries that are installed, and does nothing else.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from hf_efficiency._after_import import after_import

__version__ = "0.1.0"

if TYPE_CHECKING:
    from hf_efficiency.demo import load_demo_model
    from hf_efficiency.distillation.cache_writer import cache_teacher
    from hf_efficiency.distillation.sampling import write_sequences
    from hf_efficiency.distillation.student import make_student
    from hf_efficiency.distillation.teacher_cache import TeacherCache
    from hf_efficiency.integrations.peft import (
        AdaDoRAConfig,
        AdaLoRACallback,
        BitFitConfig,
        BottleneckConfig,
        CompacterConfig,
        DVoRAConfig,
        DyLoRAConfig,
        GaLoreConfig,
        IntrinsicConfig,
        SNELLConfig,
        SoRACallback,
        SoRAConfig,
    )
    from hf_efficiency.integrations.peft.merge import merge_adapters
    from hf_efficiency.integrations.peft.prepare import prepare_for_training
    from hf_efficiency.integrations.transformers import (
        AWQConfig,
        GPTQConfig,
        NF4Config,
        QuIPSharpConfig,
        RTNConfig,
        prefer,
    )
    from hf_efficiency.integrations.transformers.caches import (
        H2OCache,
        PagedCache,
        PriorityCache,
        QuantizedKVCache,
        RandomCache,
        RollingCache,
        SnapKVCache,
        StreamingCache,
        TOVACache,
        convert_attention,
        load_cache,
        make_cache,
    )
    from hf_efficiency.integrations.transformers.compression import GistModel, compress_prompt
    from hf_efficiency.integrations.transformers.distillation import DistillTrainer
    from hf_efficiency.integrations.transformers.distillation_config import DistillConfig
    from hf_efficiency.integrations.transformers.galore import galore
    from hf_efficiency.integrations.transformers.selection import DataSelectionCallback
    from hf_efficiency.integrations.transformers.selection_order import CurriculumCallback, MixtureCallback
    from hf_efficiency.integrations.transformers.speculative import speculative
    from hf_efficiency.integrations.transformers.speculative_drafters import SkipLayers
    from hf_efficiency.optim import GaLoreAdamW
    from hf_efficiency.selection import Selection, select

# Public name: the module that defines it. A host that is missing only takes its own names away.
_EXPORTS = {
    "RTNConfig": "hf_efficiency.integrations.transformers",
    "GPTQConfig": "hf_efficiency.integrations.transformers",
    "AWQConfig": "hf_efficiency.integrations.transformers",
    "NF4Config": "hf_efficiency.integrations.transformers",
    "QuIPSharpConfig": "hf_efficiency.integrations.transformers",
    "prefer": "hf_efficiency.integrations.transformers",
    "load_demo_model": "hf_efficiency.demo",
    "DistillConfig": "hf_efficiency.integrations.transformers.distillation_config",
    "DistillTrainer": "hf_efficiency.integrations.transformers.distillation",
    "TeacherCache": "hf_efficiency.distillation.teacher_cache",
    "cache_teacher": "hf_efficiency.distillation.cache_writer",
    "make_student": "hf_efficiency.distillation.student",
    "write_sequences": "hf_efficiency.distillation.sampling",
    "AdaDoRAConfig": "hf_efficiency.integrations.peft",
    "AdaLoRACallback": "hf_efficiency.integrations.peft",
    "BitFitConfig": "hf_efficiency.integrations.peft",
    "BottleneckConfig": "hf_efficiency.integrations.peft",
    "CompacterConfig": "hf_efficiency.integrations.peft",
    "GaLoreAdamW": "hf_efficiency.optim",
    "GaLoreConfig": "hf_efficiency.integrations.peft",
    "galore": "hf_efficiency.integrations.transformers.galore",
    "IntrinsicConfig": "hf_efficiency.integrations.peft",
    "SNELLConfig": "hf_efficiency.integrations.peft",
    "DVoRAConfig": "hf_efficiency.integrations.peft",
    "DyLoRAConfig": "hf_efficiency.integrations.peft",
    "SoRACallback": "hf_efficiency.integrations.peft",
    "SoRAConfig": "hf_efficiency.integrations.peft",
    "merge_adapters": "hf_efficiency.integrations.peft.merge",
    "prepare_for_training": "hf_efficiency.integrations.peft.prepare",
    "CurriculumCallback": "hf_efficiency.integrations.transformers.selection_order",
    "DataSelectionCallback": "hf_efficiency.integrations.transformers.selection",
    "MixtureCallback": "hf_efficiency.integrations.transformers.selection_order",
    "Selection": "hf_efficiency.selection",
    "select": "hf_efficiency.selection",
    "H2OCache": "hf_efficiency.integrations.transformers.caches",
    "PagedCache": "hf_efficiency.integrations.transformers.caches",
    "PriorityCache": "hf_efficiency.integrations.transformers.caches",
    "QuantizedKVCache": "hf_efficiency.integrations.transformers.caches",
    "RandomCache": "hf_efficiency.integrations.transformers.caches",
    "RollingCache": "hf_efficiency.integrations.transformers.caches",
    "SnapKVCache": "hf_efficiency.integrations.transformers.caches",
    "StreamingCache": "hf_efficiency.integrations.transformers.caches",
    "TOVACache": "hf_efficiency.integrations.transformers.caches",
    "GistModel": "hf_efficiency.integrations.transformers.compression",
    "compress_prompt": "hf_efficiency.integrations.transformers.compression",
    "convert_attention": "hf_efficiency.integrations.transformers.caches",
    "load_cache": "hf_efficiency.integrations.transformers.caches",
    "make_cache": "hf_efficiency.integrations.transformers.caches",
    "SkipLayers": "hf_efficiency.integrations.transformers.speculative_drafters",
    "speculative": "hf_efficiency.integrations.transformers.speculative",
}

__all__ = [
    "AWQConfig",
    "AdaDoRAConfig",
    "AdaLoRACallback",
    "BitFitConfig",
    "BottleneckConfig",
    "CompacterConfig",
    "CurriculumCallback",
    "DVoRAConfig",
    "DataSelectionCallback",
    "DistillConfig",
    "DistillTrainer",
    "DyLoRAConfig",
    "GPTQConfig",
    "GaLoreAdamW",
    "GaLoreConfig",
    "GistModel",
    "H2OCache",
    "IntrinsicConfig",
    "MixtureCallback",
    "NF4Config",
    "PagedCache",
    "PriorityCache",
    "QuIPSharpConfig",
    "QuantizedKVCache",
    "RTNConfig",
    "RandomCache",
    "RollingCache",
    "SNELLConfig",
    "Selection",
    "SkipLayers",
    "SnapKVCache",
    "SoRACallback",
    "SoRAConfig",
    "StreamingCache",
    "TOVACache",
    "TeacherCache",
    "__version__",
    "cache_teacher",
    "compress_prompt",
    "convert_attention",
    "galore",
    "load_cache",
    "load_demo_model",
    "make_cache",
    "make_student",
    "merge_adapters",
    "prefer",
    "prepare_for_training",
    "select",
    "speculative",
    "write_sequences",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS})


def _register() -> None:
    """Makes the methods known to every host library that is installed."""
    if find_spec("transformers") is not None:
        import_module("hf_efficiency.integrations.transformers").register()
    # PEFT is slow to import, and its import of bitsandbytes asks the network: its types join when a script imports it
    after_import("peft", _register_peft)


def _register_peft() -> None:
    if "hf_efficiency.integrations.peft" not in sys.modules:  # else it is what imports PEFT, and registers by itself
        import_module("hf_efficiency.integrations.peft")


_register()
