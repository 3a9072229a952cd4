"""The messages that driver, host and workers exchange.

A worker is a process; it has a number in its group, which no other process ever gets. It carries ranks: one of its own at the
start, others when their processes are lost, none while it is a spare.

What a blob holds is said at each message; the receiver decides whether to open it. How they travel: `torchtrainer.control.wire`.
Long because it is the contract of the processes: most of it says what each message and field means.

    driver --> host --> worker        Call, PrepareStop, StopAt, SetRanks, AdoptRanks, SendState, Join, EndWorker
               host --> worker        SnapshotGrant, SnapshotReleased
    driver --> host                   StartGroup, StartWorker, KillWorker, KillGroup, SignalWorkers, DumpStacks, Quit
    worker --> host                   SnapshotRequest, SnapshotDone
    worker --> host --> driver        WorkerReady, Reply, Failure, Boundary, Paused, StateSent, RanksAdopted, Bound, LoaderLost, Heartbeat, Heard, Logged
    host   --> driver                 EngineFailed, GroupFailed, WorkerStarted, WorkerExited, GroupGone, Output, Stacks,
                                      CheckpointEnded, Logged

What they say to each other when a rank's process is killed in a call and replaced, of two ranks, without heartbeats. The driver's
messages to workers, and theirs to the driver, pass through the host:

    the group starts     host     ──WorkerStarted──> driver     worker 0
                         host     ──WorkerStarted──> driver     worker 1
                         worker 0 ──WorkerReady────> driver
                         worker 1 ──WorkerReady────> driver
    a call               driver   ──Call───────────> worker 0
                         driver   ──Call───────────> worker 1
    worker 1 is killed   host     ──WorkerExited───> driver     worker 1
                         driver   ──AdoptRanks─────> worker 0
                         driver   ──StartWorker────> host       worker 2
                         worker 0 ──RanksAdopted───> driver
    its replacement      host     ──WorkerStarted──> driver     worker 2
                         worker 2 ──WorkerReady────> driver
                         driver   ──PrepareStop────> workers
                         worker 0 ──Boundary───────> driver
                         driver   ──StopAt─────────> workers
                         worker 0 ──Paused─────────> driver
                         driver   ──SendState──────> worker 0
                         worker 0 ──StateSent──────> driver
                         driver   ──Join───────────> worker 2
                         driver   ──SetRanks───────> worker 0
                         worker 2 ──RanksAdopted───> driver
    the call ends        worker 0 ──Reply──────────> driver
                         worker 2 ──Reply──────────> driver
    the group ends       driver   ──EndWorker──────> workers
                         host     ──WorkerExited───> driver     worker 0
                         host     ──WorkerExited───> driver     worker 2
                         host     ──GroupGone──────> driver
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torchtrainer.control.wire import ForWorker, FromWorker, Message

# driver to worker


@dataclass(frozen=True, kw_only=True)
class Call(ForWorker):
    """Run one method of the rank's runtime. ``blob``: cloudpickled keyword arguments."""

    call: int
    method: str
    blob: bytes = b""


@dataclass(frozen=True, kw_only=True)
class PrepareStop(ForWorker):
    """At your next step boundary in this call, say where you are and pause. ``round``: counts such requests in a call."""

    call: int
    round: int


@dataclass(frozen=True, kw_only=True)
class StopAt(ForWorker):
    """At this boundary (batches completed in the call), save the state, end the pass, or pause until `SetRanks`.

    A worker that holds says so by `Paused`, and goes on doing what `AdoptRanks` and `SendState` ask for.
    """

    call: int
    round: int
    boundary: int
    stop: bool
    save: bool
    pause: bool = False


@dataclass(frozen=True, kw_only=True)
class SetRanks(ForWorker):
    """Carry exactly these ranks from now on, and continue; to workers that pause at a boundary, or wait for a call.

    Without ranks a worker leaves the running call, without a reply, and is a spare.
    """

    ranks: list[int]


@dataclass(frozen=True, kw_only=True)
class AdoptRanks(ForWorker):
    """Carry these ranks too, from now on: their process is gone. What it had not done in the call is done by this worker.

    The worker looks at it where it waits for other ranks, at step boundaries and between calls; it replies for these ranks too,
    also if it has replied for its own already. ``call``: the running or latest call.
    """

    call: int
    ranks: list[int]


