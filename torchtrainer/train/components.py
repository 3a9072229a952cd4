"""Models, optimizers, criterion and schedulers of an operator: checked, moved to the device, compiled and wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from torchtrainer.comm.group import GroupCollective
from torchtrainer.comm.hooks import compress
from torchtrainer.comm.shared_memory import why_no_room
from torchtrainer.comm.wrapping import Exchanging, ddp_of, unwrap, wrap
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError
from torchtrainer.train.compiling import compile_model
from torchtrainer.train.data_order import Dealing, even_of
from torchtrainer.train.formats import lay_out
from torchtrainer.train.fully_sharded import FullySharded
from torchtrainer.train.optimizers import choose_form
from torchtrainer.train.refetching import Losing
from torchtrainer.train.sharding import Unsharded
from torchtrainer.train.weights import some
from torchtrainer.train.zero import ShardedOptimizers

if TYPE_CHECKING:
    from torchtrainer.operator import OperatorContext, TrainingOperator
    from torchtrainer.train.data import RankLoader
    from torchtrainer.train.loop import StepIterator
    from torchtrainer.train.metrics import AverageMeterCollection
    from torchtrainer.train.precision import Amp
    from torchtrainer.train.step import GradientClock

_RETIRED = {
    "model": "use models=",
    "optimizer": "use optimizers=",
    "scheduler": "use schedulers=",
    "loss": "use criterion=",
    "apex_args": 'apex is not used; remove it and pass precision="fp16" or "bf16" to TorchTrainer',
    "train_loader": "use self.register_data(train_loader=...)",
    "validation_loader": "use self.register_data(validation_loader=...)",
}


@dataclass(frozen=True, kw_only=True)
class Components:
    """The parts that an operator registered.

    Attributes:
        raw_models: the user's modules: state is taken from and loaded into these.
        models: the same, wrapped for the exchange of gradients where that is needed; hooks call these.
        optimizers: in the order given.
        criterion: the loss, or None.
        schedulers: in the order given.
        ours: gradients of every model are averaged over the ranks by us; none was wrapped by the user.
        no_room: why there is no shared memory for gradients, on any rank; empty if there is.
        follows: by model, whether all ranks take its buffers over from rank 0.
        sharding: how the state is spread over the ranks.
        channels_last: images are to come with their channels last.
    """

    raw_models: list[nn.Module]
    models: list[nn.Module]
    optimizers: list[Any]
    criterion: Any
    schedulers: list[Any]
    ours: bool = False
    no_room: str = ""
    follows: list[bool] = field(default_factory=list)
    sharding: Unsharded = field(default_factory=Unsharded)
    channels_last: bool = False

    @property
    def modules(self) -> list[nn.Module]:
        """The models, and the criterion if it is a module with parameters or buffers that no model has."""
        if not isinstance(self.criterion, nn.Module):
            return self.raw_models
        theirs = {id(one) for model in self.raw_models for one in (*model.parameters(), *model.buffers())}
        own = (one for one in (*self.criterion.parameters(), *self.criterion.buffers()) if id(one) not in theirs)
        return [*self.raw_models, self.criterion] if any(True for _ in own) else self.raw_models

    def followers(self) -> Iterator[tuple[nn.Module, bool]]:
        """Every module, and whether all ranks take its buffers over from rank 0: a criterion's belong to each rank."""
        for place, module in enumerate(self.modules):
            yield module, place < len(self.follows) and self.follows[place]


