"""What a loss is a mean over: its samples, or what it counts among its targets.

A mean of ranks' means is the mean over everything only if each is weighted by what it is a mean over. For most losses that is the
number of samples. The losses of classes leave out ignored targets and weight classes; others may say what they count by a method
``num_samples(target)``.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn
from torch.nn import functional

_MODULES = (nn.CrossEntropyLoss, nn.NLLLoss)
_FUNCTIONS = (functional.cross_entropy, functional.nll_loss)
IGNORED = -100
"""Class number that torch's losses leave out by default."""


def tells_count(criterion: Any) -> bool:
    """Whether a loss says what it is a mean over."""
    return _own_count(criterion) is not None or _options(criterion) is not None


def count(criterion: Any, target: Any) -> Any:
    """What the loss of a batch is a mean over; None: its samples.

    Args:
        criterion: the loss.
        target: of the batch, on the device of the loss.

    Returns:
        A number, or on other devices than the CPU a 0-d tensor, so that nobody waits for the device.
    """
    own = _own_count(criterion)
    if own is not None:
        found = own(target)
    else:
        options = _options(criterion)
        if options is None or not _has_class_numbers(target):
            return None
        weight, ignored = options
        if weight is None and _none_is_ignored(target, ignored):
            return target.numel()
        counted = target != ignored
        found = counted.sum() if weight is None else (weight[target.masked_fill(~counted, 0)] * counted).sum()
    if isinstance(found, torch.Tensor):
        return found.detach() if found.device.type != "cpu" else found.item()
    return found


def counted_classes(criterion: Any, target: torch.Tensor) -> torch.Tensor:
    """Which targets are class numbers that count: not those that the loss leaves out, nor negative ones, which are no classes."""
    options = _options(criterion)
    counts = target >= 0
    return counts if options is None else counts & (target != options[1])


def _own_count(criterion: Any) -> Any:
    """The method ``num_samples`` of a loss; None: it has none."""
    if type(criterion) in _MODULES and "num_samples" not in criterion.__dict__:
        return None  # a module takes long to say that it lacks something
    own = getattr(criterion, "num_samples", None)
    return own if callable(own) else None


def _none_is_ignored(target: torch.Tensor, ignored: int) -> bool:
    """Whether a look that costs nearly nothing shows that no target is left out."""
    return ignored < 0 and target.device.type == "cpu" and target.numel() > 0 and target.min().item() >= 0


def _options(criterion: Any) -> tuple[torch.Tensor | None, int] | None:
    """Class weights and ignored class of a loss of classes that is a mean; None for any other loss."""
    if isinstance(criterion, _MODULES):
        plain = type(criterion).forward in (nn.CrossEntropyLoss.forward, nn.NLLLoss.forward)
        return (criterion.weight, criterion.ignore_index) if plain and criterion.reduction == "mean" else None
    given: dict[str, Any] = {}
    if isinstance(criterion, functools.partial) and not criterion.args:
        criterion, given = criterion.func, criterion.keywords
    if criterion not in _FUNCTIONS or given.get("reduction", "mean") != "mean":
        return None
    return given.get("weight"), given.get("ignore_index", IGNORED)


def _has_class_numbers(target: Any) -> bool:
    return isinstance(target, torch.Tensor) and not target.is_floating_point()
