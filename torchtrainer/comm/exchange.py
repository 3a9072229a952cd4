"""What carries gradients between the ranks of a run, as the steps and recovery see it.

A new way is a class with these methods, made in `torchtrainer.worker.assembly`. There are `torchtrainer.comm.shared_memory`
(one machine, and several ranks in one process alone) and `torchtrainer.comm.group_exchange` (torch's process group).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch


class Exchange(Protocol):
    """Averages the gradients of all ranks. Exchanges are numbered from 1; a process is in the one after those it completed.

    A rank *gives* its gradients: they are put where the exchange takes them from, then published. When all ranks have given
    theirs, each process finishes the exchange and has the means. Used by the thread that trains.

    Attributes:
        number: exchanges completed; set by a process that joins.
        region: where the gradients of the present parameters lie, for a process that joins.
        layout: tells other parameters apart, for tags.
    """

    number: int
    region: int
    layout: int

    def lay_out(
        self, parameters: Sequence[torch.Tensor], by_rows: Collection[int] = (), region: int | None = None
    ) -> None:
        """Exchanges the gradients of other parameters from the next exchange on. Every process does so before the same one.

        Args:
            parameters: in the order that gradients come in.
            by_rows: numbers of those whose gradients may be sparse.
            region: where the other processes have theirs, for one that joins.
        """

    def begin(self, tag: array[int]) -> None:
        """A backward pass has begun whose end will be an exchange; ``tag`` as for `publish`."""

    @property
    def begun(self) -> bool:
        """Whether others wait for this exchange already, whatever this rank will have to give."""

    def given(self, rank: int) -> int:
        """The latest exchange for which the rank's gradients are there: what has not to be computed again if it is lost."""

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
        """Takes a rank's gradients for the running exchange; does nothing if the rank has given them already.

        Args:
            rank: whose gradients; this process carries it.
            number: of the running exchange, which is one more than the completed ones.
            gradients: one per parameter, in their order; None: the rank has none for it.
            weight: of a sample of this rank in the mean over all samples.
            samples: of the rank, by whose number its gradients are scaled already; 0: they are zeros.
            loss: of the rank, for those who ask for that of all; see `loss`.
        """

    def publish(self, rank: int, number: int, tag: array[int]) -> None:
        """Announces that the rank's gradients are ready.

        Args:
            rank, number: as for `put`.
            tag: has to be the same on all ranks; see `torchtrainer.comm.board.exchange_tag`.
        """

    def finish(
        self,
        *,
        carried: Callable[[], Collection[int]],
        on_wait: Callable[[], None],
        tag: array[int],
        place: int | None = None,
    ) -> list[torch.Tensor | None]:
        """Waits until all ranks have given their gradients, and averages them.

        Args:
            carried: the ranks that this process carries now.
            on_wait: called now and then while this process waits, if it can do anything then. May put and publish for more
                ranks and change what ``carried`` returns. What it raises leaves the exchange, which can be finished later.
            tag: that the ranks of this process have published.
            place: of the ranks of this process, as for `be_at`; None: who is further than this is not looked at.

        Returns:
            One tensor per parameter; None where no rank has a gradient, or the parameter's own is the mean already.

        Raises:
            EngineError: a rank did not come in time.
            UnequalExchangeError: a rank has another tag, or went on without this exchange.
        """

    def loss(self) -> float | None:
        """The loss of all ranks in the latest exchange: the mean over all samples; None: losses do not travel here."""

    def be_at(self, rank: int, place: int) -> None:
        """Says how far a rank is, so that nobody waits for an exchange that it has left out.

        Args:
            rank: carried by this process.
            place: grows with every step and call, the same on all ranks.
        """

    def leave(self, tag: array[int]) -> None:
        """The call is over and every exchange was made; ``tag`` as for `publish`."""

    def close(self) -> None:
        """Lets go of memory; nothing else may be called after it."""
