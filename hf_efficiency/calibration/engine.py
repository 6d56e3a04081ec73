"""Runs calibration data through a decoder block by block and hands each layer's input statistics to a method.

Shape legend: n sequences, t tokens, b sequences of a micro-batch, d hidden size.

Memory: one block's statistics, and one batch of hidden states per sequence (`offload` says where it lives). A method
that compares with the dense model keeps a second batch of hidden states.
"""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_efficiency.calibration.capture import BlockCall, first_hidden, same_calls, trace, trace_calls
from hf_efficiency.calibration.hidden import HiddenStates
from hf_efficiency.calibration.memory import return_free_memory
from hf_efficiency.calibration.method import BlockContext, BlockMethod, InputGroup
from hf_efficiency.calibration.precision import cast_floating, wide_products, widened, working_dtype
from hf_efficiency.calibration.resume import BlockCheckpoints
from hf_efficiency.calibration.statistics import InputStatistics, all_finite
from hf_efficiency.calibration.stepping import step_through
from hf_efficiency.calibration.structure import (
    find_blocks,
    first_tensor,
    linear_sizes,
    linears_of,
    replace_module,
    warn_of_fused_weights,
    weight_of,
)

if TYPE_CHECKING:
    from hf_efficiency.quantization.layers.base import QuantizedLinear


@dataclass
class _Plan:
    """How the model calls its blocks on each micro-batch."""

    batches: list[Tensor]
    calls: list[list[BlockCall]]  # [micro-batch][block]; shared between equal batches
    groups: list[list[list[str]]]  # [block][group][name inside the block]


def run_blockwise(
    model: nn.Module,
    tokens: Tensor,
    method: BlockMethod,
    *,
    skip: Collection[str] = (),
    batch_size: int = 1,
    offload: str = "none",
    resume_dir: str | Path | None = None,
    progress: bool = True,
) -> dict[str, "QuantizedLinear"]:
    """Compresses a model in place, block by block.

    Args:
        model: A decoder that `model(input_ids=...)` runs.
        tokens: Token ids (n, t), without padding.
        method: What is done to each group of layers.
        skip: Full names of linear layers that stay dense.
        batch_size: Sequences that run together.
        offload: Where hidden states wait between blocks: `"none"`, `"cpu"` or `"disk"`.
        resume_dir: Folder where finished blocks are kept, so that an interrupted run goes on where it stopped.
        progress: Whether to show a progress bar with the time left.

    Returns:
        The storage layers by full name. They already stand in the model.

    Raises:
        ValueError: If the tokens are no (n, t) matrix of at least one sequence, the model has no blocks, every layer
            is skipped, or an activation is not finite.
    """
    _check_tokens(tokens, batch_size)
    prefix, blocks = find_blocks(model)
    names = linears_of(prefix, blocks)
    if names and not names.keys() - set(skip):
        raise ValueError("Every linear layer is excluded, so nothing is left to compress: skip fewer layers.")
    warn_of_fused_weights(prefix, blocks)
    return_free_memory()  # tokenizing a long text leaves much of it
    was_training = model.training
    model.eval()
    try:
        device = next(blocks.parameters()).device
        plan = _make_plan(model, blocks, tokens.to(device), batch_size)
        store = BlockCheckpoints(resume_dir, method, tokens, blocks) if resume_dir is not None else None
        engine = _Engine(model, prefix, blocks, method, plan, frozenset(skip), offload, store)
        return engine.run(progress)
    finally:
        model.train(was_training)


def _check_tokens(tokens: Tensor, batch_size: int) -> None:
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 1:
        raise ValueError(f"Calibration tokens must be a matrix (sequences, tokens), got shape {tuple(tokens.shape)}.")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1.")


def _make_plan(model: nn.Module, blocks: nn.ModuleList, tokens: Tensor, batch_size: int) -> _Plan:
    """Traces one micro-batch of each size, or every one where the blocks' arguments depend on the tokens."""
    batches = list(tokens.split(batch_size))
    first = trace(model, blocks, batches[0])
    calls = [first.calls] * len(batches)
    if len(batches) > 1:
        ragged = batches[-1].shape[0] != batch_size
        if ragged:
            calls[-1] = trace_calls(model, blocks, batches[-1], first.returns)
        if len(batches) - ragged > 1:
            second = trace_calls(model, blocks, batches[1], first.returns)
            if not same_calls(first.calls, second):
                calls = [trace_calls(model, blocks, batch, first.returns) for batch in batches]
    return _Plan(batches, calls, first.groups)


