"""Ranks in the calling process: ``use_local`` (one rank, for debuggers) and spmd (a launcher started the processes)."""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchtrainer.driver.policies import RankView
from torchtrainer.engines.base import CallResult, GroupPlan
from torchtrainer.errors import InvalidArgumentTypeError
from torchtrainer.process.paths import RankPaths, private_directory
from torchtrainer.topology import Topology, to_environ
from torchtrainer.train.metrics import PassResult

if TYPE_CHECKING:
    from torchtrainer.comm.group import Collective
    from torchtrainer.worker.runtime import RankRuntime

OWN_RESULT_METHODS = frozenset({"get_model", "state_dict", "load_state_dict", "update_scheduler"})
"""Calls whose result is alike on all ranks, or None: each process takes its own."""


class LocalModeEngine:
    """``use_local=True``: the only rank is the calling process, so that a debugger stops inside the user's code."""

    name = "use_local"

    def start_group(self, plan: GroupPlan, listener: object) -> InlineGroup:
        """Builds the rank here."""
        from torchtrainer.comm.group import SingleCollective

        return InlineGroup(plan, SingleCollective(), local_rank=0, gather=False)


class SpmdEngine:
    """Attaches to the processes that torchrun, srun, mpirun or an operator started; every call is collective.

    Args:
        topology: where this process stands.
    """

    name = "spmd"

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    def start_group(self, plan: GroupPlan, listener: object) -> InlineGroup:
        """Joins the group and builds this process's rank.

        Only rank 0 prints: standard output of the other ranks goes to their log files from here on.
        """
        from torchtrainer.comm.group import join_group

        at = self.topology
        if at.rank:
            _send_stdout_to_log(RankPaths.of(plan.log_dir, at.rank))
        with _gloo_on_loopback(at):
            collective = join_group(
                at,
                backend=plan.settings.backend,
                timeout_s=plan.settings.timeout_s,
                device=_device(plan, at.local_rank),
            )
        return InlineGroup(plan, collective, local_rank=at.local_rank, gather=True)


class InlineGroup:
    """The rank of this process, and through collectives the results of the others."""

    def __init__(self, plan: GroupPlan, collective: Collective, *, local_rank: int, gather: bool) -> None:
        import torch

        from torchtrainer.train.progress import OpenGate, Progress
        from torchtrainer.worker.runtime import RankRuntime, run_initialization_hook

        self.world_size = collective.world_size
        self._collective = collective
        self._gather = gather
        self._progress = Progress()
        device = _device(plan, local_rank)
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
            gate=OpenGate(),
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

    def end(self, force: bool = False) -> None:
        """Closes the rank and leaves the group. Idempotent."""
        runtime, self._runtime = self._runtime, None
        if runtime is not None:
            runtime.close()
            self._collective.close()


def _device(plan: GroupPlan, local_rank: int) -> Any:
    import torch

    return torch.device("cuda", plan.gpus[local_rank]) if plan.gpus else torch.device("cpu")


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


def _send_stdout_to_log(paths: RankPaths) -> None:
    private_directory(paths.root)
    log = paths.stream("stdout")
    sys.stdout.flush()
    sys.stdout = open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "w", buffering=1)  # noqa: SIM115
