"""GaLoreAdamW: AdamW whose moments live in a low-rank subspace of the gradient.

Zhao et al., "GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection" (ICML 2024), Algorithm 2.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import asdict
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer

from hf_efficiency.optim.checks import GROUP_KEYS, check_group, check_keys, check_same_options, check_shapes
from hf_efficiency.optim.low_rank import low_rank_step_
from hf_efficiency.optim.moments import (
    MIN_8BIT_SIZE,
    adam_direction_,
    adamw_8bit_,
    add_to_,
    create_moments,
    wide_dtype,
)
from hf_efficiency.optim.options import OPTION_NAMES, GaLoreOptions


class GaLoreAdamW(Optimizer):
    """AdamW with low-rank moments for the groups that have a `rank`, and ordinary AdamW for the others.

    On a GPU the step of a projected weight is the kernel `galore_update`. The state holds tensors and numbers only: it
    is saved and loaded by `torch.save` and `torch.load(weights_only=True)`, and training goes on to the same bit.

    With `per_layer=True` each parameter is updated during the backward pass, as soon as its gradient is complete, and
    the gradient is freed: the gradients of two layers never stand side by side, and `step()` has nothing left to do.
    That rules out what needs all gradients, or more than one backward pass a step: gradient accumulation and several
    processes (both raise an error), gradient clipping by the total norm (it finds no gradients and does nothing), and
    float16 loss scaling (bfloat16 needs none).

    Args:
        params: Parameters, or groups: dicts with `params`, and any of the arguments below. Every parameter of a group
            with a `rank` must be a matrix (m, n).
        lr: η. A projected weight moves by η α.
        betas: β1 and β2.
        eps: ε.
        weight_decay: λ, decoupled, not scaled by α.
        per_layer: Update during the backward pass.
        **options: Fields of `GaLoreOptions`, for groups that do not set their own.

    Raises:
        ValueError: Numbers out of range, a rank above what a matrix has, an unknown key of a group.
        TypeError: A number of the wrong type.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        per_layer: bool = False,
        **options: Any,
    ) -> None:
        check_keys(options, OPTION_NAMES)
        if per_layer and _processes() > 1:
            raise ValueError(
                "per_layer=True updates weights before the gradients of all processes are averaged: leave it out where "
                "several processes train together."
            )
        self._per_layer = per_layer
        self._hooks: list[Any] = []
        self._updated: set[Tensor] = set()
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, {**defaults, **asdict(GaLoreOptions(**options))})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group, checked; with `per_layer` its parameters are updated in the backward pass from now on."""
        check_keys(param_group, GROUP_KEYS)
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except (ValueError, TypeError):
            self.param_groups.pop()
            raise
        if self._per_layer:
            self._add_hooks(len(self.param_groups) - 1)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient.

        Args:
            closure: Computes the loss again, with gradients.

        Returns:
            The closure's loss.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._updated.clear()
        index = 0
        for group in self.param_groups:
            parameters = list(enumerate(group["params"], start=index))
            index += len(parameters)
            self._update(group, [(i, p) for i, p in parameters if p.grad is not None])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over a saved state: moments and projections keep their own dtype, whatever the weights have.

        Raises:
            ValueError: If the state was made with other options or for other weights.
        """
        saved_groups = state_dict["param_groups"]
        check_same_options(self.param_groups, saved_groups)
        saved_ids = chain.from_iterable(group["params"] for group in saved_groups)
        owners = [(group, parameter) for group in self.param_groups for parameter in group["params"]]
        states = []
        for saved_id, (group, parameter) in zip(saved_ids, owners, strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved:
                check_shapes(parameter, group, saved)
                states.append((parameter, saved))
        # torch's own method would cast 8-bit codes and float32 moments to the dtype of the weights
        super().load_state_dict({**state_dict, "state": {}})
        for parameter, saved in states:
            self.state[parameter] = {
                key: value.to(parameter.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in saved.items()
            }

    def remove_hooks(self) -> None:
        """Ends the update during the backward pass: from now on `step()` does it."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._per_layer = False

    def _update(self, group: dict[str, Any], parameters: list[tuple[int, Tensor]]) -> None:
        """The step of some parameters of one group, each with its place among all parameters."""
        options = GaLoreOptions.of(group)
        numbers = {name: group[name] for name in ("betas", "eps", "weight_decay")}
        lr = float(group["lr"])
        whole = []
        for index, parameter in parameters:
            gradient, state = parameter.grad, self.state[parameter]
            if gradient is None or gradient.is_sparse:
                raise ValueError("GaLoreAdamW takes dense gradients only: make the embedding with sparse=False.")
            if options.rank is not None:
                seed = options.seed * 1_000_003 + index
                low_rank_step_(parameter.data, gradient, state, options, seed, lr, **numbers)
                continue
            if not state:
                small = parameter.numel() < MIN_8BIT_SIZE
                state["step"] = torch.zeros((), device=parameter.device)
                create_moments(state, parameter.shape, parameter, 32 if small else options.state_bits)
            whole.append(parameter)
        self._update_whole([p for p in whole if "exp_avg_absmax" not in self.state[p]], lr, **numbers)
        for parameter in whole:
            if "exp_avg_absmax" in self.state[parameter] and parameter.grad is not None:
                state = self.state[parameter]
                state["step"] += 1
                adamw_8bit_(parameter.data, parameter.grad, state, int(state["step"]), lr, **numbers)

    def _update_whole(
        self, parameters: list[Tensor], lr: float, betas: tuple[float, float], eps: float, weight_decay: float
    ) -> None:
        """AdamW with 32-bit moments, by torch's fused kernel where weights are as wide as the moments."""
        fused: list[Tensor] = []
        for parameter in parameters:
            if parameter.dtype == wide_dtype(parameter.dtype) and parameter.device.type in ("cpu", "cuda"):
                fused.append(parameter)
                continue
            state = self.state[parameter]
            state["step"] += 1
            moments = state["exp_avg"], state["exp_avg_sq"]
            gradient = parameter.grad.to(moments[0].dtype)  # type: ignore[union-attr]
            direction = adam_direction_(gradient, *moments, int(state["step"]), betas, eps)
            add_to_(parameter.data, direction, keep=1 - lr * weight_decay, rate=-lr)
        if fused:
            columns = ([self.state[p][name] for p in fused] for name in ("exp_avg", "exp_avg_sq", "step"))
            exp_avgs, exp_avg_sqs, steps = columns
            gradients = [p.grad for p in fused if p.grad is not None]
            adamw(
                fused, gradients, exp_avgs, exp_avg_sqs, [], steps, fused=True, amsgrad=False, beta1=betas[0],
                beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
            )  # fmt: skip

    def _add_hooks(self, position: int) -> None:
        """Updates the parameters of the group at `position` as soon as their gradients are complete."""
        first = sum(len(group["params"]) for group in self.param_groups[:position])
        optimizer = weakref.ref(self)  # a model must not keep its optimizer alive

        def hook_of(index: int) -> Callable[[Tensor], None]:
            @torch.no_grad()
            def update(parameter: Tensor) -> None:
                owner = optimizer()
                if owner is None:
                    return
                if parameter in owner._updated:
                    raise RuntimeError(
                        "A second backward pass before step(): per_layer=True does not go with gradient accumulation. "
                        "Set gradient_accumulation_steps=1 or leave per_layer out."
                    )
                owner._updated.add(parameter)
                # by position: loading a state and learning rate schedules replace the group
                owner._update(owner.param_groups[position], [(index, parameter)])
                parameter.grad = None

            return update

        for index, parameter in enumerate(self.param_groups[position]["params"], start=first):
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook_of(index)))


def _processes() -> int:
    running = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if running else 1
