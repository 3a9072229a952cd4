"""Reacts to the death of a loader process: new processes fetch its batches again, a limited number of times."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torchtrainer.config import FailureConfig
from torchtrainer.errors import WorkerDiedError
from torchtrainer.process.signals import describe_exit
from torchtrainer.train.loader_processes import LoaderDiedError

BUS_ERROR = int(getattr(signal, "SIGBUS", 0))


@dataclass(frozen=True, kw_only=True)
class LoaderLoss:
    """A process of a loader that died and was replaced.

    Attributes:
        loader: what the loader is for.
        rank: whose batches it read.
        pid, exit_code, oom, stack: see `LoaderDiedError`.
        seconds: from when it was noticed until the batch was there.
    """

    loader: str
    rank: int
    pid: int
    exit_code: int
    oom: bool
    stack: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Losing:
    """What a rank does about loader processes that die.

    Attributes:
        tell: is told of each one, once the batch is there that it was to read.
        max_failures: so many in a row are replaced, no batch being read between them.
    """

    tell: Callable[[LoaderLoss], None]
    max_failures: int = FailureConfig().max_failures


class Refetching:
    """Counts the deaths at one batch of a loader.

    Args:
        losing: what is done about them.
        loader: what the loader is for.
        rank: that reads.
    """

    def __init__(self, losing: Losing, *, loader: str, rank: int) -> None:
        self._losing = losing
        self._loader = loader
        self._rank = rank
        self._open: list[tuple[float, list[LoaderDiedError]]] = []

    def lost(self, died: list[LoaderDiedError]) -> None:
        """One process, or several together, died before a batch was there.

        Raises:
            WorkerDiedError: that is once too often.
        """
        self._open.append((time.monotonic(), died))
        if len(self._open) > self._losing.max_failures:
            raise WorkerDiedError(self._story(died[0]), self._rank, died[0].exit_code) from None

    def fetched(self) -> None:
        """A batch is there."""
        if not self._open:
            return
        now, opened = time.monotonic(), self._open
        self._open = []
        for since, one in ((since, one) for since, died in opened for one in died):
            self._losing.tell(
                LoaderLoss(
                    loader=self._loader,
                    rank=self._rank,
                    pid=one.pid,
                    exit_code=one.exit_code,
                    oom=one.oom,
                    stack=one.stack,
                    seconds=now - since,
                )
            )

    def _story(self, died: LoaderDiedError) -> str:
        times, self._open = len(self._open), []
        how = "was killed for memory" if died.oom else describe_exit(died.exit_code)
        story = f"rank {self._rank}: process {died.pid} of the {self._loader} loader {how}"
        if times > 1:
            story += f", as {times} in a row did before a batch was read"
        story += f"; FailureConfig(max_failures={self._losing.max_failures}) allows no more."
        if died.exit_code == -BUS_ERROR:
            story += " A bus error there often means that the shared memory in /dev/shm is used up."
        if died.oom:
            story += " Use fewer loader processes (DataLoader(num_workers=...)) or smaller batches, or give the container more memory."
        return "\n".join([story, *(["It crashed here:", died.stack] if died.stack else [])])


def unbroken(
    open_stream: Callable[[bool], Iterator[Any]], kill: Callable[[], list[LoaderDiedError]], refetching: Refetching
) -> Iterator[Any]:
    """The elements of a stream that a loader's processes read, from beginning to end whoever of them dies.

    Args:
        open_stream: opens the stream; told whether it is to be the same once more.
        kill: ends what is left of the processes; returns those that had died.
        refetching: counts deaths.
    """
    given, again = 0, False
    while True:
        try:
            for number, element in enumerate(open_stream(again)):
                if number >= given:
                    refetching.fetched()
                    given += 1
                    yield element
        except LoaderDiedError:
            refetching.lost(kill())
            again = True
        else:
            refetching.fetched()
            return
