"""Gradients through torch's process group, where wrappers of torch's exchange most of them inside the backward pass.

``DistributedDataParallel`` and FSDP exchange the gradients of the models that they were put around, as these were at that time. The
rest of what the optimizers update (a criterion, a layer that was unfrozen or added later) is averaged here as the pass ends.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from torchtrainer.comm.board import NO_TAG, UnequalExchangeError
from torchtrainer.comm.tags import average_through_group, open_tags

_END = 1 << 62
"""Bit of the tag that says that the rank's call is over."""


class ProcessGroupExchange:
    """An `torchtrainer.comm.exchange.Exchange` of one rank per process. Making one is a collective call.

    Args:
        covered: ids of the parameters whose gradients wrappers exchange.
        timeout_s: longest wait for the tags of the others.
        check: called in each exchange when the tags agree, before anything is averaged here.

    Attributes:
        number: exchanges completed.
        layout: how many parameters are averaged here.
    """

    region = 0

    def __init__(self, covered: Collection[int], *, timeout_s: float, check: Callable[[], None]) -> None:
        self.number = 0
        self.layout = 0
        self._covered = covered
        self._check = check
        self._tags = open_tags(timeout_s)
        self._count = 0
        self._rest: list[tuple[int, torch.Tensor]] = []
        self._given: Sequence[torch.Tensor | None] = ()

    def lay_out(
        self, parameters: Sequence[torch.Tensor], by_rows: Collection[int] = (), region: int | None = None
    ) -> None:
        """See `torchtrainer.comm.exchange.Exchange`."""
        self._rest = [(place, one) for place, one in enumerate(parameters) if id(one) not in self._covered]
        self._count, self.layout = len(parameters), len(self._rest)

    def begin(self, tag: array[int]) -> None:
        """Sends the tag on its way while the wrappers exchange."""
        if self._tags is not None:
            self._tags.begin(tag)

    @property
    def begun(self) -> bool:
        """Whether tags are on their way, which all ranks wait for."""
        return self._tags is not None and self._tags.running

    def leave(self, tag: array[int]) -> None:
        """The call is over, and every exchange was made: the ranks compare their tags once more. A collective call."""
        if self._tags is not None:
            tag[0] |= _END
            self._tags.begin(tag)
            self._finish_tags()

    def given(self, rank: int) -> int:
        """Nobody looks at the gradients of a rank before the exchange is over."""
        return self.number

    def be_at(self, rank: int, place: int) -> None:
        """Nothing: ranks that part are seen by their tags."""

    def loss(self) -> None:
        """None: no losses travel with the gradients."""

    def put(self, rank: int, number: int, gradients: Sequence[torch.Tensor | None], **stands_for: float) -> None:
        """Takes the gradients that the wrappers have left alone."""
        self._given = gradients

    def publish(self, rank: int, number: int, tag: array[int] = NO_TAG) -> None:
        """Nothing: the tag is on its way since the pass began."""

    def finish(self, **how: Any) -> list[torch.Tensor | None]:  # nobody looks around inside a collective
        """Waits for the tags of all ranks, and averages what no wrapper did; None: the gradient is right as it is.

        Raises:
            UnequalExchangeError: a rank has another tag.
            OperatorUseError: from ``check``.
        """
        self._finish_tags()
        self._check()
        means: list[torch.Tensor | None] = [None] * self._count
        if self._rest:
            self._average(means)
        self.number, self._given = self.number + 1, ()
        return means

    def close(self) -> None:
        """Nothing: the group ends with the process."""

    def _average(self, means: list[torch.Tensor | None]) -> None:
        """Averages the gradients that no wrapper exchanges; a rank without one counts with zeros."""
        given = [self._given[place] for place, _ in self._rest]
        dense = [
            torch.zeros_like(one)
            if gradient is None
            else gradient.to_dense()
            if gradient.is_sparse
            else gradient.clone()
            for (_, one), gradient in zip(self._rest, given, strict=True)
        ]
        present = torch.tensor([float(one is not None) for one in given], device=dense[0].device)
        average_through_group([*dense, present])
        for (place, _), gradient, mean, there in zip(self._rest, given, dense, present.tolist(), strict=True):
            if there:
                means[place] = mean.to_sparse(1) if gradient is not None and gradient.is_sparse else mean

    def _finish_tags(self) -> None:
        if self._tags is None or not self._tags.running:
            return
        try:
            self._tags.finish()
        except UnequalExchangeError as error:
            over = error.tag is not None and error.tag[0] & _END != 0
            raise UnequalExchangeError(error.rank, None if over else error.tag) from None