@dataclass(kw_only=True)
class Internals:
    """What an operator keeps for the loops and the rank that runs it, apart from the attributes that users see and set.

    Attributes:
        context: where the operator lives.
        amp: its mixed precision.
        components: what it registered.
        loaders: its loaders by name, ``train`` and ``validation``.
        steps: the iterator of the call that is running.
        meters: those of the built-in loop in this call, once it ran.
        gradient_clock: in a call that is profiled.
        weighs: the exchange takes the weight of a rank's gradients along, so that nobody has to scale them before.
        loss_count: what the mean of the running step's loss is over, where the loss tells that; None: the samples.
        loss_here: the loss of the running step on this rank, where the optimizer asks for losses; None: it does not.
        loss_of_all: that of all ranks, once they have exchanged it.
        bare_forward: the built-in step exchanges the gradients itself, and calls models without ``DistributedDataParallel``.
    """

    context: OperatorContext
    amp: Amp
    components: Components | None = None
    loaders: dict[str, RankLoader] = field(default_factory=dict)
    steps: StepIterator | None = None
    meters: AverageMeterCollection | None = None
    gradient_clock: GradientClock | None = None
    weighs: bool = False
    loss_count: Any = None
    loss_here: float | None = None
    loss_of_all: float | None = None
    bare_forward: bool = False


def internals(operator: TrainingOperator) -> Internals:
    """The library's own part of an operator."""
    return operator._internals  # the one place: users see none of it among their own attributes


def optimizers_of(operator: TrainingOperator) -> list[Any]:
    """The registered optimizers, and one that the user only put in ``self.optimizer`` or ``self.optimizers``."""
    components = internals(operator).components
    found = list(components.optimizers) if components is not None else []
    for name in ("optimizer", "optimizers"):
        for one in as_list(operator.__dict__.get(name)):
            if hasattr(one, "param_groups") and not any(one is known for known in found):
                found.append(one)
    return found


class Registered:
    """What an operator registered, under a private name that programs for RaySGD read; the user's own attribute comes first."""

    def __init__(self, part: str) -> None:
        self._part = part

    def __get__(self, operator: TrainingOperator | None, kind: type) -> Any:
        components = internals(operator).components if operator is not None else None
        if components is None:
            raise AttributeError(f"{kind.__name__} has registered no {self._part} yet")
        return getattr(components, self._part)


def as_list(value: Any) -> list[Any]:
    """The members of a tuple or list; anything else, an ``nn.Sequential`` for instance, is one component."""
    return list(value) if isinstance(value, list | tuple) else [value]


def in_shape_of(given: Any, members: list[Any]) -> Any:
    """Members in the container that was given: list, tuple, or the single object."""
    if isinstance(given, list):
        return list(members)
    return tuple(members) if isinstance(given, tuple) else members[0]


def check_models(value: Any, who: str) -> list[nn.Module]:
    """The modules in ``value``, or a TypeError that shows what is not a module.

    Raises:
        InvalidArgumentError: parameters have no shape yet.
    """
    found = _check(value, who, "an nn.Module, or several in a tuple or list", lambda one: isinstance(one, nn.Module))
    for model in found:
        lazy = [name for name, one in (*model.named_parameters(), *model.named_buffers()) if is_lazy(one)]
        if lazy:
            raise InvalidArgumentError(
                f"{who} must have parameters with shapes, but {some(lazy)} of {type(model).__name__} are of lazy modules and have "
                "none yet. Call the model once on an example batch where you make it, before you make the optimizer: "
                "model(torch.zeros(2, ...))"
            )
    return found


def check_optimizers(value: Any, who: str) -> list[Any]:
    """The optimizers in ``value``; anything that steps and has a state counts as one."""
    return _check(value, who, "a torch optimizer, or several in a tuple or list", _steps)


def check_schedulers(value: Any, who: str) -> list[Any]:
    """The learning rate schedulers in ``value``."""
    return _check(value, who, "a learning rate scheduler, or several in a tuple or list", _steps, empty=True)


def _check(value: Any, who: str, expected: str, fits: Callable[[Any], bool], *, empty: bool = False) -> list[Any]:
    members = as_list(value)
    if not members and not empty:
        raise InvalidArgumentTypeError(f"{who} must be {expected}; got an empty {type(value).__name__}")
    for index, member in enumerate(members):
        if isinstance(member, type) or not fits(member):
            where = f" at place {index}" if isinstance(value, list | tuple) else ""
            raise InvalidArgumentTypeError(
                f"{who} must be {expected}; got {member!r} of type {type(member).__name__}{where}"
            )
    return members


