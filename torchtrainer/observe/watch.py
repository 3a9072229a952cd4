"""What the driver shows while it waits: output of rank 0, the progress bar, and the user's callbacks."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from torchtrainer.control.messages import Beat, CheckpointEnded, Heard, Output
from torchtrainer.driver.causes import Cause
from torchtrainer.driver.report import rank_of, short_cause
from torchtrainer.observe.devices import CpuMeter, DeviceUse, GpuMonitor
from torchtrainer.observe.events import Callbacks, CheckpointEvent, FailureEvent, StepEvent
from torchtrainer.observe.notices import notice
from torchtrainer.observe.progress_bar import PassBar, StartBar
from torchtrainer.observe.shown import Shown
from torchtrainer.observe.status import FailureRecord

GPU_SAMPLE_S = 1.0
"""Seconds between two looks at the GPUs while a pass runs."""


class Watch:
    """Turns what workers report into what the user sees. All in the user's thread, while it waits.

    Args:
        callbacks: the user's.
        use_tqdm: draw progress bars.
        world_size: ranks; with several, lines of rank 0 are marked as such.
        gpus: reads GPU statistics; None without GPUs.
        shown: which steps the callbacks have seen.
        look: called several times a second while the driver waits.
        on_saved: called with the step of each checkpoint that is complete.
        on_signal: called with a signal that came to a rank, as a warning of a preemption.
        clock, wall_clock: monotonic seconds, and seconds since 1970.
    """

    def __init__(
        self,
        *,
        callbacks: Callbacks,
        use_tqdm: bool,
        world_size: int,
        gpus: GpuMonitor | None,
        shown: Shown | None = None,
        look: Callable[[], None] = lambda: None,
        on_saved: Callable[[int], None] = lambda _: None,
        on_signal: Callable[[int], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._callbacks = callbacks
        self._use_tqdm = use_tqdm
        self._prefix = "[rank 0] " if world_size > 1 else ""
        self._gpus = gpus
        self._shown = shown or Shown(None)
        self._call = 0
        self._look = look
        self._on_saved = on_saved
        self._on_signal = on_signal
        self._told: set[str] = set()
        self._failing = False
        self._clock = clock
        self._wall_clock = wall_clock
        self._pass_name: str | None = None
        self._bar: PassBar | None = None
        self._start_bar: StartBar | None = None
        self._meters: dict[int, CpuMeter] = {}
        self._cpu: dict[int, DeviceUse] = {}
        self._gpu_use: tuple[DeviceUse, ...] = ()
        self._gpu_due = 0.0
        self._rate_from: tuple[float, int] | None = None
        self.failures: list[FailureRecord] = []

    # Calls of the trainer

    def begin_start(self, what: str) -> None:
        """Workers are being started."""
        self._start_bar = StartBar(what, enabled=self._use_tqdm)

    def end_start(self) -> None:
        """Workers are there, or it failed."""
        if self._start_bar is not None:
            self._start_bar.close()
            self._start_bar = None

    def begin_pass(self, name: str, call: int = 0) -> None:
        """A pass begins.

        Args:
            name: of it, such as ``train epoch 3``.
            call: place of the call among those of the trainer.
        """
        self._pass_name = name
        self._call = call
        self._rate_from = None
        self._meters.clear()

    def end_pass(self) -> None:
        """The pass has ended, in whatever way."""
        self._pass_name = None
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def device_use(self) -> tuple[DeviceUse, ...]:
        """Latest use of the GPUs, or of the CPU by rank."""
        return self._gpu_use or tuple(use for _, use in sorted(self._cpu.items()))

    def use_of(self, rank: int, device: str) -> DeviceUse | None:
        """Latest use of what one rank works on."""
        for use in self._gpu_use:
            if use.device == device:
                return use
        return self._cpu.get(rank)

    # Listener of the controller

    def on_waiting(self, doing: str) -> None:
        """The driver still waits."""
        if self._start_bar is not None:
            self._start_bar.tick()
        self._look()

    def on_checkpoint(self, ended: CheckpointEnded) -> None:
        """A checkpoint was written, or could not be; the same trouble is told once."""
        for problem in ended.problems:
            if problem not in self._told:
                self._told.add(problem)
                notice(f"checkpoint of step {ended.step}: {problem}")
        if ended.error and not self._failing:
            notice(f"no checkpoint of step {ended.step}, and training goes on: {ended.error}")
        self._failing = bool(ended.error)
        if not ended.error:
            self._on_saved(ended.step)
            self._callbacks.on_checkpoint(
                CheckpointEvent(
                    step=ended.step,
                    epoch=ended.epoch,
                    path=ended.path,
                    seconds=ended.stall_s + ended.seconds,
                    stall_s=ended.stall_s,
                )
            )

    def on_heard(self, heard: Heard) -> None:
        """A signal that warns of a preemption came to a rank."""
        self._on_signal(heard.signum)

    def on_beat(self, beat: Beat) -> None:
        """A rank told where it is."""
        meter = self._meters.setdefault(beat.rank, CpuMeter(self._clock))
        percent = meter.percent(beat.cpu_s)
        if percent is not None or beat.rank not in self._cpu:
            self._cpu[beat.rank] = DeviceUse(device="cpu", percent=percent, memory_used_bytes=beat.rss_bytes)
        if beat.rank == 0 and beat.call and self._pass_name is not None:
            self._show_step(beat)

    def on_output(self, output: Output) -> None:
        """Rank 0 wrote lines."""
        stream = sys.stderr if output.stream == "stderr" else sys.stdout
        text = "".join(self._prefix + line for line in output.text.splitlines(keepends=True))
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # a worker may write what we cannot show
        if self._bar is not None and output.stream == "stdout":
            self._bar.write(text)
            return
        stream.write(text)
        stream.flush()

    def on_failure(self, cause: Cause, error: BaseException) -> None:
        """The group failed."""
        now = self._wall_clock()
        self.failures.append(FailureRecord(time=now, rank=rank_of(cause), cause=short_cause(cause)))
        message = "\n".join(_said(part) for part in (error, error.__cause__) if part is not None)
        self._callbacks.on_failure(
            FailureEvent(time=now, rank=rank_of(cause), cause=short_cause(cause), message=message)
        )

    # Parts

    def _show_step(self, beat: Beat) -> None:
        if not self._use_tqdm and not self._callbacks:
            return
        now = self._clock()
        if self._gpus is not None and now >= self._gpu_due:
            self._gpu_use = self._gpus.sample()
            self._gpu_due = now + GPU_SAMPLE_S
        event = StepEvent(
            epoch=beat.epoch,
            step=beat.step,
            batch=beat.batch,
            batches=beat.batches,
            samples=beat.samples,
            samples_per_s=self._rate(now, beat.samples),
            loss=beat.loss,
            phase=beat.phase,
            devices=self.device_use(),
        )
        if self._use_tqdm:
            if self._bar is None:
                self._bar = PassBar(self._pass_name or "", total=beat.batches)
            self._bar.update(event)
        if beat.batch and self._shown.is_new(self._call, beat.batch):
            self._callbacks.on_step(event)

    def _rate(self, now: float, samples: int) -> float | None:
        """Samples of all ranks per second since the pass began to move."""
        if self._rate_from is None or samples < self._rate_from[1]:
            self._rate_from = (now, samples)
            return None
        since, before = self._rate_from
        return (samples - before) / (now - since) if now > since and samples > before else None


def _said(error: BaseException) -> str:
    """``str(error)``, also for an exception of the user's whose own ``__str__`` fails."""
    try:
        return str(error)
    except Exception:
        return type(error).__name__
