"""Turns the trainer's arguments into what a run is started from: checked, with every "auto" decided."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtrainer.arguments import (
    check_batch_size,
    check_counts,
    check_creators,
    check_engine,
    check_options,
    decide_gpus,
    decide_threads,
    settings_from,
)
from torchtrainer.config import CheckpointConfig, FailureConfig, PreemptionConfig, TrainSettings
from torchtrainer.driver.run_record import in_notebook, reached_by
from torchtrainer.engines.base import Engine, GroupPlan
from torchtrainer.engines.registry import engine_called
from torchtrainer.engines.snapshots import CheckpointOrders
from torchtrainer.engines.spmd import LocalModeEngine
from torchtrainer.errors import InvalidArgumentError, ResumeError
from torchtrainer.observe.devices import gpu_count
from torchtrainer.observe.notices import notice, notice_once, warn
from torchtrainer.preempt.watch import NoticeWatch
from torchtrainer.process.cgroups import usable_cores
from torchtrainer.process.paths import private_directory
from torchtrainer.resume import OpenRun, borrowed, known, open_run
from torchtrainer.spec import BuildSpec
from torchtrainer.topology import WORKER_MARK, Topology
from torchtrainer.topology import current as current_topology

CREATORS = (
    "model_creator",
    "data_creator",
    "optimizer_creator",
    "loss_creator",
    "scheduler_creator",
    "initialization_hook",
)
COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Environment variable for the cache of torch's compiler; a user's own choice stays."""
AS_GIVEN = (
    "seed",
    "compile",
    "memory_format",
    "accumulate",
    "fused",
    "strategy",
    "comm_hook",
    "cpu_affinity",
    "wrap_ddp",
    "add_dist_sampler",
    "even_batches",
    "min_batch_size",
    "use_tqdm",
    "timeout_s",
)
"""Arguments that become settings of the ranks unchanged."""
OPTIONS: dict[str, Callable[[], Any]] = {
    "config": dict,
    "failure": FailureConfig,
    "checkpoint": CheckpointConfig,
    "preemption": PreemptionConfig,
}
"""What stands for None."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything needed to start a run.

    Attributes:
        spec: what every rank is built from.
        engine: where the ranks live.
        world_size: ranks.
        threads: intra-op threads per process.
        gpus: GPU index per local rank, empty without GPUs.
        hang_timeout_s: longest time without progress.
        is_main: this process speaks for the run: it is the driver, or rank 0 of a launch.
        watches_machine: of the processes of this machine, this one asks whether the machine will be taken away.
        checkpoint, preemption, failure, min_workers: the user's options.
    """

    spec: BuildSpec
    engine: Engine
    world_size: int
    threads: int
    gpus: tuple[int, ...]
    hang_timeout_s: float
    is_main: bool
    watches_machine: bool
    checkpoint: CheckpointConfig
    preemption: PreemptionConfig
    failure: FailureConfig
    min_workers: int

    def for_group(
        self, *, log_dir: str, logs_stay: bool, orders: CheckpointOrders | None, compiled: str | None
    ) -> GroupPlan:
        """The plan from which an engine starts the ranks.

        Args:
            log_dir: where the ranks' output goes.
            logs_stay: whether that directory outlives the run.
            orders: where and how states are kept.
            compiled: where compiled models are kept; None: where torch keeps them.

        Raises:
            OSError: the directory for compiled models cannot be made.
        """
        keeps = self.spec.settings.compile and compiled is not None and not _has_compile_cache(os.environ)
        if keeps:
            private_directory(
                Path(str(compiled))
            )  # torch would make one that others may write to, if the umask lets it
        return GroupPlan(
            spec=self.spec,
            world_size=self.world_size,
            threads=self.threads,
            gpus=self.gpus,
            log_dir=log_dir,
            logs_stay=logs_stay,
            timeouts=self.engine.timeouts,
            hang_timeout_s=self.hang_timeout_s,
            checkpoint=orders,
            save_every_s=self.checkpoint.every_seconds,
            failure=self.failure,
            min_workers=self.min_workers,
            environ={COMPILE_CACHE: str(compiled)} if keeps else {},
        )

    def open_run(
        self,
        run_dir: str | os.PathLike[str] | None,
        resume: bool | str,
        *,
        callbacks: Sequence[object],
        may_change: Sequence[str],
    ) -> OpenRun:
        """Opens the directory of the run; under a launcher rank 0 does so, and the other ranks learn what it found.

        Raises:
            RunDirectoryError: it cannot be used.
            ResumeError: there is nothing to continue with that fits.
        """

        def open_here() -> OpenRun:
            opened = open_run(
                run_dir,
                resume=resume,
                config=self.checkpoint,
                reached=reached_by(self.spec, callbacks),
                world_size=self.world_size,
                may_change=may_change,
            )
            self._check_preemptions(opened)
            return opened

        return self.engine.open_run(open_here, known, borrowed, self.spec.settings, self.gpus)

    def watch_notices(self, opened: OpenRun) -> NoticeWatch | None:
        """Begins to watch for warnings of a preemption; None for a run that keeps nothing, which could not be saved.

        In a notebook signals are left alone: they are the kernel's.
        """
        if opened.checkpoints is None:
            return None
        config = replace(self.preemption, signals=()) if in_notebook() else self.preemption
        notices = NoticeWatch(config, os.environ, metadata=self.watches_machine, say=warn)
        notices.start()
        return notices

    def _check_preemptions(self, opened: OpenRun) -> None:
        record, allowed = opened.record, self.failure.max_preemptions
        if record is not None and allowed is not None and record.preemptions > allowed:
            opened.directory.close()
            raise ResumeError(
                f"the run in {opened.directory.root} was preempted {record.preemptions} times in a row at step "
                f"{record.preempted_at}, without a step of progress; FailureConfig.max_preemptions allows {allowed}. Give it "
                "machines that stay longer, or pass a larger max_preemptions"
            )


