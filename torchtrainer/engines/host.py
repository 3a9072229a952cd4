"""The host process: supervises all worker processes of one driver on one machine. No torch, one thread.

    driver ──ipc──> host ──socket──> spawner ──fork──> worker 0..P-1
                     ^                                    │
                     └────────────────ipc─────────────────┘

It starts workers, carries messages, follows logs, notices deaths as events, and ends everything when the driver ends, in
whatever way that happens. It decides nothing about training.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from pathlib import Path

from torchtrainer.control.channel import Router
from torchtrainer.control.messages import (
    Call,
    DumpStacks,
    EngineFailed,
    Failure,
    GroupFailed,
    GroupGone,
    Heartbeat,
    Hello,
    KillGroup,
    KillWorker,
    Logged,
    Quit,
    Reply,
    SignalWorkers,
    SnapshotDone,
    SnapshotRequest,
    StartGroup,
    StartWorker,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.control.wire import ForWorker, FromWorker, Message
from torchtrainer.engines.groups import WRITER, HostGroup, child_spec, new_group, worker_name
from torchtrainer.engines.output import ask_for_stacks, last_words, last_words_of_driver, new_output, written_stacks
from torchtrainer.engines.saving import Saving
from torchtrainer.engines.starting import SpawnerReplaced, Starters
from torchtrainer.process.guard import kill_process_group, kill_session, open_pidfd, settle_signals, signal_process
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.paths import EnginePaths
from torchtrainer.process.starters import (
    ChildExited,
    ChildNotStarted,
    ChildStarted,
    PreloadFailed,
    StarterEvent,
    StarterFailed,
    StarterReady,
)
from torchtrainer.process.streams import open_standard_descriptors

DRIVER = b"driver"
TICK_S = 0.05
"""Polling interval for logs, and for exits of exec'd workers, while a group works."""
IDLE_TICK_S = 1.0
"""The same while the group is idle."""
EXIT_SETTLE_S = 0.01
"""How long to wait for a worker's last messages after its end."""


