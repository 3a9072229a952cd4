"""torch's elastic agent, with our workers and our main loop.

Rendezvous, rank assignment, events, metrics, watchdog timers and health checks are torch's. What differs: workers are forked
from a preloaded spawner, the loop waits for events instead of sleeping, blocking calls run beside it so that signals are
answered at once, restarts are refilled by progress, and the real error is told.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.metrics.api import put_metric
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.utils.api import macros

from torchtrainer.elastic.endpoint import Reach, UnreachableError
from torchtrainer.elastic.environment import Launch, worker_environment
from torchtrainer.elastic.store import renew_store, static_store
from torchtrainer.elastic.workers import Attempt, Workers
from torchtrainer.launcher.activity import HangDetector, read_step, sample, stacks_of
from torchtrainer.launcher.failure import WorkerEnd, describe, preempted
from torchtrainer.launcher.fork_safety import Program
from torchtrainer.launcher.summary import Summary
from torchtrainer.launcher.watch import Call, ProcessWatch
from torchtrainer.process.oom import OomWatch
from torchtrainer.process.paths import LaunchPaths

WAIT_UNTOLD_S = 5.0
"""How long a launcher waits for other machines before it says so."""
ACTIVITY_CHECK_S = 1.0
"""Time between two checks for hung workers."""


class Preempted(Exception):  # noqa: N818  # not an error: state is saved, and the launch can be started again
    """Workers stopped for a preemption with their state saved."""


@dataclass(frozen=True, kw_only=True)
class AgentOptions:
    """The user's options beyond those in torch's ``WorkerSpec``.

    Attributes:
        program: what the workers run.
        forked: they go on in the spawner's interpreter.
        signals: those that end the launch.
        hang_timeout_s: seconds without progress after which it is a failure; None: never.
        stop_timeout_s: from asking workers to end to killing them.
        closed_membership: no other machine can join, so nobody has to be asked.
        machines: how many there have to be, as the user said it.
        join_limit: how long they are waited for, in words.
        virtual_local_rank: every worker believes to be local rank 0 with one device.
    """

    program: Program
    forked: bool
    signals: Sequence[signal.Signals]
    hang_timeout_s: float | None
    stop_timeout_s: float
    closed_membership: bool
    machines: str
    join_limit: str
    virtual_local_rank: bool


class Agent(LocalElasticAgent):
    """Runs the workers of this machine until they are done.

    Args:
        orders: what to run and how.
        watch: starts processes and hears of their ends and of signals.
        paths: the launcher's private files.
        summary: tells the user.
        reach: of the machine that hosts the rendezvous.
        agent: arguments of torch's agent.
    """

    def __init__(
        self,
        orders: AgentOptions,
        watch: ProcessWatch,
        paths: LaunchPaths,
        summary: Summary,
        reach: Reach,
        **agent: Any,
    ) -> None:
        super().__init__(**agent)
        self._orders = orders
        self._watch = watch
        self._paths = paths
        self._summary = summary
        self._reach = reach
        self._attempt = 0
        self._generation = 0
        self._best_step = 0
        self._hangs: HangDetector | None = None
        self._next_look_s = 0.0
        self._question: Call[int] | None = None
        self._oom = OomWatch()
        self.ends: list[WorkerEnd] = []

    # Starting

    def _rendezvous(self, worker_group: Any) -> None:
        if self._generation:
            renew_store(worker_group.spec.rdzv_handler)
        if self._question is not None:  # torch's handler does one thing at a time
            self._watch.finish(self._question, self._reach.look)
            self._question = None
        began_s, told = time.monotonic(), False

        def meanwhile() -> None:
            nonlocal told
            self._reach.look()
            if not told and time.monotonic() - began_s > WAIT_UNTOLD_S:
                told = True
                self._summary.says(
                    f"waiting for other machines: wanted {self._orders.machines}, {self._orders.join_limit}"
                )

        self._watch.run(lambda: super(Agent, self)._rendezvous(worker_group), meanwhile)

    def _assign_worker_ranks(self, store: Any, group_rank: int, group_world_size: int, spec: Any) -> Any:
        if spec.rdzv_handler.get_backend() == "static" and group_world_size > 1:
            store = static_store(
                spec.rdzv_handler,
                store,
                group_rank,
                group_world_size,
                again=self._generation > 0,
                say=self._summary.says,
            )
        return super()._assign_worker_ranks(store, group_rank, group_world_size, spec)

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        spec = worker_group.spec
        launch = self._launch(worker_group)
        envs = {worker.local_rank: worker_environment(launch, worker) for worker in worker_group.workers}
        self._setup_local_watchdog(envs=envs)
        if hasattr(self, "_setup_healthcheck"):
            self._setup_healthcheck()
        args = {rank: tuple(macros.substitute(list(spec.args), str(rank))) for rank in envs}
        for rank in envs:
            self._paths.progress(rank).unlink(missing_ok=True)
        self._generation += 1  # unlike attempts, it counts the starts that a change of machines caused
        context = Workers(
            Attempt(
                generation=self._generation,
                program=self._orders.program,
                commands={rank: [str(spec.entrypoint), *map(str, args[rank])] for rank in envs},
                default_signals=self._orders.signals,
                forked=self._orders.forked,
                stop_timeout_s=self._orders.stop_timeout_s,
            ),
            self._watch,
            self._paths,
            name=spec.role,
            entrypoint=str(spec.entrypoint),
            args=args,
            envs=envs,
            logs_specs=self._logs_specs,
            log_line_prefixes=self._prefixes(worker_group),
            duplicate_stdout_filters=getattr(spec, "duplicate_stdout_filters", None),
            duplicate_stderr_filters=getattr(spec, "duplicate_stderr_filters", None),
        )
        self._pcontext = context
        context.start()
        self._summary.started(worker_group.workers, self._attempt)
        if self._orders.hang_timeout_s is not None:
            self._hangs = HangDetector(self._orders.hang_timeout_s, time.monotonic())
        return context.pids()

    def _launch(self, worker_group: Any) -> Launch:
        spec = worker_group.spec
        return Launch(
            attempt=self._attempt,
            max_restarts=spec.max_restarts,
            run_id=spec.rdzv_handler.get_run_id(),
            role=spec.role,
            local_world_size=spec.local_world_size,
            group_rank=worker_group.group_rank,
            group_world_size=worker_group.group_world_size,
            master_addr=worker_group.master_addr,
            master_port=worker_group.master_port,
            agent_store=spec.rdzv_handler.use_agent_store,
            virtual_local_rank=self._orders.virtual_local_rank,
            launch_dir=str(self._paths.root),
        )

    def _prefixes(self, worker_group: Any) -> dict[int, str] | None:
        template = self._log_line_prefix_template
        if not template:
            return None
        hostname = os.uname().nodename if hasattr(os, "uname") else ""
        return {
            worker.local_rank: Template(template).safe_substitute(
                role_name=worker_group.spec.role,
                rank=worker.global_rank,
                local_rank=worker.local_rank,
                hostname=hostname,
            )
            for worker in worker_group.workers
        }

    # The loop

    def _invoke_run(self, role: str = "") -> RunResult:
        group = self._worker_group
        spec = group.spec
        self._initialize_workers(group)
        while True:
            self._watch.wait(spec.monitor_interval)
            result: RunResult = self._monitor_workers(group)
            group.state = result.state
            put_metric(f"workers.{spec.role}.remaining_restarts", self._remaining_restarts)
            put_metric(f"workers.{spec.role}.{result.state.name.lower()}", 1)
            if result.state == WorkerState.SUCCEEDED:
                with contextlib.suppress(UnreachableError):  # all is done here
                    self._watch.run(self._exit_barrier, self._reach.look)
                return result
            if result.state in {WorkerState.UNHEALTHY, WorkerState.FAILED}:
                if not self._restart_after_failure(group):
                    group.state = WorkerState.FAILED
                    return result
            elif self._hangs is not None and self._is_hung():
                continue  # its workers were killed: the next look finds them failed
            elif not self._orders.closed_membership and self._do_others_wait(spec.rdzv_handler):
                self._summary.says("a machine joined or left: restarting all workers")
                self._restart_workers(group)

    def _do_others_wait(self, handler: Any) -> bool:
        """Whether machines wait to join.

        The loop goes on until the answer is there: from a host that is cut off none comes, and workers fail meanwhile.
        """
        if self._question is None:
            self._question = self._watch.begin(handler.num_nodes_waiting)
        if not self._question.done:
            return False
        answered, self._question = self._question, None
        return answered.result() > 0

    def _restart_after_failure(self, group: Any) -> bool:
        """Restarts the workers if the budget allows it; keeps what is known of the failure otherwise."""
        context = self._workers()
        ranks = {worker.local_rank: worker.global_rank for worker in group.workers}
        self.ends = context.ends()
        self._stop_workers(group)
        if preempted(self.ends):
            raise Preempted
        report = describe(self.ends, ranks, self._attempt, oom_killed=self._oom.killed())
        self._refill()
        if self._remaining_restarts == 0:
            self._summary.says(report)
            return False
        self._remaining_restarts -= 1
        self._summary.says(
            f"{report}\nrestarting all workers ({self._remaining_restarts} of {self._worker_group.spec.max_restarts} "
            "restarts left)"
        )
        self._summary.failed()
        self._attempt += 1
        self._restart_workers(group)
        return True

    def _refill(self) -> None:
        """Gives back all restarts if the workers got further than ever before: only a loop without progress is stopped."""
        step = max((read_step(self._paths.progress(rank)) for rank in self._workers().pids()), default=0)
        if step > self._best_step:
            self._best_step = step
            self._remaining_restarts = self._worker_group.spec.max_restarts

    def _is_hung(self) -> bool:
        now_s = time.monotonic()
        if now_s < self._next_look_s or self._hangs is None:
            return False
        self._next_look_s = now_s + ACTIVITY_CHECK_S
        samples = {r: sample(pid, self._paths.progress(r)) for r, pid in self._workers().living().items()}
        silent_s = self._hangs.silent_s(samples, now_s)
        if silent_s is None:
            return False
        self._summary.says(
            f"no worker made progress for {silent_s:.0f} s (--hang-timeout {self._orders.hang_timeout_s:g}); "
            f"their stacks follow, then they are stopped\n{self.stacks()}"
        )
        self._workers().kill()
        return True

    def _workers(self) -> Workers:
        context = self._pcontext
        assert isinstance(context, Workers), "workers were started"
        return context

    def stacks(self) -> str:
        """What every living worker of this machine is doing, as Python stacks if available."""
        if self._pcontext is None:
            return "no workers yet: this launcher is waiting for the rendezvous"
        ranks = {worker.local_rank: worker.global_rank for worker in self._worker_group.workers}
        parts = [
            f"rank {ranks.get(rank, '?')} (pid {pid}):\n{stacks_of(pid, self._paths.stacks(self._generation, rank))}"
            for rank, pid in self._workers().living().items()
        ]
        return "\n\n".join(parts) or "no worker is running"

    def print_stacks(self) -> None:
        """Prints the stacks of all workers: the answer to SIGUSR2."""
        self._summary.says(f"stacks of all workers, as asked by SIGUSR2\n{self.stacks()}")

    # Stopping

    def _stop_workers(self, worker_group: Any, **_: Any) -> None:
        self._shutdown()

    def _shutdown(self, death_sig: signal.Signals = signal.SIGTERM, timeout: int | None = None, **_: Any) -> None:
        timeout = int(self._orders.stop_timeout_s) if timeout is None else timeout
        for name in ("_worker_watchdog", "_health_check_server"):
            server = getattr(self, name, None)
            if server is not None:
                server.stop()
                setattr(self, name, None)
        if isinstance(self._pcontext, Workers):
            self._pcontext.close(death_sig, timeout)
            self.ends = self._pcontext.ends()


def raise_signal(signum: signal.Signals) -> None:
    """Raises what torch's agent ends with when a signal came.

    Raises:
        SignalException: always.
    """
    raise SignalException(f"Process {os.getpid()} got signal: {signum}", sigval=signum)
