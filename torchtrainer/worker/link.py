"""A worker's side of the control channel: a thread that receives orders and sends the training thread's messages.

The training thread never touches the socket. It takes calls from a queue, hands over messages through another, and pays one
attribute check per step for the possibility of being stopped.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from torchtrainer.control.channel import Dealer
from torchtrainer.control.messages import (
    AdoptRanks,
    Boundary,
    Call,
    EndWorker,
    Heartbeat,
    Hello,
    Join,
    PrepareStop,
    SendState,
    SetRanks,
    SnapshotGrant,
    SnapshotReleased,
    StopAt,
)
from torchtrainer.control.wire import ForWorker, Message
from torchtrainer.observe.heartbeat import heartbeat
from torchtrainer.process.guard import tie_broken
from torchtrainer.train.progress import Progress

EXIT_LINK_LOST = 70
FLUSH_S = 5.0
"""How long a worker waits for its last messages to leave before it ends."""


class StepBarrier:
    """Ends a pass at the boundary on which the ranks agree; asked by the training thread, told by the link's thread.

    The agreement (no collective, nothing to pay while idle): every rank that is told to prepare says at once which boundary
    it will come to next, and holds there; the driver answers with the highest, which every rank can reach. The link's thread
    says it: the training thread may be in a collective that waits for a rank which already holds.
    """

    def __init__(self, pause_s: float) -> None:
        self._pause_s = pause_s
        self._preparing = False
        self._orders: list[StopAt] = []
        self._lock = threading.Lock()
        self._call = 0
        self._round = 0
        self._passed = -1
        self._decided = threading.Event()
        self.stopped = False
        self.save_wanted = False
        self.pause_wanted = False
        self.announce: Any = None  # set by the link: called with (call, round, boundary)

    def begin(self, call: int, at: int = 0, orders: Sequence[StopAt] = ()) -> None:
        """From the link's thread, in order with what it hears of stops: a call begins; forgets earlier agreements.

        Args:
            call: its number.
            at: boundary at which this process enters the call.
            orders: what the ranks have agreed on in it; what comes at ``at`` or before is done.
        """
        self._preparing = False
        self._orders = []
        self._decided.clear()
        self.stopped = self.save_wanted = self.pause_wanted = False
        self._passed = at - 1
        self._call, self._round = call, 0
        self._orders = [order for order in orders if order.boundary > at]
        if self._orders:
            self._decided.set()
            self._preparing = True

    def prepare(self, call: int, round_: int) -> None:
        """From the link's thread: a stop, or a save, is wanted in this call."""
        if call == self._call:
            with self._lock:
                self._round = round_
                self._decided.clear()
                self._preparing = True  # before reading: the training thread writes where it is, then looks at this
            self.announce(call, round_, self._passed + 1)

    def decide(self, order: StopAt) -> None:
        """From the link's thread: the boundary on which the ranks agreed, and what to do there."""
        if order.call == self._call and order.round == self._round:
            with self._lock:
                self._orders.append(order)
                self._decided.set()

    def stop_requested(self, boundary: int) -> bool:
        """See `StepGate`.

        Raises:
            TimeoutError: the driver did not answer.
        """
        self._passed = boundary
        self.save_wanted = self.pause_wanted = False
        if not self._preparing:
            return False
        if not self._decided.wait(self._pause_s):
            raise TimeoutError(
                f"paused at a step boundary for {self._pause_s} s (pause_s) and was not told where to stop"
            )
        with self._lock:
            reached = [order for order in self._orders if order.boundary <= boundary]
            self._orders = [order for order in self._orders if order.boundary > boundary]
            self._preparing = (
                bool(self._orders) or not self._decided.is_set()
            )  # asked again meanwhile: pause at the next
        self.save_wanted = any(order.save for order in reached)
        self.pause_wanted = any(order.pause for order in reached)
        self.stopped = any(order.stop for order in reached)
        return self.stopped


