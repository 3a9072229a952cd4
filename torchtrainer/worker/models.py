"""Sends a model from the rank that trains it to the user: as an object if possible, else as its state."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cloudpickle
import torch
from torch import nn
from torch.nn.utils import parametrize

from torchtrainer.comm.wrapping import unwrap
from torchtrainer.errors import NotSerializableError, OperatorUseError
from torchtrainer.operator import TrainingOperator
from torchtrainer.spec import BuildSpec, rank_config
from torchtrainer.train.components import as_list, internals
from torchtrainer.train.rng import isolated_rng, seed_all
from torchtrainer.train.state import detached

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True, kw_only=True)
class ModelStates:
    """Models that cannot be copied or pickled.

    Attributes:
        states: of the models, on the CPU.
        modes: ``training`` of their modules, in the order of ``modules()``.
        device: where the user wants them.
        reason: why only their states came.
    """

    states: list[Any]
    modes: list[list[bool]]
    device: str
    reason: str


def copies(operator: TrainingOperator, *, to_cpu: bool) -> Any:
    """Copies of an operator's models, which any process can use: one, or a list; `ModelStates` if they cannot be copied."""
    components = internals(operator).components
    if components is None:
        raise OperatorUseError(
            f"no models are registered; call self.register(models=..., optimizers=...) in the setup function of "
            f"{type(operator).__name__}"
        )
    try:
        models = [components.sharding.copy_of(model) for model in components.raw_models]
    except Exception as error:  # of torch, or of whatever the user's module holds
        states = [components.sharding.model_state(model) for model in components.raw_models]
        return _states(components.raw_models, states, "cpu" if to_cpu else str(operator.device), error)
    if to_cpu and operator.device.type != "cpu":  # what is there already is left alone, whatever it is made of
        models = [model.cpu() for model in models]
    return models[0] if len(models) == 1 else models


def pickled(models: Any) -> bytes:
    """What `copies` returned as a pickle: of the models, of models without what does not pickle, or of their states."""
    try:
        return _dumps(models)
    except Exception as error:
        if isinstance(models, ModelStates):
            raise NotSerializableError(f"the state of the model cannot be sent to the driver: {error}") from error
        reason = error
    given = as_list(models)
    for model in given:
        _drop_hooks(model)
    try:
        return _dumps(models)
    except Exception:  # also without its hooks; the first error says more
        device = next((str(one.device) for model in given for one in model.parameters()), "cpu")
        return _dumps(_states(given, [model.state_dict() for model in given], device, reason))


def rebuilt(found: ModelStates, spec: BuildSpec, world_size: int) -> Any:
    """The models, made by the user's creator as the ranks made them, with their trained state; in the driver.

    Args:
        found: what came instead of them.
        spec: of the run.
        world_size: ranks of the run.

    Raises:
        NotSerializableError: there is no creator, or it makes other models.
    """
    creators = getattr(spec.training_operator_cls, "_creators", None)
    creator = spec.model_creator or getattr(creators, "model_creator", None)
    if creator is None:
        raise NotSerializableError(
            f"the model cannot be sent to the driver ({found.reason}), and without model_creator only setup knows how to make it: "
            'build it here, and load trainer.state_dict()["models"][0] into it'
        )
    with isolated_rng():
        seed_all(spec.settings.seed)
        models = [unwrap(one) for one in as_list(creator(rank_config(spec.config, rank=0, world_size=world_size)))]
    try:
        for model, state, modes in zip(models, found.states, found.modes, strict=True):
            model.load_state_dict(state)
            for module, training in zip(model.modules(), modes, strict=False):
                module.training = training
    except (RuntimeError, ValueError) as error:
        raise NotSerializableError(
            f"the model cannot be sent to the driver ({found.reason}), and what model_creator makes does not take its state: "
            f'{error}. Build the model here, and load trainer.state_dict()["models"] into it'
        ) from error
    models = [model.to(found.device) for model in models]
    return models[0] if len(models) == 1 else models


def _states(models: Sequence[nn.Module], states: Sequence[Any], device: str, error: Exception) -> ModelStates:
    return ModelStates(
        states=[detached(state) for state in states],
        modes=[[module.training for module in model.modules()] for model in models],
        device=device,
        reason=str(error).splitlines()[0] if str(error) else type(error).__name__,
    )


def _drop_hooks(model: nn.Module) -> None:
    """Takes away the hooks that do not pickle: they refer to what is in the worker."""
    for module in model.modules():
        for name in _HOOKS:
            hooks = getattr(module, name, None) or {}
            for key in [key for key, hook in hooks.items() if not _pickles(hook)]:
                del hooks[key]


def _pickles(hook: Any) -> bool:
    try:
        cloudpickle.dumps(hook)
    except Exception:
        return False
    return True


def _dumps(value: Any) -> bytes:
    buffer = io.BytesIO()
    _Pickler(buffer).dump(value)
    return buffer.getvalue()


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Pickles also scripted modules, and those of ``torch.nn.utils.parametrize``, whose classes are made as they are parametrized."""

    def reducer_override(self, obj: Any) -> Any:
        """How an object is pickled."""
        if isinstance(obj, torch.jit.ScriptModule):
            buffer = io.BytesIO()
            with _not_deprecated():
                torch.jit.save(obj, buffer)
            return _scripted, (buffer.getvalue(),)
        if isinstance(obj, nn.Module) and parametrize.is_parametrized(obj):
            return _parametrized, (type(obj).__bases__[0], dict(obj.__dict__))
        return super().reducer_override(obj)


@contextmanager
def _not_deprecated() -> Iterator[None]:
    """The user scripts modules, and was told by torch what it thinks of that."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def _scripted(data: bytes) -> Any:
    with _not_deprecated():
        return torch.jit.load(io.BytesIO(data))  # type: ignore[no-untyped-call]  # torch has no types here


def _parametrized(kind: type[nn.Module], members: dict[str, Any]) -> nn.Module:
    module = kind.__new__(kind)
    module.__dict__.update(members)
    parametrize._inject_new_class(module)
    for name in module.parametrizations:  # type: ignore[union-attr]  # a ModuleDict
        parametrize._inject_property(module, name)
    return module
