"""One rank's part in agreeing where to stop or save without a driver: a thread that checks a few times a second.

The thread that trains pays an attribute check per step. Its gate is that of a worker, `torchtrainer.worker.link.StepBarrier`; what
a worker hears from the driver comes here from rank 0, whose thread decides: see `torchtrainer.engines.stop_coordinator`.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

from torchtrainer.comm.rank_channel import RankChannel
from torchtrainer.control.messages import StopAt
from torchtrainer.engines.stop_coordinator import StopCoordinator, StopOrders
from torchtrainer.errors import Preempted
from torchtrainer.process.child import flush_output
from torchtrainer.worker.link import StepBarrier

LOOK_S = 0.1
"""Seconds between two checks for a notice of this rank and for messages of other ranks."""
BUSY_LOOK_S = 0.005
"""The same while the ranks agree."""
BUSY_S = 1.0
"""How long after the last message a rank keeps checking that often."""
JOIN_S = 1.0
"""How long the thread gets to end: longer than a store takes to answer; nobody waits for a store that is cut off."""


class Agreement:
    """Where this rank stands in the agreement of all ranks. Calls are counted the same on all ranks, from 1.

    Args:
        channel: between the ranks.
        rank, world_size: of this process.
        pause_s: longest time that a rank holds at a boundary.
        look: called at every look, in the thread; a `Preempted` from there ends the process at once.
        save_every_s: says how many seconds there are between two saves now; None: nobody asks for any. Rank 0's counts.

    Attributes:
        gate: to be asked at every step boundary.
    """

    def __init__(
        self,
        channel: RankChannel,
        *,
        rank: int,
        world_size: int,
        pause_s: float,
        look: Callable[[], None],
        save_every_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self.gate = StepBarrier(pause_s)
        self.gate.announce = self._announce
        self._channel = channel
        self._rank = rank
        self._look = look
        self._save_every_s = save_every_s
        self._rounds = StopCoordinator(world_size) if rank == 0 else None
        self._lock = threading.Lock()  # a call begins or ends, or an order is followed
        self._call, self._running = 0, False
        self._stop_wanted = self._save_wanted = False
        self._orders: StopOrders = []
        self._untold: StopOrders = []
        self._saved_at = time.monotonic()
        self._busy_until = 0.0
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="torchtrainer-agreement", daemon=True)

    # User's thread

    def begin(self) -> None:
        """A call begins that can be stopped at step boundaries; the thread looks from the first one on."""
        with self._lock:
            self._call, self._running = self._call + 1, True
            self.gate.begin(self._call)
        if self._thread.ident is None:
            self._thread.start()

    def end(self) -> None:
        """It has ended on this rank."""
        with self._lock:
            self._running = self._stop_wanted = self._save_wanted = False

    def wish(self, *, stop: bool) -> None:
        """Has all ranks save, and stop if that is wanted, in the running call, else in the next one. In any thread."""
        with self._lock:
            self._stop_wanted, self._save_wanted = self._stop_wanted or stop, True

    def close(self) -> None:
        """Ends the thread. Idempotent."""
        self._closing.set()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(JOIN_S)

    # Its own thread

    def _run(self) -> None:
        try:
            while not self._closing.wait(BUSY_LOOK_S if time.monotonic() < self._busy_until else LOOK_S):
                self._turn()
        except Preempted as leaving:  # the thread that trains may be where nothing reaches it
            flush_output()
            os._exit(int(leaving.code or 0))
        except RuntimeError:  # the store is gone, and with it the launcher or rank 0: the collectives will say so
            return

    def _turn(self) -> None:
        """Talks to the other ranks without the lock: a store that is cut off does not answer, and only this thread may wait for it."""
        self._look()
        with self._lock:
            self._note_wish()
        self._tell_noted()
        orders = self._channel.orders()
        with self._lock:
            self._follow(orders)
        self._tell_noted()
        if self._rounds is None:
            return
        for told in self._channel.told():
            self._give(self._rounds.hear(told))
        if self._save_is_due(self._rounds):
            self._saved_at = time.monotonic()
            self._give(self._rounds.hear({"kind": "wish", "call": self._call, "stop": False}))

    def _note_wish(self) -> None:
        if self._running and self._save_wanted:
            self._note("wish", call=self._call, stop=self._stop_wanted)
            self._stop_wanted = self._save_wanted = False

    def _follow(self, orders: StopOrders) -> None:
        """Does what rank 0 ordered for the running call; orders for calls to come wait for them."""
        early = []
        for order in (*self._orders, *orders):
            self._busy_until = time.monotonic() + BUSY_S
            if order["call"] > self._call:
                early.append(order)
            elif order["call"] == self._call and self._running:
                self._do(order)
            elif order["kind"] != "stop_at":
                self._note("ended", round=order["round"])
        self._orders = early

    def _do(self, order: dict[str, Any]) -> None:
        if order["kind"] == "ask":
            self._note("in", round=order["round"])
        elif order["kind"] == "prepare":
            self.gate.prepare(order["call"], order["round"])
        else:
            fields = {name: order[name] for name in ("call", "round", "boundary", "stop")}
            self.gate.decide(StopAt(group="", save=True, **fields))

    def _announce(self, call: int, number: int, boundary: int) -> None:
        self._note("at", call=call, round=number, boundary=boundary)

    def _note(self, kind: str, **more: Any) -> None:
        self._untold.append({"kind": kind, "rank": self._rank, **more})

    def _tell_noted(self) -> None:
        for message in self._untold:
            self._channel.tell(message)
            self._busy_until = time.monotonic() + BUSY_S
        self._untold.clear()

    def _give(self, orders: StopOrders) -> None:
        for order in orders:
            self._channel.order(order)
            self._busy_until = time.monotonic() + BUSY_S

    def _save_is_due(self, rounds: StopCoordinator) -> bool:
        every_s = self._save_every_s()
        if every_s is None or rounds.open or not self._running:
            return False
        return time.monotonic() - self._saved_at >= every_s
