"""The host process: supervises all worker processes of one driver on one machine. No torch, one thread.

    driver ──ipc──> host ──socket──> spawner ──fork──> worker 0..P-1
                     ^                                    │
                     └────────────────ipc─────────────────┘

It starts workers, carries messages, follows logs, notices deaths as events, and ends everything when the driver ends, in
whatever way that happens. It decides nothing about training.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from torchtrainer.control.channel import Router
from torchtrainer.control.messages import (
    Beat,
    Call,
    DumpStacks,
    EngineFailed,
    EngineReady,
    Failure,
    GroupFailed,
    GroupGone,
    Hello,
    KillGroup,
    Output,
    Quit,
    Reply,
    SignalWorkers,
    SnapshotTaken,
    SnapshotWanted,
    Stacks,
    StartGroup,
    WorkerExited,
    WorkerReady,
    WorkerStarted,
)
from torchtrainer.control.wire import ForWorker, FromWorker, Message
from torchtrainer.engines.groups import WRITER, Group, child_spec, new_group, worker_name
from torchtrainer.engines.preload import PRELOAD, PRELOADABLE
from torchtrainer.engines.saving import Saving
from torchtrainer.process.child import ChildSpec
from torchtrainer.process.guard import kill_process_group, kill_session, open_pidfd, settle_signals, signal_process
from torchtrainer.process.logs import LogTail, last_text
from torchtrainer.process.paths import EnginePaths, RankPaths, private_directory
from torchtrainer.process.signals import STACK_DUMP_SIGNAL
from torchtrainer.process.starters import (
    ChildExited,
    ChildStarted,
    ExecStarter,
    Starter,
    StarterEvent,
    StarterFailed,
    StarterReady,
    preloaded_starter,
)

DRIVER = b"driver"
TICK_S = 0.05
"""How often logs are looked at, and exec'd workers for exits, while a group works."""
IDLE_TICK_S = 1.0
"""The same while nothing goes on."""
EXIT_SETTLE_S = 0.01
"""How long after a worker's end its last messages are waited for."""
STACK_DUMP_WAIT_S = 0.3
"""How long a worker gets to write its stacks before they are read."""


