"""How a worker process carries its ranks: through shared memory, several or one, or over a process group as any DDP program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.comm.changing import ChangingCollective
from torchtrainer.comm.exchange import GradientExchange, why_not_shared
from torchtrainer.comm.group import Collective, GroupCollective, SingleCollective
from torchtrainer.config import BATCH_SIZE, TrainSettings
from torchtrainer.control.messages import Join
from torchtrainer.errors import InvalidArgumentError
from torchtrainer.observe.notices import notice, warn
from torchtrainer.operator import TrainingOperator
from torchtrainer.spec import BuildSpec
from torchtrainer.topology import share_of
from torchtrainer.train.cards import CardFile
from torchtrainer.train.components import internals
from torchtrainer.train.equality import make_equal
from torchtrainer.train.group_rank import group_rank_of
from torchtrainer.train.lone import LoneRank
from torchtrainer.train.progress import Progress
from torchtrainer.train.seats import Buffers, bound_reason
from torchtrainer.train.sharding import unknown_kinds
from torchtrainer.train.team import Team
from torchtrainer.train.trained import TrainedParameters
from torchtrainer.worker.crew import Crew, CrewGate
from torchtrainer.worker.runtime import RankRuntime, build_rank
from torchtrainer.worker.team_runtime import LoneRuntime, TeamRuntime

if TYPE_CHECKING:
    from torchtrainer.worker.link import Link
    from torchtrainer.worker.main import WorkerArguments
    from torchtrainer.worker.saver import RegionSaver

NOT_IN_MEMORY = "the gradients of this run do not travel through shared memory"


@dataclass(frozen=True, kw_only=True)
class MemoryPaths:
    """Files in memory that the host holds for a group.

    Attributes:
        gradients: of the exchange.
        cards: of the ranks, by rank, and one more for what all take over from rank 0.
        shared: for the state that one worker shares with another.
        steps: where each worker marks how far it is.
    """

    gradients: str
    cards: list[str]
    shared: str
    steps: str


@dataclass(frozen=True, kw_only=True)
class Seating:
    """The ranks of a process, and what serves them.

    Attributes:
        runtime: serves calls.
        crew: serves changes of who carries what; None: there are none.
        bound: why this process can carry no other rank; empty: it can.
        recovers: the ranks of a lost process can be taken over.
        record: what the ranks said to each other while they were built.
        shared_path: of the state that a worker shares.
    """

    runtime: RankRuntime
    crew: Crew | None = None
    bound: str = NOT_IN_MEMORY
    recovers: bool = False
    record: list[Any] = field(default_factory=list)
    shared_path: str = ""

    def ranks(self) -> list[int]:
        """The ranks that this process carries now."""
        if isinstance(self.runtime, TeamRuntime):
            return self.runtime.team.ranks
        return [self.turn()]

    def turn(self) -> int:
        """The rank whose turn it is."""
        return internals(self.runtime.operator).context.collective.rank

    def settle(self, method: str, value: Any) -> None:
        """To be called when a call has returned."""
        self.runtime.settle(method, value)
        if self.crew is not None:
            self.crew.tell_collectives()
            self.crew.tell_carried()

    def late_result(self, rank: int) -> Any:
        """What the latest call returns for a rank that was taken over after it."""
        return self.runtime.late_result(rank) if isinstance(self.runtime, TeamRuntime) else None

    def begin(self, call: int) -> None:
        """A call begins."""
        if self.crew is not None:
            self.crew.call = call
        if isinstance(self.runtime, TeamRuntime):
            self.runtime.team.call = call

    def join(self, order: Join) -> None:
        """Takes over ranks, with a state that another worker has shared."""
        assert isinstance(self.runtime, TeamRuntime | LoneRuntime)
        assert self.crew is not None
        self.begin(order.call)
        self.runtime.join(self.shared_path, order.number, order.ranks, order.at)
        self.crew.joined(order)


def build_seating(
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
) -> Seating:
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
    return Seating(runtime=_through_group(operator, gate=gate, **keeping))


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
            notice(f"{asked}: {kind} is taken to update each parameter by that parameter's gradient and state alone")
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
            f"gradients go through Gloo, more slowly, and lost workers cannot be recovered in place: {components.no_room}"
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
) -> Seating:
    paths = MemoryPaths(**arguments.memory)
    make_equal(operator, alone=arguments.record is not None)
    carrier = _carrier(operator, paths, arguments.ranks, arguments.world_size, arguments.timeout_s, shared_by)
    crew = Crew(
        group=arguments.group,
        worker=arguments.worker,
        carrier=carrier,
        operator=operator,
        orders=link.orders,
        send=link.send,
        shared_path=paths.shared,
        saver=keeping["saver"],
        hold_s=arguments.hold_s,
    )
    carrier.on_wait = crew.on_wait
    runtime = _runtime_of(operator, carrier, gate=CrewGate(gate, crew, carrier.at_boundary), **keeping)
    record, streaming = changing.record, any(not one.any_world_size for one in internals(operator).loaders.values())
    if not streaming:
        changing.built()
        crew.watch_collectives()
    if isinstance(carrier, LoneRank) and arguments.ranks:
        carrier.at_boundary()
    return Seating(
        runtime=runtime,
        crew=crew,
        bound=bound_reason(operator),
        recovers=not streaming,
        record=record,
        shared_path=paths.shared,
    )


def build_alone(spec: BuildSpec, *, world_size: int, progress: Progress, **arguments: Any) -> RankRuntime:
    """Builds all ranks of a run in this process, for debuggers.

    Args:
        spec: the user's code and options.
        world_size: ranks.
        progress: where the process shows what it is doing.
        arguments: of `RankRuntime`.

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
    carrier = _carrier(operator, None, range(world_size), world_size, spec.settings.timeout_s, 1)
    return _runtime_of(operator, carrier, **arguments)


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
) -> RankRuntime:
    """Builds the rank of a process that a launcher started.

    Args:
        spec: the user's code and options.
        collective: the ranks.
        device: where this rank trains.
        local_rank: place of the rank on its machine.
        progress: where the rank shows what it is doing.
        memory: fields of `MemoryPaths`, if the ranks are on one machine and share some.
        on_wait: called while other ranks are waited for.
        keeping: other arguments of `RankRuntime`.
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
    carrier = _carrier(operator, paths, [rank], world_size, spec.settings.timeout_s, world_size)
    carrier.on_wait = on_wait
    keeping["gate"] = CrewGate(keeping["gate"], None, carrier.at_boundary)
    return _runtime_of(operator, carrier, **keeping)


def _through_group(operator: TrainingOperator, *, gate: Any, **arguments: Any) -> RankRuntime:
    """The calls of a rank whose gradients go through a process group, or that has no other rank beside it."""
    found = group_rank_of(operator)
    if found is not None:
        gate = CrewGate(gate, None, found.at_boundary)
    return RankRuntime(operator, gate=gate, group_rank=found, **arguments)


def _batch_shares(size: Any, world_size: int) -> tuple[int, ...]:
    return tuple(share_of(size, rank, world_size) for rank in range(world_size)) if isinstance(size, int) else ()


def _runtime_of(operator: TrainingOperator, carrier: Team | LoneRank, **arguments: Any) -> RankRuntime:
    if isinstance(carrier, Team):
        return TeamRuntime(operator, carrier, **arguments)
    return LoneRuntime(operator, carrier, **arguments)


def _carrier(
    operator: TrainingOperator,
    paths: MemoryPaths | None,
    ranks: Sequence[int],
    world_size: int,
    timeout_s: float,
    shared_by: int,
) -> Team | LoneRank:
    """What carries the ranks of this process; ``paths``: None if they are all ranks."""
    trained = TrainedParameters(operator)
    internals(operator).weighs = True
    exchange = GradientExchange(
        None if paths is None else paths.gradients,
        world_size=world_size,
        parameters=trained.parameters,
        timeout_s=timeout_s,
        processes=shared_by,
        by_rows=trained.by_rows,
    )
    tensors = Buffers(operator).tensors
    card_paths = [None] * world_size if paths is None else paths.cards
    cards = [CardFile(path, rank=rank, tensors=tensors) for rank, path in enumerate(card_paths)]
    if bound_reason(operator):
        return LoneRank(operator, exchange=exchange, cards=cards, trained=trained)
    return Team(operator, exchange=exchange, cards=cards, trained=trained, ranks=ranks)
