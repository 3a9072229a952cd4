"""Deep copies of models, whatever they keep of their last forward pass."""

from __future__ import annotations

import copy
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def copy_of(module: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A deep copy, also of a module that keeps tensors of its last forward pass, as ``weight_norm`` does: without their graph.

    Args:
        module: any.
        memo: what is copied already, as for ``copy.deepcopy``.
    """
    memo = {} if memo is None else memo
    for tensor in _with_graph(module):
        memo.setdefault(id(tensor), tensor.detach().clone())
    return copy.deepcopy(module, memo)


def _with_graph(module: nn.Module) -> Iterator[torch.Tensor]:
    """The tensors in a module that were computed from others, which torch does not copy."""
    found: list[Any] = [module]
    seen: set[int] = set()
    while found:
        value = found.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            if value.grad_fn is not None:
                yield value
        elif isinstance(value, dict):
            found.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset):
            found.extend(value)
        elif not isinstance(value, type | types.ModuleType | types.FunctionType | types.MethodType):
            found.extend(getattr(value, "__dict__", {}).values())
