"""From what the user gave to the trainer to one rank's operator, ready to train."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError
from torchtrainer.operator import CreatorOperator, OperatorContext, TrainingOperator
from torchtrainer.train.components import internals
from torchtrainer.train.creators import Creators, attach_created
from torchtrainer.train.rng import seed_all, seed_rank

if TYPE_CHECKING:
    from torchtrainer.spec import BuildSpec


def build_operator(spec: BuildSpec, context: OperatorContext) -> TrainingOperator:
    """Builds a rank's operator: every rank the same one, then with a random stream of its own.

    Three forms: creators alone; an operator class alone, whose ``setup`` registers everything; both, where the creators'
    results are attached before ``setup`` is called. Every creator, and ``setup``, runs right after seeding.

    Raises:
        InvalidArgumentError: creators are missing, or do not fit the operator class.
        InvalidArgumentTypeError: ``training_operator_cls`` is no subclass of `TrainingOperator`.
    """
    seed = context.settings.seed
    kind: Any = spec.training_operator_cls
    if kind is not None and not (isinstance(kind, type) and issubclass(kind, TrainingOperator)):
        raise InvalidArgumentTypeError(
            f"training_operator_cls must be a subclass of torchtrainer.TrainingOperator, got {kind!r}"
        )
    creators = _creators(spec)
    if kind is None:
        if creators is None:
            raise InvalidArgumentError(
                "TorchTrainer needs model_creator and optimizer_creator, or training_operator_cls; got neither"
            )
        operator: TrainingOperator = TrainingOperator.from_creators(**_arguments(spec))(context)
    else:
        operator = kind(context)
        if creators is not None:
            if issubclass(kind, CreatorOperator):
                raise InvalidArgumentError(
                    f"{kind.__name__} was made by from_creators and has its creators; remove those of TorchTrainer"
                )
            attach_created(operator, creators, lists=True)
    seed_all(seed)
    operator.setup(operator.config)
    check_accumulation(operator)
    if creators is not None or isinstance(operator, CreatorOperator):
        check_stock_loop(operator)
    check_samples(operator)
    seed_rank(seed, context.collective.rank)
    return operator


def _arguments(spec: BuildSpec) -> dict[str, Any]:
    names = ("model_creator", "optimizer_creator", "data_creator", "loss_creator", "scheduler_creator")
    return {name: getattr(spec, name) for name in names}


def _creators(spec: BuildSpec) -> Creators | None:
    """The creators of the spec; None if it has none."""
    arguments = _arguments(spec)
    given = [name for name, value in arguments.items() if value is not None]
    if not given:
        return None
    missing = [name for name in ("model_creator", "optimizer_creator") if name not in given]
    if missing:
        raise InvalidArgumentError(
            f"{' and '.join(missing)} must be given together with {', '.join(given)}; or pass only training_operator_cls, "
            f"whose setup registers everything"
        )
    return Creators(**arguments)


def check_accumulation(operator: TrainingOperator) -> None:
    """Refuses ``accumulate`` where the user's own code makes the update.

    Raises:
        InvalidArgumentError: it does.
    """
    batches, kind = internals(operator).context.settings.accumulate, type(operator)
    own = [
        name for name in ("train_batch", "train_epoch") if getattr(kind, name) is not getattr(TrainingOperator, name)
    ]
    if batches > 1 and own:
        raise InvalidArgumentError(
            f"accumulate={batches} is done by the built-in step, and {kind.__name__} has its own {own[0]}: step the "
            f"optimizer there after every {batches} batches, and leave accumulate at 1"
        )


def check_stock_loop(operator: TrainingOperator) -> None:
    """Refuses what the built-in step of an operator made from creators would silently leave untrained.

    Raises:
        InvalidArgumentError: several models or optimizers, or no loss, and neither hook of the training loop is overridden.
    """
    kind, placed = type(operator), internals(operator).components
    own = kind.train_batch is not TrainingOperator.train_batch or kind.train_epoch is not TrainingOperator.train_epoch
    if own or placed is None:
        return
    for name, members in (("models", placed.models), ("optimizers", placed.optimizers)):
        if len(members) > 1:
            raise InvalidArgumentError(
                f"the built-in training step trains one model with one optimizer, but the creators returned "
                f"{len(members)} {name}; pass training_operator_cls= with a TrainingOperator subclass that overrides "
                f"train_batch or train_epoch"
            )
    if placed.criterion is None:
        raise InvalidArgumentError(
            "the built-in training step needs a loss, but loss_creator is None; pass loss_creator=, for instance "
            "torch.nn.CrossEntropyLoss, or a training_operator_cls= that overrides train_batch or train_epoch"
        )


def check_samples(operator: TrainingOperator) -> None:
    """Refuses training data with fewer samples than there are ranks.

    Raises:
        InvalidArgumentError: there are fewer.
    """
    ranks, train = operator.world_size, internals(operator).loaders.get("train")
    if train is not None and train.samples_per_pass is not None and 0 < train.samples_per_pass < ranks:
        raise InvalidArgumentError(
            f"the train loader has {train.samples_per_pass} samples for num_workers={ranks} ranks, so some ranks would "
            f"never train: use num_workers={train.samples_per_pass} or fewer, or more data"
        )