def _steps(value: Any) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("step", "state_dict", "load_state_dict"))


def refuse_retired(arguments: dict[str, Any]) -> None:
    """A TypeError for arguments that ``register`` does not take, with what to use instead."""
    for name in arguments:
        advice = _RETIRED.get(name, "it takes models, optimizers, criterion, schedulers and ddp_args")
        raise InvalidArgumentTypeError(f"register() does not take {name!r}: {advice}")


def place(
    *,
    models: Any,
    optimizers: Any,
    criterion: Any,
    schedulers: Any,
    ddp_args: Any,
    context: OperatorContext,
    stock: bool,
) -> Components:
    """Checks everything, then puts it on the device, compiles and wraps it. A collective call, made by every rank.

    Optimizers keep working: moving a module keeps its parameters the same objects. ``stock``: only the built-in step handles
    gradients, which may then lie in the memory that is exchanged.
    """
    settings = context.settings
    raw = [unwrap(model) for model in check_models(models, "register(models=...)")]
    given = as_list(models)
    stepping = check_optimizers(optimizers, "register(optimizers=...)")
    scheduling = [] if schedulers is None else check_schedulers(schedulers, "register(schedulers=...)")
    if ddp_args is not None and not isinstance(ddp_args, dict):
        raise InvalidArgumentError(f"ddp_args needs to be a dict object. Got {ddp_args!r}")
    if scheduling and settings.scheduler_step_freq is None:
        raise InvalidArgumentError(
            "a scheduler was registered, but scheduler_step_freq of TorchTrainer is None; set it to 'batch', 'epoch' or "
            "'manual' (stepped by update_scheduler or by your own code)"
        )
    laid_out = [
        _placed(model, context, compiled=one is not model and ddp_of(one) is None)
        for model, one in zip(raw, given, strict=True)
    ]
    if isinstance(criterion, nn.Module):
        criterion = criterion.to(context.device)
    for optimizer in stepping:
        _move_state(optimizer, context.device)
        reason = choose_form(optimizer, settings.fused, half=settings.precision == "bf16")
        if reason and context.say is not None:
            context.say(f"fused=True: {reason}; it steps as it is")
    return _wrapped(
        Components(
            raw_models=raw,
            models=given,
            optimizers=stepping,
            criterion=criterion,
            schedulers=scheduling,
            channels_last=any(laid_out),
        ),
        {**({"gradient_as_bucket_view": True} if stock else {}), **settings.ddp_args, **(ddp_args or {})},
        context,
    )


def _placed(model: nn.Module, context: OperatorContext, *, compiled: bool) -> bool:
    """Moves a model to the device and has it compiled, unless the user did; returns whether its images are to have their channels last."""
    settings = context.settings
    model.to(context.device)
    laid_out = lay_out(model, settings.memory_format, device=context.device, half=settings.precision != "fp32")
    if settings.compile and not compiled:
        compile_model(model, settings.compile if isinstance(settings.compile, dict) else {}, say=context.say)
    return laid_out


