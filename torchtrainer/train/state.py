"""The state of an operator as plain containers of CPU tensors that share no memory with the training, and back."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from torchtrainer.errors import InvalidArgumentError, OperatorUseError
from torchtrainer.train.components import Components, internals
from torchtrainer.train.sharding import Unsharded
from torchtrainer.train.trained import loose_parameters
from torchtrainer.train.weights import fit, some

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator


def detached(value: Any) -> Any:
    """A copy that shares nothing with ``value``: tensors on the CPU, containers rebuilt, other objects deep-copied."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) is dict:
        return {key: detached(one) for key, one in value.items()}
    if isinstance(value, OrderedDict):
        ordered = OrderedDict((key, detached(one)) for key, one in value.items())
        if hasattr(value, "_metadata"):  # versions of the modules, which load_state_dict reads
            ordered._metadata = copy.deepcopy(value._metadata)  # type: ignore[attr-defined]  # torch puts it there
        return ordered
    if type(value) in (list, tuple):
        return type(value)(detached(one) for one in value)
    return copy.deepcopy(value)


def capture(operator: TrainingOperator, passes_started: int) -> dict[str, Any]:
    """A copy of `live_state`, on the CPU."""
    copied: dict[str, Any] = detached(live_state(operator, passes_started))
    return copied


def live_state(operator: TrainingOperator, passes_started: int) -> dict[str, Any]:
    """The state dict of a trainer; keys as RaySGD's, and ``global_step``. Its tensors are those of the training.

    What the ranks keep in shares is put together, in new tensors: a collective call then.

    Args:
        operator: the operator of any rank: all have the same state.
        passes_started: passes over the training data that were started.
    """
    components = internals(operator).components
    sharding = components.sharding if components else Unsharded()
    state: dict[str, Any] = {
        "epoch": passes_started,
        "global_step": operator.global_step,
        "operator": operator.state_dict(),
        "models": [sharding.model_state(model) for model in components.raw_models] if components else [],
        "optimizers": [sharding.optimizer_state(one) for one in components.optimizers] if components else [],
    }
    if components and len(components.modules) > len(components.raw_models):
        state["criterion"] = components.criterion.state_dict()
    if loose := loose_parameters(operator):
        state["parameters"] = loose
    if components and components.schedulers:
        state["schedulers"] = [scheduler.state_dict() for scheduler in components.schedulers]
    if internals(operator).amp.scaler.is_enabled():
        state["amp_native"] = internals(operator).amp.scaler.state_dict()
    return state


def restore(operator: TrainingOperator, state: Mapping[str, Any]) -> None:
    """Loads a state dict into an operator's models, optimizers, schedulers, loss scaler and own extras.

    Raises:
        InvalidArgumentError: it is not a state dict, or has another number of models, optimizers or schedulers.
        RuntimeError: a model does not fit; torch's message, with the first difference in front.
    """
    _check_fit(operator, state)
    components = internals(operator).components or Components(
        raw_models=[], models=[], optimizers=[], criterion=None, schedulers=[]
    )
    for model, values in zip(components.raw_models, state["models"], strict=True):
        shape_buffers(model, values)
    _load_models(components, state["models"])
    if state.get("criterion") and len(components.modules) > len(components.raw_models):
        components.criterion.load_state_dict(state["criterion"])
    _load_loose(operator, state.get("parameters", ()))
    for optimizer, values in zip(components.optimizers, state["optimizers"], strict=True):
        mine = components.sharding.optimizer_share(optimizer, detached(values))  # torch keeps the tensors it is given
        optimizer.load_state_dict(mine)
    for scheduler, values in zip(components.schedulers, state.get("schedulers", ()), strict=False):
        scheduler.load_state_dict(detached(values))
    if internals(operator).amp.scaler.is_enabled() and state.get("amp_native"):
        internals(operator).amp.scaler.load_state_dict(state["amp_native"])
    for name, order in state.get("orders", {}).items():
        if name in internals(operator).loaders:
            internals(operator).loaders[name].put_order(order)
    operator.global_step = int(state.get("global_step", 0))
    operator.load_state_dict(detached(state.get("operator")))