def _has_compile_cache(environ: Mapping[str, str]) -> bool:
    """Whether the user chose where compiled models are kept; torch puts its own choice into the environment, too."""
    chosen = environ.get(COMPILE_CACHE, "")
    of_torch = f"{tempfile.gettempdir()}{os.sep}torchinductor_"
    return bool(chosen) and not chosen.startswith(of_torch)


def plan_run(given: Mapping[str, Any]) -> RunPlan:
    """Checks the arguments of `TorchTrainer` and decides what they leave open.

    Args:
        given: every argument by its name.

    Raises:
        InvalidArgumentError, InvalidArgumentTypeError: an argument that cannot work.
        NotAvailableError: something that this version does not have.
    """
    if WORKER_MARK in os.environ:
        raise InvalidArgumentError(
            "a TorchTrainer was made inside a worker process of another one, by a module that the workers import. Make "
            "it in the script itself, or below if __name__ == '__main__'"
        )
    creators = {name: given[name] for name in CREATORS}
    given = {**given, **{name: make() for name, make in OPTIONS.items() if given[name] is None}}
    config, failure = given["config"], given["failure"]
    check_creators(creators, given["training_operator_cls"])
    check_counts(given["num_workers"], given["min_workers"], config)
    engine = _engine_for(given["engine"], use_local=given["use_local"])
    topology = engine.topology
    world_size = topology.world_size if topology else given["num_workers"]
    check_options(
        resume=given["resume"],
        checkpoint=given["checkpoint"],
        preemption=given["preemption"],
        failure=failure,
    )
    check_batch_size(config, world_size)
    local_ranks = topology.local_world_size if topology else world_size
    gpus = decide_gpus(given["use_gpu"], local_ranks, gpu_count(os.environ) if given["use_gpu"] else 0)
    settings = _settings(given, use_gpu=bool(gpus))
    if topology is not None:
        _tell_ranks(topology, given["num_workers"])
    operator_cls = given["training_operator_cls"]
    return RunPlan(
        spec=BuildSpec(settings=settings, config=config, training_operator_cls=operator_cls, **creators),
        engine=engine,
        world_size=world_size,
        threads=_threads(given["num_cpus_per_worker"], local_ranks, topology),
        gpus=gpus,
        hang_timeout_s=settings.timeout_s if failure.hang_timeout_s == "auto" else failure.hang_timeout_s,
        is_main=topology is None or topology.rank == 0,
        watches_machine=topology is None or topology.local_rank == 0,
        checkpoint=given["checkpoint"],
        preemption=given["preemption"],
        failure=failure,
        min_workers=given["min_workers"],
    )


def _threads(wanted: Any, local_ranks: int, topology: Topology | None) -> int:
    launched = topology is not None
    threads, crowded = decide_threads(wanted, local_ranks, os.environ, launched=launched, cores=usable_cores())
    if crowded and (topology is None or topology.rank == 0):
        notice_once(crowded)
    return threads


def _settings(given: Mapping[str, Any], *, use_gpu: bool) -> TrainSettings:
    return settings_from(
        precision=given["precision"],
        use_fp16=given["use_fp16"],
        scheduler_creator=given["scheduler_creator"],
        scheduler_step_freq=given["scheduler_step_freq"],
        use_gpu=use_gpu,
        backend=given["backend"],
        ddp_args=given["ddp_args"] or {},
        max_failures=given["failure"].max_failures,
        **{name: given[name] for name in AS_GIVEN},
    )


def _engine_for(engine: str | Engine, *, use_local: bool) -> Engine:
    check_engine(engine)
    if use_local:
        return LocalModeEngine()
    if not isinstance(engine, str):
        return engine
    if engine == "auto":
        engine = "local" if current_topology() is None else "spmd"
    return engine_called(engine)


def _tell_ranks(topology: Topology, num_workers: int) -> None:
    if topology.rank == 0 and num_workers not in (1, topology.world_size):
        notice(
            f"num_workers={num_workers} gives way to the {topology.world_size} processes that {topology.launcher} started"
        )
