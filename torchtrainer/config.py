"""Option objects: frozen, keyword-only, and checked when they are made.

Times are in seconds and on the monotonic clock. Everything that waits, and every size that limits something, is named here
with its unit and default, and the errors it can cause print it.
"""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError

BATCH_SIZE = "*batch_size"
"""Key of ``config`` for a batch size over all ranks: each rank's creators see its own share under the same key."""

NUM_SAMPLES = "num_samples"
BATCH_COUNT = "batch_count"

Precision = Literal["fp32", "bf16", "fp16"]
SchedulerStepFreq = Literal["batch", "epoch", "manual"]
PRECISIONS: tuple[str, ...] = ("fp32", "bf16", "fp16")
SCHEDULER_STEP_FREQS: tuple[str, ...] = ("batch", "epoch", "manual")
STRATEGIES: tuple[str, ...] = ("ddp", "zero1", "fsdp")
"""How training state is spread over the ranks: a full copy on each; optimizer state sharded; parameters sharded too."""
COMM_HOOKS: tuple[str, ...] = ("fp16", "bf16", "powersgd")
"""Ways of compressing gradients before they are exchanged."""
MEMORY_FORMATS: tuple[str, ...] = ("auto", "channels_last", "as_made")
CLOUDS: tuple[str, ...] = ("aws", "azure", "gcp")
DIGESTS = "TORCHTRAINER_DIGESTS"
"""Environment variable of ``torchtrainer verify-resume``: directory for the logs of this start of the script."""
VERIFY_RUNS = "TORCHTRAINER_VERIFY_RUNS"
"""The same: directory for run directories and checkpoints of such a start, wherever the script wants them."""
DRIVER_JOURNAL_BYTES = 1024**2
"""Size in bytes at which the driver's event journal moves on to a new file; only the previous file is kept."""
PREEMPTION_SIGNALS: tuple[str, ...] = ("SIGTERM", "SIGUSR1")


