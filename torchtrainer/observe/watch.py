"""What the driver shows while it waits: output of rank 0, the progress bar, failures, and the user's callbacks."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from torchtrainer.control.messages import CheckpointEnded, Heard, Heartbeat, Logged, Output
from torchtrainer.driver.causes import Cause
from torchtrainer.driver.events import Joined, Recovered, ReplacingStopped
from torchtrainer.driver.report import short_cause
from torchtrainer.driver.stragglers import Straggler
from torchtrainer.driver.views import WorkerView
from torchtrainer.observe.devices import CpuMeter, DeviceUse, GpuMonitor
from torchtrainer.observe.events import Callbacks, CheckpointEvent, StepEvent
from torchtrainer.observe.failure_watch import FailureWatch
from torchtrainer.observe.failures import FailureRecord, named
from torchtrainer.observe.notices import PacedNotices, log, notice, standard_stream
from torchtrainer.observe.progress_bar import PassBar, StartBar
from torchtrainer.observe.shown import Shown

GPU_SAMPLE_S = 1.0
"""Seconds between two looks at the GPUs while a pass runs."""


class RunObserver:
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
        keep: writes a failure to the history.
        clock: monotonic seconds.

    Attributes:
        failures: what is known of the failures so far.
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
        keep: Callable[[FailureRecord], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
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
        self._pass_name: str | None = None
        self._bar: PassBar | None = None
        self._start_bar: StartBar | None = None
        self._meters: dict[int, CpuMeter] = {}
        self._cpu: dict[int, DeviceUse] = {}
        self._gpu_use: tuple[DeviceUse, ...] = ()
        self._gpu_due = 0.0
        self._rate_from: tuple[float, int] | None = None
        self._losses: dict[int, tuple[int, float]] = {}
        self._last: Heartbeat | None = None
        self._views: Callable[[], tuple[WorkerView, ...]] = tuple
        self._lines = PacedNotices(self._say, clock=clock)
        self.failures = FailureWatch(callbacks=callbacks, lines=self._lines, keep=keep, clock=clock)

    # Calls of the trainer

    def attach(self, views: Callable[[], tuple[WorkerView, ...]]) -> None:
        """The ranks are there.

        Args:
            views: of the workers, as they are at the time.
        """
        self._views = self.failures.views = views

    def begin_start(self, what: str) -> None:
        """Workers are being started."""
        self._start_bar = StartBar(what, enabled=self._use_tqdm)

    def end_start(self) -> None:
        """Workers are there, or it failed."""
        if self._start_bar is not None:
            self._start_bar.close()
            self._start_bar = None

    def begin_pass(self, method: str, epoch: int, call: int = 0) -> None:
        """A pass begins.

        Args:
            method: ``train`` or ``validate``.
            epoch: passes over the training data that are started by then.
            call: place of the call among those of the trainer.
        """
        self._pass_name = f"{method} epoch {epoch}"
        self.failures.epoch = epoch
        self._call = call
        self._rate_from = None
        self._losses.clear()
        self._meters.clear()

    def end_pass(self) -> None:
        """The pass has ended, in whatever way: its last step is shown with the losses of all ranks."""
        last, self._last = self._last, None
        try:
            if last is not None:
                self._show_step(last)
        finally:
            self._pass_name = None
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def end_run(self, total_s: float) -> None:
        """The trainer was shut down, after so many seconds: says what was held back, and what failures have cost."""
        self._lines.say_due(all_held=True)
        cost = self.failures.goodput(total_s)
        if cost:
            self._say(cost, level=logging.INFO)

    def device_use(self) -> tuple[DeviceUse, ...]:
        """Latest use of the GPUs, or of the CPU by each process that carries ranks, by lowest rank."""
        carriers = [view.worker for view in self._views() if view.carries]
        return self._gpu_use or tuple(self._cpu[worker] for worker in carriers if worker in self._cpu)

    def use_of(self, view: WorkerView) -> DeviceUse | None:
        """Latest use of what one process works on."""
        for use in self._gpu_use:
            if use.device == view.device:
                return use
        return self._cpu.get(view.worker)

    # Listener of the controller

    def on_waiting(self, doing: str) -> None:
        """The driver still waits."""
        if self._start_bar is not None:
            self._start_bar.tick()
        self._lines.say_due()
        self._look()

    def on_checkpoint(self, ended: CheckpointEnded) -> None:
        """A checkpoint was written, or could not be; the same trouble is told once."""
        for problem in ended.problems:
            if problem not in self._told:
                self._told.add(problem)
                self._say(f"checkpoint of step {ended.step}: {problem}")
        if ended.error and not self._failing:
            self._say(f"no checkpoint of step {ended.step}, and training continues: {ended.error}")
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

    def on_heartbeat(self, heartbeat: Heartbeat) -> None:
        """A worker told where it is; steps are shown as the one that carries rank 0 takes them."""
        meter = self._meters.setdefault(heartbeat.worker, CpuMeter(self._clock))
        percent = meter.percent(heartbeat.cpu_s)
        if percent is not None or heartbeat.worker not in self._cpu:
            self._cpu[heartbeat.worker] = DeviceUse(
                device="cpu", percent=percent, memory_used_bytes=heartbeat.rss_bytes
            )
        if not heartbeat.call or self._pass_name is None:
            return
        if heartbeat.loss is not None:
            self._losses[heartbeat.worker] = (len(heartbeat.ranks), heartbeat.loss)
        if 0 in heartbeat.ranks:
            self._last = heartbeat if heartbeat.batch == heartbeat.batches else None
            if self._last is None:
                self._show_step(heartbeat)

    def on_output(self, output: Output) -> None:
        """Rank 0 wrote lines."""
        stream = standard_stream("stderr" if output.stream == "stderr" else "stdout")
        text = "".join(self._prefix + line for line in output.text.splitlines(keepends=True))
        encoding = getattr(stream, "encoding", None) or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)  # a worker may write what we cannot show
        if self._bar is not None and output.stream == "stdout":
            self._bar.write(text, stream)
            return
        stream.write(text)
        stream.flush()

    def on_logged(self, logged: Logged) -> None:
        """A worker, or the host, has something to tell the user."""
        prefix = f"[rank {logged.rank}] " if self._prefix and logged.rank is not None else ""
        with self._aside():
            log(logged.level, logged.text, rank=logged.rank, pid=logged.pid, prefix=prefix)

    def on_failure(self, cause: Cause, error: BaseException) -> None:
        """The group failed."""
        self.failures.on_failure(cause, error)

    def on_recovered(self, record: Recovered) -> None:
        """A worker was lost, and what it had left undone is done."""
        self.failures.on_recovered(record)

    def on_joined(self, joined: Joined) -> None:
        """A new worker has taken over ranks."""
        self.failures.on_joined(joined)

    def on_straggler(self, straggler: Straggler) -> None:
        """A worker is much slower than the others."""
        verb = "takes" if len(straggler.ranks) == 1 else "take"
        self._say(
            f"{named(straggler.ranks)} {verb} {straggler.factor:.1f} times as long per step as the others, most of it in "
            f"{straggler.phase}"
        )

    def on_replacing_stopped(self, stopped: ReplacingStopped) -> None:
        """No more workers are built; the group goes on with those it has."""
        why = stopped.why or (short_cause(stopped.cause) if stopped.cause is not None else "")
        tries = "one that failed" if stopped.tries == 1 else f"{stopped.tries} that failed"
        self._say(f"giving up on replacements after {tries}; training continues with fewer processes ({why})")

    # Parts

    def _say(self, text: str, *, level: int = logging.WARNING) -> None:
        """Tells the user a line, above the bar if there is one."""
        with self._aside():
            notice(text, level=level)

    def _aside(self) -> AbstractContextManager[None]:
        return self._bar.aside() if self._bar is not None else nullcontext()

    def _show_step(self, heartbeat: Heartbeat) -> None:
        if not self._use_tqdm and not self._callbacks:
            return
        now = self._clock()
        if self._gpus is not None and now >= self._gpu_due:
            self._gpu_use = self._gpus.sample()
            self._gpu_due = now + GPU_SAMPLE_S
        event = StepEvent(
            epoch=heartbeat.epoch,
            step=heartbeat.step,
            batch=heartbeat.batch,
            batches=heartbeat.batches,
            samples=heartbeat.samples,
            samples_per_s=self._rate(now, heartbeat.samples),
            loss=self._mean_loss(),
            phase=heartbeat.phase,
            devices=self.device_use(),
        )
        if self._use_tqdm:
            if self._bar is None:
                self._bar = PassBar(self._pass_name or "", total=heartbeat.batches)
            self._bar.update(event)
        if heartbeat.batch and self._shown.is_new(self._call, heartbeat.batch):
            self._callbacks.on_step(event)

    def _mean_loss(self) -> float | None:
        """Over all ranks, as far as they have told theirs in this pass."""
        carriers = {view.worker for view in self._views() if view.carries}
        told = [one for worker, one in self._losses.items() if worker in carriers or not carriers]
        ranks = sum(count for count, _ in told)
        return sum(count * loss for count, loss in told) / ranks if ranks else None

    def _rate(self, now: float, samples: int) -> float | None:
        """Samples of all ranks per second since the pass began to move."""
        if self._rate_from is None or samples < self._rate_from[1]:
            self._rate_from = (now, samples)
            return None
        since, before = self._rate_from
        return (samples - before) / (now - since) if now > since and samples > before else None
