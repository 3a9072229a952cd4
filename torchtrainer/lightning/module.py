"""Reads a Lightning module: its class, loaders, step signatures and losses; and says what of it cannot be used here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, NotAvailableError

_NEVER_CALLED = ("on_train_end", "on_fit_end", "teardown", "configure_callbacks")


def find_base(value: Any) -> Any:
    """The ``LightningModule`` that a class derives from, whichever package it is of; None: it does not."""
    for base in value.__mro__ if isinstance(value, type) else ():
        packages = ("lightning.pytorch.", "pytorch_lightning.")
        if base.__name__ == "LightningModule" and base.__module__.startswith(packages):
            return base
    return None


def create(module_cls: Any, config: dict[str, Any]) -> Any:
    """Makes the module; ``config`` goes to a parameter of that name.

    Raises:
        InvalidArgumentTypeError: its ``__init__`` needs other arguments.
    """
    signature = inspect.signature(module_cls)
    arguments = {"config": config} if "config" in signature.parameters else {}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise InvalidArgumentTypeError(
            f"{module_cls.__name__} is made with config alone, or with nothing if it has no parameter config: {error}. "
            f"Take the others from config, or give them defaults"
        ) from None
    return module_cls(**arguments)


def overrides(module: Any, base: Any, hook: str) -> bool:
    """Whether the user wrote this hook."""
    return hook in vars(module) or getattr(type(module), hook) is not getattr(base, hook)


def check_module(module: Any, base: Any, *, scaling: bool, warn: bool) -> None:
    """Refuses a module that cannot be trained here.

    Args:
        module: the user's.
        base: Lightning's class.
        scaling: losses are scaled, and steps may be left out.
        warn: also warn of hooks that are never called.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise NotAvailableError(
            f"{name} sets automatic_optimization = False; manual optimization is not available here. Return the loss from "
            f"training_step, or write a TrainingOperator, whose train_batch does what it likes"
        )
    if not overrides(module, base, "training_step"):
        raise InvalidArgumentError(f"{name} has no training_step; write one that returns the loss")
    for step in ("training_step", "validation_step"):
        if "dataloader_iter" in inspect.signature(getattr(module, step)).parameters:
            raise NotAvailableError(
                f"{step} of {name} takes dataloader_iter, which is not available here; take a batch"
            )
    if scaling and overrides(module, base, "optimizer_step"):
        raise NotAvailableError(
            f'{name} overrides optimizer_step, which is not available with precision="fp16", where a step may be left out; '
            f'use precision="bf16" or "fp32"'
        )
    ignored = [hook for hook in _NEVER_CALLED if overrides(module, base, hook)]
    if ignored and warn:
        warnings.warn(f"torchtrainer does not call {', '.join(ignored)} of {name}", stacklevel=2)


def choose_loader(given: Any, module: Any, base: Any, hook: str) -> Any:
    """The loader that was given, else the module's own; None if there is none.

    Raises:
        NotAvailableError: several loaders.
    """
    loader = given
    if loader is None and overrides(module, base, hook):
        loader = getattr(module, hook)()
    if not isinstance(loader, list | tuple | dict):
        return loader
    members = list(loader.values()) if isinstance(loader, dict) else list(loader)
    if len(members) > 1:
        raise NotAvailableError(
            f"{hook} of {type(module).__name__} gives {len(members)} loaders; only one is available here. Join the data "
            f"sets, with torch.utils.data.ConcatDataset for instance"
        )
    return members[0] if members else None


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


def validation_loss(output: Any) -> torch.Tensor | None:
    """The loss that ``validation_step`` returned, as a 0-d tensor; None if it returned none."""
    loss = output.get("val_loss", output.get("loss")) if isinstance(output, Mapping) else output
    return loss.reshape(()) if isinstance(loss, torch.Tensor) and loss.numel() == 1 else None


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return f"a dict with the keys {list(output)} and loss={output.get('loss')!r}"
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else repr(output)


class TrainingStep(nn.Module):
    """Calls ``training_step`` as a forward pass, which is where ``DistributedDataParallel`` prepares its exchange.

    Args:
        module: the user's; it is not changed, and its state is taken from itself.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module: Any = module

    def forward(self, *arguments: Any) -> Any:
        """What ``training_step`` returns."""
        return self.module.training_step(*arguments)