def check_shares(even_batches: Any, min_batch_size: Any) -> None:
    """Checks the settings for dealing out the end of a pass.

    Raises:
        InvalidArgumentError: a value is invalid.
    """
    if even_batches not in (True, False, "drop", "repeat"):
        raise InvalidArgumentError(
            f'even_batches must be False, True, "repeat" (as True) or "drop", got {even_batches!r}'
        )
    if not isinstance(min_batch_size, int) or isinstance(min_batch_size, bool) or min_batch_size < 1:
        raise InvalidArgumentError(
            f"min_batch_size must be a whole number of at least 1 sample per rank, got {min_batch_size!r}"
        )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When a run saves its state by itself, where, and how many states it keeps.

    Attributes:
        every_steps: optimizer steps between two checkpoints; None: by time only.
        every_seconds: seconds between two checkpoints; "auto": as often as possible at a cost below a hundredth of the
            time; None: by steps only.
        keep: number of verified checkpoints that stay; at least 2 do.
        path: directory in which each run gets its own, or an fsspec URL to which checkpoints are copied; None: inside
            the run directory.
        asynchronous: write in the background.
    """

    every_steps: int | None = None
    every_seconds: float | Literal["auto"] | None = 300.0
    keep: int = 3
    path: str | None = None
    asynchronous: bool = True

    def __post_init__(self) -> None:
        if self.every_steps is not None and self.every_steps < 1:
            raise InvalidArgumentError(f"CheckpointConfig.every_steps must be at least 1 step, got {self.every_steps}")
        seconds = self.every_seconds
        if seconds not in (None, "auto") and not (isinstance(seconds, int | float) and 0 < seconds < math.inf):
            raise InvalidArgumentError(
                f'CheckpointConfig.every_seconds must be more than 0 seconds, "auto" or None, got {seconds!r}'
            )
        if self.keep < 1:
            raise InvalidArgumentError(f"CheckpointConfig.keep must be at least 1, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class FailureConfig:
    """How a run reacts to processes that die or hang: see "When a worker dies" in the manual.

    Attributes:
        max_failures: failures in a row without a new step between them, that end the run with the latest error; 0: the
            first one ends it. Building a replacement may also fail this many times in a row, at least once.
        max_preemptions: preemptions in a row, without a new step between them, after which a start refuses to continue;
            None: any number.
        replace: build a replacement for a lost process; False: the others keep its ranks if they can.
        hang_timeout_s: seconds without progress after which a worker counts as hung; "auto": within a step 30 times the
            longest of the latest ones, at least 120 (30 for a process that sends no heartbeats) and at most
            ``timeout_s``; elsewhere ``timeout_s``.
    """

    max_failures: int = 3
    max_preemptions: int | None = None
    replace: bool = True
    hang_timeout_s: float | Literal["auto"] = "auto"

    def __post_init__(self) -> None:
        if self.max_failures < 0:
            raise InvalidArgumentError(f"FailureConfig.max_failures must be at least 0, got {self.max_failures}")
        if self.max_preemptions is not None and self.max_preemptions < 0:
            raise InvalidArgumentError(f"FailureConfig.max_preemptions must be at least 0, got {self.max_preemptions}")
        if self.hang_timeout_s != "auto" and not (
            isinstance(self.hang_timeout_s, int | float) and self.hang_timeout_s > 0
        ):
            raise InvalidArgumentError(
                f'FailureConfig.hang_timeout_s must be "auto" or more than 0 seconds, got {self.hang_timeout_s!r}'
            )


@dataclass(frozen=True, kw_only=True)
class Timeouts:
    """Deadlines of the engine, in seconds. Error messages use these names.

    Attributes:
        engine_start_s: the host and the spawner exist and torch is imported.
        worker_connect_s: a forked worker has said hello.
        error_gather_s: after the first rank's exception, how long to wait for the same from the others.
        interrupt_s: after Ctrl-C, how long to wait for the ranks to reach a step boundary before control returns.
        pause_s: how long a worker waits at a step boundary for the decision where to stop.
        shutdown_s: from asking the workers to end to killing those that did not.
        cleanup_s: from the death of the driver until nothing is left.
        heartbeat_s: between two heartbeats of a worker.
        progress_s: between two progress reports of rank 0 during a pass.
        stack_dump_s: how long to wait for the stacks of a hung worker.
        write_s: how long to wait for a checkpoint that is being written, if anything depends on it.
        preempt_s: from a notice of preemption without a deadline to leaving, saved or not.
    """

    engine_start_s: float = 120.0
    worker_connect_s: float = 60.0
    error_gather_s: float = 0.5
    interrupt_s: float = 1.0
    pause_s: float = 60.0
    shutdown_s: float = 5.0
    cleanup_s: float = 2.0
    heartbeat_s: float = 1.0
    progress_s: float = 0.1
    stack_dump_s: float = 1.0
    write_s: float = 60.0
    preempt_s: float = 25.0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How a rank trains: the trainer's arguments that are the same on every rank. Pickles without torch.

    Attributes:
        seed: everything random derives from it.
        precision: number format of the forward pass.
        use_fp16: what the user passed as ``use_fp16``, for operators that read it.
        compile: False, True, or options of ``torch.compile``.
        memory_format: of images and convolutions: ``channels_last``, "auto" (channels last where it makes convolutions
            faster), or ``as_made`` by the user's code. Channels last changes the order of summation and so the last
            bits; therefore None is "auto" with half precision, whose bits differ anyway, and else ``as_made``.
        accumulate: batches of each rank whose gradients add up to one optimizer step.
        fused: True: all parameters in one fused kernel, whose last bits differ; False: the user's optimizer as it is;
            "auto": fused with ``bf16``, else a few calls where that is faster and gives the same bits.
        strategy: of `STRATEGIES`.
        comm_hook: of `COMM_HOOKS`, or None: gradients are exchanged uncompressed.
        cpu_affinity: keep each process to its own cores; "auto": to those of one memory node, where there are several.
        wrap_ddp: wrap models in ``DistributedDataParallel`` when there are several ranks.
        ddp_args: arguments of ``DistributedDataParallel``.
        add_dist_sampler: deal each loader out to the ranks; False: use loaders as they are.
        even_batches: give all ranks the same number of samples in each step and the same number of steps: "repeat" or
            True repeats some samples of the pass, "drop" leaves some out; False: each sample once.
        min_batch_size: fewest samples of a rank in a short last step; "auto": 2 in training where a model has batch-norm layers, else 1.
        scheduler_step_freq: when the built-in loop steps the schedulers.
        use_tqdm: whether the driver shows a progress bar.
        use_gpu: whether ranks train on GPUs.
        backend: ``nccl`` or ``gloo``.
        timeout_s: longest wait for any collective, in seconds.
        max_failures: number of loader processes that may die in a row before a batch is read; see `FailureConfig`.
    """

    seed: int = 0
    precision: Precision = "fp32"
    use_fp16: bool = False
    compile: bool | dict[str, Any] = False
    memory_format: Literal["auto", "channels_last", "as_made"] | None = None
    accumulate: int = 1
    fused: bool | Literal["auto"] = "auto"
    strategy: Literal["ddp", "zero1", "fsdp"] = "ddp"
    comm_hook: Literal["fp16", "bf16", "powersgd"] | None = None
    cpu_affinity: bool | Literal["auto"] = "auto"
    wrap_ddp: bool = True
    ddp_args: dict[str, Any] = field(default_factory=dict)
    add_dist_sampler: bool = True
    even_batches: bool | Literal["drop", "repeat"] = False
    min_batch_size: int | Literal["auto"] = "auto"
    scheduler_step_freq: SchedulerStepFreq | None = None
    use_tqdm: bool = False
    use_gpu: bool = False
    backend: Literal["nccl", "gloo"] = "gloo"
    timeout_s: float = 1800.0
    max_failures: int = FailureConfig().max_failures

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise InvalidArgumentError(f"precision must be one of {', '.join(PRECISIONS)}; got {self.precision!r}")
        if self.scheduler_step_freq is not None and self.scheduler_step_freq not in SCHEDULER_STEP_FREQS:
            raise InvalidArgumentError(
                f"scheduler_step_freq must be one of {', '.join(SCHEDULER_STEP_FREQS)} or None; "
                f"got {self.scheduler_step_freq!r}"
            )
        if not self.timeout_s > 0:
            raise InvalidArgumentError(f"timeout_s must be more than 0 seconds, got {self.timeout_s!r}")
        if not isinstance(self.ddp_args, dict):
            raise InvalidArgumentError(f"ddp_args needs to be a dict object, got {type(self.ddp_args).__name__}")
        if not isinstance(self.compile, bool | dict):
            raise InvalidArgumentTypeError(
                f"compile must be True, False or a dict of torch.compile options, got {self.compile!r}"
            )
        check_shares(self.even_batches, 1 if self.min_batch_size == "auto" else self.min_batch_size)
        self._check_compute()

    def deciding_bits(self) -> dict[str, Any]:
        """The settings on which the bits of a training depend; newer ones only if they differ from their defaults."""
        usual = TrainSettings()
        later = (
            *("accumulate", "memory_format", "fused", "comm_hook", "compile", "even_batches", "min_batch_size"),
            *("scheduler_step_freq", "add_dist_sampler", "wrap_ddp", "ddp_args"),
        )
        unusual = {name: getattr(self, name) for name in later if getattr(self, name) != getattr(usual, name)}
        return {"seed": self.seed, "precision": self.precision, **unusual}

    def _check_compute(self) -> None:
        for name, known, more in (
            ("strategy", STRATEGIES, ""),
            ("comm_hook", COMM_HOOKS, " or None"),
            ("memory_format", MEMORY_FORMATS, " or None"),
        ):
            value = getattr(self, name)
            if value not in known and not (more and value is None):
                raise InvalidArgumentError(f"{name} must be one of {', '.join(known)}{more}; got {value!r}")
        for name in ("fused", "cpu_affinity"):
            value = getattr(self, name)
            if value != "auto" and not isinstance(value, bool):
                raise InvalidArgumentTypeError(f'{name} must be True, False or "auto", got {value!r}')
        if not isinstance(self.accumulate, int) or isinstance(self.accumulate, bool) or self.accumulate < 1:
            raise InvalidArgumentError(
                f"accumulate must be a whole number of batches per optimizer step, at least 1; got {self.accumulate!r}"
            )
        if self.comm_hook is not None and self.strategy != "ddp":
            raise InvalidArgumentError(
                f'comm_hook={self.comm_hook!r} is for strategy="ddp"; strategy={self.strategy!r} exchanges gradients in its own way'
            )
        if self.strategy != "ddp" and self.precision == "fp16":
            raise InvalidArgumentError(
                f'precision="fp16" scales the loss, which strategy={self.strategy!r} does not take; use precision="bf16"'
            )
        if not self.wrap_ddp and (self.comm_hook is not None or self.strategy != "ddp"):
            raise InvalidArgumentError(
                "wrap_ddp=False leaves the exchange of gradients to you: strategy and comm_hook need it"
            )


