"""Number formats of the forward pass: automatic mixed precision from torch's own parts, on the GPU and the CPU."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from torchtrainer.config import Precision

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Amp:
    """Automatic mixed precision of one operator: what hooks use as ``self._amp.autocast()``.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        device: where the models are.

    Attributes:
        scaler: scales the loss, so that small fp16 gradients do not vanish; passes everything through unless ``fp16``.
    """

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._device_type = device.type
        self._dtype = _DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    @property
    def active(self) -> bool:
        """Whether the forward pass runs in half precision."""
        return self._dtype is not None

    def autocast(self) -> AbstractContextManager[Any]:
        """The context for a forward pass and its loss; does nothing with ``fp32``."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device_type, dtype=self._dtype)
