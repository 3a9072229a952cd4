"""Calls the user's creator functions, in a fixed order and each with fresh seeds, and checks what they return."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.nn.modules.loss import _Loss

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, OperatorUseError
from torchtrainer.train.components import check_models, check_optimizers, check_schedulers, in_shape_of, internals
from torchtrainer.train.rng import seed_all

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

Creator = Callable[..., Any]


@dataclass(frozen=True, kw_only=True)
class Creators:
    """The user's creator functions; see `torchtrainer.spec.BuildSpec` for what each takes."""

    model_creator: Creator
    optimizer_creator: Creator
    data_creator: Creator | None = None
    loss_creator: Creator | None = None
    scheduler_creator: Creator | None = None

    def __post_init__(self) -> None:
        for name in ("model_creator", "optimizer_creator"):
            if not callable(getattr(self, name)):
                raise InvalidArgumentError(f"{name} must be a function, got {getattr(self, name)!r}")
        for name in ("data_creator", "loss_creator", "scheduler_creator"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InvalidArgumentError(f"{name} must be a function or None, got {value!r}")
        if isinstance(self.loss_creator, nn.Module):
            raise InvalidArgumentError(
                f"loss_creator must be a loss class or a function of config, got the loss {self.loss_creator!r} itself; "
                f"pass {type(self.loss_creator).__name__} or `lambda config: ...`"
            )


@dataclass(frozen=True, kw_only=True)
class Created:
    """The results of the creators, in the shapes in which they returned them."""

    models: Any
    optimizers: Any
    criterion: Any
    schedulers: Any
    loaders: tuple[Any, Any] | None


def run_creators(creators: Creators, config: dict[str, Any], seed: int) -> Created:
    """Calls data, model, optimizer, scheduler and loss creator in this order, each right after seeding with ``seed``.

    Raises:
        InvalidArgumentTypeError: a creator returned something of the wrong type; the message names it.
        InvalidArgumentError: the data creator returned no loader, an empty one or more than two.
    """
    loaders = None
    if creators.data_creator is not None:
        seed_all(seed)
        loaders = check_loaders(creators.data_creator(config), _who("data_creator", creators.data_creator))
    seed_all(seed)
    models = creators.model_creator(config)
    check_models(models, _who("model_creator", creators.model_creator))
    seed_all(seed)
    optimizers = creators.optimizer_creator(models, config)
    check_optimizers(optimizers, _who("optimizer_creator", creators.optimizer_creator))
    schedulers = None
    if creators.scheduler_creator is not None:
        seed_all(seed)
        schedulers = creators.scheduler_creator(optimizers, config)
        check_schedulers(schedulers, _who("scheduler_creator", creators.scheduler_creator))
    criterion = None
    if creators.loss_creator is not None:
        seed_all(seed)
        criterion = make_loss(creators.loss_creator, config)
    return Created(models=models, optimizers=optimizers, criterion=criterion, schedulers=schedulers, loaders=loaders)


def check_loaders(value: Any, who: str) -> tuple[Any, Any]:
    """``(train, validation or None)`` out of what a data creator returned."""
    if value is None:
        raise InvalidArgumentTypeError(f"{who} must be a loader or (train loader, validation loader); got None")
    loaders = tuple(value) if isinstance(value, list | tuple) else (value,)
    if len(loaders) > 2:
        raise InvalidArgumentError(
            f"Number of loaders must be <= 2. Got {len(loaders)}: {who} must be a loader or (train, validation)"
        )
    if not loaders or loaders[0] is None:
        raise InvalidArgumentError(f"{who} must hold a train loader; got {value!r}")
    for loader, name in zip(loaders, ("train", "validation"), strict=False):
        if loader is not None:
            _check_loader(loader, f"the {name} loader in {who}")
    return loaders[0], loaders[1] if len(loaders) == 2 else None


def _check_loader(loader: Any, who: str) -> None:
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise InvalidArgumentTypeError(
            f"{who} must be something to iterate over, a DataLoader for instance; got {loader!r} of type "
            f"{type(loader).__name__}"
        )
    try:
        batches = len(loader)
    except TypeError:  # of unknown length, over an iterable data set
        return
    if batches == 0:
        raise InvalidArgumentError(
            f"{who} has no batches; its data set is empty, or smaller than one batch with drop_last=True"
        )


def make_loss(creator: Creator, config: dict[str, Any]) -> Any:
    """The loss of a loss creator: a class of ``torch.nn`` is made without arguments, a function gets ``config``."""
    criterion = creator(config) if _takes_config(creator) else creator()
    if not callable(criterion):
        raise InvalidArgumentTypeError(
            f"{_who('loss_creator', creator)} must be a loss that can be called with (output, target); got {criterion!r}"
        )
    return criterion


def _takes_config(creator: Creator) -> bool:
    if isinstance(creator, type) and issubclass(creator, _Loss):
        return False
    try:
        parameters = list(inspect.signature(creator).parameters.values())
    except (TypeError, ValueError):  # a callable written in C
        return True
    if not parameters or parameters[0].kind in (parameters[0].KEYWORD_ONLY, parameters[0].VAR_KEYWORD):
        return False
    first = parameters[0]
    required = first.default is first.empty and first.kind is not first.VAR_POSITIONAL
    return required or first.name == "config" or inspect.isfunction(creator) or inspect.ismethod(creator)


def _who(argument: str, creator: Creator) -> str:
    name = getattr(creator, "__qualname__", None) or repr(creator)
    return f"what {argument} ({name}) returns"


def attach_created(operator: TrainingOperator, creators: Creators, *, lists: bool) -> None:
    """Runs creators and registers what they made; singular attributes are the first of each.

    Args:
        operator: gets the attributes.
        creators: the user's functions.
        lists: plural attributes are always lists (first generation); else they have the shape the creator returned.
    """
    made = run_creators(creators, operator.config, internals(operator).context.settings.seed)
    operator.register(
        models=made.models, optimizers=made.optimizers, criterion=made.criterion, schedulers=made.schedulers
    )
    placed = internals(operator).components
    if placed is None:
        raise OperatorUseError(f"{type(operator).__name__}.register was overridden and did not call super().register")
    operator.criterion = placed.criterion
    schedulers = made.schedulers if made.schedulers is not None else []
    for name, given, members in (
        ("model", made.models, placed.models),
        ("optimizer", made.optimizers, placed.optimizers),
        ("scheduler", schedulers, placed.schedulers),
    ):
        setattr(operator, name, members[0] if members else None)
        setattr(operator, f"{name}s", list(members) if lists or not members else in_shape_of(given, members))
    if made.loaders is not None:
        operator.register_data(train_loader=made.loaders[0], validation_loader=made.loaders[1])
