"""How the state of a training is spread over the ranks, and how it is made whole: checkpoints of all strategies have one form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchtrainer.comm.copies import copy_of
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError

_OF_EVERY_OPTIMIZER = ("param_groups", "state", "defaults")


class Unsharded:
    """``strategy="ddp"``: every rank has the whole state. Base of the strategies in which it has a share.

    A strategy turns shares into whole tensors and back, so that whoever saves and loads knows of none. In the thread that
    trains; every rank makes the same calls, since making something whole takes all shares.

    Attributes:
        in_step: a forward pass exchanges something, so that every rank has to run as many as the others.
        divides_state: each rank has a share of the optimizers' states.
    """

    in_step = False
    divides_state = False

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """All of a parameter, of its gradient or of its optimizer state, of which this rank may have a part."""
        return tensor

    def share(self, tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor.

        Args:
            tensor: whole, and the same on all ranks.
            parameter: of the model; what fits it is divided as it is.
        """
        return tensor

    def gradient_leaves(self, model: nn.Module) -> Iterator[nn.Parameter]:
        """The parameters as autograd sees them, whose hooks get this rank's gradients."""
        yield from model.parameters()

    def model_state(self, model: nn.Module) -> Mapping[str, Any]:
        """The model's whole state dict."""
        return model.state_dict()

    def model_share(self, model: nn.Module, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What the model's ``load_state_dict`` takes on this rank of a whole state dict."""
        return state

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """The optimizer's whole state dict."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def optimizer_share(self, optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
        """What the optimizer's ``load_state_dict`` takes on this rank of a whole state dict."""
        return state

    def copy_of(self, model: nn.Module) -> nn.Module:
        """A copy of the model that any process can use by itself."""
        found: nn.Module = copy_of(model)
        return found

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """While it lasts, the forward pass exchanges nothing: in a validation ranks may have unequal numbers of batches."""
        yield


def check_divisible(optimizer: Any, strategy: str) -> None:
    """Whether an optimizer goes by its parameter groups alone, parameter by parameter, as far as that can be seen.

    Args:
        optimizer: the user's.
        strategy: for which it has to.

    Raises:
        InvalidArgumentTypeError: it is not one of torch's kind.
        InvalidArgumentError: it keeps parameters, or another optimizer, in an attribute.
    """
    kind = type(optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise InvalidArgumentTypeError(f"strategy={strategy!r} divides a torch.optim.Optimizer, got {kind.__name__}")
    for name, value in vars(optimizer).items():
        members = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
        if name not in _OF_EVERY_OPTIMIZER and any(
            isinstance(one, nn.Parameter | torch.optim.Optimizer) for one in members
        ):
            raise InvalidArgumentError(
                f"strategy={strategy!r} cannot divide {kind.__name__}, which updates all parameters together (it keeps them "
                f'in its attribute {name}): use strategy="ddp", or an optimizer that updates each parameter by itself'
            )


def unknown_kinds(optimizers: Iterable[Any]) -> list[str]:
    """Names of the classes of optimizers that are not torch's own, of which nobody knows whether they can be divided."""
    kinds = {type(one) for one in optimizers}
    return sorted(kind.__name__ for kind in kinds if not kind.__module__.startswith("torch.optim"))
