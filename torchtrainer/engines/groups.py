"""Worker groups as the host sees them: which processes there are, and what each was started with."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torchtrainer.control.messages import StartGroup
from torchtrainer.engines.memory_files import SharedMemory
from torchtrainer.engines.snapshots import CheckpointOrders, Snapshots
from torchtrainer.process.child import ChildSpec
from torchtrainer.process.guard import kill_session
from torchtrainer.process.logs import LogTail, size_of
from torchtrainer.process.paths import EnginePaths, RankPaths, private_directory
from torchtrainer.process.signals import STOP_SIGNALS
from torchtrainer.script.take_over import SCRIPT_FILE
from torchtrainer.topology import WORKER_MARK, gloo_interface

WORKER_ENTRY = "torchtrainer.worker.main:main"
WRITER_ENTRY = "torchtrainer.checkpoint.writer:main"
WRITER = "writer"
"""Stands for the rank in the name of a writer."""


def worker_name(group: str, worker: int) -> str:
    """Name of a worker on the control channel and towards the starter."""
    return f"{group}/{worker}"


@dataclass
class HostGroup:
    """Processes of one worker group, by their numbers.

    Attributes:
        spec: what it was started with.
        pids: of the processes that exist.
        unborn: those that were asked for.
        unwanted: those that are to end as soon as they exist.
        like: the rank that each process is built for.
        tails: of what rank 0 writes.
        logged: by process, the bytes that its rank's ``stderr``, stacks and crashes had when it was started.
        awaited: those that are being built or run a call.
        killed: all of them are to end.
        memory: files in memory that the workers share.
        snapshots: of their states.
        writer_pid: of the process that writes a checkpoint.
        stacks_due: when stacks that were asked for are to be read.
    """

    spec: StartGroup
    memory: SharedMemory
    pids: dict[int, int] = field(default_factory=dict)
    unborn: set[int] = field(default_factory=set)
    unwanted: set[int] = field(default_factory=set)
    like: dict[int, int] = field(default_factory=dict)
    tails: dict[str, LogTail] = field(default_factory=dict)
    logged: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    awaited: set[int] = field(default_factory=set)
    killed: bool = False
    snapshots: Snapshots | None = None
    writer_pid: int | None = None
    stacks_due: float | None = None

    @property
    def active(self) -> bool:
        """Whether any rank is being built or runs a call; otherwise nobody listens to progress."""
        return bool(self.awaited)

    def worker_of(self, pid: int) -> int | None:
        """Number of a process, None if it is not of this group."""
        return next((worker for worker, known in self.pids.items() if known == pid), None)

    def open_files(self, blob: bytes, paths: EnginePaths) -> None:
        """Writes what the workers are built from, and begins to follow what rank 0 writes, if it is one of them.

        Raises:
            OSError: there is no space.
        """
        private_directory(Path(self.spec.log_dir))
        with open(os.open(paths.spec(self.spec.group), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(blob)
        for stream in ("stdout", "stderr") if 0 in self.spec.here else ():
            log = RankPaths.of(self.spec.log_dir, 0).stream(stream)
            self.tails[stream] = LogTail(log, start=size_of(log))
        for rank in self.spec.here:
            self.note_logs(rank)

    def note_logs(self, worker: int) -> None:
        """Remembers what is in the logs that a process is about to write to: an earlier one has said that."""
        paths = RankPaths.of(self.spec.log_dir, self.like[worker])
        self.logged[worker] = size_of(paths.stream("stderr")), size_of(paths.stacks), size_of(paths.crash)

    def kill(self) -> None:
        """Kills every process, and waits for none."""
        self.killed = True
        for pid in self.pids.values():
            kill_session(pid)
        self.pids.clear()
        self.unborn.clear()

    def close(self) -> None:
        """Gives the memory back."""
        self.memory.close()
        if self.snapshots is not None:
            self.snapshots.close()


def new_group(message: StartGroup, paths: EnginePaths) -> HostGroup:
    """A group of which no process exists yet."""
    ranks = message.here
    memory = SharedMemory.of(message.world_size, paths.root)
    group = HostGroup(
        spec=replace(message, blob=b""),
        memory=memory,
        unborn=set(ranks),
        awaited=set(ranks),
        like={rank: rank for rank in ranks},
    )
    if message.checkpoint is not None:
        orders = CheckpointOrders(**message.checkpoint)
        group.snapshots = Snapshots(orders=orders, world_size=message.world_size, private_dir=paths.root)
    return group


def writer_spec(group: HostGroup, number: int, paths: EnginePaths) -> ChildSpec:
    """The specification of the process that writes a snapshot."""
    message, snapshots = group.spec, group.snapshots
    assert snapshots is not None
    return ChildSpec(
        key=f"{message.group}/{WRITER}",
        entry=WRITER_ENTRY,
        arguments=snapshots.writer_arguments(number, paths.written(message.group)),
        environ={**message.environ, WORKER_MARK: message.group},
        cwd=message.cwd,
        sys_path=message.sys_path,
        log_dir=str(paths.writer_logs(message.group)),
        rank=0,
        multiprocessing_dir=str(paths.multiprocessing(message.group)),
        ignored_signals=list(STOP_SIGNALS),  # it saves because somebody wants the processes to stop
    )


def child_spec(group: HostGroup, worker: int, paths: EnginePaths, record: list[Any] | None = None) -> ChildSpec:
    """The specification of a worker process.

    Args:
        group: it belongs to.
        worker: its number.
        paths: of the host.
        record: what it is built with if it comes later than the others.
    """
    message, rank = group.spec, group.like[worker]
    environ = {
        **gloo_interface(one_machine=len(message.nodes) == 1),
        "OMP_NUM_THREADS": str(message.threads),
        **message.environ,
        WORKER_MARK: message.group,
        SCRIPT_FILE: str(paths.spec(message.group)),
        "RANK": str(rank),
        "WORLD_SIZE": str(message.world_size),
        "LOCAL_RANK": str(message.here.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(message.here)),
        "GROUP_RANK": str(message.node_rank),
        "GROUP_WORLD_SIZE": str(len(message.nodes)),
    }
    arguments = _worker_arguments(group, worker, paths, record)
    return ChildSpec(
        key=worker_name(message.group, worker),
        entry=WORKER_ENTRY,
        arguments=arguments,
        environ=environ,
        cwd=message.cwd,
        sys_path=message.sys_path,
        log_dir=message.log_dir,
        rank=rank,
        multiprocessing_dir=str(paths.multiprocessing(message.group)),
        # Until the worker hears them: user code of its creators may not be interrupted by them.
        ignored_signals=["SIGINT", *(arguments["checkpoint"] or {}).get("signals", ())],
    )


def _worker_arguments(group: HostGroup, worker: int, paths: EnginePaths, record: list[Any] | None) -> dict[str, Any]:
    """A worker's arguments; see `torchtrainer.worker.main.WorkerArguments`."""
    message, snapshots, rank = group.spec, group.snapshots, group.like[worker]
    local_rank = message.here.index(rank)
    store = paths.store(message.group)
    return {
        "group": message.group,
        "name": worker_name(message.group, worker),
        "worker": worker,
        "rank": rank,
        "ranks": [rank] if record is None else [],
        "world_size": message.world_size,
        "local_rank": local_rank,
        "local_world_size": len(message.here),
        "endpoint": paths.endpoint,
        "spec_path": str(paths.spec(message.group)),
        "store_path": str(store if record is None else store.with_name(f"{store.name}-{worker}")),
        "log_dir": message.log_dir,
        "threads": message.threads,
        "backend": message.backend,
        "timeout_s": message.timeout_s,
        "gpu": message.gpus[local_rank] if message.gpus else None,
        "heartbeat_s": message.heartbeat_s,
        "progress_s": message.progress_s,
        "pause_s": message.pause_s,
        "memory": group.memory.paths(),
        "record": record,
        "checkpoint": snapshots and {**asdict(snapshots.orders), "regions": snapshots.regions},
    }
