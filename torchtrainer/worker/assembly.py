"""Puts an executor together: who carries which ranks, and through what their gradients are exchanged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.changing import ChangingCollective
from torchtrainer.comm.group import Collective, GroupCollective, SingleCollective
from torchtrainer.comm.shared_memory import SharedMemoryExchange, why_not_shared
from torchtrainer.config import BATCH_SIZE, TrainSettings
from torchtrainer.errors import InvalidArgumentError
from torchtrainer.observe.notices import notice, warn
from torchtrainer.operator import OperatorContext, TrainingOperator
from torchtrainer.spec import BuildSpec, rank_config
from torchtrainer.topology import share_of
from torchtrainer.train.backward_sync import BackwardSync, sync_through_group
from torchtrainer.train.build import build_operator
from torchtrainer.train.components import internals
from torchtrainer.train.equality import make_equal
from torchtrainer.train.gradient_sync import RecoverableSync
from torchtrainer.train.progress import Progress
from torchtrainer.train.rank_context import Buffers, bound_reason
from torchtrainer.train.records import RecordFile
from torchtrainer.train.sharding import unknown_kinds
from torchtrainer.train.shared_step import SharedStep
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.worker.executor import Executor
from torchtrainer.worker.reassignment import BoundaryGate, Reassignment

if TYPE_CHECKING:
    from torchtrainer.worker.link import Link
    from torchtrainer.worker.main import WorkerArguments
    from torchtrainer.worker.saver import RegionSaver

NOT_IN_MEMORY = "the gradients of this run do not travel through shared memory"


def run_initialization_hook(spec: BuildSpec) -> None:
    """Runs the user's ``initialization_hook``, if there is one; before anything else of the run, for any number of ranks."""
    if spec.initialization_hook is not None:
        spec.initialization_hook()


def build_rank(
    spec: BuildSpec,
    *,
    collective: Collective,
    device: torch.device,
    local_rank: int,
    progress: Progress,
    in_memory: bool = False,
    batch_shares: tuple[int, ...] = (),
) -> TrainingOperator:
    """Builds the operator of a rank.

    Args:
        spec: the user's code and options.
        collective: the ranks of the run.
        device: where this rank trains.
        local_rank: place of the rank on its machine.
        progress: where the rank shows what it is doing.
        in_memory: gradients are to be exchanged through shared memory.
        batch_shares: parts of ``config[BATCH_SIZE]`` by rank, for a process that carries all ranks.
    """
    progress.enter("setup")
    context = OperatorContext(
        config=rank_config(spec.config, rank=collective.rank, world_size=collective.world_size),
        settings=spec.settings,
        device=device,
        collective=collective,
        local_rank=local_rank,
        progress=progress,
        in_memory=in_memory,
        batch_shares=batch_shares,
        say=notice if collective.rank == 0 else None,
    )
    return build_operator(spec, context)


@dataclass(frozen=True, kw_only=True)
class MemoryPaths:
    """Files in memory that the host holds for a group.

    Attributes:
        gradients: of the exchange.
        records: of the ranks, by rank, and one more for what all take over from rank 0.
        shared: for the state that one worker shares with another.
        steps: where each worker marks how far it is.
    """

    gradients: str
    records: list[str]
    shared: str
    steps: str


@dataclass(frozen=True, kw_only=True)
class Assembled:
    """A worker process, built.

    Attributes:
        executor: serves calls.
        reassignment: serves changes of who carries which ranks; None: there are none.
        bound: why this process can carry no other rank; empty: it can.
        recovers: the ranks of a lost process can be taken over.
        record: what the ranks said to each other while they were built.
    """

    executor: Executor
    reassignment: Reassignment | None = None
    bound: str = NOT_IN_MEMORY
    recovers: bool = False
    record: list[Any] = field(default_factory=list)


