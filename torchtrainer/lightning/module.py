"""Reads a Lightning module: its class, step signatures, losses and metrics; and says what cannot be used here."""

from __future__ import annotations

import inspect
import numbers
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from torchtrainer.config import BATCH_COUNT, NUM_SAMPLES
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, NotAvailableError
from torchtrainer.train.step import reading

_POSITIONS = (BATCH_COUNT, "epoch", "profile")
RESULT_KEYS = (NUM_SAMPLES, *_POSITIONS)
"""Names that the results reserve for their own entries."""
_NEVER_CALLED = ("on_train_end", "on_fit_end", "teardown", "configure_callbacks")
_REMOVED = ("training_epoch_end", "validation_epoch_end")


def find_base(value: Any, name: str = "LightningModule") -> Any:
    """The class of Lightning, of either package, that a class derives from; None: it does not."""
    for base in value.__mro__ if isinstance(value, type) else ():
        packages = ("lightning.pytorch.", "pytorch_lightning.")
        if base.__name__ == name and base.__module__.startswith(packages):
            return base
    return None


def overrides(module: Any, base: Any, hook: str) -> bool:
    """Whether the user wrote this hook."""
    return hook in vars(module) or getattr(type(module), hook, None) is not getattr(base, hook, None)


def check_module(module: Any, base: Any, *, warn: bool) -> None:
    """Refuses a module that cannot be trained here.

    Args:
        module: the user's.
        base: Lightning's class.
        warn: also warn of hooks that are never called.
    """
    name = type(module).__name__
    if not overrides(module, base, "training_step"):
        raise InvalidArgumentError(f"{name} has no training_step; write one that returns the loss")
    for step in ("training_step", "validation_step"):
        if "dataloader_iter" in inspect.signature(getattr(module, step)).parameters:
            raise NotAvailableError(
                f"{step} of {name} takes dataloader_iter, which is not supported here; take a batch"
            )
    for hook in _REMOVED:
        if overrides(module, base, hook):
            raise NotAvailableError(
                f"{name} has {hook}, which Lightning removed in version 2: keep what the steps return in an attribute of the "
                f"module, and use on_{hook.replace('training', 'train')}"
            )
    ignored = [hook for hook in _NEVER_CALLED if overrides(module, base, hook)]
    if ignored and warn:
        warnings.warn(f"torchtrainer does not call {', '.join(ignored)} of {name}", stacklevel=2)


def step_arguments(step: Callable[..., Any], batch: Any, batch_idx: int) -> tuple[Any, ...]:
    """``(batch,)``, or ``(batch, batch_idx)`` where the step takes more than the batch."""
    parameters = inspect.signature(step).parameters.values()
    positional = [one for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    open_ended = any(one.kind is one.VAR_POSITIONAL for one in parameters)
    return (batch, batch_idx) if len(positional) > 1 or open_ended else (batch,)


def training_loss(output: Any, who: str, world_size: int) -> torch.Tensor | None:
    """The loss that ``training_step`` returned, as a 0-d tensor; None: the batch is to be skipped.

    Raises:
        InvalidArgumentTypeError: there is no loss in it.
        NotAvailableError: one of several ranks skips a batch, for which the others would wait.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if isinstance(loss, torch.Tensor) and loss.numel() == 1:
        return loss.reshape(())
    if output is not None:
        raise InvalidArgumentTypeError(
            f"training_step of {who} must return the loss, a tensor with one element, or a dict with it under 'loss', or "
            f"None; got {_describe(output)}"
        )
    if world_size > 1:
        raise NotAvailableError(
            f"training_step of {who} returned None to skip the batch, but the other {world_size - 1} ranks wait for this "
            f"rank's gradients: return a loss that is multiplied with 0, or train with num_workers=1"
        )
    return None


def step_metrics(output: Any, loss_name: str) -> dict[str, Any]:
    """What a step returned as metrics: a loss under ``loss_name``, and every other number of a dict under its own name.

    Args:
        output: a loss, or a dict that may have one under ``loss``; numbers are tensors with one element too. ``num_samples``
            in it weighs the others.
        loss_name: ``train_loss`` or ``val_loss``.
    """
    named = output if isinstance(output, Mapping) else {"loss": output}
    found = {str(name): _number(value) for name, value in named.items()}
    metrics = {name: found[name] for name in found if found[name] is not None and name not in _POSITIONS}
    loss = metrics.pop("loss", None)
    return metrics if loss is None or loss_name in metrics else {loss_name: loss, **metrics}


def _number(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return reading(value.reshape(())) if value.numel() == 1 else None
    return float(value) if isinstance(value, numbers.Real) else None


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict with the keys {list(output)} and loss={output.get('loss')!r}"
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else repr(output)


class ForwardPass(nn.Module):
    """Makes a call as the forward pass of a module, which is where ``DistributedDataParallel`` prepares its exchange.

    Args:
        module: the user's, whose parameters are exchanged; it is not changed, and its state is taken from itself.
        partial: passes use a part of the parameters, another one each time.
    """

    def __init__(self, module: nn.Module, *, partial: bool) -> None:
        super().__init__()
        self.module = module
        if partial:  # DDP looks for unused parameters then, and warns of a pass that has none
            self.unused = nn.Parameter(torch.zeros(1, device=next(module.parameters()).device))

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns."""
        return function(*arguments)
