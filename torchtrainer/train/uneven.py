"""Steps with unequal numbers of samples on the ranks: weights of gradients, and errors of the user's collectives."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchtrainer.comm.uneven import UnevenStep, collectives_made
from torchtrainer.train.components import internals
from torchtrainer.train.data_passes import RankBatch

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class GradientShare:
    """Makes the exchange's mean over the ranks a mean over the samples, in steps in which the ranks have unequal shares.

    The gradient of a rank with n of B samples is multiplied by n * W / B before it is averaged over the W ranks; by zeros
    for a rank that lent itself a batch. Steps with equal shares are left alone and cost nothing. This is right for every
    loss that is a mean over the batch, and for every exchange that averages: DDP, or the user's own. What is weighed is what
    ``backward()`` adds to ``grad``: ``torch.autograd.grad`` gives the gradients of the rank's own loss in every step.

    Args:
        parameters: gives the trainable parameters, when they are needed.
        world_size: number of ranks.
    """

    def __init__(self, parameters: Callable[[], Iterable[nn.Parameter]], world_size: int) -> None:
        self._parameters = parameters
        self._world_size = world_size
        self._hooks: list[Any] = []
        self._nodes: list[Any] = []

    def apply(self, size: int, global_size: int) -> None:
        """Weighs the gradients of the coming step.

        Args:
            size: samples of this rank in the step.
            global_size: samples of all ranks in the step.
        """
        if self._world_size == 1 or global_size <= 0 or size * self._world_size == global_size:
            return
        scale = size * self._world_size / global_size
        # not g * 0: an infinite gradient of a lent batch would become NaN
        weigh = (lambda gradient: gradient * scale) if size else torch.zeros_like

        def weighed(gradients: tuple[torch.Tensor | None, ...]) -> tuple[torch.Tensor | None, ...]:
            return tuple(None if one is None else weigh(one) for one in gradients)

        # On the node that adds to grad, not on the parameter, whose hooks torch.autograd.grad runs too. The nodes are kept:
        # torch makes new ones, without hooks, where nobody has them.
        self._nodes = [torch.autograd.graph.get_gradient_edge(one).node for one in self._parameters()]
        self._hooks = [node.register_prehook(weighed) for node in self._nodes]

    def remove(self) -> None:
        """Leaves the gradients alone again."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._nodes.clear()


class UnevenWatch:
    """Has collectives of the user's fail with a word that helps, in steps of a call in which ranks have unequal numbers of samples.

    Only if this call has made collectives before, or may not have had the chance to. Compiled models are not watched: they would be
    run as they were before they were compiled.

    Args:
        operator: whose step it is.
        training: ranks without samples take part with borrowed ones.
    """

    def __init__(self, operator: TrainingOperator, *, training: bool) -> None:
        self._off = bool(internals(operator).context.settings.compile)
        self._training = training
        self._first = True
        self._made = collectives_made()
        self._mode: UnevenStep | None = None

    def begin(self, batch: RankBatch) -> None:
        """The step of a batch begins."""
        first, self._first = self._first, False
        if batch.even or self._off or not (first or collectives_made() > self._made):
            return
        samples = f"this rank has {batch.size} of the {batch.global_size} samples of this step"
        missing = 0 if self._training else batch.without
        if missing:
            samples += f" of a validation, and {missing} {'rank has' if missing == 1 else 'ranks have'} none"
        self._mode = UnevenStep(samples, missing=missing)
        self._mode.__enter__()  # type: ignore[no-untyped-call]  # torch has no types here

    def end(self) -> None:
        """The step is over."""
        mode, self._mode = self._mode, None
        if mode is not None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # nor here
