"""Cuts a student out of its teacher.

Shape legend: d and d' features of teacher and student, n tokens.
"""

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_efficiency.calibration.data import resolve_calibration
from hf_efficiency.calibration.structure import first_tensor, is_conv1d
from hf_efficiency.distillation.trace import decoder_blocks

KEEPS = ("uniform", "last", "similarity")
_CALIBRATION_BATCH = 4


def make_student(
    teacher: Any,
    num_layers: int | None = None,
    hidden_size: int | None = None,
    keep: str | Sequence[int] = "uniform",
    *,
    intermediate_size: int | None = None,
    calibration: Any = "default",
    tokenizer: Any = None,
    num_samples: int = 16,
    seq_len: int = 128,
) -> Any:
    """A smaller model of the teacher's class that starts from the teacher's weights.

    Args:
        teacher: A dense causal language model; it is left as it is.
        num_layers: Blocks of the student; None: as many as the teacher has.
        hidden_size: Width d' of the residual stream; None: the teacher's. Where the config has a `head_dim` of its own,
            all heads stay, and of the stream the columns in which the embedding has the greatest norm. Elsewhere the
            first columns stay, and the first heads, which keep their size; fused projections are taken to hold the
            parts of each head together, or (GPT-2) one part of all heads after the other.
        keep: Which blocks stay. `"uniform"`: evenly spaced from the first on, and the last, which prepares the output;
            `"last"`: the last ones; `"similarity"`: those that change their input most, 1 - cos(input, output) averaged
            over tokens (ShortGPT, Men et al. 2024, section 3.2); or the blocks themselves, counted from 0.
        intermediate_size: Width of the MLPs, the first neurons; None: the teacher's.
        calibration: Text or token ids for `"similarity"`, as the quantization configs take.
        tokenizer: For calibration text.
        num_samples: Calibration sequences.
        seq_len: Tokens of each.

    Returns:
        The student, in the teacher's dtype, on its device, in training mode.

    Raises:
        ValueError: A size the teacher can't give, an unknown `keep`, or a quantized teacher.
    """
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            "The teacher is quantized, so its weights can't be cut: pass teacher.dequantize(), or a dense model."
        )
    total = len(decoder_blocks(teacher))
    kept = _kept_blocks(keep, num_layers, total)
    if kept is None:
        tokens = resolve_calibration(calibration, tokenizer, num_samples=num_samples, seq_len=seq_len, model=teacher)
        kept = most_influential(block_influence(teacher, tokens), num_layers or total)
    cut_depth(text, kept, total)
    columns = _cut_width(text, teacher, hidden_size, intermediate_size)
    with torch.random.fork_rng(devices=[]):  # what does not fit starts afresh, the same in every process
        torch.manual_seed(0)
        student = type(teacher)(config)
    student.to(dtype=teacher.dtype, device=teacher.device)
    _copy_weights(teacher, student, kept, columns)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.train()


