"""A rank whose operator makes the update itself: its gradients are exchanged inside backward, and its process carries no other.

While the process of another rank is lost, this one waits in its exchange until a replacement has given that rank's gradients. The
replacement needs the state of the ranks at the step boundary before; this process has it as long as it has updated nothing since.

Everything here runs in the thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel

from torchtrainer.comm.bucket_hook import exchange_by_hook
from torchtrainer.comm.exchange import GradientExchange
from torchtrainer.train.cards import CardFile, packed, unpacked
from torchtrainer.train.complete_state import module_modes
from torchtrainer.train.components import internals
from torchtrainer.train.equality import Comparison
from torchtrainer.train.rng import StreamReader
from torchtrainer.train.seats import Buffers, all_parameters, nothing, packed_extras, unpacked_extras

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class LoneRank:
    """The rank of this process, and its exchange with the others.

    Args:
        operator: of this process.
        exchange: with the other processes.
        cards: of every rank, by rank; one more for the buffers that all take over from rank 0.

    Attributes:
        exchange: as given.
        on_wait: called while others are waited for.
        epoch_idx: number of the running pass hook.
    """

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        exchange: GradientExchange,
        cards: list[CardFile],
    ) -> None:
        self.exchange = exchange
        self.on_wait: Callable[[], None] = nothing
        self.epoch_idx: Callable[[], int] = lambda: 0
        self._operator = operator
        self._cards = cards
        self._buffers = Buffers(operator)
        self._streams = StreamReader()
        self._rank = internals(operator).context.collective.rank
        self._boundary = exchange.number
        self._comparison = Comparison(operator)
        parameters = all_parameters(operator)
        components = internals(operator).components
        for model in components.models if components is not None else []:
            if isinstance(model, DistributedDataParallel):
                exchange_by_hook(model, parameters, self._exchange)

    def why_not_shared(self, ranks: Sequence[int]) -> str:
        """Why these ranks cannot go on from the state of this process; empty if they can.

        Their cards are of step boundaries. A rank that was lost after it had given its gradients, and before the boundary, has
        none for what comes next; and this process must not have updated anything since its own boundary.
        """
        done = self.exchange.number - self._boundary
        if done:
            return f"{done} exchanges were completed since the last step boundary"
        missing = [rank for rank in ranks if not self._cards[rank].has(self.exchange.number)]
        return (
            f"rank {missing[0]} was lost between its exchange of gradients and the end of the step" if missing else ""
        )

    def begin_call(self) -> None:
        """A call of ``train`` begins."""
        self._comparison.begin()

    def at_boundary(self) -> None:
        """Writes the card of this rank: a replacement would go on from here."""
        inside = internals(self._operator)
        self._boundary = self.exchange.number
        plain = {
            "streams": self._streams.read(),
            "loaders": {name: loader.state_dict() for name, loader in inside.loaders.items()},
            "modes": module_modes(self._operator),
            "steps": inside.steps.state_dict() if inside.steps is not None else None,
            "meters": packed(inside.meters.state_dict()) if inside.meters is not None else None,
            "epoch_idx": self.epoch_idx(),
            "sums": self._comparison.sums,
            "extras": packed_extras(self._operator),
        }
        self._cards[self._rank].write(self._boundary, self._buffers.tensors, plain)

    def follow_first_rank(self) -> None:
        """Gives this process the buffers of rank 0, as they were when it gave its latest gradients."""
        if self._buffers.followed and self._rank and self.exchange.number:
            self._buffers.load(self._cards[-1].tensors(self.exchange.number), followed=True)

    def card(self) -> tuple[list[torch.Tensor], dict[str, Any]]:
        """The card of this rank at the present exchange: values of its buffers, and the rest."""
        tensors, plain = self._cards[self._rank].read(self.exchange.number)
        return list(tensors), plain

    def load_buffers(self, tensors: Sequence[torch.Tensor]) -> None:
        """Puts back the buffers of a card: the forward pass of whoever shared its state may have changed them since."""
        self._buffers.load(tensors, followed=True)
        self._buffers.load(tensors, followed=False)

    def _exchange(self, gradients: list[torch.Tensor | None]) -> Sequence[torch.Tensor | None]:
        number = self.exchange.number + 1
        progress = internals(self._operator).context.progress
        phase = progress.phase
        with self._operator.timers.record("give"):
            self.exchange.put(self._rank, number, gradients)
        if self._rank == 0 and self._buffers.followed:
            self._cards[-1].write(number, self._buffers.tensors, None)
        self.exchange.publish(self._rank, number)
        progress.enter("exchange")
        with self._operator.timers.record("sync"):
            means = self.exchange.finish(carried=lambda: [self._rank], on_wait=self.on_wait)
        self._comparison.finish(self._cards[:-1], number - 1)
        self.follow_first_rank()
        progress.enter(phase)
        return means


def rank_state_of(card: dict[str, Any]) -> dict[str, Any]:
    """A card as the state of a rank, in the form of `torchtrainer.train.complete_state.rank_state`, without its streams."""
    mine = {name: card[name] for name in ("loaders", "modes", "epoch_idx")}
    mine["meters"] = unpacked(card["meters"])
    if card["steps"] is not None:
        mine["steps"] = card["steps"]
    if card["extras"]:
        mine["operator"] = unpacked_extras(card["extras"])
    return mine
