"""Everything that a rank needs to continue with the same bits: captured at a step boundary, and restored.

A complete state has two parts. ``shared`` is the trainer's state dict, alike on all ranks. ``rank`` is what only this rank has:
its random streams, the place of its loaders, the means of the pass in progress, module modes, and whatever state the ranks do
not keep equal. Both are plain containers of tensors, numbers and text, so that they load with ``weights_only=True``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchtrainer.errors import InvalidArgumentError
from torchtrainer.train.components import Components, internals
from torchtrainer.train.metrics import merge_meters
from torchtrainer.train.rng import rng_from_data, rng_to_data, seed_rank
from torchtrainer.train.sampler import derive_seed
from torchtrainer.train.state import live_state, restore, shape_buffers
from torchtrainer.train.trained import known_parameters, loose_parameters

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

OWN_LOOP_HOOKS = ("train_epoch", "train_batch")
"""Hooks that decide when gradients are used up; if they are the user's, gradients belong to the state."""


def shared_state(operator: TrainingOperator) -> dict[str, Any]:
    """The state that is the same on all ranks, as the trainer's state dict; its tensors are those of the training.

    With it go the orders of running passes that samplers of the user's have drawn.
    """
    loaders = internals(operator).loaders
    loader = loaders.get("train")
    state = live_state(operator, loader.passes_started if loader is not None else 0)
    orders = {name: order for name, one in loaders.items() if (order := one.saved_order()) is not None}
    return {**state, "orders": orders} if orders else state


def equal_on_all_ranks(operator: TrainingOperator) -> bool:
    """Whether the ranks keep their models and optimizers equal, so that one of them speaks for all."""
    context, components = internals(operator).context, internals(operator).components
    if context.collective.world_size == 1:
        return True
    if components is None:
        return False
    if components.ours:
        return True
    return all(
        wrapped is not raw or not any(one.requires_grad for one in raw.parameters())
        for raw, wrapped in zip(components.raw_models, components.models, strict=True)
    )


def exchanged_tensors(operator: TrainingOperator) -> set[int]:
    """Addresses of the tensors that are bit for bit equal on all ranks, so that any rank may write them.

    Buffers are not among them: they are those of rank 0, which the others take over before each forward.
    """
    components = internals(operator).components
    if components is None or not equal_on_all_ranks(operator):
        return set()
    modules = components.modules
    found = {one.data_ptr() for one in (*known_parameters(operator), *(p for m in modules for p in m.parameters()))}
    for optimizer in components.optimizers:
        for values in getattr(optimizer, "state", {}).values():
            found.update(one.data_ptr() for one in values.values() if isinstance(one, torch.Tensor))
    return found - {0}


def rank_state(operator: TrainingOperator, modes: Sequence[bool] | None) -> dict[str, Any]:
    """What only this rank has.

    Args:
        operator: of this rank.
        modes: of its modules, as `module_modes` gives them, if the present ones are only for a validation.
    """
    inside = internals(operator)
    state: dict[str, Any] = {
        "rng": rng_to_data(),
        "loaders": {name: loader.state_dict() for name, loader in inside.loaders.items()},
        "modes": module_modes(operator) if modes is None else list(modes),
    }
    if inside.steps is not None:
        state["steps"] = inside.steps.state_dict()
        state["meters"] = inside.meters.state_dict() if inside.meters is not None else None
    components = inside.components
    if not equal_on_all_ranks(operator):
        state["own"] = shared_state(operator)
    elif inside.context.collective.world_size > 1:
        state["operator"] = operator.state_dict()
        if components is not None and not _follow_first_rank(components):
            state["buffers"] = [
                {} if follows else dict(module.named_buffers()) for module, follows in components.followers()
            ]
    if components is not None and _has_own_loop(operator):
        state["gradients"] = [
            {name: components.sharding.whole(one.grad) for name, one in named if one.grad is not None}
            for named in _named_parameters(operator, components)
        ]
    return state


def module_modes(operator: TrainingOperator) -> list[bool]:
    """``training`` of every module, in the order of ``modules()``."""
    components = internals(operator).components
    return [one.training for model in (components.raw_models if components else []) for one in model.modules()]


