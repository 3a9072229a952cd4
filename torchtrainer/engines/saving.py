"""The host's part in checkpoints: answers ranks that want to copy, starts writers, and reports their outcome."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable

from torchtrainer.control.messages import (
    CheckpointEnded,
    SnapshotDone,
    SnapshotGrant,
    SnapshotReleased,
    SnapshotRequest,
)
from torchtrainer.control.wire import Message
from torchtrainer.driver.run_dir import BorrowedRunDirectory
from torchtrainer.engines.groups import HostGroup, writer_spec
from torchtrainer.engines.snapshots import read_outcome
from torchtrainer.process.child import ChildSpec
from torchtrainer.process.paths import EnginePaths, private_directory
from torchtrainer.process.whole_file import replace_file


class Saving:
    """Has snapshots of any group written. Used by the host's only thread.

    Args:
        paths: the host's files.
        start_child: starts a process.
        to_worker: sends to a worker of a group.
        to_driver: sends to the driver.
    """

    def __init__(
        self,
        paths: EnginePaths,
        start_child: Callable[[ChildSpec], None],
        *,
        to_worker: Callable[[str, int, Message], None],
        to_driver: Callable[[Message], None],
    ) -> None:
        self._paths = paths
        self._start_child = start_child
        self._to_worker = to_worker
        self._to_driver = to_driver

    def on_message(self, group: HostGroup, message: SnapshotRequest | SnapshotDone) -> None:
        """A rank wants to copy its share, or has."""
        snapshots = group.snapshots
        if snapshots is None:
            return
        if isinstance(message, SnapshotRequest):
            self._answer(group, snapshots.want(message))
            return
        failed = snapshots.copied(message)
        if failed is not None:
            self._tell_ended(group, failed)
        self.write_if_due(group)

    def write_if_due(self, group: HostGroup) -> None:
        """Starts the writer of a snapshot that is whole; when no rank is left, also of one that nobody spoke of."""
        snapshots = group.snapshots
        number = snapshots.due(ranks_left=bool(group.pids)) if snapshots is not None else 0
        if snapshots is None or not number:
            return
        snapshots.begin(number)
        name = group.spec.group
        self._paths.written(name).unlink(missing_ok=True)
        try:
            private_directory(self._paths.writer_logs(name))
            self._start_child(writer_spec(group, number, self._paths))
        except OSError as error:  # no space, or no more processes
            self.on_writer_not_started(group, str(error))

    def on_writer_not_started(self, group: HostGroup, text: str) -> None:
        """There is no process that could write a snapshot."""
        assert group.snapshots is not None
        ended = group.snapshots.end({"error": f"its writer could not be started: {text}"}, group.spec.group)
        self._tell_ended(group, ended)

    def on_writer_exited(self, group: HostGroup) -> None:
        """The writer of a group is gone."""
        snapshots, name = group.snapshots, group.spec.group
        group.writer_pid = None
        assert snapshots is not None
        self._tell_ended(group, snapshots.end(read_outcome(self._paths.written(name)), name))
        self.write_if_due(group)
        self._answer(group, snapshots.answers(name))

    def on_worker_exited(self, group: HostGroup, worker: int, exit_code: int) -> None:
        """A worker of a group is gone, while others continue; one that left as it was told to owes nobody a share."""
        if group.snapshots is None or not group.pids or exit_code == 0:
            return
        for ended in group.snapshots.give_up(group.spec.group, group.memory.step_of(worker)):
            self._tell_ended(group, ended)
        self._answer(group, group.snapshots.answers(group.spec.group))  # who waited for what was given up

    def begin_again(self, groups: Iterable[HostGroup]) -> None:
        """Starts every writer once more: they went with whoever had started them."""
        for group in groups:
            if group.snapshots is not None:
                group.snapshots.writing, group.writer_pid = 0, None
                self.write_if_due(group)

    def finish(self, groups: Iterable[HostGroup], turn: Callable[[], None]) -> None:
        """Has everything written that was copied whole, and gives the memory back; for when nobody is left who could copy.

        Args:
            groups: without ranks.
            turn: waits a moment for processes that end, and calls `on_writer_exited` for writers.
        """
        groups = [group for group in groups if group.snapshots is not None]
        for group in groups:
            _note_reached(group)
            self.write_if_due(group)
        limit_s = max((one.snapshots.orders.write_s for one in groups if one.snapshots is not None), default=0.0)
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline and any(one.snapshots and one.snapshots.writing for one in groups):
            turn()
        for group in groups:
            if group.snapshots is not None:
                group.snapshots.close()

    def _answer(self, group: HostGroup, answers: list[tuple[int, SnapshotGrant]]) -> None:
        for rank, answer in answers:
            self._to_worker(group.spec.group, rank, answer)

    def _tell_ended(self, group: HostGroup, ended: CheckpointEnded) -> None:
        name = group.spec.group
        for rank in group.pids:
            self._to_worker(name, rank, SnapshotReleased(group=name, worker=rank, number=ended.number))
        self._to_driver(ended)


def _note_reached(group: HostGroup) -> None:
    """Writes down how far the ranks were, for the next start of the script; a disk that does not take it keeps nobody up."""
    run_dir = group.snapshots.orders.run_dir if group.snapshots is not None else ""
    if run_dir:
        with contextlib.suppress(OSError):
            replace_file(BorrowedRunDirectory(run_dir).reached, str(group.memory.furthest()).encode())
