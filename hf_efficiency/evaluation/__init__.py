"""What a compression cost and what it gained: perplexity, KL to the original, agreement, size, memory, speed."""

from hf_efficiency.evaluation.answers import answer
from hf_efficiency.evaluation.compare import compare
from hf_efficiency.evaluation.footprint import BitsPerWeight, bits_per_weight, bytes_on_disk, peak_memory
from hf_efficiency.evaluation.metrics import Divergence, kl_and_agreement, perplexity
from hf_efficiency.evaluation.report import Measurements, Report
from hf_efficiency.evaluation.speed import Speed, measure_speed
from hf_efficiency.evaluation.text import EvaluationText, default_text, read_text

__all__ = [
    "BitsPerWeight",
    "Divergence",
    "EvaluationText",
    "Measurements",
    "Report",
    "Speed",
    "answer",
    "bits_per_weight",
    "bytes_on_disk",
    "compare",
    "default_text",
    "kl_and_agreement",
    "measure_speed",
    "peak_memory",
    "perplexity",
    "read_text",
]
