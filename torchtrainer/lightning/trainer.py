"""What a Lightning module finds when it looks at ``self.trainer``: the run that it is part of, to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchtrainer.errors import NotAvailableError
from torchtrainer.lightning.building import LENGTHS
from torchtrainer.lightning.strategy import StrategyView
from torchtrainer.train.components import internals

if TYPE_CHECKING:
    from torchtrainer.lightning import LightningOperator

_LENGTH = "how long to train is decided call by call; put {name} into config for a module that has to know it before"
_ADVICE = {
    "max_epochs": _LENGTH.format(name="max_epochs"),
    "max_steps": _LENGTH.format(name="max_steps"),
    "estimated_stepping_batches": _LENGTH.format(name="max_epochs, or max_steps,"),
    "should_stop": "it cannot be set; stop by not calling train() again",
}
_PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


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

    _operator: LightningOperator

    accumulate_grad_batches = 1
    barebones = False
    callbacks: tuple[Any, ...] = ()
    check_val_every_n_epoch = 1
    fast_dev_run = False
    gradient_clip_algorithm = None
    gradient_clip_val = None
    log_dir = None
    logger = None
    min_epochs = None
    min_steps = None
    num_sanity_val_steps = 0
    predicting = False
    progress_bar_callback = None
    sanity_checking = False
    should_stop = False
    testing = False

    def __init__(self, operator: LightningOperator) -> None:
        self.__dict__["_operator"] = operator

    def __getattr__(self, name: str) -> Any:
        advice = _ADVICE.get(
            name, "it is not supported here; override a hook of the operator that from_ptl returns instead"
        )
        raise TrainerAttributeError(f"self.trainer.{name}: the module is trained by torchtrainer. {advice}")

    def __setattr__(self, name: str, value: Any) -> None:
        advice = _ADVICE.get(name, "the module cannot change what self.trainer shows")
        raise TrainerAttributeError(f"self.trainer.{name} = {value!r}: the module is trained by torchtrainer. {advice}")

    def print(self, *arguments: Any, **options: Any) -> None:
        """Prints on rank 0."""
        if self.is_global_zero:
            print(*arguments, **options)

    @property
    def current_epoch(self) -> int:
        """Index of the training pass, from 0."""
        return self._operator.position.epoch_idx

    @property
    def global_step(self) -> int:
        """Optimizer steps taken: with manual optimization those of all optimizers."""
        operator = self._operator
        if not operator.model.automatic_optimization:
            return operator.stepping.updates
        return operator.global_step + operator.position.stepped

    @property
    def max_epochs(self) -> int:
        """As ``config`` has it."""
        return int(self._length("max_epochs"))

    @property
    def max_steps(self) -> int:
        """As ``config`` has it; -1 if it has only ``max_epochs``."""
        return int(self._length("max_steps", -1 if "max_epochs" in self._lengths else None))

    @property
    def estimated_stepping_batches(self) -> float:
        """Optimizer steps of the whole training, by what ``config`` says of its length."""
        lengths = self._lengths
        if not lengths:
            return float(self.__getattr__("estimated_stepping_batches"))
        steps = lengths.get("max_steps", float("inf"))
        if "max_epochs" in lengths:
            steps = min(steps, lengths["max_epochs"] * self.num_training_batches)
        return float(steps) if steps == float("inf") else int(steps)

    @property
    def is_last_batch(self) -> bool:
        """Whether the batch that is worked on is the last one of the pass."""
        return (self._operator.position.batch_idx or 0) + 1 >= self.num_training_batches

    @property
    def precision(self) -> str:
        """In Lightning's words."""
        return _PRECISIONS[internals(self._operator).context.settings.precision]

    @property
    def strategy(self) -> StrategyView:
        """The ranks."""
        return StrategyView(self._operator)

    @property
    def default_root_dir(self) -> str:
        """The working directory."""
        return str(Path.cwd())

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
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The same."""
        return self.callback_metrics

    @property
    def optimizers(self) -> list[Any]:
        """The optimizers."""
        return list(self._operator.optimizers)

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
    def model(self) -> Any:
        """The module."""
        return self._operator.model

    @property
    def datamodule(self) -> Any:
        """The data module; None: there is none."""
        return self._operator.data.datamodule

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

    @property
    def _lengths(self) -> Mapping[str, Any]:
        """What ``config`` says of the length of the training."""
        config = self._operator.config
        known = isinstance(config, Mapping)
        return {name: config[name] for name in LENGTHS if known and config.get(name) is not None}

    def _length(self, name: str, default: Any = None) -> Any:
        found = self._lengths.get(name, default)
        return self.__getattr__(name) if found is None else found


def _length(loader: Any) -> float:
    if loader is None:
        return 0
    try:
        return len(loader)
    except TypeError:  # of unknown length
        return float("inf")
