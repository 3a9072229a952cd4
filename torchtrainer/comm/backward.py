"""Notices the end of every backward pass that gives gradients to some parameters, however the loss came about."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

import torch


class BackwardEnd:
    """Calls a function when a backward pass is over that has added to the gradients of some parameters.

    It does not matter whether the parameters were used through a wrapper, a method or a submodule of a model, or without any
    model. ``torch.autograd.grad`` adds to no gradient, and is not noticed.

    Args:
        on_end: gets the units of the parameters, each with how many of them got a gradient; runs in the thread that differentiates, and what it raises is raised
            by ``backward()``.
        on_begin: called when the first gradient of a pass is there.
    """

    def __init__(self, on_end: Callable[[Mapping[int, int]], None], on_begin: Callable[[], None] | None = None) -> None:
        self._on_end = on_end
        self._on_begin = on_begin
        self._touched: dict[int, int] = {}
        self._pass = -1
        self._hooks: dict[torch.Tensor, torch.utils.hooks.RemovableHandle] = {}

    def watch(self, parameters: Iterable[torch.Tensor], unit: int) -> None:
        """Notices these parameters from now on.

        Args:
            parameters: that are trained; those that are watched already stay as they are.
            unit: what they belong to.
        """
        for parameter in parameters:
            if parameter not in self._hooks:
                self._hooks[parameter] = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]  # torch has no types here
                    partial(self._note, unit)
                )

    def _note(self, unit: int, parameter: torch.Tensor) -> None:
        self._touched[unit] = self._touched.get(unit, 0) + 1
        task = torch._C._current_graph_task_id()  # noqa: SLF001  # a name of the pass: there is no public one
        if task != self._pass:  # not a flag: a pass that an error ends has no end
            self._pass = task
            if self._on_begin is not None:
                self._on_begin()
            torch.autograd.Variable._execution_engine.queue_callback(self._end)  # noqa: SLF001  # as DDP does it

    def _end(self) -> None:
        touched, self._touched = self._touched, {}
        if touched:  # else a pass within this one, of a checkpointed block, has dealt with all
            self._on_end(touched)


@torch.no_grad()
def take_over(parameters: Sequence[torch.Tensor], means: Sequence[torch.Tensor | None]) -> None:
    """Makes the gradients of parameters what the exchange came to, in their own memory; None: they stay as they are."""
    here, there = [], []
    for parameter, mean in zip(parameters, means, strict=True):
        if mean is None:
            continue
        if parameter.grad is None or parameter.grad.layout != mean.layout or mean.is_sparse:
            parameter.grad = mean.clone()
        else:
            here.append(parameter.grad)
            there.append(mean)
    if here:
        torch._foreach_copy_(here, there)
