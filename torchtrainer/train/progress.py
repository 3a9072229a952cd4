"""Where a rank stands: written by the training thread, read by the thread that reports.

Plain attributes, no lock: each is written whole by one thread, and a reader that is one value behind is right enough for
a progress bar and for a heartbeat. The training loop pays an attribute assignment per phase and nothing else.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torchtrainer.train.refetching import LoaderLoss

_STEP = struct.Struct("<q")
LATEST_STEPS = 100
"""Number of steps that count as the latest ones."""
ENOUGH_STEPS = 10
"""Number of steps needed to tell how long one takes."""


class Progress:
    """Position and phase of one rank.

    Attributes:
        phase: what the training thread is doing: ``setup``, ``idle``, ``data``, ``forward``, ``backward``, ``step``,
            ``train``, ``validate``, or the name of a call.
        phase_since: monotonic seconds at which ``phase`` was entered.
        epoch: passes over the training data that were started.
        step: training batches completed since the operator was built or loaded (all passes).
        batch: batches of the current pass that were completed (training or validation).
        batches: how many batches this call will take, if known.
        samples: samples of all ranks handled in this call.
        losses: latest loss in this call by rank (a float, or a 0-d tensor that the reporter converts).
        spent_s: seconds in each phase that was left.
        longest_s: the longest of the latest steps, whatever it waited for; 0.0: there were too few to tell.
        mark: where the steps are marked too; None: nowhere.
        on_loader_lost: called by the training thread when a loader process that died was replaced; None: nobody wants to know.
    """

    __slots__ = (
        "_stepped_at",
        "_steps_s",
        "batch",
        "batches",
        "epoch",
        "longest_s",
        "losses",
        "mark",
        "on_loader_lost",
        "phase",
        "phase_since",
        "samples",
        "spent_s",
        "step",
    )

    def __init__(self) -> None:
        self.phase = "setup"
        self.phase_since = time.monotonic()
        self.epoch = 0
        self.step = 0
        self.batch = 0
        self.batches: int | None = None
        self.samples = 0
        self.losses: dict[int, Any] = {}
        self.spent_s: dict[str, float] = {}
        self.longest_s = 0.0
        self._steps_s: deque[float] = deque(maxlen=LATEST_STEPS)
        self._stepped_at: float | None = None
        self.mark: StepMark | None = None
        self.on_loader_lost: Callable[[LoaderLoss], None] | None = None

    def enter(self, phase: str) -> None:
        """Marks the start of a phase."""
        now = time.monotonic()
        left = self.phase
        self.spent_s[left] = self.spent_s.get(left, 0.0) + now - self.phase_since
        self.phase = phase
        self.phase_since = now

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """While it lasts, this process waits for others: whoever holds them up is not it."""
        before = self.phase
        self.enter("exchange")
        try:
            yield
        finally:
            self.enter(before)

    def reach(self, step: int, epoch: int | None = None) -> None:
        """The training is at a step, by taking it or because a state was loaded; in an epoch, if that is another one."""
        self.step = step
        if epoch is not None:
            self.epoch = epoch
        if self.mark is not None:
            self.mark.show(step)

    def loader_lost(self, loss: LoaderLoss) -> None:
        """A loader process died and was replaced."""
        if self.on_loader_lost is not None:
            self.on_loader_lost(loss)

    def stepped(self) -> None:
        """Marks the end of a training step."""
        now = time.monotonic()
        if self._stepped_at is not None:
            self._steps_s.append(now - self._stepped_at)
            if len(self._steps_s) >= ENOUGH_STEPS:
                self.longest_s = max(self._steps_s)
        self._stepped_at = now

    def begin_pass(self) -> None:
        """Marks the start of a call: the time since the last one belongs to no step."""
        self._stepped_at = None
        self.losses = {}

    def loss(self, ranks: Iterable[int]) -> float | None:
        """The mean of the latest losses of ranks; None: none has one that is a number, as what hooks return is the user's."""
        losses, found = self.losses, []
        for rank in ranks:
            try:
                found.append(float(losses[rank]))
            except (KeyError, TypeError, ValueError, RuntimeError):
                continue
        return sum(found) / len(found) if found else None


class StepMark:
    """Where a process marks its steps in memory that outlives it, so that even after a crash one knows how far it was.

    Args:
        path: of the file, which the processes of a group share.
        place: number of this process.
    """

    def __init__(self, path: str, place: int) -> None:
        fd = os.open(path, os.O_RDWR)
        try:
            end = (place + 1) * _STEP.size
            if os.fstat(fd).st_size < end:
                os.ftruncate(fd, end)
            self._memory = mmap.mmap(fd, end)
        finally:
            os.close(fd)
        self._offset = place * _STEP.size

    def show(self, step: int) -> None:
        """Marks the number of steps completed."""
        _STEP.pack_into(self._memory, self._offset, step)


class StepGate(Protocol):
    """Asked at every step boundary whether the pass continues; the way in which a pass is stopped from outside."""

    def stop_requested(self, boundary: int) -> bool:
        """Says whether to stop here.

        Args:
            boundary: how many batches this rank has completed in this call.
        """

    @property
    def save_wanted(self) -> bool:
        """Whether the state is to be saved at the boundary that was asked for last."""


class StateSaver(Protocol):
    """Saves the state of a rank at step boundaries."""

    def due(self) -> bool:
        """Whether the state is to be saved here, because of the number of steps."""

    def save(self, *, must: bool) -> None:
        """Saves it; training continues when the state is copied.

        Args:
            must: also if an earlier state is still being written; else this one is left out then.
        """


class OpenGate:
    """A gate that never stops a pass."""

    save_wanted = False

    def stop_requested(self, boundary: int) -> bool:
        """Always False."""
        return False
