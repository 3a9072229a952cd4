"""The rank of this process, under a launcher or with ``use_local``: built here, called here, and saved with the other ranks."""

from __future__ import annotations

import gc
import io
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from torchtrainer.control.messages import CheckpointEnded, Heartbeat, LoaderLost
from torchtrainer.driver.controller import Listener
from torchtrainer.driver.policies import MIN_SAVE_EVERY_S, STEPPING_METHODS, save_interval_s
from torchtrainer.driver.recovery import refetched
from torchtrainer.driver.views import WorkerView
from torchtrainer.engines.base import CallResult, GroupPlan
from torchtrainer.engines.launched_memory import LaunchedMemory
from torchtrainer.engines.spmd_peers import Peers
from torchtrainer.errors import EngineError, InvalidArgumentError, InvalidArgumentTypeError
from torchtrainer.observe.heartbeat import heartbeat
from torchtrainer.preempt.notice import Notice, is_more_urgent
from torchtrainer.train.metrics import PassResult

if TYPE_CHECKING:
    import torch

    from torchtrainer.comm.group import Collective
    from torchtrainer.engines.spmd_agreement import Agreement
    from torchtrainer.engines.spmd_gate import SpmdGate
    from torchtrainer.engines.spmd_saver import GatheringSaver
    from torchtrainer.operator import TrainingOperator
    from torchtrainer.train.refetching import LoaderLoss
    from torchtrainer.worker.executor import Executor

OWN_RESULT_METHODS = frozenset({"get_model", "state_dict", "load_state_dict", "update_scheduler"})
"""Calls whose result is the same on all ranks, or None: each process takes its own."""


