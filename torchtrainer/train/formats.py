"""How images lie in memory: channel after channel as torch makes them, or with the channels of a pixel side by side.

Convolutions are faster with the latter ("channels last") on most hardware; their sums are then in another order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
IMAGE_DIMENSIONS = 4
"""Samples, channels, height, width."""


def lay_out(model: nn.Module, memory_format: str | None, *, device: torch.device, half: bool) -> bool:
    """Puts a model's weights into the memory format that was asked for; returns whether its images should follow.

    Args:
        model: on its device; optimizers made before stay valid.
        memory_format: see `torchtrainer.config.TrainSettings`.
        device: of the model.
        half: the forward pass runs in half precision.
    """
    asked = memory_format == "auto" or (memory_format is None and half)  # half precision has other bits anyway
    if memory_format != "channels_last" and not (asked and _wins(model, device, half=half)):
        return False
    model.to(memory_format=torch.channels_last)
    return True


def _wins(model: nn.Module, device: torch.device, *, half: bool) -> bool:
    """Whether channels last makes a model faster: with 2d convolutions on the CPU, and in half precision on GPUs."""
    return any(isinstance(one, _CONVOLUTIONS) for one in model.modules()) and (device.type == "cpu" or half)


def follow(value: Any) -> Any:
    """An input in channels-last form if it is images; anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dim() == IMAGE_DIMENSIONS and value.is_floating_point():
        return value.contiguous(memory_format=torch.channels_last)
    return value