class Host:
    """Everything the host process knows and does. ``run`` returns when the driver is gone or says `Quit`."""

    def __init__(self, paths: EnginePaths, driver_pid: int, driver_pipe: int, start_method: str) -> None:
        environ = dict(os.environ)
        self._paths = paths
        self._starter: Starter = preloaded_starter(PRELOAD, environ) if start_method == "fork" else ExecStarter()
        self._exec_starter: ExecStarter | None = None
        self._router = Router(paths.socket)
        self._driver_pid = driver_pid
        self._driver_watch = [fd for fd in (open_pidfd(driver_pid), driver_pipe) if fd is not None]
        self._groups: dict[str, Group] = {}
        self._preloaded: set[str] = set()
        self._quit = False
        self._waiting: list[ChildSpec] | None = []  # until the starter is ready; sending earlier could block
        self._exits: list[tuple[float, ChildExited]] = []
        self._saving = Saving(paths, start_child=self._start_child, to_rank=self._to_rank, to_driver=self._to_driver)

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
        starters = [s for s in (self._starter, self._exec_starter) if s is not None]
        fds = [*self._driver_watch, *(fd for s in starters for fd in s.fds())]
        ready = self._router.wait(fds, EXIT_SETTLE_S if self._exits else TICK_S if busy else IDLE_TICK_S)
        if ready.intersection(self._driver_watch):
            self._quit = True
            return
        while (received := self._router.receive()) is not None:
            self._on_message(*received)
        for starter in starters:
            for event in starter.events():
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
        elif isinstance(message, SnapshotWanted | SnapshotTaken):
            if message.group in self._groups:
                self._saving.on_message(self._groups[message.group], message)
        elif isinstance(message, FromWorker):
            self._pass_to_driver(message)
        elif isinstance(message, StartGroup):
            self._start_group(message)
        elif isinstance(message, KillGroup):
            self._kill_group(message.group)
        elif isinstance(message, SignalWorkers):
            for pid in self._living(message.group):
                signal_process(pid, message.signum)
        elif isinstance(message, DumpStacks):
            self._ask_for_stacks(message.group)
        elif isinstance(message, Quit):
            self._quit = True
        else:
            raise ValueError(f"{sender!r} sent {type(message).__name__}, which the host does not take")

    def _pass_to_workers(self, message: ForWorker) -> None:
        group = self._groups.get(message.group)
        if group is None:
            return
        ranks = list(group.pids) if message.rank is None else [message.rank]
        if isinstance(message, Call):
            group.awaited.update(ranks)
        for rank in ranks:
            self._router.send(worker_name(message.group, rank).encode(), message)

    def _pass_to_driver(self, message: FromWorker) -> None:
        group = self._groups.get(message.group)
        if group is None or isinstance(message, Hello):
            return
        if isinstance(message, Beat) and not group.active:
            return
        if isinstance(message, WorkerReady):
            self._learn_modules(message.modules)
        if isinstance(message, WorkerReady | Reply | Failure):
            group.awaited.discard(message.rank)
            self._forward_output(group, flush=True)  # what was printed before comes before
        if isinstance(message, WorkerReady) and not group.awaited:
            self._paths.spec(message.group).unlink(missing_ok=True)  # every rank has read it
        self._to_driver(message)

    def _learn_modules(self, modules: list[str]) -> None:
        new = [m for m in modules if m.split(".")[0] in PRELOADABLE and m not in self._preloaded]
        if new:
            self._preloaded.update(new)
            self._starter.preload(new)

    # Groups

    def _start_group(self, message: StartGroup) -> None:
        group = new_group(message, self._paths)
        self._groups[message.group] = group
        try:
            private_directory(Path(message.log_dir))
            spec_path = self._paths.spec(message.group)
            with open(os.open(spec_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(message.blob)
            for stream in ("stdout", "stderr"):
                group.tails[stream] = LogTail(RankPaths.of(message.log_dir, 0).stream(stream))
            for rank in range(message.world_size):
                self._start_child(child_spec(group, rank, self._paths))
        except OSError as error:  # no space, or no more processes: other groups go on
            self._to_driver(GroupFailed(group=message.group, text=str(error)))

    def _start_child(self, spec: ChildSpec) -> None:
        if self._waiting is not None:
            self._waiting.append(spec)
        else:
            (self._exec_starter or self._starter).start(spec)

    def _living(self, name: str) -> list[int]:
        group = self._groups.get(name)
        return list(group.pids.values()) if group is not None else []

    def _kill_group(self, name: str) -> None:
        group = self._groups.get(name)
        if group is None:
            self._to_driver(GroupGone(group=name))
            return
        group.killed = True
        if self._waiting is not None:
            self._waiting = [spec for spec in self._waiting if spec["key"].rsplit("/", 1)[0] != name]
            group.unborn.clear()
        for pid in group.pids.values():
            kill_session(pid)
        self._forget_if_gone(name, group)

    def _forget_if_gone(self, name: str, group: Group) -> None:
        if group.pids or group.unborn:
            return
        self._saving.write_if_due(group)
        if group.snapshots is not None:
            if group.snapshots.writing:
                return
            group.snapshots.close()
        self._forward_output(group, flush=True)
        for tail in group.tails.values():
            tail.close()
        del self._groups[name]
        self._paths.forget(name)
        self._to_driver(GroupGone(group=name))

    # Starter events

    def _on_starter_event(self, event: StarterEvent) -> None:
        if isinstance(event, StarterReady):
            self._on_starter_ready(event)
        elif isinstance(event, StarterFailed):
            self._on_starter_failed(event)
        elif isinstance(event, ChildStarted):
            self._on_child_started(event)
        else:
            # A moment later: what the worker said last may still be on its way.
            self._exits.append((time.monotonic() + EXIT_SETTLE_S, event))

    def _on_starter_ready(self, event: StarterReady) -> None:
        if event.threads > 1 and self._exec_starter is None:
            self._exec_starter = ExecStarter()  # a fork would copy one thread and the others' locks
        waiting, self._waiting = self._waiting or [], None
        for spec in waiting:
            self._start_child(spec)
        self._to_driver(EngineReady(host_pid=os.getpid(), spawner_pid=event.pid, import_s=event.import_s))

    def _on_starter_failed(self, event: StarterFailed) -> None:
        for group in self._groups.values():
            # The kernel ends workers with the spawner; their ids may soon be somebody else's.
            self._kill_and_forget(group)
        self._exec_starter = ExecStarter()
        self._saving.begin_again(self._groups.values())
        self._saving.finish(self._groups.values(), self._turn_at_end)
        self._groups.clear()
        self._to_driver(EngineFailed(text=event.text))

    # Snapshots

    def _to_rank(self, name: str, rank: int, message: Message) -> None:
        self._router.send(worker_name(name, rank).encode(), message)

    def _turn_at_end(self) -> None:
        """Waits a moment for writers to end; what else is said comes from ranks that were killed, or a driver that is gone."""
        noted, self._exits = self._exits, []
        for _, exited in noted:
            self._on_child_exited(exited)
        starters = [s for s in (self._starter, self._exec_starter) if s is not None]
        self._router.wait([fd for starter in starters for fd in starter.fds()], EXIT_SETTLE_S)
        while self._router.receive() is not None:
            pass
        for starter in starters:
            for event in starter.events():
                if isinstance(event, ChildStarted):
                    self._on_child_started(event)
                elif isinstance(event, ChildExited):
                    self._on_child_exited(event)
                elif isinstance(event, StarterFailed):
                    self._exec_starter = self._exec_starter or ExecStarter()
                    self._saving.begin_again(self._groups.values())

    def _take_exits(self) -> None:
        now = time.monotonic()
        due = [event for when, event in self._exits if when <= now]
        self._exits = [(when, event) for when, event in self._exits if when > now]
        for event in due:
            self._on_child_exited(event)

    def _on_child_started(self, event: ChildStarted) -> None:
        name, rank_text = event.key.rsplit("/", 1)
        group = self._groups[name]
        if rank_text == WRITER:
            group.writer_pid = event.pid
            return
        rank = int(rank_text)
        group.unborn.discard(rank)
        group.pids[rank] = event.pid
        if group.killed:
            kill_session(event.pid)
        self._to_driver(WorkerStarted(group=name, rank=rank, pid=event.pid))

    def _on_child_exited(self, event: ChildExited) -> None:
        for name, group in list(self._groups.items()):
            if event.pid == group.writer_pid:
                self._saving.on_writer_exited(group)
                self._forget_if_gone(name, group)
                return
            rank = group.rank_of(event.pid)
            if rank is None:
                continue
            kill_process_group(event.pid)  # what the worker had started goes with it
            del group.pids[rank]
            group.awaited.discard(rank)
            self._forward_output(group, flush=True)
            tail = last_text(RankPaths.of(group.spec.log_dir, rank).stream("stderr"))
            self._to_driver(
                WorkerExited(
                    group=name,
                    rank=rank,
                    pid=event.pid,
                    exit_code=event.exit_code,
                    max_rss_bytes=event.max_rss_bytes,
                    stderr_tail=tail,
                )
            )
            self._forget_if_gone(name, group)

    def _kill_and_forget(self, group: Group) -> None:
        group.killed = True
        for pid in group.pids.values():
            kill_session(pid)
        group.pids.clear()
        group.unborn.clear()

    # Output and stacks

    def _forward_output(self, group: Group, flush: bool = False) -> None:
        for stream, tail in group.tails.items():
            text = tail.new_text(flush)
            if text:
                self._to_driver(Output(group=group.spec.group, rank=0, stream=stream, text=text))

    def _ask_for_stacks(self, name: str) -> None:
        group = self._groups.get(name)
        if group is None or STACK_DUMP_SIGNAL is None:
            return
        for pid in group.pids.values():
            signal_process(pid, STACK_DUMP_SIGNAL)
        group.stacks_due = time.monotonic() + STACK_DUMP_WAIT_S

    def _send_stacks(self, group: Group) -> None:
        group.stacks_due = None
        for rank in group.pids:
            text = last_text(RankPaths.of(group.spec.log_dir, rank).stacks)
            self._to_driver(Stacks(group=group.spec.group, rank=rank, text=text))

    # The end

    def _end_everything(self) -> None:
        for group in self._groups.values():
            self._kill_and_forget(group)
        self._saving.finish(self._groups.values(), self._turn_at_end)
        for starter in (self._starter, self._exec_starter):
            if starter is not None:
                starter.close()
        self._router.close()
        self._paths.remove()


def main(arguments: list[str]) -> None:
    """Runs the host.

    Args:
        arguments: private directory, pid of the driver, start method. Standard input is a pipe that the driver holds open.
    """
    root, driver_pid, start_method = arguments
    settle_signals()
    paths = EnginePaths(Path(root))
    try:
        Host(paths, int(driver_pid), sys.stdin.fileno(), start_method).run()
    finally:
        paths.remove()


if __name__ == "__main__":
    main(sys.argv[1:])
