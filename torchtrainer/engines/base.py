"""What the trainer asks of an engine: a group of ranks that answers calls. `docs/extending.md` says how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from torchtrainer.config import FailureConfig, Timeouts, TrainSettings
from torchtrainer.control.messages import CheckpointEnded
from torchtrainer.driver.controller import Listener
from torchtrainer.driver.views import WorkerView
from torchtrainer.engines.snapshots import CheckpointOrders
from torchtrainer.preempt.notice import Notice
from torchtrainer.spec import BuildSpec
from torchtrainer.topology import Topology

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """Everything needed to start a group.

    Attributes:
        spec: creators and settings, what every rank is built from.
        world_size: ranks.
        threads: intra-op threads per process.
        gpus: GPU index per local rank, empty without GPUs.
        log_dir: where the ranks' output goes.
        logs_stay: whether that directory outlives the run.
        timeouts: deadlines of the engine.
        hang_timeout_s: longest time without progress.
        checkpoint: where and how states are kept; None: nothing is kept.
        save_every_s: seconds between two checkpoints; "auto": as few as cost less than a hundredth; None: only by steps.
        failure: what is done about processes that are lost.
        min_workers: processes below which the ranks wait for new ones.
        environ: variables of the ranks besides those of this process.
    """

    spec: BuildSpec
    world_size: int
    threads: int
    gpus: tuple[int, ...] = ()
    log_dir: str
    logs_stay: bool
    timeouts: Timeouts = field(default_factory=Timeouts)
    hang_timeout_s: float = 1800.0
    checkpoint: CheckpointOrders | None = None
    save_every_s: float | Literal["auto"] | None = None
    failure: FailureConfig | None = None
    min_workers: int = 1
    environ: Mapping[str, str] = field(default_factory=dict)

    @property
    def settings(self) -> TrainSettings:
        """How each rank trains."""
        return self.spec.settings


@dataclass(frozen=True, kw_only=True)
class CallResult:
    """Results of a call, one per rank in rank order.

    Attributes:
        values: what the ranks returned.
        stopped: the pass was ended early.
        snapshot: number of the latest snapshot that was taken; 0: none.
    """

    values: list[Any]
    stopped: bool = False
    snapshot: int = 0


class Group(Protocol):
    """Ranks that exist and take calls. Used from the user's thread."""

    @property
    def world_size(self) -> int:
        """How many ranks there are."""

    @property
    def views(self) -> tuple[WorkerView, ...]:
        """What is known about each rank."""

    def call(self, method: str, **keywords: Any) -> CallResult:
        """Runs a method of `torchtrainer.worker.executor.Executor` on every rank."""

    @property
    def retryable(self) -> bool:
        """Whether the latest error of a call was a loss of processes after which `restart` may help."""

    def restart(self) -> None:
        """Starts the ranks again, as they were at first."""

    def resize(self, processes: int) -> None:
        """Has the ranks carried by so many processes.

        Raises:
            InvalidArgumentError: they cannot be.
        """

    def stop(self) -> None:
        """Has the running call end at the next step boundary, with the state saved; called while it runs."""

    def save(self) -> None:
        """Has the state saved at the next step boundary of the running call; called while it runs."""

    def noticed(self, found: Notice | None) -> Notice | None:
        """The notice that all ranks act upon, between two calls: where they are processes of their own, that of any of them."""

    def await_checkpoint(self, snapshot: int, timeout_s: float) -> CheckpointEnded | None:
        """Waits until a snapshot is on disk, or cannot be; None if it took too long."""

    def local_operator(self) -> TrainingOperator:
        """The operator of the rank that is this process.

        Raises:
            NotAvailableError: all ranks are other processes.
        """

    def wait_for_all(self) -> None:
        """Waits until every process that makes the trainer's calls has made this one; at once where one process makes them."""

    def end(self, force: bool = False) -> None:
        """Ends the ranks. Idempotent."""


class Engine(Protocol):
    """Makes groups.

    Attributes:
        name: by which it is asked for.
        timeouts: its deadlines, for all that waits in a run on it.
        topology: where this process stands in a launch whose processes are the ranks; None: it drives ranks elsewhere.
    """

    name: str
    timeouts: Timeouts
    topology: Topology | None

    def open_run(
        self,
        open_here: Callable[[], T],
        known: Callable[[T], dict[str, Any]],
        borrowed: Callable[[Mapping[str, Any]], T],
        settings: TrainSettings,
        gpus: tuple[int, ...],
    ) -> T:
        """Opens the run once, whichever number of processes make the trainer; the others learn of it.

        Args:
            open_here: opens it in this process.
            known: JSON data on what was opened, for the other processes.
            borrowed: makes of that what the other processes have.
            settings, gpus: of this run.

        Raises:
            TorchTrainerError: what kept any of the processes from it.
        """

    def start_group(self, plan: GroupPlan, listener: Listener) -> Group:
        """Starts ranks and waits until they are built."""