def put_back(operator: TrainingOperator, shared: Mapping[str, Any], mine: Mapping[str, Any]) -> None:
    """Puts models, optimizers, schedulers, scaler, extras, gradients and random streams where they were.

    The random streams come last: loading draws numbers.

    Raises:
        InvalidArgumentError, OperatorUseError: the state is another model's; the first difference is named.
    """
    whole = dict(mine.get("own") or shared)
    if "operator" in mine:
        whole["operator"] = mine["operator"]
    restore(operator, whole)
    components = internals(operator).components
    for module, buffers in zip(components.modules if components else [], mine.get("buffers", ()), strict=False):
        shape_buffers(module, buffers)
        here = dict(module.named_buffers())
        for name, value in buffers.items():
            here[name].copy_(value)
    if components is not None and "gradients" in mine:
        _put_gradients_back(operator, components, mine["gradients"])
    rng_from_data(mine["rng"])


def put_loaders_back(operator: TrainingOperator, mine: Mapping[str, Any], *, same_ranks: bool) -> None:
    """Moves the loaders to where they were.

    Args:
        operator: of this rank.
        mine: this rank's state.
        same_ranks: the state is of as many ranks as there are now.

    Raises:
        InvalidArgumentError: a loader stands in the middle of a pass that only the same number of ranks can go on with.
    """
    for name, loader in internals(operator).loaders.items():
        position = mine["loaders"].get(name)
        if position is None:
            continue
        if not same_ranks and position["samples"] and not loader.any_world_size:
            raise InvalidArgumentError(
                f"the {name} loader is a stream that was left in the middle of a pass, which only the same number of "
                "ranks can continue: use the same num_workers, or resume=False to start anew"
            )
        loader.load_state_dict(position)


def rank_states_for(
    states: Sequence[Mapping[str, Any]], rank: int, world_size: int, seed: int, step: int
) -> dict[str, Any]:
    """The state of a rank out of those of the ranks that there were; with as many ranks it is its own.

    With another number, a rank that was not there gets random streams of its own, and what the ranks that are gone had added
    to the means of the pass in progress is added to those that are left.

    Args:
        states: by rank, of the run that was interrupted.
        rank, world_size: here and now.
        seed: of the run.
        step: at which it was interrupted.
    """
    if len(states) == world_size:
        return dict(states[rank])
    mine = dict(states[rank] if rank < len(states) else states[0])
    if rank >= len(states):
        seed_rank(derive_seed(seed, step), rank)
        mine["rng"] = rng_to_data()
    theirs = [state for place, state in enumerate(states) if place % world_size == rank]
    if "steps" in mine:
        mine["steps"] = {**mine["steps"], "samples": sum(state["steps"]["samples"] for state in theirs)}
        mine["meters"] = merge_meters([state["meters"] for state in theirs if state["meters"] is not None])
    return mine


def _has_own_loop(operator: TrainingOperator) -> bool:
    from torchtrainer.operator import TrainingOperator as Base

    return any(getattr(type(operator), name) is not getattr(Base, name) for name in OWN_LOOP_HOOKS)


def _follow_first_rank(components: Components) -> bool:
    return all(follows or not any(True for _ in module.buffers()) for module, follows in components.followers())


def _named_parameters(operator: TrainingOperator, components: Components) -> list[list[tuple[str, nn.Parameter]]]:
    """The parameters of each module, and last those that only the optimizers know, by their numbers."""
    loose = [(str(number), one) for number, one in enumerate(loose_parameters(operator))]
    return [*(list(module.named_parameters()) for module in components.modules), loose]


@torch.no_grad()
def _put_gradients_back(
    operator: TrainingOperator, components: Components, gradients: Sequence[Mapping[str, torch.Tensor]]
) -> None:
    for named, saved in zip(_named_parameters(operator, components), gradients, strict=False):
        for name, parameter in named:
            value = saved.get(name)
            if value is None:
                parameter.grad = None
                continue
            mine = components.sharding.share(value, parameter)
            if parameter.grad is None or parameter.grad.layout != mine.layout or mine.is_sparse:
                parameter.grad = mine.to(parameter.device, copy=True)
            else:
                parameter.grad.copy_(mine)


def set_modes(operator: TrainingOperator, modes: Sequence[bool]) -> None:
    """Sets ``training`` of every module, in the order of `module_modes`."""
    components = internals(operator).components
    modules: list[nn.Module] = [
        one for model in (components.raw_models if components else []) for one in model.modules()
    ]
    for module, training in zip(modules, modes, strict=False):
        module.training = training
