"""Tensors and arrays as short texts, without importing torch or NumPy: their objects exist only if they are loaded."""

from __future__ import annotations

import sys
from typing import Any

from torchtrainer.driver.code_names import short_digest

_WHOLE_BYTES = 32 * 1024**2
"""An array up to this size is digested whole; of a larger one, as many evenly spaced bytes are."""


def _is_a(value: Any, module: str, kind: str) -> bool:
    return isinstance(value, getattr(sys.modules.get(module), kind, ()))


def is_initial(value: Any) -> bool:
    """Whether this is a parameter of a model, which begins as random numbers."""
    return _is_a(value, "torch.nn.parameter", "Parameter")


def array_text(value: Any, *, whole: bool = True) -> str | None:
    """A text for a tensor or an array; None: it is neither.

    Args:
        value: anything.
        whole: with a digest of its numbers; False: its type and shape alone.
    """
    if _is_a(value, "torch", "Tensor"):
        text = f"tensor of {value.dtype} {tuple(value.shape)}"
        if not whole:
            return text
        try:
            flat = value.detach().reshape(-1)
            kept = flat[:: _stride(flat.numel() * flat.element_size())]
            return f"{text} #{short_digest(kept.contiguous().cpu().view(sys.modules['torch'].uint8).numpy().tobytes())}"
        except (RuntimeError, TypeError, NotImplementedError):  # sparse, quantized, on no device: by its form alone
            return text
    if _is_a(value, "numpy", "generic"):
        return f"{value.dtype} {value!r}"
    if not _is_a(value, "numpy", "ndarray") or value.dtype.hasobject:
        return None
    flat = value.reshape(-1)
    return f"array of {value.dtype} {value.shape} #{short_digest(flat[:: _stride(value.nbytes)].tobytes())}"


def _stride(size: int) -> int:
    return max(1, -(-size // _WHOLE_BYTES))