@torch.no_grad()
def block_influence(model: Any, tokens: Tensor) -> Tensor:
    """1 - cos(input, output) of each block (L,), averaged over tokens (n, t): ShortGPT's measure."""
    blocks = decoder_blocks(model)
    sums = torch.zeros(len(blocks), dtype=torch.float64)

    def hook(index: int) -> Any:
        def measure(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            alike = nn.functional.cosine_similarity(before.float(), first_tensor(output).float(), dim=-1)
            sums[index] += (1 - alike).sum().double().cpu()

        return measure

    handles = [block.register_forward_hook(hook(i), with_kwargs=True) for i, block in enumerate(blocks)]
    training = model.training
    try:
        model.eval()
        for batch in tokens.split(_CALIBRATION_BATCH):
            model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return sums / tokens.numel()


def most_influential(influence: Tensor, count: int) -> list[int]:
    """The blocks of greatest influence, in their order."""
    return sorted(influence.topk(count).indices.tolist())


def _kept_blocks(keep: str | Sequence[int], num_layers: int | None, total: int) -> list[int] | None:
    """The blocks that stay; None if data must tell."""
    if not isinstance(keep, str):
        kept = list(keep)
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < total:
            raise ValueError(f"keep={kept} must name blocks from 0 to {total - 1} in rising order, each once.")
        if num_layers not in (None, len(kept)):
            raise ValueError(f"num_layers={num_layers}, but keep names {len(kept)} blocks: leave one of them out.")
        return kept
    if keep not in KEEPS:
        raise ValueError(f"keep={keep!r} is unknown: choose one of {', '.join(KEEPS)}, or name the blocks.")
    count = total if num_layers is None else num_layers
    _check_size("num_layers", count, total)
    if count == total or keep == "last":
        return list(range(total - count, total))
    if keep == "uniform":
        return [*(i * total // count for i in range(count - 1)), total - 1]
    return None


def _check_size(name: str, value: int, most: int) -> None:
    if not isinstance(value, int) or not 1 <= value <= most:
        raise ValueError(f"{name}={value!r} must be a whole number from 1 to the teacher's {most}.")


def cut_depth(config: Any, kept: Sequence[int], total: int) -> None:
    """Leaves a config with the `kept` of its decoder's `total` blocks: their number, and lists with one entry each."""
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == total and name != "architectures":
            setattr(config, name, type(value)(value[i] for i in kept))
    config.num_hidden_layers = len(kept)


def _cut_width(text: Any, teacher: Any, hidden_size: int | None, intermediate_size: int | None) -> Tensor | None:
    """Changes the config, and says which columns (d',) of the residual stream stay; None: all."""
    width = text.hidden_size
    if intermediate_size is not None:
        _check_size("intermediate_size", intermediate_size, text.intermediate_size)
        text.intermediate_size = intermediate_size
    if hidden_size is None or hidden_size == width:
        return None
    _check_size("hidden_size", hidden_size, width)
    heads = text.num_attention_heads
    if getattr(text, "head_dim", None) is None:
        size = width // heads
        if hidden_size % size:
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of the teacher's head size {size}, since "
                f"{type(text).__name__} has no head_dim of its own."
            )
        text.num_attention_heads = hidden_size // size
        grouped = getattr(text, "num_key_value_heads", None)
        if grouped is not None:
            text.num_key_value_heads = max(1, grouped * text.num_attention_heads // heads)
    if getattr(text, "word_embed_proj_dim", None) == width:
        text.word_embed_proj_dim = hidden_size
    text.hidden_size = hidden_size
    if text.num_attention_heads < heads:
        return torch.arange(hidden_size)
    norms = teacher.get_input_embeddings().weight.detach().float().norm(dim=0)
    return norms.topk(hidden_size).indices.sort().values


@torch.no_grad()
def _copy_weights(teacher: Any, student: Any, kept: Sequence[int], columns: Tensor | None) -> None:
    """Every tensor of the student from that of the teacher of the same name, cut where it is larger."""
    blocks = decoder_blocks(student)
    prefix = next(name for name, module in student.named_modules() if module is blocks)
    numbered = re.compile(rf"(?<={re.escape(prefix)}\.)\d+(?=\.)")
    theirs = teacher.state_dict()
    for name, ours in student.state_dict().items():
        source = theirs.get(numbered.sub(lambda match: str(kept[int(match[0])]), name, count=1))
        if source is None or source.ndim != ours.ndim:
            continue
        fused = is_conv1d(student.get_submodule(name.rpartition(".")[0]))
        for dim, (have, want) in enumerate(zip(source.shape, ours.shape, strict=True)):
            if have > want:
                chosen = _indices(have, want, teacher.config.get_text_config().hidden_size, columns, fused=fused)
                source = source.index_select(dim, chosen.to(source.device))
        if source.shape == ours.shape:
            ours.copy_(source)


def _indices(have: int, want: int, width: int, columns: Tensor | None, *, fused: bool) -> Tensor:
    """Which `want` of `have` rows stay: columns of the residual stream, those of each fused part, or the first."""
    if columns is not None and (have, want) == (width, len(columns)):
        return columns
    if columns is not None and fused and have % width == 0 and have // width == want // len(columns):
        return torch.cat([part * width + columns.cpu() for part in range(have // width)])
    return torch.arange(want)
