"""Where the training of a Lightning module stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torchtrainer.train.loop import StepIterator


@dataclass
class Position:
    """Where the training of a module stands, as the module sees it.

    Attributes:
        stage: the call that is running.
        epoch_idx: index of the training pass, from 0.
        batch_idx: index of the batch in its pass, from 0; None: a loop of the user's own, which counts by itself.
        stepped: 1 between the optimizer's step and the end of the batch, when the operator has not counted it yet.
        batch_size: this rank's samples in the batch that is worked on; None: between batches.
        samples: this rank's samples in the pass, as far as they belong to this call.
    """

    stage: Literal["train", "validate"] | None = None
    epoch_idx: int = 0
    batch_idx: int | None = None
    stepped: int = 0
    batch_size: int | None = None
    samples: int = 0

    def enter(self, steps: StepIterator | None) -> None:
        """Work on a batch begins."""
        current = steps.current if steps is not None else None
        self.batch_size = current.size if current is not None else 1

    def leave(self) -> None:
        """It is over."""
        self.samples += self.batch_size or 0
        self.batch_size = None
        self.batch_idx = (self.batch_idx or 0) + 1

    def next_pass(self) -> None:
        """A training pass is over."""
        self.epoch_idx += 1
        self.batch_idx = self.samples = 0

    def weight(self, steps: StepIterator | None) -> float:
        """Samples behind a value that is logged now: those of the batch, or between batches those of the pass so far."""
        if self.batch_idx is None:  # a loop of the user's own
            current = steps.current if steps is not None else None
            return current.size if current is not None else 1
        return self.samples if self.batch_size is None else self.batch_size