def build_worker(
    spec: BuildSpec,
    *,
    group: GroupCollective | None,
    arguments: WorkerArguments,
    device: torch.device,
    progress: Progress,
    gate: Any,
    saver: RegionSaver | None,
    link: Link,
    shared_by: int,
) -> Assembled:
    """Builds what a worker process carries.

    Args:
        spec: the user's code and options.
        group: the processes that are built together; None: this one comes later, alone.
        arguments: of this worker.
        device: where it trains.
        progress, gate, saver, link: of this worker.
        shared_by: workers that run on the cores of this one.
    """
    in_memory = arguments.world_size > 1 and _may_go_through_memory(spec.settings, device)
    changing = ChangingCollective(
        rank=arguments.rank,
        world_size=arguments.world_size,
        group=group,
        record=arguments.record,
        waiting=progress.waiting,
    )
    collective: Collective = changing if in_memory else group or SingleCollective()
    operator = build_rank(
        spec,
        collective=collective,
        device=device,
        local_rank=arguments.local_rank,
        progress=progress,
        in_memory=in_memory,
    )
    every_steps = arguments.checkpoint["every_steps"] if arguments.checkpoint is not None else None
    keeping: dict[str, Any] = {"saver": saver, "every_steps": every_steps}
    if in_memory and _goes_through_memory(operator, tells=arguments.rank == 0):
        return _in_memory(operator, changing, arguments, gate, link, keeping, shared_by)
    _say_what_a_loss_means(operator)
    return Assembled(executor=_through_group(operator, gate=gate, **keeping))


def _may_go_through_memory(settings: TrainSettings, device: torch.device) -> bool:
    """Whether gradients go through shared memory if the operator and the machine allow it."""
    asked = settings.strategy == "ddp" and settings.comm_hook is None
    return asked and settings.wrap_ddp and device.type == "cpu" and why_not_shared() is None


def _say_what_a_loss_means(operator: TrainingOperator) -> None:
    """Has rank 0 say that lost workers are not recovered in place, where that is what the user asked for."""
    context, components = internals(operator).context, internals(operator).components
    settings = context.settings
    if context.collective.rank or context.collective.world_size == 1 or components is None:
        return
    if settings.strategy != "ddp":
        asked = f'strategy="{settings.strategy}"'
        notice(f"{asked}: a lost worker means a restart from the newest checkpoint")
        for kind in unknown_kinds(components.optimizers):
            notice(
                f"{asked}: {kind} is assumed to update each parameter from that parameter's gradient and state alone"
            )
    elif settings.comm_hook is not None:
        notice(
            f'comm_hook="{settings.comm_hook}": gradients do not go through shared memory, and a lost worker means a restart '
            "from the newest checkpoint"
        )


def _goes_through_memory(operator: TrainingOperator, *, tells: bool) -> bool:
    """Whether the operator's gradients do; ``tells``: this process says so if there is only no room for it."""
    components = internals(operator).components
    if components is not None and components.no_room and tells:
        warn(
            "gradients go through Gloo, which is slower, and lost workers cannot be recovered in place: "
            f"{components.no_room}"
        )
    return components is not None and components.ours and not components.no_room


def _in_memory(
    operator: TrainingOperator,
    changing: ChangingCollective,
    arguments: WorkerArguments,
    gate: Any,
    link: Link,
    keeping: dict[str, Any],
    shared_by: int,
) -> Assembled:
    paths = MemoryPaths(**arguments.memory)
    make_equal(operator, alone=arguments.record is not None)
    sync = _sync_through_memory(operator, paths, arguments.ranks, arguments.world_size, arguments.timeout_s, shared_by)
    reassignment = Reassignment(
        group=arguments.group,
        worker=arguments.worker,
        sync=sync,
        operator=operator,
        orders=link.orders,
        send=link.send,
        shared_path=paths.shared,
        saver=keeping["saver"],
        pause_s=arguments.pause_s,
    )
    sync.on_wait = reassignment.on_wait
    executor = Executor(operator, sync=sync, gate=BoundaryGate(gate, reassignment, sync.at_boundary), **keeping)
    record, streaming = changing.record, any(not one.any_world_size for one in internals(operator).loaders.values())
    if not streaming:
        changing.built()
        reassignment.watch_collectives()
    if arguments.ranks:
        sync.at_boundary()
    return Assembled(
        executor=executor,
        reassignment=reassignment,
        bound=bound_reason(operator),
        recovers=not streaming,
        record=record,
    )


