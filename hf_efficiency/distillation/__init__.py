"""Distillation: losses, matched layers, students, and teachers that are models, averages or caches."""

from hf_efficiency.distillation.chunked import Job, chunked_loss
from hf_efficiency.distillation.ema import EMATeacher
from hf_efficiency.distillation.features import FeatureLoss
from hf_efficiency.distillation.heads import OutputHead
from hf_efficiency.distillation.layer_map import cka, resolve_layer_map
from hf_efficiency.distillation.losses import DIVERGENCES, Objective, divergence
from hf_efficiency.distillation.sampling import continue_prompts, write_sequences
from hf_efficiency.distillation.student import make_student
from hf_efficiency.distillation.targets import TopK, top_k
from hf_efficiency.distillation.trace import Trace, decoder_blocks, trace

__all__ = [
    "DIVERGENCES",
    "EMATeacher",
    "FeatureLoss",
    "Job",
    "Objective",
    "OutputHead",
    "TopK",
    "Trace",
    "chunked_loss",
    "cka",
    "continue_prompts",
    "decoder_blocks",
    "divergence",
    "make_student",
    "resolve_layer_map",
    "top_k",
    "trace",
    "write_sequences",
]
