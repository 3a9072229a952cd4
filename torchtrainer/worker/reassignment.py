"""Orders of the driver to a worker while its training thread works, and when they take effect.

Orders come by the link's thread. The training thread looks for them where it waits for other ranks, at step boundaries and
between calls: there, and only there, the state of the last boundary is still whole.
"""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator
from typing import Any

from torchtrainer.checkpoint.snapshot import Region, assemble
from torchtrainer.comm.uneven import collectives_made
from torchtrainer.control.messages import AdoptRanks, Bound, Join, Paused, RanksAdopted, SendState, SetRanks, StateSent
from torchtrainer.control.wire import ForWorker, Message
from torchtrainer.errors import EngineError, SnapshotError
from torchtrainer.train.complete_state import shared_state
from torchtrainer.train.components import internals
from torchtrainer.train.gradient_sync import RecoverableSync
from torchtrainer.worker.checkpointer import RankCheckpointer
from torchtrainer.worker.saver import RegionSaver

LOOK_S = 0.2
"""Time between two checks of a worker that holds whether it has paused too long."""


class Released(BaseException):
    """This worker carries no rank any more, and leaves the running call; not an error of the user's to catch."""


class Reassignment:
    """The worker's part in changes of who carries what. Used by the thread that trains.

    Args:
        group, worker: of this process.
        sync: the ranks of this process.
        operator: of this process.
        orders: filled by the link's thread.
        send: hands a message over to the host.
        shared_path: memory file for the state that is the same on all ranks.
        saver: counts the snapshots; None: nothing is kept.
        pause_s: longest wait for `SetRanks`.

    Attributes:
        call: the running call; 0: none.
    """

    def __init__(
        self,
        *,
        group: str,
        worker: int,
        sync: RecoverableSync,
        operator: Any,
        orders: queue.SimpleQueue[ForWorker | None],
        send: Callable[[Message], None],
        shared_path: str,
        saver: RegionSaver | None,
        pause_s: float,
    ) -> None:
        self._group = group
        self._worker = worker
        self._sync = sync
        self._operator = operator
        self._orders = orders
        self._send = send
        self._shared_path = shared_path
        self._region = Region(shared_path, rank=0, world_size=1)
        self._saver = saver
        self._pause_s = pause_s
        self._kept: list[ForWorker | None] = []
        self._taken: list[int] = []
        self._redone = 0
        self._in_first_step = False
        self._collectives: int | None = None
        self._bound = False
        self.call = 0

    # Where orders are looked for

    def on_wait(self) -> None:
        """Called in an exchange while this process waits for other ranks."""
        for order in self._waiting_orders(AdoptRanks, SendState):
            if isinstance(order, AdoptRanks):
                self._carry(order, self._sync.catch_up)
            elif isinstance(order, SendState):
                self._share(order)

    def at_boundary(self) -> None:
        """At a step boundary."""
        steps = internals(self._operator).steps
        if steps is not None and steps.compares_here:
            self.tell_collectives()
        if not self._in_first_step:
            self.tell_adopted()
        self._tell_bound()
        self._in_first_step = False
        for order in self._waiting_orders(AdoptRanks):  # what is shared here would be before what the gate asks for
            self._at_rest(order)

    def pause(self, boundary: int) -> None:
        """At a step boundary, until the driver has said who carries what.

        Raises:
            Released: nothing is left to carry.
            EngineError: the driver said nothing.
        """
        self._send(Paused(group=self._group, worker=self._worker, call=self.call, boundary=boundary))
        deadline = time.monotonic() + self._pause_s
        while time.monotonic() < deadline:
            for order in self._waiting_orders(AdoptRanks, SendState, SetRanks):
                self._at_rest(order)
                if isinstance(order, SetRanks):
                    return
            self._await_order(LOOK_S)
        raise EngineError(f"paused at a step boundary for {self._pause_s:g} s (pause_s) and was not told how to go on")

    def between_calls(self, order: ForWorker) -> None:
        """An order that came while no call was running."""
        with contextlib.suppress(Released):
            self._at_rest(order)
        self.tell_adopted()

    def watch_collectives(self) -> None:
        """From now on only the user's code calls collectives: the process is built, and gradients go through memory."""
        self._collectives = collectives_made()

    def tell_collectives(self) -> None:
        """Tells the driver if the user's model, loss or hooks turn out to use collectives, of which recovery knows nothing."""
        if not self._bound and self._collectives is not None and collectives_made() != self._collectives:
            self._tell(
                "the model, the loss or a hook calls torch.distributed itself, and such calls need the process of every rank"
            )

    def _tell_bound(self) -> None:
        """Says so if it has turned out that a process can carry one rank only."""
        if self._sync.unlike and not self._bound:
            self._tell(self._sync.unlike)

    def _tell(self, why: str) -> None:
        self._bound = True
        self._send(Bound(group=self._group, worker=self._worker, bound=why))

    def tell_adopted(self) -> None:
        """Says that what was taken over is done; to be called when the step is over."""
        if self._taken:
            taken, redone = self._taken, self._redone
            self._taken, self._redone = [], 0
            self._send(
                RanksAdopted(
                    group=self._group,
                    worker=self._worker,
                    ranks=taken,
                    call=self.call,
                    step=self._operator.global_step,
                    redone=redone,
                )
            )

    def join(self, order: Join, checkpointer: RankCheckpointer) -> None:
        """Takes ranks over with a state that another worker has shared.

        The driver is told at once between two calls, else when the first step is over.
        """
        shared = assemble([self._shared_path], order.number)["shared"]
        resumed = self._sync.join(shared, order.ranks, order.at)
        internals(self._operator).context.progress.reach(self._operator.global_step, shared["epoch"])
        if resumed is not None:
            checkpointer.resume_with(resumed)
        self._taken = [*self._taken, *order.ranks]
        if self._saver is not None:
            self._saver.number = order.at["snapshots"]
        if order.call:
            self._in_first_step = True
        else:
            self.tell_adopted()

    def kept_reply(self, call: int) -> tuple[Any, ...] | None:
        """What the process that was lost was about to tell of the running call; None: the call has to be made here."""
        return self._sync.kept_reply(call)

    # Orders

    def _waiting_orders(self, *kinds: type[ForWorker]) -> Iterator[ForWorker]:
        """The orders of some kinds that have come, in order; others are left for where they belong."""
        while not self._orders.empty():
            self._kept.append(self._orders.get())
        while (found := next((one for one in self._kept if isinstance(one, kinds)), None)) is not None:
            self._kept.remove(found)
            yield found

    def _await_order(self, timeout_s: float) -> None:
        with contextlib.suppress(queue.Empty):
            self._kept.append(self._orders.get(timeout=timeout_s))

    def next_order(self) -> ForWorker | None:
        """Waits for the next order between two calls; None: nothing more will come."""
        return self._kept.pop(0) if self._kept else self._orders.get()

    def _at_rest(self, order: ForWorker) -> None:
        if isinstance(order, AdoptRanks):
            self._carry(order, self._adopt)
            self._sync.turn_to_lowest()
        elif isinstance(order, SendState):
            self._share(order)
        elif isinstance(order, SetRanks):
            self._sync.assign(order.ranks)
            if not order.ranks:
                raise Released

    def _adopt(self, rank: int) -> int:
        self._sync.adopt(rank)
        return 0

    def _carry(self, order: AdoptRanks, take: Callable[[int], int]) -> None:
        for rank in order.ranks:
            if rank not in self._sync.contexts:
                self._redone += take(rank)
                self._taken.append(rank)

    def _share(self, order: SendState) -> None:
        error = self._sync.why_not_shared(order.ranks)
        steps = internals(self._operator).steps
        at = {
            **self._sync.where(),
            "steps": steps.state_dict() if steps is not None else None,
            "snapshots": self._saver.number if self._saver is not None else 0,
        }
        if not error:
            try:
                state = {**shared_state(self._operator), **self._sync.shared_state()}
                self._region.write(state, {}, set(), order.number)
            except SnapshotError as failed:
                error = str(failed)
        self._send(
            StateSent(
                group=self._group,
                worker=self._worker,
                number=order.number,
                call=self.call,
                at=at,
                step=self._operator.global_step,
                error=error,
            )
        )


class BoundaryGate:
    """A gate at which a process has its ranks note how far they are; a worker also looks for orders, and holds if it is told to.

    Args:
        gate: that is asked whether to continue.
        reassignment: of this worker; None: nobody orders this process about.
        before: called at every boundary first.
    """

    def __init__(self, gate: Any, reassignment: Reassignment | None, before: Callable[[], None]) -> None:
        self._gate = gate
        self._reassignment = reassignment
        self._before = before

    @property
    def save_wanted(self) -> bool:
        """See `torchtrainer.train.progress.StepGate`."""
        return bool(self._gate.save_wanted)

    def stop_requested(self, boundary: int) -> bool:
        """See `torchtrainer.train.progress.StepGate`."""
        self._before()
        if self._reassignment is None:
            return bool(self._gate.stop_requested(boundary))
        self._reassignment.at_boundary()
        stop: bool = self._gate.stop_requested(boundary)
        if self._gate.pause_wanted:
            self._reassignment.pause(boundary)
        return stop