@dataclass(frozen=True, kw_only=True)
class PreemptionConfig:
    """Sources of advance warnings that this machine or job will be taken away, and what is known about them.

    Attributes:
        signals: names of the signals that are such warnings; those that this system lacks are left out.
        repeat_s: the same signal again within this time is the same warning; after it, it means: leave now, without saving.
        grace_s: seconds from a signal to the end of the process; None: the environment's ``TORCHTRAINER_GRACE_S``, else unknown.
        metadata: clouds whose metadata service is polled, of "aws", "azure" and "gcp"; "auto": the one whose machine
            this is; () or None: none.
        metadata_every_s: seconds between two requests to a metadata service.
        metadata_timeout_s: for connecting to a metadata service (at most 2), and again for its answer.
        file: a path whose existence is a warning.
        check: a function that is called in a thread; returns a false value, True, the seconds left, or a ``Notice``.
        check_every_s: seconds between two calls of ``check``.
        slurm_lead_s: how long before the end of a Slurm job's time to warn if no signal came; 0: never.
        requeue: run ``scontrol requeue`` for this job after the state is saved.
    """

    signals: tuple[str, ...] = PREEMPTION_SIGNALS
    repeat_s: float = 0.5
    grace_s: float | None = None
    metadata: Literal["auto"] | tuple[str, ...] | None = "auto"
    metadata_every_s: float = 5.0
    metadata_timeout_s: float = 2.0
    file: str | os.PathLike[str] | None = None
    check: Callable[[], object] | None = None
    check_every_s: float = 5.0
    slurm_lead_s: float = 60.0
    requeue: bool = False

    def __post_init__(self) -> None:
        _check_signals(self.signals)
        for name in ("metadata_every_s", "metadata_timeout_s", "check_every_s"):
            if not 0 < getattr(self, name) < math.inf:
                raise InvalidArgumentError(
                    f"PreemptionConfig.{name} must be more than 0 seconds, got {getattr(self, name)!r}"
                )
        for name in ("repeat_s", "slurm_lead_s") if self.grace_s is None else ("repeat_s", "slurm_lead_s", "grace_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InvalidArgumentError(
                    f"PreemptionConfig.{name} must be at least 0 seconds, got {getattr(self, name)!r}"
                )
        if self.metadata not in ("auto", None) and (
            not isinstance(self.metadata, tuple) or not set(self.metadata) <= set(CLOUDS)
        ):
            raise InvalidArgumentError(
                f'PreemptionConfig.metadata must be "auto", None or a tuple of {", ".join(CLOUDS)}; got {self.metadata!r}'
            )
        if self.check is not None and not callable(self.check):
            raise InvalidArgumentTypeError(
                f"PreemptionConfig.check must be a function without arguments, got {self.check!r}"
            )


def _check_signals(names: tuple[str, ...]) -> None:
    if not isinstance(names, tuple):
        raise InvalidArgumentTypeError(f"PreemptionConfig.signals must be a tuple of names of signals, got {names!r}")
    for name in names:
        if name == "SIGINT":
            raise InvalidArgumentError(
                "PreemptionConfig.signals cannot contain SIGINT: Ctrl-C ends the call in progress"
            )
        if name in ("SIGKILL", "SIGSTOP"):
            raise InvalidArgumentError(f"PreemptionConfig.signals cannot contain {name}: no process can handle it")
        if name not in PREEMPTION_SIGNALS and name not in signal.Signals.__members__:
            raise InvalidArgumentError(
                f"PreemptionConfig.signals must be names of signals such as SIGTERM; there is no {name!r}"
            )
