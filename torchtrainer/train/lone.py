"""A rank whose operator makes the update itself: its gradients are exchanged as backward ends, and its process carries no other.

While the process of another rank is lost, this one waits in its exchange until a replacement has given that rank's gradients. The
replacement needs the state of the ranks at the step boundary before; this process has it as long as it has updated nothing since.

Everything here runs in the thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.backward import BackwardEnd, take_over
from torchtrainer.comm.exchange import GradientExchange, UnequalExchangeError
from torchtrainer.train.cards import CardFile, packed, unpacked
from torchtrainer.train.complete_state import module_modes
from torchtrainer.train.components import internals
from torchtrainer.train.data_drawing import OrderComparison
from torchtrainer.train.equality import Comparison
from torchtrainer.train.extras import keeps_extras, packed_extras, unpacked_extras
from torchtrainer.train.rng import StreamReader
from torchtrainer.train.seats import Buffers, nothing
from torchtrainer.train.step import stands_for
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.train.updates import Updates, go_to, standing

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class LoneRank:
    """The rank of this process, and its exchange with the others.

    Args:
        operator: of this process.
        exchange: with the other processes.
        cards: of every rank, by rank; one more for the buffers that all take over from rank 0.
        trained: the parameters that ``exchange`` was laid out for.

    Attributes:
        exchange: as given.
        updates: of the optimizers.
        on_wait: called while others are waited for.
        epoch_idx: number of the running pass hook.
    """

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        exchange: GradientExchange,
        cards: list[CardFile],
        trained: TrainedParameters,
    ) -> None:
        self.exchange = exchange
        self.updates = Updates(operator, trained)
        self.on_wait: Callable[[], None] = nothing
        self.epoch_idx: Callable[[], int] = lambda: 0
        self._operator = operator
        self._cards = cards
        self._buffers = Buffers(operator)
        self._streams = StreamReader()
        self._rank = internals(operator).context.collective.rank
        self._boundary = exchange.number
        self._comparison = Comparison(operator)
        self._orders = OrderComparison()
        self._trained = trained
        self._ends = BackwardEnd(self._on_backward_end)
        self._watch()

    def _watch(self) -> None:
        for parameter, unit in zip(self._trained.parameters, self._trained.units, strict=True):
            if parameter.requires_grad:
                self._ends.watch((parameter,), unit)

    def _follow_changes(self, *, begins: bool = False) -> None:
        """Exchanges the gradients of other parameters, if others are trained than before."""
        if self._trained.changed(begins=begins):
            self.exchange.lay_out(self._trained.parameters, self._trained.by_rows)
            self._watch()
            self.updates.watch()

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

    def begin_call(self, *, anew: bool) -> None:
        """A call of ``train`` begins.

        Args:
            anew: this rank is at its beginning: it goes on with no call that was interrupted.
        """
        self._follow_changes(begins=True)
        self.updates.begin_call()
        if anew:
            self._comparison.begin()

    def end_call(self) -> None:
        """The call is over."""
        self.updates.end_call()

    def join(self, at: Mapping[str, Any]) -> None:
        """Goes to where another process was when it shared its state; ``at``: what `where` gave there."""
        go_to(at, self.exchange, self._trained, self.updates)
        self._watch()

    def where(self) -> dict[str, Any]:
        """Where this process stands, as plain data for one that joins."""
        return standing(self.exchange, self._trained, self.updates)

    def at_boundary(self) -> None:
        """Writes the card of this rank: a replacement would go on from here."""
        inside = internals(self._operator)
        self._follow_changes()
        self._boundary = self.exchange.number
        self.updates.look()
        self.exchange.be_at(self._rank, self.updates.place)
        if inside.steps is not None and inside.steps.compares_here:
            self._comparison.begin()
        loaders = {name: loader.state_dict() for name, loader in inside.loaders.items()}
        self._orders.note(loaders)
        plain = {
            "streams": self._streams.read(),
            "loaders": loaders,
            "modes": module_modes(self._operator),
            "steps": inside.steps.state_dict() if inside.steps is not None else None,
            "meters": packed(inside.meters.state_dict()) if inside.meters is not None else None,
            "epoch_idx": self.epoch_idx(),
            "sums": self._comparison.sums,
            "extras": packed_extras(self._operator.state_dict() if keeps_extras(self._operator) else None),
        }
        self._cards[self._rank].write(self._boundary, self._buffers.tensors, plain)

    def follow_first_rank(self) -> None:
        """Gives this process the buffers of rank 0, as they were when it gave its latest gradients."""
        if self._buffers.followed and self._rank and self.exchange.number:
            self._buffers.load(self._cards[-1].tensors(self.exchange.number), followed=True)

    def card(self) -> tuple[list[torch.Tensor | None], dict[str, Any]]:
        """The card of this rank at the present exchange: values of its buffers, and the rest."""
        tensors, plain = self._cards[self._rank].read(self.exchange.number)
        return list(tensors), plain

    def load_buffers(self, tensors: Sequence[torch.Tensor | None]) -> None:
        """Puts back the buffers of a card: the forward pass of whoever shared its state may have changed them since."""
        self._buffers.load(tensors, followed=True)
        self._buffers.load(tensors, followed=False)

    def _on_backward_end(self, touched: Mapping[int, int]) -> None:
        """Exchanges the gradients of what a backward pass went through, but for models under ``no_sync``."""
        self._follow_changes()
        components = internals(self._operator).components
        models = dict(enumerate(components.models)) if components is not None else {}
        kept_back = {unit for unit in touched if not getattr(models.get(unit), "require_backward_grad_sync", True)}
        if kept_back and not models.keys() & touched.keys() - kept_back:
            kept_back = set(touched)  # a criterion goes with the models
        self.updates.kept_back |= kept_back
        if units := touched.keys() - kept_back:
            self._exchange(units)

    @torch.no_grad()
    def _exchange(self, units: set[int]) -> None:
        parameters = self._trained.parameters
        given = [one.grad if unit in units else None for one, unit in zip(parameters, self._trained.units, strict=True)]
        number, tag = self.exchange.number + 1, self.updates.tag(self.exchange.layout)
        inside = internals(self._operator)
        progress = inside.context.progress
        phase = progress.phase
        with self._operator.timers.record("give"):
            batch = inside.steps.current if inside.steps is not None else None
            self.exchange.put(self._rank, number, given, **stands_for(self._operator, batch))
        if self._rank == 0 and self._buffers.followed:
            self._cards[-1].write(number, self._buffers.tensors, None)
        self.exchange.publish(self._rank, number, tag)
        progress.enter("exchange")
        with self._operator.timers.record("sync"):
            try:
                means = self.exchange.finish(
                    carried=lambda: [self._rank], on_wait=self.on_wait, tag=tag, place=self.updates.place
                )
            except UnequalExchangeError as error:
                raise self.updates.explain(error, self.exchange.layout) from None
        self._comparison.finish(self._cards[:-1], number - 1)
        self._orders.finish(self._cards[:-1], number - 1)
        self.follow_first_rank()
        take_over(parameters, means)
        self.updates.exchanged(units)
        if inside.loss_here is not None:
            inside.loss_of_all = self.exchange.loss()
        progress.enter(phase)


def rank_state_of(card: dict[str, Any]) -> dict[str, Any]:
    """A card as the state of a rank, in the form of `torchtrainer.train.complete_state.rank_state`, without its streams."""
    mine = {name: card[name] for name in ("loaders", "modes", "epoch_idx")}
    mine["meters"] = unpacked(card["meters"])
    if card["steps"] is not None:
        mine["steps"] = card["steps"]
    if card["extras"]:
        mine["operator"] = unpacked_extras(card["extras"])
    return mine
