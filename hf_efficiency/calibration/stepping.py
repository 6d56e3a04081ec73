"""One forward pass of a block over all micro-batches, halted at each group of linear layers.

Every micro-batch runs in a coroutine of its own. A coroutine that reaches the first layer of an input group hands its
input over and waits; when all have arrived, the group is compressed in place, and all go on with the new weights.
So a block that is compressed in its true order costs one pass instead of one a group, and what waits is only what
the block itself keeps alive at that point.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn


@torch.no_grad()
def step_through(
    forward: Callable[[int], Tensor],
    count: int,
    leaders: Sequence[nn.Module],
    observe: Callable[[int, Tensor], None],
    compress: Callable[[int], None],
    deliver: Callable[[int, Tensor], None],
) -> None:
    """Runs `forward(i)` for `count` micro-batches, stopping all of them at every leader.

    Args:
        forward: Runs the block on micro-batch i and returns its output.
        count: Number of micro-batches.
        leaders: The first layer of each group, in the order in which a forward pass reaches them.
        observe: Called with a leader's index and its input, once for each micro-batch that reaches it.
        compress: Called with a leader's index when every micro-batch has reached it or passed it by.
        deliver: Called with i and the output of micro-batch i.
    """

    def halt_at(index: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            runner = getcurrent()
            if runner.parent is not None:
                runner.parent.switch((index, args[0]))

        return hook

    with ExitStack() as stack:
        for index, leader in enumerate(leaders):
            stack.callback(leader.register_forward_pre_hook(halt_at(index), prepend=True).remove)
        waiting: dict[int, tuple[greenlet, int]] = {}

        def advance(i: int, runner: greenlet, *first: Any) -> None:
            result = runner.switch(*first)
            if runner.dead:
                waiting.pop(i, None)
                deliver(i, result)
            else:
                index, x = result
                waiting[i] = (runner, index)
                observe(index, x)

        for i in range(count):
            advance(i, greenlet(forward), i)
        while waiting:
            # A micro-batch may skip a layer (an expert without tokens), so the earliest leader goes first.
            earliest = min(index for _, index in waiting.values())
            compress(earliest)
            for i, (runner, index) in list(waiting.items()):
                if index == earliest:
                    advance(i, runner)