@dataclass(frozen=True, kw_only=True)
class SendState(ForWorker):
    """Where you wait for other ranks, or for a call, write the state that is alike on all ranks for a worker that joins.

    Attributes:
        number: of the shared state.
        ranks: that the worker will take over, whose records have to fit this state.
    """

    number: int
    ranks: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Join(ForWorker):
    """Take over these ranks, with the state that another worker has shared.

    Attributes:
        number: of the shared state.
        at: where the running call stands, as `StateSent` told it.
        call, method, blob: of the running call, as in `Call`; call 0: none is running, wait for one.
        orders: what the others were told by `StopAt` in this call and may not have come to, its fields. It is with this message
            as the boundary may be passed before another one comes. What is to be saved at ``at`` or before, is.
    """

    number: int
    ranks: list[int]
    at: dict[str, Any]
    call: int = 0
    method: str = ""
    blob: bytes = b""
    orders: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class SnapshotGrant(ForWorker):
    """Whether to take this snapshot; the same for all ranks."""

    number: int
    go: bool


@dataclass(frozen=True, kw_only=True)
class SnapshotReleased(ForWorker):
    """The checkpoint of this snapshot is on disk, or will not be."""

    number: int


@dataclass(frozen=True, kw_only=True)
class EndWorker(ForWorker):
    """No more calls will come: clean up and exit."""


# driver to host


@dataclass(frozen=True, kw_only=True)
class StartGroup(Message):
    """Start one worker process per rank of a machine. ``blob``: the script's state and the pickled `BuildSpec`, for `take_over`.

    Attributes:
        group: name of the new group.
        world_size: ranks, one process each.
        nodes: the ranks of each machine, in the order of their local ranks.
        node_rank: which machine the receiving host is on.
        log_dir: directory for ``rank_<r>/stdout.log`` and the like.
        environ: the complete environment of each worker, before what is set per rank.
        cwd: working directory of the workers.
        sys_path: ``sys.path`` of the workers.
        threads: intra-op threads per process.
        backend: ``gloo`` or ``nccl``.
        timeout_s: longest wait for any collective.
        gpus: GPU index per local rank, empty without GPUs.
        heartbeat_s: seconds between two heartbeats.
        progress_s: seconds between two progress reports of rank 0 during a call.
        checkpoint: where and how states are kept, fields of `CheckpointOrders`; None: nothing is kept.
    """

    group: str
    world_size: int
    nodes: list[list[int]]
    node_rank: int = 0
    log_dir: str
    environ: dict[str, str]
    cwd: str
    sys_path: list[str]
    threads: int
    backend: str
    timeout_s: float
    gpus: list[int] = field(default_factory=list)
    heartbeat_s: float = 1.0
    progress_s: float = 0.1
    pause_s: float = 60.0
    checkpoint: dict[str, Any] | None = None
    blob: bytes = b""

    @property
    def here(self) -> list[int]:
        """The ranks of the machine that the receiving host is on."""
        return self.nodes[self.node_rank]


@dataclass(frozen=True, kw_only=True)
class StartWorker(Message):
    """Start one more process of a group, which carries no rank until it joins; `WorkerReady` follows.

    Attributes:
        worker: its number.
        rank: the rank that it is built like, and beside whose logs it writes.
        record: what the ranks said to each other while the first worker was built, from its `WorkerReady`.
    """

    group: str
    worker: int
    rank: int
    record: list[Any]


@dataclass(frozen=True, kw_only=True)
class KillWorker(Message):
    """End one process of a group now, with everything that it started; `WorkerExited` follows."""

    group: str
    worker: int


@dataclass(frozen=True, kw_only=True)
class KillGroup(Message):
    """End every process of a group now, with everything that these processes started."""

    group: str


@dataclass(frozen=True, kw_only=True)
class SignalWorkers(Message):
    """Send a signal to the worker processes of a group (not to their children)."""

    group: str
    signum: int


@dataclass(frozen=True, kw_only=True)
class DumpStacks(Message):
    """Have every worker of a group write the Python stacks of its threads; each comes back as `Stacks`."""

    group: str


