"""Finds what an operator holds besides registered parts: tensors and numbers reachable from its attributes.

A checkpoint has of it what the operator's ``state_dict`` returns. ``torchtrainer verify-resume`` compares all of it, so that
what was forgotten there is seen.
"""

from __future__ import annotations

import random
import sys
import sysconfig
from collections import deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler

from torchtrainer.train.components import internals
from torchtrainer.train.digest import MAX_DEPTH, has_members, is_plain, leaves, member

if TYPE_CHECKING:
    from torchtrainer.operator import TrainingOperator

OURS = frozenset({"_internals", "timers", "train_loader", "validation_loader", "global_step"})
"""Attributes that the library keeps in an operator."""
_INSTALLED = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def held_values(operator: TrainingOperator) -> dict[str, Any]:
    """Tensors, arrays, generators and numbers by name, such as ``self.teacher.weight``.

    What is registered is left out, as it is in every checkpoint; so are data sets, as the batches are compared. Numbers in objects
    of installed packages are too: writers and progress bars count what concerns nobody.
    """
    components, seen = internals(operator).components, {id(operator)}
    if components is not None:
        seen.update(map(id, (*components.optimizers, *components.schedulers)))
        for model in components.raw_models:
            seen.update(id(one) for one in model.parameters())
            seen.update(id(one) for one in model.state_dict(keep_vars=True).values())
    found: dict[str, Any] = {}
    for name, value in vars(operator).items():
        if name not in OURS:
            found.update(_reached(value, f"self.{name}", seen, numbers=True))
    return found


def _reached(value: Any, name: str, seen: set[int], *, numbers: bool, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Everything that counts below a value, once.

    Args:
        value, name: where to begin.
        seen: identities of objects that were reached before.
        numbers: plain numbers count.
        depth: how many objects are above it.
    """
    if is_plain(value):
        if numbers and isinstance(value, bool | int | float | complex):
            yield name, value
        return
    if id(value) in seen or depth > MAX_DEPTH or isinstance(value, Dataset | DataLoader | Sampler):
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor) or hasattr(value, "tobytes"):
        yield name, value
    elif isinstance(value, torch.Generator):
        yield name, value.get_state()
    elif isinstance(value, random.Random):
        yield name, value.getstate()
    elif isinstance(value, torch.optim.Optimizer):
        yield from leaves(value.state_dict(), name)
    else:
        for key, one in _members(value):
            inner = numbers if isinstance(value, Mapping | list | tuple | deque) else _is_of_the_script(value)
            yield from _reached(one, member(name, key), seen, numbers=inner, depth=depth + 1)


def _members(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a container or an object consists of."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, list | tuple | deque):
        yield from enumerate(value)
    elif isinstance(value, nn.Module):
        yield from (pair for part in (value._parameters, value._buffers, value._modules) for pair in part.items())
        yield from ((name, one) for name, one in vars(value).items() if not name.startswith("_") and name != "training")
    elif has_members(value):
        yield from vars(value).items()


def _is_of_the_script(value: Any) -> bool:
    """Whether the class of an object is not one of an installed package."""
    module = sys.modules.get(type(value).__module__)
    path = getattr(module, "__file__", None)
    return path is None or not path.startswith(_INSTALLED)
