"""Copies a worker's state into the region that the host holds, from which the writer makes a checkpoint."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable, Sequence

from torchtrainer.checkpoint.snapshot import Prepared, Region
from torchtrainer.control.messages import SnapshotDone, SnapshotGrant, SnapshotReleased, SnapshotRequest
from torchtrainer.control.wire import Message
from torchtrainer.errors import EngineError, SnapshotError
from torchtrainer.worker.checkpointer import Collected

Receive = Callable[[float], SnapshotGrant | SnapshotReleased]


class RegionSaver:
    """Copies the shares of this process's ranks into shared memory; used by the thread that trains.

    Args:
        group, worker: of this process.
        regions: paths of the ranks' regions, by rank.
        asynchronous: training continues while the checkpoint is written.
        wait_s: longest wait for the host (pause_s), and for a checkpoint that is being written (write_s).
        send: hands a message over to the host.
        receive: waits for what the host says about snapshots; raises `queue.Empty`.
    """

    def __init__(
        self,
        *,
        group: str,
        worker: int,
        regions: Sequence[str],
        asynchronous: bool,
        wait_s: float,
        send: Callable[[Message], None],
        receive: Receive,
    ) -> None:
        self._group = group
        self._worker = worker
        self._regions = [Region(path, rank=rank, world_size=len(regions)) for rank, path in enumerate(regions)]
        self._asynchronous = asynchronous
        self._wait_s = wait_s
        self._send = send
        self._receive = receive
        self.number = 0
        self.taken = 0

    def save(self, collect: Callable[[], Collected], *, must: bool) -> None:
        """See `torchtrainer.worker.checkpointer.Saver`. What can be done before the host has answered is done.

        Raises:
            EngineError: the host did not answer.
        """
        started = time.monotonic()
        self.number += 1
        must = must or not self._asynchronous
        self._send(SnapshotRequest(group=self._group, worker=self._worker, number=self.number, must=must))
        collected, error = collect(), ""
        prepared: dict[int, Prepared] = {}
        try:
            for rank, mine in collected.mine.items():
                prepared[rank] = self._regions[rank].prepare(collected.shared, mine, collected.movable)
        except SnapshotError as failed:  # training does not end because it cannot be saved; the user is told
            error = str(failed)
        if not self._answer(SnapshotGrant):
            return
        try:
            for rank, one in prepared.items() if not error else ():
                self._regions[rank].copy(one, self.number)
                self.taken = self.number
        except SnapshotError as failed:
            error = str(failed)
        self._send(
            SnapshotDone(
                group=self._group,
                worker=self._worker,
                number=self.number,
                ranks=list(collected.mine),
                meta=collected.meta,
                stall_s=time.monotonic() - started,
                error=error,
            )
        )
        if not self._asynchronous:
            self._answer(SnapshotReleased)

    def _answer(self, kind: type[SnapshotGrant | SnapshotReleased]) -> bool:
        """Waits for the host's word on the present snapshot; what it says of earlier ones is left unread."""
        deadline = time.monotonic() + self._wait_s
        while True:
            try:
                message = self._receive(max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise EngineError(
                    f"a worker waited {self._wait_s:g} s (pause_s, write_s) for the host at snapshot {self.number}: "
                    "the disk may have become slow or full; look at the run's directory"
                ) from None
            if isinstance(message, kind) and message.number == self.number:
                return message.go if isinstance(message, SnapshotGrant) else True