@dataclass(frozen=True, kw_only=True)
class Quit(Message):
    """End every group, and the host."""


# worker to host and driver


@dataclass(frozen=True, kw_only=True)
class Hello(FromWorker):
    """First message of a worker process."""

    pid: int


@dataclass(frozen=True, kw_only=True)
class WorkerReady(FromWorker):
    """The rank is built and waits for calls.

    Attributes:
        device: name of its device.
        facts: what it built: counts of models, optimizers, loaders; under ``bound`` why a process can carry only the rank
            that it was built for, empty if it can carry any number; under ``recovers`` whether a lost worker can be
            replaced while the others keep their memory.
        modules: modules it imported beyond the preloaded ones.
        record: what the ranks said to each other while it was built; only from worker 0.
    """

    device: str
    facts: dict[str, Any]
    modules: list[str]
    record: list[Any] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Reply(FromWorker):
    """A call has returned for one rank.

    Attributes:
        rank: whose result it is.
        call: number of the call.
        form: how ``blob`` is written: ``json``, ``pass`` (JSON of metrics and their weights), ``state`` (by ``torch.save``) or
            ``pickle`` (a value that the user's call returns as an object).
        stopped: the pass was ended at a boundary by `StopAt`.
        snapshot: number of the latest snapshot that was taken; 0: none.
        step, epoch: progress after the call.
    """

    rank: int
    call: int
    form: str
    stopped: bool = False
    snapshot: int = 0
    step: int = 0
    epoch: int = 0
    blob: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Failure(FromWorker):
    """User code, or ours, raised in a worker. ``blob``: the cloudpickled exception, opened on the user's side only.

    Attributes:
        rank: the one that it happened to.
        call: number of the call; 0 while the worker was being built.
        kind: ``error`` or ``exit`` (``SystemExit``).
        type_name, text: of the exception.
        traceback: formatted.
        phase, step: where the rank was.
        exit_code: for ``exit``.
    """

    rank: int
    call: int
    kind: str
    type_name: str
    text: str
    traceback: str
    phase: str
    step: int
    exit_code: int | None = None
    blob: bytes = b""


@dataclass(frozen=True, kw_only=True)
class Boundary(FromWorker):
    """Answer to `PrepareStop`: this rank holds after so many batches of the call."""

    call: int
    round: int
    boundary: int


@dataclass(frozen=True, kw_only=True)
class Paused(FromWorker):
    """This worker holds at the boundary that `StopAt` named."""

    call: int
    boundary: int


@dataclass(frozen=True, kw_only=True)
class RanksAdopted(FromWorker):
    """What a lost worker had left undone is done: all ranks have taken the step in which it was lost, or are past it.

    Attributes:
        ranks: that this worker took over by `AdoptRanks` or `Join`.
        call: in which it happened; 0: between two calls.
        step: optimizer steps completed.
        redone: shares of a step that were computed once more.
    """

    ranks: list[int]
    call: int
    step: int
    redone: int


@dataclass(frozen=True, kw_only=True)
class Bound(FromWorker):
    """It turned out in training that a worker can carry only the rank that it was built for, and cannot be replaced in place.

    Attributes:
        bound: why, as under ``bound`` in `WorkerReady`.
    """

    bound: str


@dataclass(frozen=True, kw_only=True)
class StateSent(FromWorker):
    """Answer to `SendState`: the state is written.

    Attributes:
        number: as it was asked for.
        call: the call that this worker is in; 0: none.
        at: where that call stands; for `Join`.
        step: optimizer steps in the state.
        error: why it cannot be shared; empty if it was.
    """

    number: int
    call: int = 0
    at: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Heard(FromWorker):
    """A signal that warns of a preemption came to this rank's process."""

    signum: int


@dataclass(frozen=True, kw_only=True)
class SnapshotRequest(FromWorker):
    """This worker is ready to copy its share of a snapshot.

    Attributes:
        number: of the snapshot, from 1; all ranks count alike.
        must: wait for a checkpoint that is being written; else leave this one out.
    """

    number: int
    must: bool


