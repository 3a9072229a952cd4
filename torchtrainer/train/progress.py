"""Where a rank stands: written by the training thread, read by the thread that reports.

Plain attributes, no lock: each is written whole by one thread, and a reader that is one value behind is right enough for
a progress bar and for a heartbeat. The training loop pays an attribute assignment per phase and nothing else.
"""

from __future__ import annotations

import time
from typing import Any, Protocol


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
        loss: latest loss of this rank (a float, or a 0-d tensor that the reporter converts).
    """

    __slots__ = ("batch", "batches", "epoch", "loss", "phase", "phase_since", "samples", "step")

    def __init__(self) -> None:
        self.phase = "setup"
        self.phase_since = time.monotonic()
        self.epoch = 0
        self.step = 0
        self.batch = 0
        self.batches: int | None = None
        self.samples = 0
        self.loss: Any = None

    def enter(self, phase: str) -> None:
        """Marks the start of a phase."""
        self.phase = phase
        self.phase_since = time.monotonic()


class StepGate(Protocol):
    """Asked at every step boundary whether the pass goes on; the way in which a pass is stopped from outside."""

    def stop_requested(self, boundary: int) -> bool:
        """Says whether to stop here.

        Args:
            boundary: how many batches this rank has completed in this call.
        """

    @property
    def save_wanted(self) -> bool:
        """Whether the state is to be saved at the boundary that was asked for last."""


class Keeper(Protocol):
    """Saves the state of a rank at step boundaries."""

    def due(self) -> bool:
        """Whether the state is to be saved here, because of the number of steps."""

    def save(self, *, must: bool) -> None:
        """Saves it; training goes on when the state is copied.

        Args:
            must: also if an earlier state is still being written; else this one is left out then.
        """


class OpenGate:
    """A gate that never stops a pass."""

    save_wanted = False

    def stop_requested(self, boundary: int) -> bool:
        """Always False."""
        return False
