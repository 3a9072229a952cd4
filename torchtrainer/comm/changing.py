"""The ranks of a run whose processes may change: how they talk while they are built, and what replaces that later.

As long as every rank has the process that it began with, this is their process group. What was said while they were built is
written down, so that a process that comes later is built with the same answers, without the others. After that nothing is
exchanged in this way any more: the loaders' checks are done, and buffers travel with the gradients.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torchtrainer.comm.group import GroupCollective
from torchtrainer.errors import EngineError

if TYPE_CHECKING:
    from torch import nn


class ChangingCollective:
    """The collective of a worker process of the local engine.

    Args:
        rank: that the process is built for; changes with the rank whose turn it is.
        world_size: all ranks.
        group: those that are built together; None: this process is built alone.
        record: what the others said, for a process that is built alone; empty: every rank says what this one says.
        waiting: entered while this process waits for the others.

    Attributes:
        rank, world_size: as given.
        record: what the ranks said so far.
    """

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        group: GroupCollective | None,
        record: Sequence[Any] | None = None,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.record: list[Any] = []
        self._group = group
        self._waiting = waiting
        self._answers = list(record or ())

    def built(self) -> None:
        """The process is built: the ranks may have other processes from now on."""
        self._group = None
        self._answers = []

    def all_gather(self, value: Any) -> list[Any]:
        """Every rank's value (JSON data), in rank order; once the process is built, this one's for all."""
        if self._group is not None:
            with self._waiting():
                answer = self._group.all_gather(value)
        elif self._answers:
            answer = self._answers.pop(0)
        else:
            return [json.loads(json.dumps(value)) for _ in range(self.world_size)]
        self.record.append(answer)
        return answer

    def gather_tensors(self, state: bytes) -> list[bytes]:
        """Every rank's bytes, in rank order; errors as for `sum`."""
        return self._together().gather_tensors(state)

    def sum(self, values: Sequence[float]) -> list[float]:
        """The ranks' sums, while every rank has the process that it began with.

        Raises:
            EngineError: that is over.
        """
        return self._together().sum(values)

    def broadcast_buffers(self, modules: Iterable[nn.Module], src: int = 0) -> None:
        """Gives every rank the buffers of rank ``src``; errors as for `sum`."""
        self._together().broadcast_buffers(modules, src)

    def _together(self) -> GroupCollective:
        if self._group is None:
            raise EngineError(
                "the ranks of this run may be in other processes by now, and exchange nothing but gradients"
            )
        return self._group

    def barrier(self) -> None:
        """Waits for the ranks that are built together."""
        if self._group is not None:
            self._group.barrier()

    def close(self) -> None:
        """Nothing: the group ends with the process."""