@dataclass(frozen=True, kw_only=True)
class SnapshotDone(FromWorker):
    """This worker's share is copied.

    Attributes:
        number: of the snapshot.
        ranks: whose shares it copied.
        meta: for the manifest.
        stall_s: how long training stood still for it.
        error: why it was not copied; empty if it was.
    """

    number: int
    ranks: list[int]
    meta: dict[str, Any]
    stall_s: float
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class LoaderLost(FromWorker):
    """A process of a rank's loader died, and the batch that was wanted has been fetched by new ones.

    Attributes:
        rank: whose loader it is.
        loader: what the loader is for.
        pid, exit_code: of the process; ``-n``: killed by signal ``n``.
        oom: the system killed it for memory.
        step: optimizer steps that were completed.
        seconds: from when it was noticed until the batch was there.
        stack: where it crashed, if it told that.
    """

    rank: int
    loader: str
    pid: int
    exit_code: int
    oom: bool
    step: int
    seconds: float
    stack: str = ""


@dataclass(frozen=True, kw_only=True)
class Heartbeat(FromWorker):
    """Heartbeat and progress of one worker.

    Attributes:
        phase, phase_age_s: what the training thread does, and for how long.
        epoch, step, batch, batches, samples: see `torchtrainer.train.progress.Progress`.
        loss: mean of the latest losses of its ranks; None: they have none.
        rss_bytes: resident memory.
        cpu_s: processor seconds used so far.
        longest_s: the longest of the latest steps, whatever it waited for; 0.0: there were too few to tell.
        spent_s: seconds in each phase since the worker was built.
        ranks: that it carries; progress is shown as the carrier of rank 0 tells it.
    """

    call: int
    phase: str
    phase_age_s: float
    epoch: int
    step: int
    batch: int
    batches: int | None
    samples: int
    loss: float | None
    rss_bytes: int
    cpu_s: float
    longest_s: float = 0.0
    spent_s: dict[str, float] = field(default_factory=dict)
    ranks: list[int] = field(default_factory=list)


# host to driver


@dataclass(frozen=True, kw_only=True)
class CheckpointEnded(Message):
    """A snapshot was written, or could not be.

    Attributes:
        group: worker group.
        number: of the snapshot.
        step, epoch: of the state.
        path: of the checkpoint; empty if there is none.
        stall_s: how long training stood still for it.
        seconds: how long it was written for.
        size_bytes: of the state.
        error: why there is no checkpoint.
        problems: what else the user should know.
    """

    group: str
    number: int
    step: int
    epoch: int = 0
    path: str = ""
    stall_s: float = 0.0
    seconds: float = 0.0
    size_bytes: int = 0
    error: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class EngineFailed(Message):
    """The spawner could not get ready, or was lost and cannot be replaced."""

    text: str


@dataclass(frozen=True, kw_only=True)
class WorkerStarted(FromWorker):
    """The process of a rank exists. ``machine``: the host name of where it runs."""

    pid: int
    machine: str = ""


@dataclass(frozen=True, kw_only=True)
class WorkerExited(FromWorker):
    """The process of a rank is gone.

    Attributes:
        exit_code: status; ``-n``: killed by signal ``n``.
        step: optimizer steps that it had completed.
        max_rss_bytes: peak resident memory.
        stderr_tail: last lines that it wrote to stderr.
        crash: the stack that it crashed in; empty if it did not.
        oom: the system has just killed a process of this control group for memory.
    """

    pid: int
    exit_code: int
    step: int = 0
    oom: bool = False
    max_rss_bytes: int = 0
    stderr_tail: str = ""
    crash: str = ""


@dataclass(frozen=True, kw_only=True)
class GroupFailed(Message):
    """The processes of a group could not be started; other groups continue."""

    group: str
    text: str


@dataclass(frozen=True, kw_only=True)
class GroupGone(Message):
    """No process of the group is left."""

    group: str


@dataclass(frozen=True, kw_only=True)
class Output(FromWorker):
    """Whole lines that a rank wrote to stdout or stderr."""

    stream: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Logged(FromWorker):
    """Something to tell the user, for the driver's logger.

    Attributes:
        rank: the one that the sender was built like; None: it is no worker.
        pid: of the sender.
        level: of `logging`.
    """

    rank: int | None
    pid: int
    level: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Stacks(FromWorker):
    """Python stacks of all threads of a rank."""

    text: str
