"""The ranks that one process carries, and the step that they take together with the ranks of other processes.

The process has one model and one optimizer, which are equal in all processes. What only a rank has is in its seat: random
streams, loaders, means, and what its buffers were. In a step every seat in turn runs forward and backward, and gives its
gradients to the exchange, with its card for the next step. When all ranks have given theirs, every process has the same
mean of all gradients, summed in rank order, and makes the update. So the bits do not depend on who carries what.

Everything here runs in the thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.board import NO_TAG
from torchtrainer.comm.exchange import GradientExchange, UnequalExchangeError
from torchtrainer.train.cards import CardFile, packed, unpacked
from torchtrainer.train.components import internals
from torchtrainer.train.data import RankBatch
from torchtrainer.train.data_drawing import OrderComparison
from torchtrainer.train.equality import Comparison
from torchtrainer.train.extras import Extras, packed_extras, unpacked_extras
from torchtrainer.train.metrics import AverageMeterCollection
from torchtrainer.train.rng import (
    StreamReader,
    isolated_rng,
    rng_state,
    seed_rank,
    set_rng_state,
    streams_from_plain,
)
from torchtrainer.train.seats import Buffers, Seat, nothing, trainable_of
from torchtrainer.train.state import detached
from torchtrainer.train.step import forward_backward, stands_for, update
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.train.uneven import GradientShare, UnevenWatch
from torchtrainer.train.updates import Updates, go_to, standing

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class Team:
    """The seats of this process.

    Args:
        operator: of this process; built for the lowest of its ranks.
        exchange: with the other processes.
        cards: of every rank, by rank.
        trained: the parameters that ``exchange`` was laid out for.
        ranks: that this process carries at first; none: it is a spare.

    Attributes:
        seats: by rank.
        extras: the operator's own state.
        exchange: with the other processes.
        updates: of the optimizers.
        on_wait: called while others are waited for.
        training: a ``train`` call is running.
        new_pass: the running ``train`` call began a new pass.
        call: number of the call that is running, or was the latest; alike in all processes.
    """

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        exchange: GradientExchange,
        cards: list[CardFile],
        trained: TrainedParameters,
        ranks: Collection[int],
    ) -> None:
        self.exchange = exchange
        self.updates = Updates(operator, trained)
        self.on_wait: Callable[[], None] = nothing
        self.training = False
        self.new_pass = False
        self.call = 0
        self._comparison = Comparison(operator)
        self._orders = OrderComparison()
        self._operator = operator
        self._uneven = UnevenWatch(operator, training=True)
        self._cards = cards
        self._trained = trained
        self._tag = NO_TAG
        self._strays: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._buffers = Buffers(operator)
        self.extras = Extras(operator)
        self._streams = StreamReader()
        self._collective: Any = internals(operator).context.collective
        self._world_size = self._collective.world_size
        self._share = GradientShare(trainable_of(operator), self._world_size)
        self.parts: dict[int, RankBatch] = {}
        lead = Seat(rank=self._collective.rank, loaders=internals(operator).loaders)
        self._now = lead
        self.seats: dict[int, Seat] = {}
        self._pattern = lead
        for rank in sorted(ranks):
            self.seats[rank] = lead if rank == lead.rank else self._new_seat(rank)
        self._first_cards()

    # Seats

    @property
    def ranks(self) -> list[int]:
        """The ranks that this process carries."""
        return sorted(self.seats)

    def each(self) -> Iterator[Seat]:
        """Every seat in rank order, with its streams, loaders, means and buffers in place."""
        yield from map(self.turn_to_rank, self.ranks)

    def turn_to_rank(self, rank: int) -> Seat:
        """Has the operator be that of a rank, with its buffers."""
        self.turn_to(self.seats[rank])
        if len(self.seats) > 1:
            self._buffers.load_for(rank, self._cards, self.exchange.number, alone=False)
        return self._now

    def turn_to(self, seat: Seat) -> None:
        """Puts what belongs to a seat in the place of what belongs to another."""
        left = self._now
        if seat is left:
            return
        left.streams = rng_state()
        left.extras = self.extras.of_rank()
        self._put_in_place(seat)
        self._now = seat
        self._collective.rank = seat.rank
        internals(self._operator).loaders = seat.loaders
        self.show_means()

    def _put_in_place(self, seat: Seat) -> None:
        self.extras.put(seat.extras)
        streams, seat.streams = seat.streams, None
        if streams is not None:
            set_rng_state(streams)

    def show_means(self) -> None:
        """Has the operator see the means of the seat in use, while it trains."""
        if self.training:
            internals(self._operator).meters = self._now.meters

    def adopt(self, rank: int, number: int | None = None) -> Seat:
        """Takes over a rank whose process is gone, as its card has it.

        Args:
            rank: that this process does not carry.
            number: of the card; None: that of the latest exchange.
        """
        seat = self._new_seat(rank)
        self._from_card(seat, self.exchange.number if number is None else number)
        self.seats[rank] = seat
        return seat

    def adopt_again(self) -> None:
        """Takes every rank over once more, as its card has it."""
        for rank in self.ranks:
            self.seats.pop(rank).close()
            self.adopt(rank)
        self.turn_to_lowest()

    def assign(self, ranks: Collection[int]) -> None:
        """Carries exactly these ranks from now on; at a step boundary or between calls. New ones are as their cards have them."""
        for rank in set(self.seats) - set(ranks):
            self.seats.pop(rank).close()
        for rank in sorted(set(ranks) - set(self.seats)):
            self.adopt(rank)
        self.turn_to_lowest()

    def turn_to_lowest(self) -> None:
        """Between steps and calls the operator is that of the lowest rank here."""
        if self.seats:
            lowest = self.ranks[0]
            self.turn_to(self.seats[lowest])
            self._buffers.load_for(lowest, self._cards, self.exchange.number, alone=False)

    def take_in(self) -> None:
        """Gives every seat the buffers and the operator's own state that are in place: a state dict was loaded."""
        for seat in self.seats.values():
            seat.extras = self.extras.of_rank()
        for rank in self.ranks:
            seat = self.seats[rank]
            self.turn_to(seat)
            self.write_card(seat, self.exchange.number)

    @contextmanager
    def for_all(self) -> Iterator[None]:
        """What the block changes of the operator's own state changes for every seat."""
        before = self.extras.of_rank()
        yield
        changed, gone = self.extras.changed_since(before)
        for seat in self.seats.values():
            kept = {path: value for path, value in seat.extras.items() if path not in gone}
            seat.extras = {**kept, **detached(changed)}

    def _new_seat(self, rank: int) -> Seat:
        return Seat(rank=rank, loaders={name: one.for_rank(rank) for name, one in self._pattern.loaders.items()})

    # Cards

    def _first_cards(self) -> None:
        """Writes the cards of a run that begins; every rank has the random streams that a process of its own would have."""
        seed = internals(self._operator).context.settings.seed
        for rank in self.ranks:
            self.seats[rank].extras = self.extras.of_rank()
            if self.seats[rank] is not self._now:
                with isolated_rng():
                    seed_rank(seed, rank)
                    self.seats[rank].streams = rng_state()
        for rank in self.ranks:
            self.turn_to(self.seats[rank])
            self.write_card(self.seats[rank], self.exchange.number)

    def refresh(self) -> None:
        """Writes the cards anew: something else than a step has changed the seats, or the buffers of the one in use."""
        in_place = self._now
        if in_place.rank in self.seats:
            self.write_card(in_place, self.exchange.number)
        for seat in self.each():
            if seat is not in_place:
                self.write_card(seat, self.exchange.number)

    def write_card(self, seat: Seat, number: int) -> None:
        """Writes what a seat has after an exchange; the seat is the one in use."""
        seat.extras = self.extras.of_rank()
        loaders = {name: loader.state_dict() for name, loader in seat.loaders.items()}
        self._orders.note(loaders)
        plain = {
            "call": self.call,
            "streams": self._streams.read(),
            "samples": seat.samples,
            "meters": packed(seat.meters.state_dict()),
            "loaders": loaders,
            "sums": self._comparison.sums,
            "extras": packed_extras(seat.extras or None),
            "shared": self.extras.sums,
        }
        self._cards[seat.rank].write(number, self._buffers.tensors, plain)

    def _from_card(self, seat: Seat, number: int) -> None:
        _, plain = self._cards[seat.rank].read(number)
        seat.streams = streams_from_plain(plain["streams"])
        seat.samples, seat.meters = 0, AverageMeterCollection()
        if plain["call"] == self.call:  # else it was lost before it had begun this one
            seat.samples = plain["samples"]
            seat.meters.load_state_dict(unpacked(plain["meters"]))
        for name, position in plain["loaders"].items():
            seat.loaders[name].load_state_dict(position)
        seat.extras = unpacked_extras(plain["extras"]) if plain["extras"] else {}
        if self.new_pass and plain["call"] != self.call:
            seat.loaders["train"].give_up()
        if seat is self._now:  # what is put aside for other seats is in use for this one
            self._put_in_place(seat)

    def follow_first_rank(self) -> None:
        """Gives this process the buffers of rank 0, as they are after the latest exchange."""
        if self._buffers.followed:
            self._buffers.load(self._cards[0].tensors(self.exchange.number), followed=True)

    def take_buffers(self) -> None:
        """Makes the buffers what they were after the latest exchange, whatever forward passes have done to them since."""
        self.follow_first_rank()
        if len(self.seats) == 1:
            self._buffers.load(self._cards[self.ranks[0]].tensors(self.exchange.number), followed=False)

    # A call

    def at_boundary(self) -> None:
        """At every step boundary: nothing, as the cards were written with the gradients."""

    def begin_call(self, *, anew: bool) -> None:
        """A call of ``train`` begins.

        Args:
            anew: every seat is at its beginning: it goes on with no call that was interrupted.
        """
        self._follow_changes(begins=True)
        self.updates.begin_call()
        if not anew:
            return
        for seat in self.seats.values():
            seat.samples, seat.meters = 0, AverageMeterCollection()
            if self.new_pass and "train" in seat.loaders:
                seat.loaders["train"].give_up()
        self._comparison.begin()
        self.extras.begin_comparison()
        self._uneven = UnevenWatch(self._operator, training=True)
        self.refresh()

    def end_call(self) -> None:
        """The call is over."""
        self.training = False
        self.updates.end_call()

    def where(self) -> dict[str, Any]:
        """Where this process stands, as plain data for one that joins."""
        return standing(self.exchange, self._trained, self.updates)

    def join(self, at: Mapping[str, Any]) -> None:
        """Goes to where another process was when it shared its state; ``at``: what `where` gave there."""
        go_to(at, self.exchange, self._trained, self.updates)

    def _follow_changes(self, *, begins: bool = False) -> None:
        """Exchanges the gradients of other parameters, if others are trained than before."""
        if self._trained.changed(begins=begins):
            self.exchange.lay_out(self._trained.parameters, self._trained.by_rows)
            self.updates.watch()

    def deal(self) -> RankBatch | None:
        """The batches of all seats for the next step, as one; None after the last step of a pass."""
        self.parts = {}
        for rank in self.ranks:
            part = self.seats[rank].loaders["train"].next_batch()
            if part is None:
                return None
            self.parts[rank] = part
        parts = list(self.parts.values())
        return RankBatch([part.data for part in parts], sum(part.size for part in parts), parts[0].global_size)

    def step(self, info: Mapping[str, Any]) -> None:
        """One optimizer step of all ranks; ``info`` is what their batch hooks would get."""
        self._follow_changes()
        number, steps = self.exchange.number + 1, internals(self._operator).steps
        if steps is not None and steps.compares_here:
            self._comparison.begin()
        self.updates.look()
        self._tag = self.updates.tag(self.exchange.layout)
        self._strays = [(one, one.grad) for one in self._trained.strays]
        for rank in self.ranks:
            if self.exchange.given(rank) < number:
                self._give(self.seats[rank], number)
            else:  # by a process that is gone
                self._from_card(self.seats[rank], number)
        progress = internals(self._operator).context.progress
        progress.enter("exchange")
        with self._operator.timers.record("sync"):
            try:
                means = self.exchange.finish(carried=lambda: self.ranks, on_wait=self.on_wait, tag=self._tag)
            except UnequalExchangeError as error:
                raise self.updates.explain(error, self.exchange.layout) from None
        self._comparison.finish(self._cards[: self._world_size], number)
        if self.extras.sums is not None:
            self.extras.compare([card.read(number)[1]["shared"] for card in self._cards[: self._world_size]])
        self._orders.finish(self._cards[: self._world_size], number)
        progress.enter("step")
        for parameter, mean in zip(self._trained.parameters, means, strict=True):
            parameter.grad = mean
        self.updates.exchanged(self._trained.unit_set)
        self.turn_to(self.seats[self.ranks[0]])
        self.follow_first_rank()
        before = self._now.extras
        update(self._operator, info)
        self.extras.updated(before)

    def catch_up(self, rank: int) -> int:
        """In the middle of a step: takes a rank over and does what it had not done; returns the shares that were computed."""
        number = self.exchange.number + 1
        if self.exchange.given(rank) >= number:
            self.adopt(rank, number)
            return 0
        part = self.adopt(rank).loaders["train"].next_batch()
        assert part is not None  # the other ranks have one in this step
        self.parts[rank] = part
        with torch.enable_grad():  # the exchange waits without
            self._give(self.seats[rank], number)
        internals(self._operator).context.progress.enter("exchange")
        return 1

    def _give(self, seat: Seat, number: int) -> None:
        """Computes a rank's share of the step, unless that was done, and publishes it with the card for the next step."""
        self.turn_to(seat)
        part = self.parts[seat.rank]
        self._buffers.load_for(seat.rank, self._cards, number - 1, alone=len(self.seats) == 1)
        for one, gradient in self._strays:
            one.grad = None if gradient is None else gradient.clone()
        self._share.apply(part.size, part.global_size)
        self._uneven.begin(part)
        try:
            stats = forward_backward(self._operator, part.data)
        finally:
            self._uneven.end()
            self._share.remove()
        samples = stats.pop("num_samples")
        if part.size:
            seat.meters.update(stats, samples)
            internals(self._operator).context.progress.losses[seat.rank] = stats["train_loss"]
        else:
            seat.meters.skip()
        seat.samples += part.size
        with self._operator.timers.record("give"):
            gradients = [parameter.grad for parameter in self._trained.parameters]
            self.exchange.put(seat.rank, number, gradients, **stands_for(self._operator, part))
        self.write_card(seat, number)
        self.exchange.publish(seat.rank, number, self._tag)
