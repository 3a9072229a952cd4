"""The parts of a run: the user's code and options, as every rank gets them. Travels by cloudpickle; no torch here."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, MutableMapping
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
        config: the user's mapping, handed to every creator and to ``setup`` as it is; under `BATCH_SIZE` the batch size of all
            ranks together.
        model_creator: ``(config)`` -> one module or several.
        data_creator: ``(config)`` -> a loader or ``(train, validation)``.
        optimizer_creator: ``(models, config)`` -> one optimizer or several.
        loss_creator: a loss class, or a function of ``config``, or a callable without arguments.
        scheduler_creator: ``(optimizers, config)`` -> one scheduler or several.
        training_operator_cls: a `TrainingOperator` subclass: alone, or together with creators.
        initialization_hook: called without arguments in every worker process before anything else.
    """

    settings: TrainSettings = field(default_factory=TrainSettings)
    config: Any = field(default_factory=dict)
    model_creator: Callable[..., Any] | None = None
    data_creator: Callable[..., Any] | None = None
    optimizer_creator: Callable[..., Any] | None = None
    loss_creator: Callable[..., Any] | None = None
    scheduler_creator: Callable[..., Any] | None = None
    training_operator_cls: type[TrainingOperator] | None = None
    initialization_hook: Callable[[], Any] | None = None


def rank_config(config: Any, *, rank: int, world_size: int) -> Any:
    """The copy of ``config`` that one rank's creators see: its share of the global batch size under `BATCH_SIZE`.

    It is of the type that was given. The shares add up to the global size; the first ranks get one sample more where it does
    not divide.

    Raises:
        InvalidArgumentError: the global batch size is not a whole number or is smaller than the number of ranks, or ``config``
            takes no other value for it.
    """
    mine = config if _is_frozen(config) else copy.copy(config)
    if BATCH_SIZE not in config:
        return mine
    size = config[BATCH_SIZE]
    if not isinstance(size, int) or isinstance(size, bool) or size < world_size:
        raise InvalidArgumentError(
            f"config[BATCH_SIZE] is the batch size of all ranks together and must be a whole number of at least "
            f"num_workers={world_size}, so that every rank gets a sample; got {size!r}"
        )
    share = share_of(size, rank, world_size)
    try:
        mine[BATCH_SIZE] = share
    except Exception:  # read-only; each kind of mapping has an error of its own for that
        return _made_anew(config, share)
    return mine


def _is_frozen(config: Any) -> bool:
    """Whether a mapping takes no new values, so that the ranks of a process may share it."""
    return isinstance(config, Mapping) and not isinstance(config, MutableMapping)


def _made_anew(config: Any, size: int) -> Any:
    """A read-only mapping of the same type with another batch size."""
    try:
        return type(config)({**config, BATCH_SIZE: size})
    except Exception as error:
        raise InvalidArgumentError(
            f"config, a {type(config).__name__}, is read-only and cannot be copied with a rank's share of "
            "config[BATCH_SIZE] "
            f"({error}): pass a dict, or set the batch size per rank in data_creator"
        ) from error
