"""The distillation loss of a student and a teacher, from hidden states and heads, without the logits in memory."""

from . import layers
from .op import distill_loss, distill_loss_from_logits

__all__ = ["distill_loss", "distill_loss_from_logits", "layers"]
