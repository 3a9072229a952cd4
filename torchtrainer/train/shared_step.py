"""One update for all ranks of a process, together with the ranks of other processes.

The process has one model and one optimizer, which are equal in all processes. What only a rank has is in its context: random
streams, loaders, means, and what its buffers were. In a step every rank in turn runs forward and backward, and gives its
gradients to the exchange, with its record for the next step. When all ranks have given theirs, every process has the same
mean of all gradients, summed in rank order, and makes the update. So the bits do not depend on who carries what.

Everything here runs in the thread that trains. Long because whose turn it is, what a record says and how a step goes hang on one
another's order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from torchtrainer.comm.board import NO_TAG
from torchtrainer.comm.exchange import Exchange
from torchtrainer.train.components import internals
from torchtrainer.train.data import JointLoader, RankBatch, RankLoader
from torchtrainer.train.data_drawing import OrderComparison
from torchtrainer.train.equality import Comparison
from torchtrainer.train.extras import SHARED_EXTRAS, Extras, packed_extras, unpacked_extras
from torchtrainer.train.loop import Resumed, StepIterator
from torchtrainer.train.metrics import AverageMeterCollection
from torchtrainer.train.rank_context import Buffers, RankContext, nothing, trainable_of
from torchtrainer.train.records import RecordFile, packed, unpacked
from torchtrainer.train.rng import (
    StreamReader,
    isolated_rng,
    rng_state,
    seed_rank,
    set_rng_state,
    streams_from_plain,
)
from torchtrainer.train.state import detached, restore
from torchtrainer.train.step import forward_backward, stands_for, update
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.train.uneven import GradientShare, UnevenWatch
from torchtrainer.train.updates import Updates

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class SharedStep:
    """The ranks of this process; see `torchtrainer.train.gradient_sync.RecoverableSync`.

    Args:
        operator: of this process; built for the lowest of its ranks.
        exchange: with the other processes.
        records: of every rank, by rank.
        trained: the parameters that ``exchange`` was laid out for.
        ranks: that this process carries at first; none: it is a spare.
    """

    clocked = False
    averages_over = 1  # each rank's share is weighed when it is computed

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        exchange: Exchange,
        records: Sequence[RecordFile],
        trained: TrainedParameters,
        ranks: Collection[int],
    ) -> None:
        self.exchange = exchange
        self.updates = Updates(operator, trained, exchange)
        self.on_wait: Callable[[], None] = nothing
        self.call = 0
        self.epoch_idx = 0
        self._training = False
        self._new_pass = False
        self._comparison = Comparison(operator)
        self._orders = OrderComparison()
        self._operator = operator
        self._uneven = UnevenWatch(operator, training=True)
        self._tag = NO_TAG
        self._strays: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        self._buffers = Buffers(operator)
        self._extras = Extras(operator)
        self._streams = StreamReader()
        self._collective: Any = internals(operator).context.collective
        self._records = records[: self._collective.world_size]
        self._share = GradientShare(trainable_of(operator), self._collective.world_size)
        lead = RankContext(rank=self._collective.rank, loaders=internals(operator).loaders)
        self._now = lead
        self.contexts: dict[int, RankContext] = {}
        self._pattern = lead
        internals(operator).bare_forward = True
        for rank in sorted(ranks):
            self.contexts[rank] = lead if rank == lead.rank else self._new_context(rank)
        self._first_records()

    # Contexts

    @property
    def ranks(self) -> list[int]:
        """The ranks that this process carries."""
        return sorted(self.contexts)

    @property
    def loader(self) -> RankLoader | None:
        """The train loaders of all ranks here, as one."""
        if "train" not in self._now.loaders:
            return None
        loaders = JointLoader(
            lambda: {rank: one.loaders["train"] for rank, one in self.contexts.items()},
            on_error=lambda rank: self._turn_to(self.contexts[rank]),  # whose error it is
        )
        return cast("RankLoader", loaders)

    def each(self) -> Iterator[RankContext]:
        """Every rank in order, with its streams, loaders, means and buffers in place."""
        yield from map(self.turn_to_rank, self.ranks)

    def turn_to_rank(self, rank: int) -> RankContext:
        """Has the operator be that of a rank, with its buffers."""
        self._turn_to(self.contexts[rank])
        if len(self.contexts) > 1:
            self._buffers.load_for(rank, self._records, self.exchange.number, alone=False)
        return self._now

    def turn_to_lowest(self) -> None:
        """Between steps and calls the operator is that of the lowest rank here."""
        if self.contexts:
            lowest = min(self.contexts)
            self._turn_to(self.contexts[lowest])
            self._buffers.load_for(lowest, self._records, self.exchange.number, alone=False)

    def _turn_to(self, context: RankContext) -> None:
        """Puts what belongs to a rank in the place of what belongs to another."""
        left = self._now
        if context is left:
            return
        left.streams = rng_state()
        left.extras = self._extras.of_rank()
        self._put_in_place(context)
        self._now = context
        self._collective.rank = context.rank
        internals(self._operator).loaders = context.loaders
        self._show_means()

    def _put_in_place(self, context: RankContext) -> None:
        self._extras.put(context.extras)
        streams, context.streams = context.streams, None
        if streams is not None:
            set_rng_state(streams)

    def _show_means(self) -> None:
        """Has the operator see the means of the rank whose turn it is, while it trains."""
        if self._training:
            internals(self._operator).meters = self._now.meters

    def adopt(self, rank: int) -> RankContext:
        """Takes over a rank whose process is gone, as its record of the latest exchange has it."""
        return self._adopted(rank, self.exchange.number)

    def _adopted(self, rank: int, number: int) -> RankContext:
        context = self._new_context(rank)
        self._from_record(context, number)
        self.contexts[rank] = context
        return context

    def assign(self, ranks: Collection[int]) -> None:
        """Carries exactly these ranks from now on. New ones are as their records have them."""
        for rank in set(self.contexts) - set(ranks):
            self.contexts.pop(rank).close()
        for rank in sorted(set(ranks) - set(self.contexts)):
            self.adopt(rank)
        self.turn_to_lowest()

    def state_loaded(self, *, positions: bool) -> None:
        """Gives every rank here the buffers, the operator's own state and the positions that are in place."""
        now = {name: one.state_dict() for name, one in internals(self._operator).loaders.items()} if positions else {}
        for context in self.contexts.values():
            context.extras = self._extras.of_rank()
            for name, position in now.items():
                context.loaders[name].load_state_dict(position)
        for rank in self.ranks:
            self._turn_to(self.contexts[rank])
            self.restored(self.contexts[rank])

    @contextmanager
    def for_all(self) -> Iterator[None]:
        """What the block changes of the operator's own state changes for every rank here."""
        before = self._extras.of_rank()
        yield
        changed, gone = self._extras.changed_since(before)
        for context in self.contexts.values():
            kept = {path: value for path, value in context.extras.items() if path not in gone}
            context.extras = {**kept, **detached(changed)}

    def _new_context(self, rank: int) -> RankContext:
        return RankContext(rank=rank, loaders={name: one.for_rank(rank) for name, one in self._pattern.loaders.items()})

    # Records

    def _first_records(self) -> None:
        """Writes the records of a run that begins; every rank has the random streams that a process of its own would have."""
        seed = internals(self._operator).context.settings.seed
        for rank in self.ranks:
            self.contexts[rank].extras = self._extras.of_rank()
            if self.contexts[rank] is not self._now:
                with isolated_rng():
                    seed_rank(seed, rank)
                    self.contexts[rank].streams = rng_state()
        for rank in self.ranks:
            self._turn_to(self.contexts[rank])
            self.restored(self.contexts[rank])

    def restored(self, context: RankContext) -> None:
        """Something else than a step has changed the rank whose turn it is: its record says so."""
        self._write_record(context, self.exchange.number)

    def _write_records(self) -> None:
        """Writes the records anew: something else than a step has changed the ranks, or the buffers of the one in use."""
        in_place = self._now
        if in_place.rank in self.contexts:
            self.restored(in_place)
        for context in self.each():
            if context is not in_place:
                self.restored(context)

    def _write_record(self, context: RankContext, number: int) -> None:
        """Writes what a rank has after an exchange; it is the one whose turn it is."""
        context.extras = self._extras.of_rank()
        loaders = {name: loader.state_dict() for name, loader in context.loaders.items()}
        self._orders.note(loaders)
        plain = {
            "call": self.call,
            "streams": self._streams.read(),
            "samples": context.samples,
            "meters": packed(context.meters.state_dict()),
            "loaders": loaders,
            "sums": self._comparison.sums,
            "extras": packed_extras(context.extras or None),
            "shared": self._extras.sums,
        }
        self._records[context.rank].write(number, self._buffers.tensors, plain)

    def _from_record(self, context: RankContext, number: int) -> None:
        _, plain = self._records[context.rank].read(number)
        context.streams = streams_from_plain(plain["streams"])
        context.samples, context.meters = 0, AverageMeterCollection()
        if plain["call"] == self.call:  # else it was lost before it had begun this one
            context.samples = plain["samples"]
            context.meters.load_state_dict(unpacked(plain["meters"]))
        for name, position in plain["loaders"].items():
            context.loaders[name].load_state_dict(position)
        context.extras = unpacked_extras(plain["extras"]) if plain["extras"] else {}
        if self._new_pass and plain["call"] != self.call:
            context.loaders["train"].give_up()
        if context is self._now:  # what is put aside for other ranks is in use for this one
            self._put_in_place(context)

    def take_first_buffers(self, wrapped: Sequence[Any] = ()) -> None:  # they travel with the gradients
        """Gives this process the buffers of rank 0, as they are after the latest exchange."""
        if self._buffers.followed:
            self._buffers.load(self._records[0].tensors(self.exchange.number), followed=True)

    def _take_buffers(self) -> None:
        """Makes the buffers what they were after the latest exchange, whatever forward passes have done to them since."""
        self.take_first_buffers()
        if len(self.contexts) == 1:
            self._buffers.load(self._records[min(self.contexts)].tensors(self.exchange.number), followed=False)

    # Recovery

    @property
    def unlike(self) -> str:
        """Why nobody could take a rank over, as it has turned out; empty: nothing."""
        return self._extras.unlike

    def why_not_shared(self, ranks: Sequence[int]) -> str:
        """Why ranks cannot continue from the state of this process; empty if they can."""
        return self._extras.unlike

    def shared_state(self) -> dict[str, Any]:
        """Which entries of the operator's own state all ranks share."""
        return {SHARED_EXTRAS: self._extras.shared}

    def where(self) -> dict[str, Any]:
        """Where this process stands, as plain data for one that joins."""
        return self.updates.where()

    def join(self, shared: Mapping[str, Any], ranks: Sequence[int], at: Mapping[str, Any]) -> Resumed | None:
        """Takes ranks over; see `torchtrainer.train.gradient_sync.RecoverableSync`."""
        restore(self._operator, shared)
        self._extras.share(shared[SHARED_EXTRAS])
        self.updates.go_to(at)
        self.assign(ranks)
        self._take_buffers()

        def put_back() -> None:
            """Right before the first batch: whatever the call did before it does not count."""
            restore(self._operator, shared)
            for rank in self.ranks:
                self.contexts.pop(rank).close()
                self.adopt(rank)
            self.turn_to_lowest()
            self._take_buffers()

        return None if at["steps"] is None else Resumed(steps=at["steps"], put_back=put_back)

    def kept_reply(self, call: int) -> None:
        """None: whoever carries a rank can tell what a call came to for it."""

    def catch_up(self, rank: int) -> int:
        """In the middle of a step: takes a rank over and does what it had not done; returns the shares that were computed."""
        number = self.exchange.number + 1
        if self.exchange.given(rank) >= number:
            self._adopted(rank, number)
            return 0
        context = self.adopt(rank)
        part = context.loaders["train"].next_batch()
        assert part is not None  # the other ranks have one in this step
        with torch.enable_grad():  # the exchange waits without
            self._give(context, part, number)
        internals(self._operator).context.progress.enter("exchange")
        return 1

    # A call

    def begin_call(self, *, anew: bool, new_pass: bool) -> None:
        """A call of ``train`` begins; see `torchtrainer.train.gradient_sync.GradientSync`."""
        self._new_pass = new_pass
        self.updates.follow_changes(begins=True)
        self.updates.begin_call()
        if anew:
            for context in self.contexts.values():
                context.begin_call(new_pass=new_pass)
            self._comparison.begin()
            self._extras.begin_comparison()
            self._uneven = UnevenWatch(self._operator, training=True)
            self._write_records()
        self._training = True
        self._show_means()

    def samples_of(self, context: RankContext, steps: StepIterator) -> int:
        """Samples of a rank in the running call; the iterator counts those of all ranks here."""
        return context.samples if self._training else steps.samples

    def end_call(self, *, completed: bool) -> None:  # whoever waits sees how far this process is
        """The call is over."""
        self._training = False
        self.updates.end_call()

    def settle(self, *, trained: bool, reply: tuple[Any, ...] | None = None) -> None:
        """A call of any kind has returned; after one of ``train`` the records are up to date."""
        if not trained:
            self._write_records()
        self.turn_to_lowest()  # for calls that are made once per process

    def at_boundary(self) -> None:
        """Nothing: the records were written with the gradients."""

    def step(self, parts: Mapping[int, RankBatch], info: Mapping[str, Any]) -> None:
        """One optimizer step of all ranks.

        Args:
            parts: the batches of the ranks here.
            info: what their batch hooks would get.
        """
        updates, inside = self.updates, internals(self._operator)
        updates.follow_changes()
        number = self.exchange.number + 1
        if inside.steps is not None and inside.steps.compares_here:
            self._comparison.begin()
        updates.look()
        self._tag = updates.tag()
        self._strays = [(one, one.grad) for one in updates.trained.strays]
        for rank, part in parts.items():
            if self.exchange.given(rank) < number:
                self._give(self.contexts[rank], part, number)
            else:  # by a process that is gone
                self._from_record(self.contexts[rank], number)
        inside.context.progress.enter("exchange")
        with self._operator.timers.record("sync"):
            means = updates.finish(self._tag, carried=lambda: self.contexts, on_wait=self.on_wait, by_place=False)
        self._compare(number)
        inside.context.progress.enter("step")
        for parameter, mean in zip(updates.trained.parameters, means, strict=True):
            parameter.grad = mean
        updates.exchanged(updates.trained.unit_set)
        self._turn_to(self.contexts[min(self.contexts)])
        self.take_first_buffers()
        before = self._now.extras
        update(self._operator, info)
        self._extras.updated(before)

    def _compare(self, number: int) -> None:
        """Compares this process with the others by what their records of an exchange say."""
        self._comparison.finish(self._records, number)
        if self._extras.sums is not None:
            self._extras.compare([record.read(number)[1]["shared"] for record in self._records])
        self._orders.finish(self._records, number)

    def _give(self, context: RankContext, part: RankBatch, number: int) -> None:
        """Computes a rank's share of the step, and publishes it with the record for the next step."""
        self._turn_to(context)
        self._buffers.load_for(context.rank, self._records, number - 1, alone=len(self.contexts) == 1)
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
            context.meters.update(stats, samples)
            internals(self._operator).context.progress.losses[context.rank] = stats["train_loss"]
        else:
            context.meters.skip()
        context.samples += part.size
        with self._operator.timers.record("give"):
            gradients = [parameter.grad for parameter in self.updates.trained.parameters]
            self.exchange.put(context.rank, number, gradients, **stands_for(self._operator, part))
        self._write_record(context, number)
        self.exchange.publish(context.rank, number, self._tag)
