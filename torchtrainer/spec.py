"""What a run is made of: the user's code and options, as every rank gets them. Travels by cloudpickle; no torch here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torchtrainer.config import BATCH_SIZE, TrainSettings
from torchtrainer.errors import InvalidArgumentError
from torchtrainer.topology import share_of

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


@dataclass(frozen=True, kw_only=True)
class BuildSpec:
    """The user's functions and options from which each rank builds its operator.

    Attributes:
        settings: how to train.
        config: handed to every creator and to ``setup``; under `BATCH_SIZE` the batch size of all ranks together.
        model_creator: ``(config)`` -> one module or several.
        data_creator: ``(config)`` -> a loader or ``(train, validation)``.
        optimizer_creator: ``(models, config)`` -> one optimizer or several.
        loss_creator: a loss class, or a function of ``config``, or a callable without arguments.
        scheduler_creator: ``(optimizers, config)`` -> one scheduler or several.
        training_operator_cls: a `TrainingOperator` subclass: alone, or together with creators.
        initialization_hook: called without arguments in every worker process before anything else.
    """

    settings: TrainSettings = field(default_factory=TrainSettings)
    config: dict[str, Any] = field(default_factory=dict)
    model_creator: Callable[..., Any] | None = None
    data_creator: Callable[..., Any] | None = None
    optimizer_creator: Callable[..., Any] | None = None
    loss_creator: Callable[..., Any] | None = None
    scheduler_creator: Callable[..., Any] | None = None
    training_operator_cls: type[TrainingOperator] | None = None
    initialization_hook: Callable[[], Any] | None = None


def rank_config(config: dict[str, Any], *, rank: int, world_size: int) -> dict[str, Any]:
    """The copy of ``config`` that one rank's creators see: its share of the global batch size under `BATCH_SIZE`.

    The shares add up to the global size; the first ranks get one sample more where it does not divide.

    Raises:
        InvalidArgumentError: the global batch size is not a whole number or is smaller than the number of ranks.
    """
    copy = dict(config)
    if BATCH_SIZE in copy:
        size = copy[BATCH_SIZE]
        if not isinstance(size, int) or isinstance(size, bool) or size < world_size:
            raise InvalidArgumentError(
                f"config[BATCH_SIZE] is the batch size of all ranks together and must be a whole number of at least "
                f"num_workers={world_size}, so that every rank gets a sample; got {size!r}"
            )
        copy[BATCH_SIZE] = share_of(size, rank, world_size)
    return copy
