"""Ranks in the calling process: ``use_local`` (one rank, for debuggers) and spmd (a launcher started the processes)."""

from __future__ import annotations

import gc
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO

from torchtrainer.config import TrainSettings
from torchtrainer.control.messages import Beat
from torchtrainer.driver.controller import Listener
from torchtrainer.driver.policies import STEPPING_METHODS, RankView
from torchtrainer.driver.run_dir import BorrowedRunDirectory, RunDirectory
from torchtrainer.engines.base import CallResult, GroupPlan
from torchtrainer.errors import EngineError, InvalidArgumentTypeError, RunDirectoryError
from torchtrainer.observe.devices import read_process_use
from torchtrainer.process.paths import RankPaths, private_directory
from torchtrainer.topology import Topology, to_environ
from torchtrainer.train.metrics import PassResult

if TYPE_CHECKING:
    import torch

    from torchtrainer.comm.group import Collective, MeetingPlace
    from torchtrainer.train.progress import Progress
    from torchtrainer.worker.runtime import RankRuntime

OWN_RESULT_METHODS = frozenset({"get_model", "state_dict", "load_state_dict", "update_scheduler"})
"""Calls whose result is alike on all ranks, or None: each process takes its own."""


class LocalModeEngine:
    """``use_local=True``: the only rank is the calling process, so that a debugger stops inside the user's code."""

    name = "use_local"

    def start_group(self, plan: GroupPlan, listener: Listener) -> InlineGroup:
        """Builds the rank here."""
        from torchtrainer.comm.group import SingleCollective

        return InlineGroup(plan, SingleCollective(), local_rank=0, listener=listener, gather=False)


class SpmdEngine:
    """Attaches to the processes that torchrun, srun, mpirun or an operator started; every call is collective.

    Args:
        topology: where this process stands.
    """

    name = "spmd"

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        self._place: MeetingPlace | None = None
        self._joined: Collective | None = None
        self._log: TextIO | None = None

    def share_run_dir(
        self,
        open_here: Callable[[], RunDirectory | BorrowedRunDirectory],
        settings: TrainSettings,
        gpus: tuple[int, ...],
    ) -> RunDirectory | BorrowedRunDirectory:
        """Joins the other ranks; rank 0 opens the run's directory and the others learn where it is, or why there is none.

        Raises:
            RunDirectoryError: rank 0 cannot use it; on every rank.
            EngineError: the ranks did not find each other.
        """
        collective = self._join(settings, gpus)
        opened: RunDirectory | BorrowedRunDirectory | None = None
        error: RunDirectoryError | None = None
        if self.topology.rank == 0:
            try:
                opened = open_here()
            except RunDirectoryError as found:
                error = found
        told = collective.all_gather([opened and opened.shown, error and str(error)])[0]
        if opened is not None:
            return opened
        if told[1] is not None:
            self._leave()
            raise error or RunDirectoryError(f"rank 0 says: {told[1]}")
        return BorrowedRunDirectory(told[0])

    def start_group(self, plan: GroupPlan, listener: Listener) -> InlineGroup:
        """Builds this process's rank.

        Only rank 0 prints: standard output of the other ranks goes to their log files from here on, or nowhere if
        nothing is kept.
        """
        collective = self._joined or self._join(plan.settings, plan.gpus)
        if self.topology.rank:
            self._send_stdout_to_log(plan)
        try:
            group = InlineGroup(
                plan,
                collective,
                local_rank=self.topology.local_rank,
                listener=listener if self.topology.rank == 0 else None,
                gather=True,
            )
            self._wait_until_built(collective)
        except BaseException:
            self._leave()
            raise
        self._joined = None  # the group's now
        return group

    def _wait_until_built(self, collective: Collective) -> None:
        try:
            collective.barrier()
        except RuntimeError as error:  # of the backend
            raise EngineError(
                f"rank {self.topology.rank} is built, but another of the {self.topology.world_size} ranks ended before it "
                f"was: look for that rank's own error. torch says: {error}"
            ) from error

    def _join(self, settings: TrainSettings, gpus: tuple[int, ...]) -> Collective:
        from torchtrainer.comm.group import MeetingPlace, join_group

        self._leave()
        self._place = self._place or MeetingPlace(self.topology)
        with _gloo_on_loopback(self.topology):
            self._joined = join_group(
                self.topology,
                backend=settings.backend,
                timeout_s=settings.timeout_s,
                device=_device(gpus, self.topology.local_rank),
                place=self._place,
            )
        return self._joined

    def _leave(self) -> None:
        joined, self._joined = self._joined, None
        if joined is not None:
            joined.close()

    def _send_stdout_to_log(self, plan: GroupPlan) -> None:
        path = os.devnull
        if plan.logs_stay:
            paths = RankPaths.of(plan.log_dir, self.topology.rank)
            private_directory(paths.root)
            path = str(paths.stream("stdout"))
        sys.stdout.flush()
        if self._log is not None:
            self._log.close()
        self._log = open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", buffering=1)  # noqa: SIM115
        sys.stdout = self._log


_attached: list[SpmdEngine] = []
"""The engine of this launch, made when first needed: the ranks meet for a second trainer where they met for the first."""


def spmd_engine(topology: Topology) -> SpmdEngine:
    """The engine that all trainers of this process use while its place in the launch stays the same."""
    if not _attached or _attached[0].topology != topology:
        _attached[:] = [SpmdEngine(topology)]
    return _attached[0]