def _wrapped(plain: Components, ddp_args: dict[str, Any], context: OperatorContext) -> Components:
    """The same with its models wrapped, except for those that the user has wrapped."""
    wanted = context.collective.world_size > 1 and context.settings.wrap_ddp
    ours = [wanted and (ddp_of(given) is None or isinstance(given, Exchanging)) for given in plain.models]
    if wanted and context.settings.strategy == "fsdp":
        return _fully_sharded(plain, ddp_args, context, ours)
    no_room = _no_room(plain, context)
    in_memory = context.in_memory and not no_room
    models = [
        wrap(given, device=context.device, ddp_args=ddp_args, in_memory=in_memory)
        if mine and not isinstance(given, Exchanging)  # registered once more
        else given
        for given, mine in zip(plain.models, ours, strict=True)
    ]
    if wanted and context.settings.comm_hook is not None:
        for model, mine in zip(models, ours, strict=True):
            if mine and isinstance(model, DistributedDataParallel):
                compress(model, context.settings.comm_hook)
    follows = [_follows_first_rank(model, mine, ddp_args) for model, mine in zip(models, ours, strict=True)]
    found = replace(plain, models=models, ours=all(ours), no_room=no_room, follows=follows)
    if wanted and context.settings.strategy == "zero1":
        found = replace(found, sharding=ShardedOptimizers(plain.optimizers, _group(context)))
    return found


def _fully_sharded(
    plain: Components, ddp_args: dict[str, Any], context: OperatorContext, ours: list[bool]
) -> Components:
    """The same with its models and optimizers divided between the ranks."""
    if not all(ours):
        raise InvalidArgumentError(
            'strategy="fsdp" divides models itself: register them without DistributedDataParallel around them'
        )
    sharding = FullySharded(
        plain.raw_models,
        plain.optimizers,
        device=context.device,
        collective=_group(context),
        broadcast_buffers=bool(ddp_args.get("broadcast_buffers", True)),
    )
    follows = [_follows_first_rank(model, mine, ddp_args) for model, mine in zip(plain.raw_models, ours, strict=True)]
    return replace(plain, ours=True, follows=follows, sharding=sharding)


def dealing_of(operator: TrainingOperator, *, training: bool) -> Dealing:
    """How an operator's loaders are dealt to the ranks."""
    settings = internals(operator).context.settings

    def smallest() -> int:
        if settings.min_batch_size != "auto":
            return settings.min_batch_size
        placed = internals(operator).components
        parts = (part for model in (placed.raw_models if placed else []) for part in model.modules())
        return 2 if training and any(isinstance(part, _BatchNorm) for part in parts) else 1

    return Dealing(
        shard=settings.add_dist_sampler,
        batch_shares=internals(operator).context.batch_shares,
        even=even_of(settings.even_batches),
        smallest=smallest,
    )


def losing_of(operator: TrainingOperator) -> Losing:
    """What an operator's rank does about loader processes that die."""
    context = internals(operator).context
    return Losing(tell=context.progress.loader_lost, max_failures=context.settings.max_failures)


def _group(context: OperatorContext) -> GroupCollective:
    assert isinstance(context.collective, GroupCollective)  # as always where gradients do not go through memory
    return context.collective


def _no_room(plain: Components, context: OperatorContext) -> str:
    """Why gradients cannot go through shared memory; the ranks agree, and each asks before any of them takes some."""
    if not context.in_memory:
        return ""
    groups = [group for one in plain.optimizers for group in getattr(one, "param_groups", ())]
    every = [
        *(one for group in groups for one in group["params"]),
        *(one for m in plain.modules for one in m.parameters()),
    ]
    parameters = list({id(one): one for one in every if one.requires_grad}.values())
    found: list[str] = context.collective.all_gather(why_no_room(parameters, context.collective.world_size))
    return next((reason for reason in found if reason), "")


def _follows_first_rank(model: nn.Module, ours: bool, ddp_args: dict[str, Any]) -> bool:
    trained = any(one.requires_grad for one in model.parameters())
    default = ddp_args.get("broadcast_buffers", True) if ours and trained else False
    return bool(getattr(model, "broadcast_buffers", default))


def _move_state(optimizer: Any, device: torch.device) -> None:
    """Moves an optimizer's state to the device; its step counters (0-d) stay where torch keeps them."""
    if device.type == "cpu":
        return
    for state in getattr(optimizer, "state", {}).values():
        for key, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim() > 0:
                state[key] = value.to(device)
