"""What a Lightning module finds when it looks at ``self.trainer``: the run that it is part of, to read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from torchtrainer.errors import NotAvailableError

if TYPE_CHECKING:
    from torchtrainer.lightning import LightningOperator
    from torchtrainer.train.loop import StepIterator

_ADVICE = {
    "max_epochs": "how long to train is decided call by call; take the number of epochs from config",
    "max_steps": "how long to train is decided call by call; take the number of steps from config",
    "estimated_stepping_batches": (
        "how long to train is decided call by call; take the number of epochs from config and multiply it with "
        "self.trainer.num_training_batches"
    ),
    "strategy": "the ranks are connected by torchtrainer; self.all_gather and strategies are not there",
    "should_stop": "stop by not calling train() again",
}


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


class TrainerAttributeError(NotAvailableError, AttributeError):
    """A Lightning module looked for something that only Lightning's own ``Trainer`` has."""


class GradientClipping:
    """Clips the gradients of an optimizer's parameters; they are whole by then, exchanged and not scaled."""

    def clip_gradients(self, optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
        """Clips them, if ``clip_val`` is above 0.

        Args:
            optimizer: the optimizer.
            clip_val: largest norm over all parameters, or largest magnitude of each element.
            gradient_clip_algorithm: ``norm`` or ``value``, as text or as Lightning's enum of it.
        """
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        if clip_val <= 0:
            return
        if gradient_clip_algorithm == "value":
            torch.nn.utils.clip_grad_value_(parameters, clip_val)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, clip_val)


class TrainerView:
    """Stands where a module expects its ``Trainer``: position, ranks, metrics. Read-only; what is not here is an error.

    Args:
        operator: the operator that trains the module.
    """

    __slots__ = ("_operator",)

    accumulate_grad_batches = 1
    barebones = False
    datamodule = None
    fast_dev_run = False
    gradient_clip_algorithm = None
    gradient_clip_val = None
    logger = None
    predicting = False
    progress_bar_callback = None
    sanity_checking = False
    testing = False

    def __init__(self, operator: LightningOperator) -> None:
        self._operator = operator

    def __getattr__(self, name: str) -> Any:
        advice = _ADVICE.get(
            name, "it is not available here; override a hook of the operator that from_ptl returns instead"
        )
        raise TrainerAttributeError(f"self.trainer.{name}: the module is trained by torchtrainer. {advice}")

    @property
    def current_epoch(self) -> int:
        """Index of the training pass, from 0."""
        return self._operator.position.epoch_idx

    @property
    def global_step(self) -> int:
        """Optimizer steps taken."""
        return self._operator.global_step + self._operator.position.stepped

    @property
    def training(self) -> bool:
        """Whether a ``train`` call is running."""
        return self._operator.position.stage == "train"

    @property
    def validating(self) -> bool:
        """Whether a ``validate`` call is running."""
        return self._operator.position.stage == "validate"

    @property
    def evaluating(self) -> bool:
        """The same."""
        return self.validating

    @property
    def global_rank(self) -> int:
        """This rank, from 0."""
        return self._operator.world_rank

    @property
    def local_rank(self) -> int:
        """Place of this rank on its machine, from 0."""
        return self._operator.local_rank

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self._operator.world_size

    @property
    def is_global_zero(self) -> bool:
        """Whether this is rank 0."""
        return self._operator.world_rank == 0

    @property
    def loggers(self) -> list[Any]:
        """None: metrics are in the results of the trainer's calls."""
        return []

    @property
    def callback_metrics(self) -> dict[str, Any]:
        """The metrics of the latest passes, over all ranks."""
        return dict(self._operator.latest_metrics)

    @property
    def logged_metrics(self) -> dict[str, Any]:
        """The same."""
        return self.callback_metrics

    @property
    def optimizers(self) -> list[Any]:
        """The optimizer, in a list."""
        return [self._operator.optimizer]

    @property
    def lr_scheduler_configs(self) -> list[Any]:
        """The schedulers, each with its interval and frequency."""
        return list(self._operator.schedules.members)

    @property
    def precision_plugin(self) -> GradientClipping:
        """What the module's ``clip_gradients`` clips with."""
        return GradientClipping()

    @property
    def lightning_module(self) -> Any:
        """The module."""
        return self._operator.model

    @property
    def train_dataloader(self) -> Any:
        """The training loader as this rank sees it."""
        return self._operator.train_loader

    @property
    def val_dataloaders(self) -> Any:
        """The validation loader as this rank sees it."""
        return self._operator.validation_loader

    @property
    def num_training_batches(self) -> float:
        """Batches of a training pass on this rank; infinite if not known."""
        return _length(self._operator.train_loader)

    @property
    def num_val_batches(self) -> list[float]:
        """Batches of a validation on this rank, in a list; infinite if not known."""
        return [] if self._operator.validation_loader is None else [_length(self._operator.validation_loader)]


def _length(loader: Any) -> float:
    if loader is None:
        return 0
    try:
        return len(loader)
    except TypeError:  # of unknown length
        return float("inf")
