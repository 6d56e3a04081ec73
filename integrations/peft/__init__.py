"""PEFT types that PEFT lacks, and what makes PEFT's own work on every quantized base."""

from hf_efficiency.integrations.peft.dvora import DVoRAConfig
from hf_efficiency.integrations.peft.register import register

__all__ = ["DVoRAConfig", "register"]

# Whoever imports PEFT through this package gets here before the hook that `import hf_efficiency` has set.
register()
