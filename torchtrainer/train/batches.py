"""Batches as the built-in step takes them apart: inputs, target, and how many samples there are."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from torchtrainer.comm.wrapping import unwrap
from torchtrainer.errors import InvalidArgumentTypeError

TARGET_KEYS = ("target", "targets", "label", "labels", "y")
"""Keys under which the built-in step looks for the target in a batch that is a dict, in this order."""

ANY_NAME = "**"
"""Among the names of what a model takes: it takes others, too."""


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor on the device; tuples, lists and dicts keep their shape, other things stay as they are.

    Copies to a GPU are queued behind the work there; from pinned memory they do not make the host wait.
    """
    if device.type == "cpu":
        return batch
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=device.type == "cuda")
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


def parameters_of(model: Any) -> Collection[str]:
    """Names of what a model's forward pass takes; none if it is no module."""
    kind: Any = type(unwrap(model)) if isinstance(model, nn.Module) else None
    return _parameters(kind) if kind is not None else ()


@functools.lru_cache(maxsize=64)
def _parameters(kind: Any) -> Collection[str]:
    found = inspect.signature(kind.forward).parameters.values()
    return frozenset(ANY_NAME if one.kind is one.VAR_KEYWORD else one.name for one in found)


def split_batch(batch: Any, wanted: Collection[str] = ()) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Positional inputs, named inputs and target of a batch.

    ``(*features, target)`` gives positional inputs. A dict gives its target by one of `TARGET_KEYS`; the one other entry
    is the input, and several other entries are named inputs. A model that takes the target by its name gets it, too, and then all
    inputs by name.

    Args:
        batch: from the loader.
        wanted: names of what the model takes.

    Raises:
        InvalidArgumentTypeError: the batch has another form.
    """
    if isinstance(batch, Mapping):
        key = next((name for name in TARGET_KEYS if name in batch), None)
        features = {name: value for name, value in batch.items() if name != key}
        if key is not None and features:
            if key in wanted and (ANY_NAME in wanted or all(name in wanted for name in features)):
                return (), dict(batch), batch[key]
            if len(features) == 1:
                return tuple(features.values()), {}, batch[key]
            return (), features, batch[key]
        found = f"a dict with the keys {list(batch)}"
    elif isinstance(batch, list | tuple) and len(batch) >= 2:
        return tuple(batch[:-1]), {}, batch[-1]
    else:
        found = (
            f"{type(batch).__name__} of length {len(batch)}"
            if isinstance(batch, list | tuple)
            else type(batch).__name__
        )
    raise InvalidArgumentTypeError(
        f"the built-in step takes batches (*features, target), or dicts with the target under one of "
        f"{', '.join(TARGET_KEYS)}; the loader gave {found}. Override train_batch and validate_batch for other batches"
    )


def samples_in(target: Any) -> int:
    """Number of samples of a batch: the first dimension of the first tensor in its target."""
    while isinstance(target, Mapping | list | tuple) and target:
        target = next(iter(target.values())) if isinstance(target, Mapping) else target[0]
    shape: tuple[int, ...] = tuple(getattr(target, "shape", ()))
    return shape[0] if shape else 1


def holds_classes(output: Any, target: Any) -> bool:
    """Whether outputs are scores (N, C, ...) of the classes in the target (N, ...)."""
    if not isinstance(output, torch.Tensor) or not isinstance(target, torch.Tensor):
        return False
    whole = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    return whole and output.dim() >= 2 and output.shape[:1] + output.shape[2:] == target.shape
