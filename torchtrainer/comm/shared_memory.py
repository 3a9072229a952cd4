"""Averages the gradients of all ranks of a machine through shared memory; whoever carries a rank speaks for it.

Every rank has a *slot* for its gradients and two counters: ``given`` (number of the exchange for which its gradients are in its
slot) and ``reduced`` (for which its share of the result is made). Exchange n goes one of two ways, chosen alike by all processes:

    direct   put g into slot[r][n % 2], given[r] = n  ->  wait until all have given n  ->  sum all slots
    shares   put g into slot[r],        given[r] = n  ->  wait until all have given n
             -> sum share r of all slots into the result, reduced[r] = n  ->  wait until all have reduced n  ->  copy the result

Why nothing is overwritten that somebody may still read. A process that takes part carries at least one rank that nobody else
gives, and gives n + 1 for it only when it has finished n. So if all ranks have given n + 1, everybody has finished n.

- direct: slot[r][n % 2] is written again for n + 2, by a process that has finished n + 1; then all have given n + 1, so all
  have finished n, its only readers. With one buffer, n + 1 would be written while a slow process still sums n.
- shares: slot[r] is written again for n + 1, by a process that has finished n; then all shares of n are made, and only who
  makes a share reads slots. The result is written for n + 1 when all have given n + 1, so all have copied n.
- which parameters a rank has gradients for is read by everybody, and has two buffers both ways.

Why a process may die at any instruction. When it is gone, its ranks are taken over by a process that has finished n - 1 and
not n, or joins in such a state. What is in a slot counts from ``given``, what is in a share of the result from ``reduced``;
each is set after the whole was written. If the counter says n, the place is left alone. Otherwise nobody reads it for n, and by
the rules above nobody reads it for an earlier number any more, so that it is written from the start, half written or not.
Who died between setting a counter and waking others made them sleep `WAKE_S` longer. Numbers start from 1 in new memory: a
group that starts anew needs a new file.

What is exchanged may change between two exchanges, as parameters are unfrozen or added: `SharedMemoryExchange.lay_out`. All ranks change it
before the same exchange, or their tags differ. The new slots lie behind the old ones. When an exchange through them is finished, all
have given their gradients there, so that nobody reads the old ones any more, and their memory goes back to the machine.

Memory order: x86-64 shows stores in the order in which they were made (and the C library ends its streaming copies by a
fence), so that a counter is seen after what it stands for. Elsewhere `why_not_shared` gives a reason not to.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch

from torchtrainer.checkpoint.memory import available_bytes, map_shared
from torchtrainer.comm.board import NO_TAG, PAGE_BYTES, Board, UnequalExchangeError
from torchtrainer.comm.counters import Counters
from torchtrainer.comm.futex import why_not_shared
from torchtrainer.comm.layout import SlotLayout
from torchtrainer.comm.slots import GradientSlots
from torchtrainer.comm.summing import average, share
from torchtrainer.errors import EngineError
from torchtrainer.process.cgroups import usable_cores

__all__ = [
    "SHARES_FROM_BYTES",
    "WAKE_S",
    "ExchangeUnavailableError",
    "SharedMemoryExchange",
    "UnequalExchangeError",
    "why_no_room",
    "why_not_shared",
]

WAKE_S = 0.005
"""Longest sleep of a waiting process, after which it looks for orders."""
SPIN_S = 0.0002
"""How long a process with a core of its own spins before it sleeps; waking it up takes about as long."""
SHARES_FROM_BYTES = 512 * 1024
"""Size of one rank's gradients at and above which every rank sums a share of them."""
_MB = 1e6


class ExchangeUnavailableError(EngineError):
    """Gradients cannot go through shared memory here: the platform cannot, or there is not enough memory."""


def why_no_room(parameters: Sequence[torch.Tensor], world_size: int, by_rows: Collection[int] = ()) -> str:
    """Why the machine has no memory for exchanging gradients; empty if it has. To be asked before anybody takes any.

    Args:
        parameters: whose gradients are exchanged.
        world_size: number of ranks.
        by_rows: numbers of those whose gradients may be sparse.
    """
    needed, available = 2 * (world_size + 1) * SlotLayout(parameters, by_rows).size_bytes, available_bytes()
    if available is None or needed <= available:
        return ""
    return f"it takes {needed / _MB:.0f} MB of shared memory, but only {available / _MB:.0f} MB are free"


