"""A rank whose gradients are exchanged as a backward pass ends, whoever called it: the built-in step or the operator's own.

Its process carries no other rank, since the update is the operator's to make. Where gradients go through memory, this rank waits in its
exchange while the process of another one is lost, until a replacement has given that rank's gradients. The replacement needs the
state of the ranks at the step boundary before; this process has it as long as it has updated nothing since.

Everything here runs in the thread that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.backward import BackwardEnd, take_over
from torchtrainer.comm.exchange import Exchange
from torchtrainer.comm.group_exchange import ProcessGroupExchange
from torchtrainer.errors import EngineError, OperatorUseError
from torchtrainer.train.complete_state import module_modes, set_modes
from torchtrainer.train.components import internals
from torchtrainer.train.data_drawing import OrderComparison
from torchtrainer.train.equality import Comparison, compare_in_group
from torchtrainer.train.extras import keeps_extras, packed_extras, unpacked_extras
from torchtrainer.train.gradient_sync import OneRank
from torchtrainer.train.loop import Resumed
from torchtrainer.train.rank_context import Buffers, RankContext, nothing
from torchtrainer.train.records import RecordFile, packed, unpacked
from torchtrainer.train.rng import StreamReader, set_rng_state, streams_from_plain
from torchtrainer.train.state import restore
from torchtrainer.train.step import stands_for
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.train.updates import Updates
from torchtrainer.train.wrappers import Wrappers, wrapped_by_torch

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


class BackwardSync(OneRank):
    """The rank of this process, and its exchange with the others; see `torchtrainer.train.gradient_sync.RecoverableSync`.

    Args:
        operator: of this process.
        exchange: with the other processes.
        trained: the parameters that ``exchange`` was laid out for.
        records: of every rank, by rank, and one more for the buffers that all take over from rank 0; None: nobody could take a
            rank over.
    """

    def __init__(
        self,
        operator: TrainingOperator,
        *,
        exchange: Exchange,
        trained: TrainedParameters,
        records: Sequence[RecordFile] | None = None,
    ) -> None:
        super().__init__(operator)
        self.exchange = exchange
        self.updates = Updates(operator, trained, exchange)
        self.on_wait: Callable[[], None] = nothing
        self.clocked = records is None
        self._operator = operator
        self._records = records
        self._boundary = exchange.number
        self._buffers = Buffers(operator)
        self._streams = StreamReader()
        self._comparison = Comparison(operator)
        self._orders = OrderComparison()
        self._ends = BackwardEnd(self._on_backward_end, self._on_backward_begin)
        self._watch()

    # Calls

    def begin_call(self, *, anew: bool, new_pass: bool) -> None:  # noqa: D102
        self._follow_changes(begins=True)
        self.updates.begin_call()
        if anew:
            self.context.begin_call(new_pass=new_pass)
        if anew or self._records is None:
            self._compare()

    def end_call(self, *, completed: bool) -> None:  # noqa: D102
        if completed:
            self.updates.leave()
        self.updates.end_call()

    def settle(self, *, trained: bool, reply: tuple[Any, ...] | None = None) -> None:  # noqa: D102
        if self._records is not None:
            self.at_boundary(reply)

    def at_boundary(self, reply: tuple[Any, ...] | None = None) -> None:
        """A step is complete, or a call with its reply: a replacement would continue from here."""
        steps = internals(self._operator).steps
        self._follow_changes()
        self._boundary = self.exchange.number
        self.updates.look()
        self.exchange.be_at(self.rank, self.updates.place)
        if steps is not None and steps.compares_here:
            self._compare()
        if self._records is not None:
            self._records[self.rank].write(self._boundary, self._buffers.tensors, self._record(reply))

    def take_first_buffers(self, wrapped: Sequence[Any]) -> None:
        """Gives this process the buffers of rank 0; where they travel with gradients, as they were when it gave its latest."""
        if self._records is None:
            super().take_first_buffers(wrapped)
        elif self._buffers.followed and self.rank and self.exchange.number:
            self._buffers.load(self._records[-1].tensors(self.exchange.number), followed=True)

    def _compare(self) -> None:
        """Compares what the ranks hold: now, or along with the next exchange."""
        if self._records is None:
            compare_in_group(self._operator)
        else:
            self._comparison.begin()

    def _follow_changes(self, *, begins: bool = False) -> None:
        if self.updates.follow_changes(begins=begins):
            self._watch()

    def _watch(self) -> None:
        trained = self.updates.trained
        for parameter, unit in zip(trained.parameters, trained.units, strict=True):
            if parameter.requires_grad:
                self._ends.watch((parameter,), unit)

    # Recovery

    unlike = ""

    def why_not_shared(self, ranks: Sequence[int]) -> str:
        """Why these ranks cannot continue from the state of this process; empty if they can.

        Their records are of step boundaries. A rank that was lost after it had given its gradients, and before the boundary, has
        none for what comes next; and this process must not have updated anything since its own boundary.
        """
        done = self.exchange.number - self._boundary
        if done:
            return f"{done} exchanges were completed since the last step boundary"
        missing = [rank for rank in ranks if self._records is None or not self._records[rank].has(self.exchange.number)]
        return (
            f"rank {missing[0]} was lost between its exchange of gradients and the end of the step" if missing else ""
        )

    def shared_state(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def where(self) -> dict[str, Any]:  # noqa: D102
        return self.updates.where()

    def join(self, shared: Mapping[str, Any], ranks: Sequence[int], at: Mapping[str, Any]) -> Resumed | None:
        """Takes its rank over; see `torchtrainer.train.gradient_sync.RecoverableSync`.

        Raises:
            OperatorUseError: it was built for another rank.
        """
        if list(ranks) != [self.rank]:
            raise OperatorUseError(f"this process was built for another rank than {list(ranks)}")
        assert self._records is not None  # or nobody would have asked
        self.updates.go_to(at)
        self._watch()
        tensors, record = self._records[self.rank].read(self.exchange.number)
        buffers = list(tensors)
        for name, position in record["loaders"].items():
            self.context.loaders[name].load_state_dict(position)

        def put_back() -> None:
            operator = unpacked_extras(record["extras"]) if record["extras"] else None
            restore(self._operator, {**shared, "operator": operator} if record["extras"] else shared)
            meters, saved = internals(self._operator).meters, unpacked(record["meters"])
            if meters is not None and saved is not None:
                meters.load_state_dict(saved)
            for followed in (True, False):  # the forward pass of whoever shared its state may have changed them since
                self._buffers.load(buffers, followed=followed)
            set_rng_state(streams_from_plain(record["streams"]))

        put_back()
        set_modes(self._operator, record["modes"])
        if record["steps"] is None:  # it was lost between two calls
            return None
        return Resumed(steps=record["steps"], put_back=put_back, epoch_idx=record["epoch_idx"])

    def kept_reply(self, call: int) -> tuple[Any, ...] | None:
        """What the process that had this rank before was about to tell of a call; None: it had not come to the end of it."""
        assert self._records is not None  # or nobody would have asked
        record = self._records[self.rank].read(self.exchange.number)[1]
        reply: tuple[Any, ...] | None = record["reply"] if record["call"] == call else None
        return reply

    def adopt(self, rank: int) -> RankContext:
        """Refuses: the update is the operator's, and cannot be left out for a second rank.

        Raises:
            EngineError: always.
        """
        raise EngineError(f"a process whose operator makes the update itself cannot carry rank {rank} too")

    def catch_up(self, rank: int) -> int:
        """Refuses, as `adopt`."""
        self.adopt(rank)
        return 0

    def assign(self, ranks: Collection[int]) -> None:
        """Keeps its rank, or lets it go."""
        if ranks and set(ranks) != {self.rank}:
            self.adopt(min(set(ranks) - {self.rank}))

    def _record(self, reply: tuple[Any, ...] | None) -> dict[str, Any]:
        """What only this rank has at a step boundary, as plain data."""
        inside, loaders = internals(self._operator), {n: one.state_dict() for n, one in self.context.loaders.items()}
        self._orders.note(loaders)
        return {
            "call": self.call,
            "reply": reply,
            "streams": self._streams.read(),
            "loaders": loaders,
            "modes": module_modes(self._operator),
            "steps": inside.steps.state_dict() if inside.steps is not None else None,
            "meters": packed(inside.meters.state_dict()) if inside.meters is not None else None,
            "epoch_idx": self.epoch_idx,
            "sums": self._comparison.sums,
            "extras": packed_extras(self._operator.state_dict() if keeps_extras(self._operator) else None),
        }

    # Backward passes

    def _on_backward_begin(self) -> None:
        if self.updates.training and any(map(_syncs, self._models().values())):
            self.exchange.begin(self.updates.tag())

    def _on_backward_end(self, touched: Mapping[int, int]) -> None:
        """Exchanges the gradients of what a backward pass went through, except for models under ``no_sync``."""
        self._follow_changes()
        models = self._models()
        kept_back = {unit for unit in touched if unit in models and not _syncs(models[unit])}
        if kept_back and not models.keys() & touched.keys() - kept_back:
            kept_back = set(touched)  # a criterion goes with the models
        self.updates.kept_back |= kept_back
        units = touched.keys() - kept_back
        if units or self.exchange.begun:
            self.touched = touched
            self._exchange(units)

    def _models(self) -> dict[int, Any]:
        components = internals(self._operator).components
        return dict(enumerate(components.models)) if components is not None else {}

    @torch.no_grad()
    def _exchange(self, units: Collection[int]) -> None:
        trained, inside = self.updates.trained, internals(self._operator)
        given = [
            one.grad if unit in units else None for one, unit in zip(trained.parameters, trained.units, strict=True)
        ]
        number, tag, progress = self.exchange.number + 1, self.updates.tag(), inside.context.progress
        phase, measured = progress.phase, _not_measured if self.clocked else self._operator.timers.record
        with measured("give"):
            batch = inside.steps.current if inside.steps is not None else None
            self.exchange.put(self.rank, number, given, **stands_for(self._operator, batch))
        if self._records is not None and self.rank == 0 and self._buffers.followed:
            self._records[-1].write(number, self._buffers.tensors, None)
        self.exchange.publish(self.rank, number, tag)
        progress.enter("exchange")
        with measured("sync"):
            means = self.updates.finish(tag, carried=lambda: [self.rank], on_wait=self.on_wait, by_place=True)
        if self._records is not None:
            self._comparison.finish(self._records[:-1], number - 1)
            self._orders.finish(self._records[:-1], number - 1)
            self.take_first_buffers(())
        take_over(trained.parameters, means)
        arrived = {unit for unit, mean in zip(trained.units, means, strict=True) if mean is not None}
        self.updates.exchanged(arrived.union(units))
        if inside.loss_here is not None:
            inside.loss_of_all = self.exchange.loss()
        progress.enter(phase)


def _not_measured(phase: str) -> AbstractContextManager[None]:  # noqa: ARG001  # the gradient clock does it
    return nullcontext()


def _syncs(model: Any) -> bool:
    return bool(getattr(model, "require_backward_grad_sync", True))


def sync_through_group(operator: TrainingOperator) -> BackwardSync | None:
    """The sync of a rank whose gradients go through a process group, a collective call; None: the user's own code exchanges."""
    if not wrapped_by_torch(operator):
        return None
    wrappers, trained = Wrappers(operator), TrainedParameters(operator)
    exchange = ProcessGroupExchange(
        wrappers.covered,
        timeout_s=internals(operator).context.settings.timeout_s,
        check=lambda: wrappers.check(made.touched),
    )
    exchange.lay_out(trained.parameters)
    made = BackwardSync(operator, exchange=exchange, trained=trained)
    return made