def build_alone(spec: BuildSpec, *, world_size: int, progress: Progress, **arguments: Any) -> Executor:
    """Builds all ranks of a run in this process, for debuggers.

    Args:
        spec: the user's code and options.
        world_size: ranks.
        progress: where the process shows what it is doing.
        arguments: of `Executor`.

    Raises:
        InvalidArgumentError: the operator cannot share a process with others of its kind.
    """
    if spec.settings.strategy != "ddp" or spec.settings.comm_hook is not None:
        raise InvalidArgumentError(
            f"use_local=True carries {world_size} ranks in one process, between which nothing is divided or sent: strategy="
            f"{spec.settings.strategy!r} and comm_hook={spec.settings.comm_hook!r} need worker processes, or num_workers=1"
        )
    operator = build_rank(
        spec,
        collective=ChangingCollective(rank=0, world_size=world_size, group=None),
        device=torch.device("cpu"),
        local_rank=0,
        progress=progress,
        in_memory=True,
        batch_shares=_batch_shares(spec.config.get(BATCH_SIZE), world_size),
    )
    components, bound = internals(operator).components, bound_reason(operator)
    if components is None or not components.ours:
        bound = "its models are not wrapped by the trainer"
    if bound:
        raise InvalidArgumentError(
            f"use_local=True cannot carry {world_size} ranks in one process: {bound}. Use num_workers=1, or worker processes"
        )
    sync = _sync_through_memory(operator, None, range(world_size), world_size, spec.settings.timeout_s, 1)
    return Executor(operator, sync=sync, **arguments)


def build_launched(
    spec: BuildSpec,
    *,
    collective: Collective,
    device: torch.device,
    local_rank: int,
    progress: Progress,
    memory: dict[str, Any] | None,
    on_wait: Callable[[], None],
    **keeping: Any,
) -> Executor:
    """Builds the rank of a process that a launcher started.

    Args:
        spec: the user's code and options.
        collective: the ranks.
        device: where this rank trains.
        local_rank: place of the rank on its machine.
        progress: where the rank shows what it is doing.
        memory: fields of `MemoryPaths`, if the ranks are on one machine and share some.
        on_wait: called while other ranks are waited for.
        keeping: other arguments of `Executor`.
    """
    in_memory = memory is not None and _may_go_through_memory(spec.settings, device)
    operator = build_rank(
        spec, collective=collective, device=device, local_rank=local_rank, progress=progress, in_memory=in_memory
    )
    if memory is None or not in_memory or not _goes_through_memory(operator, tells=collective.rank == 0):
        _say_what_a_loss_means(operator)
        return _through_group(operator, **keeping)
    paths, rank, world_size = MemoryPaths(**memory), collective.rank, collective.world_size
    make_equal(operator, alone=False)
    sync = _sync_through_memory(operator, paths, [rank], world_size, spec.settings.timeout_s, world_size)
    sync.on_wait = on_wait
    keeping["gate"] = BoundaryGate(keeping["gate"], None, sync.at_boundary)
    return Executor(operator, sync=sync, **keeping)


def _through_group(operator: TrainingOperator, *, gate: Any, **arguments: Any) -> Executor:
    """The executor of a rank whose gradients go through a process group, or that exchanges none."""
    sync = sync_through_group(operator)
    if sync is not None:
        gate = BoundaryGate(gate, None, sync.at_boundary)
    return Executor(operator, gate=gate, sync=sync, **arguments)


def _batch_shares(size: Any, world_size: int) -> tuple[int, ...]:
    return tuple(share_of(size, rank, world_size) for rank in range(world_size)) if isinstance(size, int) else ()


def _sync_through_memory(
    operator: TrainingOperator,
    paths: MemoryPaths | None,
    ranks: Sequence[int],
    world_size: int,
    timeout_s: float,
    shared_by: int,
) -> RecoverableSync:
    """What exchanges the gradients of the ranks of this process; ``paths``: None if they are all ranks."""
    trained = TrainedParameters(operator)
    internals(operator).weighs = True
    exchange = SharedMemoryExchange(
        None if paths is None else paths.gradients,
        world_size=world_size,
        parameters=trained.parameters,
        timeout_s=timeout_s,
        processes=shared_by,
        by_rows=trained.by_rows,
    )
    tensors = Buffers(operator).tensors
    files = [None] * world_size if paths is None else paths.records
    records = [RecordFile(path, rank=rank, tensors=tensors) for rank, path in enumerate(files)]
    if bound_reason(operator):
        return BackwardSync(operator, exchange=exchange, trained=trained, records=records)
    return SharedStep(operator, exchange=exchange, trained=trained, records=records, ranks=ranks)