@torch.no_grad()
def _load_loose(operator: TrainingOperator, values: Sequence[torch.Tensor]) -> None:
    """Loads the parameters that only the optimizers know; a state without any leaves them as they are."""
    loose = loose_parameters(operator)
    if values and [one.shape for one in values] != [one.shape for one in loose]:
        raise OperatorUseError(
            f"the state has {len(values)} parameters that belong to the optimizers alone, with the shapes "
            f"{[tuple(one.shape) for one in values]}; here they are {[tuple(one.shape) for one in loose]}"
        )
    for parameter, value in zip(loose, values, strict=False):
        parameter.copy_(value)


def restore_weights(operator: TrainingOperator, weights: Sequence[Mapping[str, Any]]) -> None:
    """Loads the weights of the models alone; optimizers, schedulers and counters stay as they are.

    Args:
        operator: of any rank.
        weights: by model, under the names that `torchtrainer.train.weights.fit` takes.

    Raises:
        InvalidArgumentError: there are more or fewer models.
        RuntimeError: a model does not fit.
    """
    components = internals(operator).components
    models = components.raw_models if components is not None else []
    _check_count("models", len(models), len(weights))
    assert components is not None
    found = [fit(model.state_dict().keys(), one) for model, one in zip(models, weights, strict=True)]
    _load_models(components, [mine for mine, _ in found])
    others, say = [name for _, names in found for name in names], internals(operator).context.say
    if others and say is not None:
        say(f"the weights of {some(others)} do not belong to the model and were left out")


def shape_buffers(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Gives buffers the shapes and types that they have in a state: those that grow in the training have others when it begins."""
    for path, module in model.named_modules():
        for name, here in module._buffers.items():
            value = state.get(f"{path}.{name}" if path else name)
            if isinstance(value, torch.Tensor) and (
                here is None or (here.shape, here.dtype) != (value.shape, value.dtype)
            ):
                kept = next((one for one in (here, *model.parameters()) if one is not None), value)
                module._buffers[name] = torch.empty_like(value, device=kept.device)


def _load_models(components: Components, states: Sequence[Mapping[str, Any]]) -> None:
    for index, (model, values) in enumerate(zip(components.raw_models, states, strict=True)):
        try:
            model.load_state_dict(components.sharding.model_share(model, values))
        except RuntimeError as error:
            difference = first_difference(model.state_dict(), values)
            raise OperatorUseError(
                f"the state does not fit model {index} of {len(components.raw_models)}, {type(model).__name__}: "
                f"{difference}. Build the model that the state was saved from. torch says: {error}"
            ) from error


def first_difference(here: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """The first key in which two model states differ, by name or shape."""
    for key, value in here.items():
        if key not in given:
            return f"{key} is missing in the state"
        shapes = tuple(getattr(value, "shape", ())), tuple(getattr(given[key], "shape", ()))
        if shapes[0] != shapes[1]:
            return f"{key} has shape {shapes[1]} in the state and {shapes[0]} here"
    extra = next((key for key in given if key not in here), None)
    return f"{extra} is in the state but not in the model" if extra is not None else "keys and shapes are the same"


def _check_fit(operator: TrainingOperator, state: Any) -> None:
    if not isinstance(state, Mapping) or "models" not in state or "optimizers" not in state:
        found = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
        raise InvalidArgumentError(
            f"load_state_dict takes what state_dict returned, a dict with models and optimizers; got {found}"
        )
    components = internals(operator).components
    for name, saved in (("models", state["models"]), ("optimizers", state["optimizers"])):
        here = len(components.raw_models if name == "models" else components.optimizers) if components else 0
        _check_count(name, here, len(saved))
    if "schedulers" in state or (components and components.schedulers):
        _check_count("schedulers", len(components.schedulers) if components else 0, len(state.get("schedulers", ())))


def _check_count(name: str, here: int, saved: int) -> None:
    if here != saved:
        raise InvalidArgumentError(
            f"the state has {saved} {name}, this trainer has {here}; build the same {name} as when the state was saved"
        )