class SharedMemoryExchange:
    """Averages the gradients of W ranks in rank order: the same bits on any number of processes.

    Used by the thread that trains, in each process that carries ranks.

    Args:
        path: of a file in memory that all of them map, and nobody used before; each makes it as long as it has to be.
            None: memory of this process alone, which carries all ranks.
        world_size: number of ranks.
        parameters: on the CPU, whose gradients are exchanged; of the same types and shapes in the same order everywhere.
        timeout_s: longest sleep until other ranks come, in one exchange; what ``on_wait`` takes does not count.
        processes: how many share this process's cores; a process spins before it sleeps only if each has a core.
        by_rows: numbers of the parameters whose gradients may be sparse.

    Attributes:
        number: exchanges completed; set by a process that joins.
        timeout_s: as given; may be set.
        region: where the slots in use begin in the file; a process that joins lays out its own there.
        layout: checksum of the parameters, for tags.

    Raises:
        ExchangeUnavailableError: not on this platform, or there is not enough memory.
    """

    def __init__(
        self,
        path: str | None,
        *,
        world_size: int,
        parameters: Sequence[torch.Tensor],
        timeout_s: float,
        processes: int,
        by_rows: Collection[int] = (),
    ) -> None:
        self.number = 0
        self.timeout_s = timeout_s
        self._path = path
        self._world_size = world_size
        self._spins = path is not None and processes <= usable_cores()
        self.region = Board.size_bytes(world_size)
        self._board = Board(self._mapped(self.region), world_size=world_size, shared=path is not None)
        self._old: GradientSlots | None = None
        self._lay_out(parameters, by_rows)

    def lay_out(
        self, parameters: Sequence[torch.Tensor], by_rows: Collection[int] = (), region: int | None = None
    ) -> None:
        """Exchanges the gradients of other parameters from the next exchange on. Every process does so before the same one.

        Args:
            parameters, by_rows: as at first.
            region: where the other processes have their slots, for one that joins; None: behind those that were in use.

        Raises:
            ExchangeUnavailableError: there is not enough memory.
        """
        if region is None and self._old is None:
            self._old = self._slots
        else:  # this process joins, or nothing went through the slots in use
            self._slots.close()
        self.region = -(-self._slots.end // PAGE_BYTES) * PAGE_BYTES if region is None else region
        self._lay_out(parameters, by_rows)

    def _lay_out(self, parameters: Sequence[torch.Tensor], by_rows: Collection[int]) -> None:
        layout = SlotLayout(parameters, by_rows)
        self.layout = layout.checksum
        self._by_shares = self._path is not None and self._world_size > 1 and layout.dense_bytes >= SHARES_FROM_BYTES
        kind: Any = {"buffers": 2 if self._path is not None and not self._by_shares else 1, "result": self._by_shares}
        end = self.region + GradientSlots.size_bytes(layout, self._world_size, **kind)
        self._slots = GradientSlots(self._mapped(end), self.region, world_size=self._world_size, layout=layout, **kind)
        self._runs = layout.flat(torch.empty(layout.dense_bytes, dtype=torch.uint8))
        self._averages: list[torch.Tensor | None] = [*layout.by_parameter(self._runs)]

    def _mapped(self, size_bytes: int) -> mmap.mmap:
        reason = why_not_shared() if self._path is not None else None
        if reason is not None:
            raise ExchangeUnavailableError(f"gradients cannot go through shared memory here: {reason}")
        try:
            if self._path is not None:
                return map_shared(self._path, size_bytes)
            available = available_bytes()
            if available is not None and size_bytes > available:
                raise OSError(errno.ENOMEM, f"{available / _MB:.0f} MB are free")
            return mmap.mmap(-1, size_bytes)
        except OSError as error:
            raise ExchangeUnavailableError(
                f"the gradients of {self._world_size} ranks need {size_bytes / _MB:.0f} MB of memory, which this machine or "
                f"container does not have: {error.strerror or error}. Raise the container's memory limit (memory.max of its "
                "control group; docker run --memory), or use a smaller num_workers"
            ) from error

    def begin(self, tag: array[int]) -> None:
        """Nothing: nobody waits for a rank before it publishes."""

    begun = False

    def leave(self, tag: array[int]) -> None:
        """Nothing: whoever waits for this rank sees its place."""

    def given(self, rank: int) -> int:
        """The latest exchange for which the rank's gradients are there."""
        return self._board.given[rank]

    def loss(self) -> float:
        """The loss of all ranks in the latest exchange: the mean over all samples, the same number on all ranks."""
        return self._board.loss(self.number)

    def be_at(self, rank: int, place: int) -> None:
        """Says how far a rank is, so that nobody waits for an exchange that it has left out.

        Args:
            rank: carried by this process.
            place: grows with every step and call, the same on all ranks.
        """
        self._board.places[rank] = place

    @torch.no_grad()
    def put(
        self,
        rank: int,
        number: int,
        gradients: Sequence[torch.Tensor | None],
        *,
        weight: float = 1.0,
        samples: float = 1.0,
        loss: float = 0.0,
    ) -> None:
        """Copies a rank's gradients for the running exchange; does nothing if the rank has given them already.

        Args:
            rank: whose gradients; this process carries it.
            number: of the running exchange, which is one more than the completed ones.
            gradients: one per parameter, in their order; None: the rank has none for it.
            weight: of a sample of this rank in the mean over all samples. Alike on all ranks, it changes nothing.
            samples: of the rank, by whose number its gradients are scaled already; 0: they are zeros.
            loss: of the rank, for those who ask for that of all; see `loss`.
        """
        if self._board.given[rank] >= number:
            return
        if number != self.number + 1:
            raise ValueError(f"number is {number}, but exchange {self.number + 1} is the one that is running")
        self._slots.put(rank, number, gradients)
        self._board.stand_for(rank, number, weight, samples, loss)

    def publish(self, rank: int, number: int, tag: array[int] = NO_TAG) -> None:
        """Announces that the rank's gradients are ready, and wakes the processes that wait for them.

        Args:
            rank, number: as for `put`.
            tag: has to be the same on all ranks; see `torchtrainer.comm.board.exchange_tag`.
        """
        if self._board.given[rank] < number:
            self._board.tag(rank, number, tag)
            self._board.given.publish(rank, number)

    @torch.no_grad()
    def finish(
        self,
        *,
        carried: Callable[[], Collection[int]],
        on_wait: Callable[[], None],
        tag: array[int] = NO_TAG,
        place: int | None = None,
    ) -> list[torch.Tensor | None]:
        """Waits until all ranks have given their gradients, and averages them.

        Args:
            carried: the ranks that this process carries now.
            on_wait: called before this thread sleeps, and at least every `WAKE_S` while it waits. May put and publish for more
                ranks and change what ``carried`` returns. What it raises leaves the exchange, which can be finished later.
            tag: that the ranks of this process have published.
            place: of the ranks of this process, as for `be_at`; None: who is further than this is not looked at.

        Returns:
            One tensor per parameter, None where no rank has a gradient; the caller's own until the next call.

        Raises:
            EngineError: a rank did not come within ``timeout_s``.
            UnequalExchangeError: a rank has another tag, or went on without this exchange.
        """
        number = self.number + 1

        def look() -> None:
            on_wait()
            if place is not None:
                self._board.check_places(number, place)

        self._wait(self._board.given, number, look)
        self._board.check_tags(number, tag)
        absent = self._slots.absent(number)
        scales = self._board.scales(number)
        by_rows = self._slots.average_rows(number, scales)  # before this process says that it has made its share
        if self._by_shares:
            self._average_by_shares(number, scales, carried, on_wait)
        else:
            for at, run in enumerate(self._runs):
                average(run, [rank[at] for rank in self._slots.runs[number % len(self._slots.runs)]], scales)
        self.number = number
        if self._old is not None:
            self._old.release()
            self._old = None
        averages = self._averages.copy()
        for at, mean in by_rows.items():
            averages[at] = mean
        for at in absent:
            averages[at] = None
        return averages

    def close(self) -> None:
        """Lets go of the memory; nothing else may be called after it."""
        self._slots.close()
        self._board.close()

    def _average_by_shares(
        self,
        number: int,
        scales: list[float] | None,
        carried: Callable[[], Collection[int]],
        on_wait: Callable[[], None],
    ) -> None:
        def reduce() -> None:
            for rank in carried():
                if self._board.reduced[rank] < number:
                    self._average_share(rank, scales)
                    self._board.reduced.publish(rank, number)

        def look() -> None:
            on_wait()
            reduce()  # a rank that has come to this process by now may have left its share undone

        reduce()
        self._wait(self._board.reduced, number, look)
        for run, result in zip(self._runs, self._slots.result, strict=True):
            run.copy_(result)

    def _average_share(self, rank: int, scales: list[float] | None) -> None:
        for place, result in enumerate(self._slots.result):
            summands = [share(runs[place], rank, self._world_size) for runs in self._slots.runs[0]]
            average(share(result, rank, self._world_size), summands, scales)

    def _wait(self, counters: Counters, number: int, on_wait: Callable[[], None]) -> None:
        if counters.reached(number) or (self._spins and _spin(counters, number)):
            return
        slept_s = 0.0
        on_wait()
        while missing := counters.missing(number):
            if slept_s >= self.timeout_s:
                raise EngineError(
                    f"ranks {missing} did not take part in exchange {number} of gradients within timeout_s="
                    f"{self.timeout_s:g} s; the other ranks wait for them. See in their logs what they do, or raise "
                    "timeout_s"
                )
            began = time.monotonic()
            counters.sleep(missing[0], number, WAKE_S)
            slept_s += time.monotonic() - began
            on_wait()


def _spin(counters: Counters, number: int) -> bool:
    end = time.monotonic() + SPIN_S
    while not counters.reached(number):
        if time.monotonic() > end:
            return False
        os.sched_yield()  # the process that is waited for may have been put on the same core
    return True