class Link:
    """Connection of a worker to the host, with its thread.

    Attributes:
        call: the running call; 0: none.
        heartbeat_every_s: seconds between two heartbeats.
        ranks: says which ranks this process carries; set when they are built.
        orders: what the driver asks for, calls among it, in order; None: nothing more will come.
    """

    def __init__(
        self, *, endpoint: str, group: str, name: str, worker: int, progress: Progress, gate: StepBarrier
    ) -> None:
        self._group = group
        self._worker = worker
        self._progress = progress
        self._gate = gate
        self.orders: queue.SimpleQueue[ForWorker | None] = queue.SimpleQueue()
        self._outbox: deque[Message] = deque()
        self._wake_read, self._wake_write = os.pipe()
        self._closing = False
        self.call = 0
        self.heartbeat_every_s = 1.0
        self.ranks: Callable[[], list[int]] = list
        gate.announce = lambda call, round_, boundary: self.send(
            Boundary(group=group, worker=worker, call=call, round=round_, boundary=boundary)
        )
        self._snapshots: queue.SimpleQueue[SnapshotGrant | SnapshotReleased] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, args=(endpoint, name), name="torchtrainer-link", daemon=True)
        self.send(Hello(group=group, worker=worker, pid=os.getpid()))
        self._thread.start()

    # Training thread

    def next_order(self) -> ForWorker | None:
        """Waits for the next call or order; None: there will be none. Waits for as long as the user's process thinks."""
        return self.orders.get()

    def send(self, message: Message) -> None:
        """Hands a message over to the link's thread."""
        self._outbox.append(message)
        os.write(self._wake_write, b"\0")

    def next_snapshot_message(self, timeout_s: float) -> SnapshotGrant | SnapshotReleased:
        """Waits for what the host says about a snapshot.

        Raises:
            queue.Empty: it said nothing.
        """
        return self._snapshots.get(timeout=timeout_s)

    def send_heartbeat(self) -> None:
        """Says where this rank is now, so that even a short call shows its last step."""
        self.send(self._heartbeat())

    def close(self) -> None:
        """Sends what is left and ends the thread."""
        self._closing = True
        os.write(self._wake_write, b"\0")
        self._thread.join(FLUSH_S)

    # Link's thread

    def _run(self, endpoint: str, name: str) -> None:
        try:
            self._serve(Dealer(endpoint, name))
        except BaseException:  # a worker that can neither hear nor speak would be waited for for ever
            traceback.print_exc()
            os._exit(EXIT_LINK_LOST)

    def _serve(self, dealer: Dealer) -> None:
        next_heartbeat = 0.0
        while not self._closing:
            if tie_broken():
                os._exit(EXIT_LINK_LOST)  # where the kernel does not end us with the host
            now = time.monotonic()
            if now >= next_heartbeat:
                dealer.send(self._heartbeat())
                next_heartbeat = now + self.heartbeat_every_s
            if dealer.wait([self._wake_read], max(0.0, next_heartbeat - now)):
                os.read(self._wake_read, 4096)
            while (message := dealer.receive()) is not None:
                self._on_message(message)
            self._flush(dealer)
        self._flush(dealer)
        dealer.close(FLUSH_S)

    def _flush(self, dealer: Dealer) -> None:
        with contextlib.suppress(IndexError):
            while True:
                dealer.send(self._outbox.popleft())

    def _on_message(self, message: Message) -> None:
        if isinstance(message, Call):
            self._gate.begin(message.call)
            self.orders.put(message)
        elif isinstance(message, Join):
            steps = message.at.get("steps") or {}
            self._gate.begin(message.call, steps.get("batches", 0), [StopAt(**order) for order in message.orders])
            self.orders.put(message)
        elif isinstance(message, AdoptRanks | SendState | SetRanks):
            self.orders.put(message)
        elif isinstance(message, PrepareStop):
            self._gate.prepare(message.call, message.round)
        elif isinstance(message, StopAt):
            self._gate.decide(message)
        elif isinstance(message, SnapshotGrant | SnapshotReleased):
            self._snapshots.put(message)
        elif isinstance(message, EndWorker):
            self.orders.put(None)

    def _heartbeat(self) -> Heartbeat:
        return heartbeat(self._progress, group=self._group, worker=self._worker, call=self.call, ranks=self.ranks())