class SpmdGroup:
    """The rank of this process, and through collectives the results of the others.

    Args:
        plan: what the rank is built from.
        collective: the processes; where it is this one alone, it carries all ranks of the plan.
        local_rank: place of the rank on its machine.
        listener: of the trainer in this process; that of rank 0 sees the progress of its rank.
        gather: results of the other ranks are wanted.
        one_machine: all processes are on this machine.
        on_end: called when the rank is closed.
    """

    def __init__(
        self,
        plan: GroupPlan,
        collective: Collective,
        *,
        local_rank: int,
        listener: Listener,
        gather: bool,
        one_machine: bool = False,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        import torch

        from torchtrainer.train.progress import Progress
        from torchtrainer.worker.assembly import run_initialization_hook

        self.world_size = collective.world_size if gather else plan.world_size
        self._collective = collective
        self._gather = gather
        self._on_end = on_end
        self._listener = listener
        self._progress = Progress()
        self._progress.on_loader_lost = self._on_loader_lost
        self._save_every_s = plan.save_every_s
        self._saver: GatheringSaver | None = None
        self._agreement: Agreement | None = None
        self._memory = LaunchedMemory(collective) if one_machine and collective.world_size > 1 else None
        device = device_of(plan.gpus, local_rank)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if gather:
            torch.set_num_threads(plan.threads)
        self._threads = plan.threads
        self._device, self._machine = str(device), socket.gethostname()
        with self._threads_of_a_worker():
            run_initialization_hook(plan.spec)
            self._peers = self._find_peers() if gather else None
            self._executor: Executor | None = self._built(plan, collective, device, local_rank)

    @contextmanager
    def _threads_of_a_worker(self) -> Iterator[None]:
        """In the user's process, as many intra-op threads as a worker has, since they decide the last bits; its own afterwards."""
        import torch

        if self._gather:  # the process is the rank's, and whoever sets another number means it
            yield
            return
        before = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            yield
        finally:
            self._threads = torch.get_num_threads()  # the user's code may set another, which a worker would keep
            torch.set_num_threads(before)

    def _find_peers(self) -> Peers:
        from torchtrainer.train.progress import StepMark

        shared = self._memory.paths if self._memory is not None else None
        if shared is None:
            return Peers(self._collective, self._device, None)
        self._progress.mark = StepMark(shared["steps"], self._collective.rank)
        return Peers(self._collective, self._device, shared["steps"])

    def _built(self, plan: GroupPlan, collective: Collective, device: torch.device, local_rank: int) -> Executor:
        from torchtrainer.worker.assembly import build_alone, build_launched

        gate, every_steps = self._gate(plan), plan.checkpoint.every_steps if plan.checkpoint is not None else None
        keeping: dict[str, Any] = {"gate": gate, "saver": self._saver, "every_steps": every_steps}
        if self.world_size > collective.world_size:
            return build_alone(plan.spec, world_size=self.world_size, progress=self._progress, **keeping)
        memory = self._memory
        return build_launched(
            plan.spec,
            collective=collective,
            device=device,
            local_rank=local_rank,
            progress=self._progress,
            memory=memory.paths if memory is not None else None,
            on_wait=memory.watch() if memory is not None else lambda: None,
            **keeping,
        )

    def _gate(self, plan: GroupPlan) -> SpmdGate:
        """The gate of the rank; if states are kept, with what it takes to agree and to save."""
        from torchtrainer.comm.rank_channel import open_channel
        from torchtrainer.engines.spmd_agreement import Agreement
        from torchtrainer.engines.spmd_gate import SpmdGate, StepCounter
        from torchtrainer.engines.spmd_saver import GatheringSaver
        from torchtrainer.train.progress import OpenGate

        if plan.checkpoint is not None:
            self._agreement = Agreement(
                open_channel(self._collective),
                rank=self._collective.rank,
                world_size=self._collective.world_size,
                pause_s=plan.timeouts.pause_s,
                look=lambda: self._listener.on_waiting("this rank trains"),
                save_every_s=self._interval_s,
            )
            gate = self._agreement.gate
            self._saver = GatheringSaver(self._collective, plan.checkpoint, stopping=lambda: gate.stopped)
        self._counter = StepCounter.of_launch(os.environ) if self._gather else None
        return SpmdGate(
            self._progress,
            self._agreement.gate if self._agreement is not None else OpenGate(),
            report=self._report if self._collective.rank == 0 else None,
            every_s=plan.timeouts.progress_s,
            counter=self._counter,
        )

    @property
    def views(self) -> tuple[WorkerView, ...]:
        """This process, and the others of the launch as far as it sees them."""
        own = WorkerView(
            worker=self._collective.rank, ranks=self._ranks, pid=os.getpid(), machine=self._machine, device=self._device
        ).heard(self._heartbeat(self._collective.rank), time.monotonic())
        return (own,) if self._peers is None else self._peers.views(own)

    @property
    def _ranks(self) -> tuple[int, ...]:
        """The ranks of this process."""
        return (self._collective.rank,) if self._gather else tuple(range(self.world_size))

    def local_operator(self) -> TrainingOperator:
        """The operator of this process's rank."""
        assert self._executor is not None
        operator: TrainingOperator = self._executor.operator
        return operator

    # Calls

    def call(self, method: str, **keywords: Any) -> CallResult:
        """Runs a method on this process's rank, and gathers the results of all."""
        assert self._executor is not None
        found, stopped = self._run(method, keywords)
        if method in STEPPING_METHODS and self._collective.rank == 0:
            self._report()
        self._executor.settle(method)
        self._progress.enter("idle")
        snapshot = self._saver.taken if self._saver is not None else 0
        if not self._gather:
            return CallResult(values=list(found.values()), stopped=stopped, snapshot=snapshot)
        value = found[self._collective.rank]
        if method in OWN_RESULT_METHODS:
            return CallResult(values=[value] * self.world_size)
        return CallResult(values=self._gathered(method, value), stopped=stopped, snapshot=snapshot)

    def _run(self, method: str, keywords: Mapping[str, Any]) -> tuple[dict[int, Any], bool]:
        """The results of this process's ranks, and whether they were stopped early."""
        assert self._executor is not None
        with self._threads_of_a_worker():
            return self._run_agreed(self._executor, method, keywords)

    def _run_agreed(self, executor: Executor, method: str, keywords: Mapping[str, Any]) -> tuple[dict[int, Any], bool]:
        if method not in STEPPING_METHODS or self._agreement is None:
            return executor.call(method, **keywords), False
        self._agreement.begin()
        try:
            return executor.call(method, **keywords), self._agreement.gate.stopped
        finally:
            self._agreement.end()
            if self._counter is not None:
                self._counter.show(0)  # what comes now, and validations, take as long as they take

    def _gathered(self, method: str, value: Any) -> list[Any]:
        """Values of all ranks. Peers are not authenticated, so only data travels: no pickle is opened."""
        import torch

        form = value
        if isinstance(value, PassResult):
            form = {"metrics": value.metrics, "weights": value.weights}
        try:
            mine = _as_data(form)
        except Exception as error:
            raise InvalidArgumentTypeError(
                f"{_what_cannot_travel(method, value)} cannot travel between processes that a launcher started: return numbers, "
                "text, tensors, or lists and dicts of them"
            ) from error
        blobs = self._collective.gather_tensors(mine)
        values = [torch.load(io.BytesIO(blob), weights_only=True) for blob in blobs]
        return [PassResult(**v) for v in values] if isinstance(value, PassResult) else values

    @property
    def retryable(self) -> bool:
        """False: this process is a rank itself; who started it starts it again."""
        return False

    def restart(self) -> None:
        """See `retryable`."""
        raise EngineError("the ranks of this run are not started by the trainer: start the script again")

    def resize(self, processes: int) -> None:
        """Raises an error unless nothing changes: the processes are the launcher's, or this one."""
        if processes != self._collective.world_size:
            raise InvalidArgumentError(
                f"resize({processes!r}): this run has {self._collective.world_size} processes, which the trainer did not start "
                "and cannot change"
            )

    def wait_for_all(self) -> None:
        """Waits until every rank is here."""
        self._collective.barrier()

    # Notices and checkpoints

    def stop(self) -> None:
        """Has the running call of all ranks end at the next step boundary, with the state saved; in any thread."""
        if self._agreement is not None:
            self._agreement.wish(stop=True)

    def save(self) -> None:
        """Has the state saved at the next step boundary of the running call; in any thread."""
        if self._agreement is not None:
            self._agreement.wish(stop=False)

    def noticed(self, found: Notice | None) -> Notice | None:
        """The most urgent notice that any rank has; a collective call.

        Args:
            found: by this rank.
        """
        if self._executor is None:  # the trainer was shut down: whoever calls it is told so
            return found
        mine = found and [found.source, found.seconds_left(), found.must_stop, found.text]
        now = time.monotonic()
        best = None
        for told in self._collective.all_gather(mine):
            if told is None:
                continue
            source, left_s, must_stop, text = told
            deadline = None if left_s is None else now + left_s
            one = Notice(source=source, deadline=deadline, must_stop=must_stop, text=text)
            best = one if best is None or is_more_urgent(one, best) else best
        return best

    def await_checkpoint(self, snapshot: int, timeout_s: float) -> CheckpointEnded | None:
        """Waits until a state is on disk, or cannot be; a collective call with one answer. None if it took too long."""
        if self._saver is None:
            return None
        ended = self._saver.finish(timeout_s)
        self._tell_checkpoints()
        return ended if ended is not None and ended.number >= snapshot else None

    def end(self, force: bool = False) -> None:
        """Closes the rank and leaves the group, unless forced together with the other ranks. Idempotent."""
        executor, self._executor = self._executor, None
        if executor is None:
            return
        try:
            self._close(executor, force)
        finally:
            self._on_end()

    def _close(self, executor: Executor, force: bool) -> None:
        if self._agreement is not None:
            self._agreement.close()
        if self._saver is not None:
            self._saver.close()
            self._tell_checkpoints()
        executor.close()
        if not force:
            self._collective.barrier()  # a rank that leaves early would cut off what the others still receive
        self._collective.close()
        if self._peers is not None:
            self._peers.close()
        if self._memory is not None:
            self._memory.close()
        # DDP holds the group in reference cycles. It has to go while the interpreter is whole: its threads give tensors
        # back, and if that happens while Python is dismantled, torch aborts the process.
        del executor
        gc.collect()

    def _interval_s(self) -> float | None:
        """Seconds between two checkpoints, as things are now."""
        if self._save_every_s != "auto":
            return self._save_every_s
        ended = self._saver.ended if self._saver is not None else None
        return MIN_SAVE_EVERY_S if ended is None else save_interval_s(ended.stall_s, ended.seconds)

    def _on_loader_lost(self, loss: LoaderLoss) -> None:
        lost = LoaderLost(group="", worker=self._collective.rank, step=self._progress.step, **asdict(loss))
        self._listener.on_recovered(refetched(lost))

    def _tell_checkpoints(self) -> None:
        for ended in self._saver.news() if self._saver is not None else ():
            self._listener.on_checkpoint(ended)

    def _report(self) -> None:
        """Shows the listener where the rank stands."""
        self._tell_checkpoints()
        self._listener.on_heartbeat(self._heartbeat(worker=0))

    def _heartbeat(self, worker: int) -> Heartbeat:
        return heartbeat(self._progress, group="", worker=worker, call=1, ranks=list(self._ranks))


def _as_data(value: Any) -> bytes:
    """A value as a file that is read without opening a pickle; raises whatever says that it is none."""
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    return buffer.getvalue()


def _what_cannot_travel(method: str, value: Any) -> str:
    """Names the metrics of a pass that are not data, or the kind of another result."""
    if not isinstance(value, PassResult) or not isinstance(value.metrics, Mapping):
        kind = type(value.metrics if isinstance(value, PassResult) else value).__name__
        return f"the {kind} that {method}() returned"
    found = []
    for name, metric in value.metrics.items():
        try:
            _as_data(metric)
        except Exception:  # of pickle, of torch, or of the object: whatever it is, this metric is not data
            found.append(f"{name} ({type(metric).__name__})")
    return f"of the metrics that {method}() returned, {', '.join(found)}"


def device_of(gpus: tuple[int, ...], local_rank: int) -> torch.device:
    """Where a rank trains: on its GPU, if the ranks of its machine have any."""
    import torch

    return torch.device("cuda", gpus[local_rank]) if gpus else torch.device("cpu")