class _Engine:
    """State of one run: the hidden states between blocks."""

    def __init__(
        self,
        model: nn.Module,
        prefix: str,
        blocks: nn.ModuleList,
        method: BlockMethod,
        plan: _Plan,
        skip: frozenset[str],
        offload: str,
        store: BlockCheckpoints | None,
    ) -> None:
        self.model, self.prefix, self.blocks = model, prefix, blocks
        self.method, self.plan, self.skip, self.store = method, plan, skip, store
        self.device = plan.batches[0].device
        self.own_dtype = next(blocks.parameters()).dtype
        # Learning compares whole blocks, in the wide dtype throughout; one-shot methods need it for products alone.
        self.product_dtype = working_dtype(self.own_dtype, self.device)
        half = self.product_dtype == torch.bfloat16 and self.device.type == "cpu"  # chosen because it is faster there
        self.statistics_dtype = torch.bfloat16 if half else torch.float32
        self.dtype = self.product_dtype if method.keep_dense or method.refines else self.own_dtype
        self.hidden = HiddenStates(offload)
        for batch in plan.batches:
            self.hidden.append(cast_floating(first_hidden(model, blocks, batch), self.dtype))
        self.dense: HiddenStates | None = None
        if method.keep_dense:
            self.dense = HiddenStates(offload)
            for x in self.hidden:
                self.dense.append(x.clone())

    def run(self, progress: bool) -> dict[str, "QuantizedLinear"]:
        layers: dict[str, QuantizedLinear] = {}
        for index in tqdm(range(len(self.blocks)), desc="Compressing blocks", unit="block", disable=not progress):
            layers.update(self._block(index))
            return_free_memory()
        return layers

    def _call(self, index: int, block: nn.Module, x: Tensor, i: int) -> Tensor:
        call = self.plan.calls[i][index]
        if self.dtype != self.own_dtype:
            call = call.cast(self.dtype)
        return first_tensor(call(block, x.to(self.device)))

    @torch.no_grad()
    def _block(self, index: int) -> dict[str, "QuantizedLinear"]:
        wide = widened if self.dtype == self.product_dtype else wide_products
        with wide(self.blocks[index], self.product_dtype):
            layers = self._run_block(index)
        for layer_name, layer in layers.items():
            replace_module(self.model, layer_name, layer)
        return layers

    def _run_block(self, index: int) -> dict[str, "QuantizedLinear"]:
        block, name = self.blocks[index], f"{self.prefix}.{index}"
        if self.dense is not None:
            for i, x in enumerate(self.dense):
                self.dense[i] = self._call(index, block, x, i)
        ctx = BlockContext(
            name=name,
            index=index,
            block=block,
            inputs=self.hidden,  # type: ignore[arg-type]  # a sequence of tensors
            targets=self.dense,  # type: ignore[arg-type]
            linears={n: m for n, m in linears_of(name, block).items() if n not in self.skip},
            dtype=self.own_dtype if self.product_dtype != self.own_dtype else None,
            statistics_dtype=self.statistics_dtype,
            call=lambda module, x, i: self._call(index, module, x, i),
        )
        if self.store is not None and self.store.load(ctx):
            ctx.refresh()
            self._advance(ctx)
        else:
            self._compress(ctx)
            if self.store is not None:
                self.store.save(ctx)
        return ctx.layers

    def _advance(self, ctx: BlockContext) -> None:
        for i, x in enumerate(self.hidden):
            self.hidden[i] = ctx.run(x, i)

    def _compress(self, ctx: BlockContext) -> None:
        method = self.method
        method.start_block(ctx)
        traced = [[f"{ctx.name}.{n}" for n in names] for names in self.plan.groups[ctx.index]]
        members = [kept for names in traced if (kept := [n for n in names if n in ctx.linears])]
        leaders = [ctx.linears[names[0]] for names in members]
        statistics = [
            InputStatistics(linear_sizes(m)[0], method.statistics, self.device, ctx.statistics_dtype) for m in leaders
        ]
        # Outputs may not replace inputs while the method still needs these.
        outputs: HiddenStates | None = None if method.refines else self.hidden
        sequential = method.true_sequential

        def compress(index: int) -> None:
            if sequential:
                self._compress_group(ctx, members[index], statistics[index])
                statistics[index] = InputStatistics(0, frozenset(), self.device)
            else:
                statistics[index].flush()  # from here on the block may overwrite its activations

        def deliver(i: int, output: Tensor) -> None:
            if sequential and outputs is not None:
                outputs[i] = output

        step_through(
            lambda i: ctx.run(self.hidden[i], i),
            len(self.hidden),
            leaders,
            observe=lambda index, x: statistics[index].add(x),
            compress=compress,
            deliver=deliver,
        )
        if not sequential:
            for names, statistic in zip(members, statistics, strict=True):
                self._compress_group(ctx, names, statistic)
        if method.refines:
            method.finish_block(ctx)
            ctx.refresh()
        if method.refines or not sequential:
            self._advance(ctx)

    def _compress_group(self, ctx: BlockContext, names: list[str], statistics: InputStatistics) -> None:
        hessian = statistics.hessian()
        if not all_finite(hessian):
            raise ValueError(
                f"The input of {names[0]} is not finite (NaN or infinity in the activations). Load the model in "
                "bfloat16 or float32, or look for NaN in the weights of the blocks before it."
            )
        for name in names:
            if not all_finite(weight_of(ctx.linears[name])):
                raise ValueError(f"The weight of {name} holds NaN or infinity; the checkpoint is damaged.")
        linears = [ctx.linears[n] for n in names]
        group = InputGroup(names, linears, hessian, statistics.abs_mean(), ctx.layers, ctx.dtype)
        self.method.compress_group(group)
