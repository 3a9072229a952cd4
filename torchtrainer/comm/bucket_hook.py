"""Gradients that DistributedDataParallel collects, exchanged by parameter instead of by bucket.

DDP wraps the model over a group of this process alone, so that it makes no collective of its own with other processes, and
they need not have the same buckets: DDP lays them out anew after the first backward pass, at different times in different
processes. What is kept of DDP is that gradients are collected as the loss is differentiated, `no_sync`, and its checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.errors import NotAvailableError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

Gradients = Sequence[torch.Tensor | None]


def exchange_by_hook(
    ddp: DistributedDataParallel,
    parameters: Sequence[nn.Parameter],
    exchange: Callable[[list[torch.Tensor | None]], Gradients],
) -> None:
    """Has the gradients of every backward pass through a model replaced by what ``exchange`` makes of them.

    ``exchange`` runs in the thread that differentiates, once per backward pass outside `no_sync`, when the last gradient is
    there. What it raises is raised by ``backward()``, after which the gradients are what this process computed alone.

    Args:
        ddp: over a group of this process alone.
        parameters: for which gradients are exchanged; this model has some or all of them.
        exchange: gets one gradient per parameter, None for those of other models and for those that this backward pass does
            not use and that have no gradient from an earlier one; returns one per parameter, None where no rank has one.

    Raises:
        NotAvailableError: by ``backward()``, for sparse gradients.
    """
    collector = _Collector(ddp, parameters, exchange)
    ddp.register_comm_hook(None, lambda _, bucket: collector.take(bucket))


class _Collector:
    """The buckets of one backward pass, until the last of them is there."""

    def __init__(
        self,
        ddp: DistributedDataParallel,
        parameters: Sequence[nn.Parameter],
        exchange: Callable[[list[torch.Tensor | None]], Gradients],
    ) -> None:
        self._places: dict[torch.Tensor, int] = {parameter: place for place, parameter in enumerate(parameters)}
        self._exchange = exchange
        self._leaves_unused = ddp.find_unused_parameters or ddp.static_graph
        self._parameters: list[torch.Tensor] = []
        self._gradients: list[torch.Tensor] = []
        self._buckets: list[tuple[Future[torch.Tensor], torch.Tensor]] = []

    def take(self, bucket: GradBucket) -> Future[torch.Tensor]:
        """One bucket is complete; DDP calls this in the order of their numbers."""
        if bucket.index() == 0:  # also after a pass that was broken off by an error
            self._forget()
        if bucket.buffer().is_sparse:
            raise NotAvailableError(
                "gradients that are sparse cannot go through shared memory: make the layer with sparse=False"
            )
        self._parameters += bucket.parameters()
        self._gradients += bucket.gradients()
        done: Future[torch.Tensor] = Future()
        self._buckets.append((done, bucket.buffer()))
        if bucket.is_last():
            self._exchange_all()
        return done

    def _exchange_all(self) -> None:
        places = [self._places[parameter] for parameter in self._parameters]
        mine: list[torch.Tensor | None] = [None] * len(self._places)
        for place, parameter, gradient in zip(places, self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:  # DDP has zeros in the bucket for a parameter without one
                mine[place] = gradient
        exchanged = self._exchange(mine)
        pairs = [
            (gradient, result)
            for gradient, place in zip(self._gradients, places, strict=True)
            if (result := exchanged[place]) is not None
        ]
        if pairs:
            torch._foreach_copy_([gradient for gradient, _ in pairs], [result for _, result in pairs])
        if self._leaves_unused:
            for parameter, gradient, place in zip(self._parameters, self._gradients, places, strict=True):
                if exchanged[place] is not None:
                    _give(parameter, gradient)
        buckets = self._buckets
        self._forget()
        for done, buffer in buckets:
            done.set_result(buffer)

    def _forget(self) -> None:
        self._parameters, self._gradients, self._buckets = [], [], []


def _give(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """What DDP does for parameters that some rank has used; it knows of this process only, and leaves others as they are."""
    if parameter.grad is None:
        parameter.grad = gradient.clone()
    elif parameter.grad.data_ptr() != gradient.data_ptr():
        parameter.grad.copy_(gradient)