class ReportingGate:
    """Never stops a pass; shows the listener every now and then, and at the end, where the rank stands.

    Args:
        progress: of this process's rank.
        listener: of the trainer in this process.
        every_s: seconds between two reports.
    """

    def __init__(self, progress: Progress, listener: Listener, every_s: float) -> None:
        self._progress = progress
        self._listener = listener
        self._every_s = every_s
        self._due = 0.0

    def stop_requested(self, boundary: int) -> bool:
        """Always False."""
        now = time.monotonic()
        if now >= self._due:
            self.report()
            self._due = now + self._every_s
        return False

    def report(self) -> None:
        """Shows where the rank stands."""
        at = self._progress
        use = read_process_use(os.getpid())
        self._listener.on_beat(
            Beat(
                group="",
                rank=0,
                call=1,
                phase=at.phase,
                phase_age_s=time.monotonic() - at.phase_since,
                epoch=at.epoch,
                step=at.step,
                batch=at.batch,
                batches=at.batches,
                samples=at.samples,
                loss=None if at.loss is None else float(at.loss),
                rss_bytes=(use and use.rss_bytes) or 0,
                cpu_s=use.cpu_s if use else 0.0,
            )
        )


class InlineGroup:
    """The rank of this process, and through collectives the results of the others.

    Args:
        plan: what the rank is built from.
        collective: the ranks.
        local_rank: place of the rank on its machine.
        listener: sees the progress of the rank; None: nobody looks.
        gather: results of the other ranks are wanted.
    """

    def __init__(
        self, plan: GroupPlan, collective: Collective, *, local_rank: int, listener: Listener | None, gather: bool
    ) -> None:
        import torch

        from torchtrainer.train.progress import OpenGate, Progress
        from torchtrainer.worker.runtime import RankRuntime, run_initialization_hook

        self.world_size = collective.world_size
        self._collective = collective
        self._gather = gather
        self._progress = Progress()
        self._gate = None
        if listener is not None:
            self._gate = ReportingGate(self._progress, listener, plan.timeouts.progress_s)
        device = _device(plan.gpus, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if gather:
            torch.set_num_threads(plan.threads)
        run_initialization_hook(plan.spec)
        self._runtime: RankRuntime | None = RankRuntime(
            plan.spec,
            collective=collective,
            device=device,
            local_rank=local_rank,
            progress=self._progress,
            gate=self._gate or OpenGate(),
        )
        self._device = str(device)

    @property
    def views(self) -> tuple[RankView, ...]:
        """This process's rank."""
        at = self._progress
        return (
            RankView(
                rank=self._collective.rank,
                pid=os.getpid(),
                phase=at.phase,
                phase_since=at.phase_since,
                heard_at=time.monotonic(),
                spoke=True,
                step=at.step,
                epoch=at.epoch,
                batch=at.batch,
                device=self._device,
                cpu_s=time.process_time(),
            ),
        )

    @property
    def operator(self) -> Any:
        """The operator of this process's rank."""
        return None if self._runtime is None else self._runtime.operator

    def call(self, method: str, **keywords: Any) -> CallResult:
        """Runs a method on this process's rank, and gathers the results of all."""
        assert self._runtime is not None
        value = getattr(self._runtime, method)(**keywords)
        if self._gate is not None and method in STEPPING_METHODS:
            self._gate.report()
        self._progress.enter("idle")
        if not self._gather:
            return CallResult(values=[value])
        if method in OWN_RESULT_METHODS:
            return CallResult(values=[value] * self.world_size)
        return CallResult(values=self._gathered(method, value))

    def _gathered(self, method: str, value: Any) -> list[Any]:
        """Values of all ranks. Peers are not authenticated, so only data travels: no pickle is opened."""
        import torch

        form = value
        if isinstance(value, PassResult):
            form = {"metrics": value.metrics, "weights": value.weights}
        buffer = io.BytesIO()
        try:
            torch.save(form, buffer)
            torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
        except Exception as error:
            raise InvalidArgumentTypeError(
                f"{method}() returned a {type(value).__name__}, which cannot travel between processes that a launcher "
                "started: return numbers, text, tensors, or lists and dicts of them"
            ) from error
        blobs = self._collective.gather_tensors(buffer.getvalue())
        values = [torch.load(io.BytesIO(blob), weights_only=True) for blob in blobs]
        return [PassResult(**v) for v in values] if isinstance(value, PassResult) else values

    def wait_for_all(self) -> None:
        """Waits until every rank is here."""
        self._collective.barrier()

    def end(self, force: bool = False) -> None:
        """Closes the rank and leaves the group, unless forced together with the other ranks. Idempotent."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.close()
            if not force:
                self._collective.barrier()  # a rank that leaves early would cut off what the others still receive
            self._collective.close()
            # DDP holds the group in reference cycles. It has to go while the interpreter is whole: its threads give tensors
            # back, and if that happens while Python is dismantled, torch aborts the process.
            del runtime
            gc.collect()


def _device(gpus: tuple[int, ...], local_rank: int) -> torch.device:
    import torch

    return torch.device("cuda", gpus[local_rank]) if gpus else torch.device("cpu")


@contextmanager
def _gloo_on_loopback(at: Topology) -> Iterator[None]:
    """On one machine, has Gloo listen on loopback only. It reads the environment, which is as it was afterwards."""
    name = "GLOO_SOCKET_IFNAME"
    wanted = to_environ(at).get(name)
    if wanted is None or name in os.environ:
        yield
        return
    os.environ[name] = wanted
    try:
        yield
    finally:
        del os.environ[name]