class Host:
    """Everything the host process knows and does. ``run`` returns when the driver is gone or says `Quit`."""

    def __init__(self, paths: EnginePaths, driver_pid: int, driver_pipe: int, start_method: str) -> None:
        self._paths = paths
        self._starters = Starters(start_method)
        self._router = Router(paths.endpoint)
        self._machine = socket.gethostname()
        self._driver_pid = driver_pid
        self._driver_watch = [fd for fd in (open_pidfd(driver_pid), driver_pipe) if fd is not None]
        self._groups: dict[str, HostGroup] = {}
        self._oom = OomWatch()
        self._quit = False
        self._exits: list[tuple[float, ChildExited]] = []
        self._saving = Saving(paths, self._starters.start, to_worker=self._to_worker, to_driver=self._to_driver)

    # The loop

    def run(self) -> None:
        """Serves until the driver is gone or wants no more, then ends every process and removes every file."""
        try:
            while not self._quit and os.getppid() == self._driver_pid:
                self._turn()
        finally:
            self._end_everything()

    def _turn(self) -> None:
        busy = any(group.active or group.killed for group in self._groups.values())
        fds = [*self._driver_watch, *self._starters.fds()]
        ready = self._router.wait(fds, EXIT_SETTLE_S if self._exits else TICK_S if busy else IDLE_TICK_S)
        if ready.intersection(self._driver_watch):
            last_words_of_driver(self._driver_pid, self._oom)
            self._quit = True
            return
        while (received := self._router.receive()) is not None:
            self._on_message(*received)
        for event in self._starters.events():
            self._on_starter_event(event)
        self._take_exits()
        for group in self._groups.values():
            if group.active:
                self._forward_output(group)
            if group.stacks_due is not None and time.monotonic() >= group.stacks_due:
                self._send_stacks(group)

    def _to_driver(self, message: Message) -> None:
        self._router.send(DRIVER, message)

    # Messages

    def _on_message(self, sender: bytes, message: Message) -> None:
        if isinstance(message, ForWorker):
            self._pass_to_workers(message)
        elif isinstance(message, SnapshotRequest | SnapshotDone):
            if message.group in self._groups:
                self._saving.on_message(self._groups[message.group], message)
        elif isinstance(message, FromWorker):
            self._pass_to_driver(message)
        elif isinstance(message, Quit):
            self._quit = True
        else:
            self._on_order(sender, message)

    def _on_order(self, sender: bytes, message: Message) -> None:
        if isinstance(message, StartGroup):
            self._start_group(message)
        elif isinstance(message, StartWorker):
            self._start_worker(message)
        elif isinstance(message, KillWorker):
            self._kill_worker(message)
        elif isinstance(message, KillGroup):
            self._kill_group(message.group)
        elif isinstance(message, SignalWorkers):
            group = self._groups.get(message.group)
            for pid in group.pids.values() if group is not None else ():
                signal_process(pid, message.signum)
        elif isinstance(message, DumpStacks):
            if message.group in self._groups:
                ask_for_stacks(self._groups[message.group])
        else:
            raise ValueError(f"{sender!r} sent {type(message).__name__}, which the host does not accept")

    def _pass_to_workers(self, message: ForWorker) -> None:
        group = self._groups.get(message.group)
        if group is None:
            return
        workers = list(group.pids) if message.worker is None else [message.worker]
        if isinstance(message, Call):
            group.awaited.update(workers)
        for worker in workers:
            self._router.send(worker_name(message.group, worker).encode(), message)

    def _pass_to_driver(self, message: FromWorker) -> None:
        group = self._groups.get(message.group)
        if group is None or isinstance(message, Hello):
            return
        if isinstance(message, Heartbeat) and not group.active:
            return
        if isinstance(message, WorkerReady):
            self._starters.preload(message.modules)
        if isinstance(message, WorkerReady | Reply | Failure):
            group.awaited.discard(message.worker)
            self._forward_output(group, flush=True)  # what was printed before comes before
        self._to_driver(message)

    # Groups

    def _start_group(self, message: StartGroup) -> None:
        group = new_group(message, self._paths)
        self._groups[message.group] = group
        try:
            group.open_files(message.blob, self._paths)
            for rank in message.here:
                self._starters.start(child_spec(group, rank, self._paths))
        except OSError as error:  # no space, or no more processes: other groups go on
            self._to_driver(GroupFailed(group=message.group, text=str(error)))

    def _on_not_started(self, group: HostGroup, worker: int, text: str) -> None:
        """There is no process for a worker: one that came later is done without, else the group cannot be."""
        name = group.spec.group
        group.unborn.discard(worker)
        group.awaited.discard(worker)
        if worker < group.spec.world_size:
            self._to_driver(GroupFailed(group=name, text=text))
        else:
            self._to_driver(WorkerExited(group=name, worker=worker, pid=0, exit_code=1, stderr_tail=text))
        if group.killed:
            self._forget_if_gone(name, group)

    def _start_worker(self, message: StartWorker) -> None:
        group = self._groups.get(message.group)
        if group is None or group.killed:
            return
        group.like[message.worker] = message.rank
        group.unborn.add(message.worker)
        group.awaited.add(message.worker)
        group.note_logs(message.worker)
        try:
            self._starters.start(child_spec(group, message.worker, self._paths, message.record))
        except OSError as error:
            self._on_not_started(group, message.worker, str(error))

    def _kill_worker(self, message: KillWorker) -> None:
        group = self._groups.get(message.group)
        if group is None:
            return
        if message.worker in group.pids:
            kill_session(group.pids[message.worker])
        else:
            group.unwanted.add(message.worker)

    def _kill_group(self, name: str) -> None:
        group = self._groups.get(name)
        if group is None:
            self._to_driver(GroupGone(group=name))
            return
        group.killed = True
        if self._starters.forget({worker_name(name, worker) for worker in group.unborn}):  # a writer is still wanted
            group.unborn.clear()
        for pid in group.pids.values():
            kill_session(pid)
        self._forget_if_gone(name, group)

    def _forget_if_gone(self, name: str, group: HostGroup) -> None:
        if group.pids or group.unborn:
            return
        self._saving.write_if_due(group)
        if group.snapshots is not None and group.snapshots.writing:
            return
        group.close()
        self._forward_output(group, flush=True)
        for tail in group.tails.values():
            tail.close()
        del self._groups[name]
        self._paths.forget(name)
        self._to_driver(GroupGone(group=name))

    # Starter events

    def _on_starter_event(self, event: StarterEvent | SpawnerReplaced) -> None:
        if isinstance(event, StarterReady):
            self._starters.on_ready(event)
        elif isinstance(event, SpawnerReplaced):
            self._warn(f"{event.text}, and the workers continue")
        elif isinstance(event, PreloadFailed):
            self._warn(event.text)
        elif isinstance(event, StarterFailed):
            self._on_starter_failed(event)
        elif isinstance(event, ChildStarted):
            self._on_child_started(event)
        elif isinstance(event, ChildNotStarted):
            self._on_child_not_started(event)
        else:
            # A moment later: what the worker said last may still be on its way.
            self._exits.append((time.monotonic() + EXIT_SETTLE_S, event))

    def _warn(self, text: str) -> None:
        """Tells the user of every trainer."""
        for name in self._groups:
            told = Logged(group=name, worker=0, rank=None, pid=os.getpid(), level=logging.WARNING, text=text)
            self._to_driver(told)

    def _on_starter_failed(self, event: StarterFailed) -> None:
        for group in self._groups.values():
            group.kill()
        self._starters.exec_from_now_on()
        self._saving.begin_again(self._groups.values())
        self._saving.finish(self._groups.values(), self._turn_at_end)
        self._groups.clear()
        self._to_driver(EngineFailed(text=event.text))

    # Snapshots

    def _to_worker(self, name: str, worker: int, message: Message) -> None:
        self._router.send(worker_name(name, worker).encode(), message)

    def _turn_at_end(self) -> None:
        """Waits a moment for writers to end; what else is said comes from ranks that were killed, or a driver that is gone."""
        noted, self._exits = self._exits, []
        for _, exited in noted:
            self._on_child_exited(exited)
        self._router.wait(self._starters.fds(), EXIT_SETTLE_S)
        while self._router.receive() is not None:
            pass
        for event in self._starters.events():
            if isinstance(event, ChildExited):
                self._on_child_exited(event)
            elif isinstance(event, StarterFailed):
                self._starters.exec_from_now_on()
                self._saving.begin_again(self._groups.values())
            else:
                self._on_starter_event(event)

    def _take_exits(self) -> None:
        now = time.monotonic()
        due = [event for when, event in self._exits if when <= now]
        self._exits = [(when, event) for when, event in self._exits if when > now]
        for event in due:
            self._on_child_exited(event)

    def _on_child_started(self, event: ChildStarted) -> None:
        name, number = event.key.rsplit("/", 1)
        group = self._groups[name]
        if number == WRITER:
            group.writer_pid = event.pid
            return
        worker = int(number)
        group.unborn.discard(worker)
        group.pids[worker] = event.pid
        if group.killed or worker in group.unwanted:
            kill_session(event.pid)
        self._to_driver(WorkerStarted(group=name, worker=worker, pid=event.pid, machine=self._machine))

    def _on_child_not_started(self, event: ChildNotStarted) -> None:
        name, number = event.key.rsplit("/", 1)
        if number == WRITER:
            self._saving.on_writer_not_started(self._groups[name], event.text)
            self._forget_if_gone(name, self._groups[name])
        else:
            self._on_not_started(self._groups[name], int(number), event.text)

    def _on_child_exited(self, event: ChildExited) -> None:
        for name, group in list(self._groups.items()):
            if event.pid == group.writer_pid:
                self._saving.on_writer_exited(group)
                self._forget_if_gone(name, group)
                return
            worker = group.worker_of(event.pid)
            if worker is None:
                continue
            kill_process_group(event.pid)  # what the worker had started goes with it
            del group.pids[worker]
            group.awaited.discard(worker)
            self._forward_output(group, flush=True)
            self._to_driver(last_words(group, worker, event, self._oom))
            self._saving.on_worker_exited(group, worker, event.exit_code)
            self._forget_if_gone(name, group)

    # Output and stacks

    def _forward_output(self, group: HostGroup, flush: bool = False) -> None:
        for message in new_output(group, flush):
            self._to_driver(message)

    def _send_stacks(self, group: HostGroup) -> None:
        group.stacks_due = None
        for message in written_stacks(group):
            self._to_driver(message)

    # The end

    def _end_everything(self) -> None:
        for group in self._groups.values():
            group.kill()
        self._saving.finish(self._groups.values(), self._turn_at_end)
        self._starters.close()
        self._router.close()
        self._paths.remove()


def main(arguments: list[str]) -> None:
    """Runs the host.

    Args:
        arguments: private directory, pid of the driver, start method. Standard input is a pipe that the driver holds open.
    """
    open_standard_descriptors()
    root, driver_pid, start_method = arguments
    settle_signals()
    paths = EnginePaths(Path(root))
    try:
        Host(paths, int(driver_pid), sys.stdin.fileno(), start_method).run()
    finally:
        paths.remove()


if __name__ == "__main__":
    main(sys.argv[1:])
