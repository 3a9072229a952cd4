"""Where a worker's state goes: into the region that the host holds, for the writer to make a checkpoint of."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable

from torchtrainer.checkpoint.snapshot import Region
from torchtrainer.control.messages import SnapshotAnswer, SnapshotDone, SnapshotTaken, SnapshotWanted
from torchtrainer.control.wire import Message
from torchtrainer.errors import EngineError, SnapshotError
from torchtrainer.worker.keeper import Collected

Receive = Callable[[float], SnapshotAnswer | SnapshotDone]


class RegionSaver:
    """Copies this rank's share into shared memory; used by the thread that trains.

    Args:
        group, rank, world_size: of this worker.
        region: path of this rank's region.
        asynchronous: training goes on while the checkpoint is written.
        wait_s: longest wait for the host (hold_s), and for a checkpoint that is being written (write_s).
        send: hands a message over to the host.
        receive: waits for what the host says about snapshots; raises `queue.Empty`.
    """

    def __init__(
        self,
        *,
        group: str,
        rank: int,
        world_size: int,
        region: str,
        asynchronous: bool,
        wait_s: float,
        send: Callable[[Message], None],
        receive: Receive,
    ) -> None:
        self._group = group
        self._rank = rank
        self._region = Region(region, rank=rank, world_size=world_size)
        self._asynchronous = asynchronous
        self._wait_s = wait_s
        self._send = send
        self._receive = receive
        self.number = 0
        self.taken = 0

    def save(self, collect: Callable[[], Collected], *, must: bool) -> None:
        """See `torchtrainer.worker.keeper.Saver`. What can be done before the host has answered is done.

        Raises:
            EngineError: the host did not answer.
        """
        started = time.monotonic()
        self.number += 1
        must = must or not self._asynchronous
        self._send(SnapshotWanted(group=self._group, rank=self._rank, number=self.number, must=must))
        collected, error, prepared = collect(), "", None
        try:
            prepared = self._region.prepare(collected.shared, collected.mine, collected.movable)
        except SnapshotError as failed:  # training does not end because it cannot be saved; the user is told
            error = str(failed)
        if not self._answer(SnapshotAnswer):
            return
        try:
            if prepared is not None:
                self._region.copy(prepared, self.number)
                self.taken = self.number
        except SnapshotError as failed:
            error = str(failed)
        self._send(
            SnapshotTaken(
                group=self._group,
                rank=self._rank,
                number=self.number,
                meta=collected.meta,
                stall_s=time.monotonic() - started,
                error=error,
            )
        )
        if not self._asynchronous:
            self._answer(SnapshotDone)

    def _answer(self, kind: type[SnapshotAnswer | SnapshotDone]) -> bool:
        """Waits for the host's word on the present snapshot; what it says of earlier ones is left unread."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                message = self._receive(max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise EngineError(
                    f"rank {self._rank} waited {self._wait_s:g} s (hold_s, write_s) for the host at snapshot {self.number}: "
                    "the disk may have become slow or full; look at the run's directory"
                ) from None
            if isinstance(message, kind) and message.number == self.number:
                return message.go if isinstance(message, SnapshotAnswer) else True
