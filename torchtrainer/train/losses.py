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
    return callable(getattr(criterion, "num_samples", None)) or _options(criterion) is not None


def count(criterion: Any, target: Any) -> Any:
    """What the loss of a batch is a mean over; None: its samples.

    Args:
        criterion: the loss.
        target: of the batch, on the device of the loss.

    Returns:
        A number, or on other devices than the CPU a 0-d tensor, so that nobody waits for the device.
    """
    own = getattr(criterion, "num_samples", None)
    if callable(own):
        found = own(target)
    else:
        options = _options(criterion)
        if options is None or not _has_class_numbers(target):
            return None
        weight, ignored = options
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
