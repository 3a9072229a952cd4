"""Tells values of data sets apart: by the bits of what they contain."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch


def fingerprint(value: Any) -> int:
    """56 bits that differ if anything in a value does: tensors, arrays, numbers, text, and containers of them.

    Of other objects only the type counts.
    """
    hashed = hashlib.blake2b(digest_size=7)
    _add(hashed, value)
    return int.from_bytes(hashed.digest(), "big")


def _add(hashed: Any, value: Any) -> None:
    hashed.update(type(value).__name__.encode())
    if isinstance(value, torch.Tensor):
        hashed.update(repr((value.dtype, tuple(value.shape))).encode())
        if value.layout is torch.strided and value.numel():
            flat = torch.empty(value.numel(), dtype=value.dtype)  # dense, which what contiguous() returns need not be
            hashed.update(flat.copy_(value.detach().reshape(-1)).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, bool | int | float | complex | str | bytes):
        hashed.update(repr(value).encode())
    elif isinstance(value, Mapping):
        for key, one in value.items():
            _add(hashed, key)
            _add(hashed, one)
    elif isinstance(value, list | tuple):
        for one in value:
            _add(hashed, one)
    elif type(value).__module__ == "numpy":
        hashed.update(repr((value.dtype, value.shape)).encode() + (b"" if value.dtype.hasobject else value.tobytes()))
    elif callable(getattr(value, "tobytes", None)):  # an image
        hashed.update(value.tobytes())
