"""Worker groups as the host sees them: which processes there are, and what each was started with."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchtrainer.control.messages import StartGroup
from torchtrainer.engines.snapshots import CheckpointOrders, Snapshots
from torchtrainer.process.child import ChildSpec
from torchtrainer.process.logs import LogTail
from torchtrainer.process.paths import EnginePaths
from torchtrainer.topology import WORKER_MARK

WORKER_ENTRY = "torchtrainer.worker.main:main"
WRITER_ENTRY = "torchtrainer.checkpoint.writer:main"
WRITER = "writer"
"""Stands in place of a rank in the name of a writer."""


def worker_name(group: str, rank: int) -> str:
    """Name of a worker on the control channel and towards the starter."""
    return f"{group}/{rank}"


@dataclass
class Group:
    """Processes of one worker group."""

    spec: StartGroup
    pids: dict[int, int] = field(default_factory=dict)
    unborn: set[int] = field(default_factory=set)
    tails: dict[str, LogTail] = field(default_factory=dict)
    awaited: set[int] = field(default_factory=set)
    killed: bool = False
    snapshots: Snapshots | None = None
    writer_pid: int | None = None
    stacks_due: float | None = None

    @property
    def active(self) -> bool:
        """Whether any rank is being built or runs a call; otherwise nobody listens to progress."""
        return bool(self.awaited)

    def rank_of(self, pid: int) -> int | None:
        """Rank carried by a process, None if it is not of this group."""
        return next((rank for rank, known in self.pids.items() if known == pid), None)


def new_group(message: StartGroup, paths: EnginePaths) -> Group:
    """A group of which no process exists yet."""
    ranks = range(message.world_size)
    group = Group(spec=replace(message, blob=b""), unborn=set(ranks), awaited=set(ranks))
    if message.checkpoint is not None:
        orders = CheckpointOrders(**message.checkpoint)
        group.snapshots = Snapshots(orders=orders, world_size=message.world_size, private_dir=paths.root)
    return group


def writer_spec(group: Group, number: int, paths: EnginePaths) -> ChildSpec:
    """What the writer of a snapshot is started with."""
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
    )


def child_spec(group: Group, rank: int, paths: EnginePaths) -> ChildSpec:
    """What the worker of a rank is started with."""
    message = group.spec
    loopback = "lo0" if sys.platform == "darwin" else "lo"
    environ = {
        "GLOO_SOCKET_IFNAME": loopback,  # Gloo's own sockets then listen on loopback only
        "OMP_NUM_THREADS": str(message.threads),
        **message.environ,
        WORKER_MARK: message.group,
        "RANK": str(rank),
        "WORLD_SIZE": str(message.world_size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(message.world_size),
    }
    return ChildSpec(
        key=worker_name(message.group, rank),
        entry=WORKER_ENTRY,
        arguments=_worker_arguments(group, rank, paths),
        environ=environ,
        cwd=message.cwd,
        sys_path=message.sys_path,
        log_dir=message.log_dir,
        rank=rank,
        multiprocessing_dir=str(paths.multiprocessing(message.group)),
    )


def _worker_arguments(group: Group, rank: int, paths: EnginePaths) -> dict[str, Any]:
    """What a worker is told; see `torchtrainer.worker.main.WorkerArguments`."""
    message, snapshots = group.spec, group.snapshots
    return {
        "group": message.group,
        "name": worker_name(message.group, rank),
        "rank": rank,
        "world_size": message.world_size,
        "socket": paths.socket,
        "spec_path": str(paths.spec(message.group)),
        "store_path": str(paths.store(message.group)),
        "log_dir": message.log_dir,
        "threads": message.threads,
        "backend": message.backend,
        "timeout_s": message.timeout_s,
        "gpu": message.gpus[rank] if message.gpus else None,
        "heartbeat_s": message.heartbeat_s,
        "progress_s": message.progress_s,
        "hold_s": message.hold_s,
        "checkpoint": snapshots and {**asdict(snapshots.orders), "region": snapshots.region(rank)},
    }
