"""Digests of values: whether two of them have the same bits, without having both."""

from __future__ import annotations

import ctypes
import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from types import ModuleType
from typing import Any

import torch

MAX_DEPTH = 8
"""Depth to which containers and objects are examined."""
SAMPLED_FROM_ELEMENTS, SAMPLE_EVERY = 64 * 1024, 61
"""Where a sample is enough: of larger tensors every 61st element; a prime, so that all columns are hit."""


def leaves(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """The values in nested containers with their names, such as ``optimizers[0].state[3].exp_avg``."""
    if value is None:
        return
    if isinstance(value, Mapping) and depth < MAX_DEPTH:
        for key, one in value.items():
            yield from leaves(one, member(name, key), depth + 1)
    elif isinstance(value, list | tuple) and depth < MAX_DEPTH and not all(map(is_plain, value)):
        for index, one in enumerate(value):
            yield from leaves(one, f"{name}[{index}]", depth + 1)
    elif has_members(value) and depth < MAX_DEPTH:
        yield from leaves(vars(value), name, depth + 1)
    else:
        yield name, value


def member(name: str, key: Any) -> str:
    """What a member of a dict is called whose own name is ``name``."""
    if not isinstance(key, str):
        return f"{name}[{key}]"
    return f"{name}.{key}" if name else key


def digest(value: Any, *, sampled: bool = False) -> str:
    """A short digest of a value of `leaves`.

    Args:
        value: any; of objects that are not known only the type counts.
        sampled: look at a part of large tensors only.
    """
    if isinstance(value, torch.Tensor):
        return _tensor_digest(value, sampled)
    found = hashlib.blake2b(type(value).__qualname__.encode(), digest_size=8)
    if hasattr(value, "tobytes"):  # an array or an image, of whatever library
        found.update(f"{getattr(value, 'dtype', '')} {getattr(value, 'shape', '')}".encode())
        found.update(value.tobytes())
    elif is_plain(value) or isinstance(value, list | tuple):
        found.update(repr(value).encode())
    return found.hexdigest()


def digest_of_all(value: Any, *, sampled: bool = False) -> str:
    """One digest of everything in nested containers; arguments as for `digest`."""
    return combined(f"{name}={digest(one, sampled=sampled)}" for name, one in leaves({"": value}))


def combined(parts: Iterable[str]) -> str:
    """One digest of several texts."""
    found = hashlib.blake2b(digest_size=8)
    for part in parts:
        found.update(part.encode() + b"\0")
    return found.hexdigest()


def is_plain(value: Any) -> bool:
    """Whether a value is a number, text or the like."""
    return value is None or isinstance(value, bool | int | float | complex | str | bytes | torch.dtype)


_OF_THE_PROCESS = type, ModuleType, logging.Logger, logging.Handler
"""Whoever holds one of these holds all modules, or all loggers, of the process: nothing of a run's own."""


def has_members(value: Any) -> bool:
    """Whether a value is an object of the user's, whose attributes are looked into."""
    plain = is_plain(value) or isinstance(value, (torch.Tensor, Mapping, list, tuple, *_OF_THE_PROCESS))
    return not plain and hasattr(value, "__dict__") and not hasattr(value, "tobytes")


def _tensor_digest(tensor: torch.Tensor, sampled: bool) -> str:
    here: torch.Tensor = tensor.detach()
    if hasattr(here, "to_local"):  # divided between the ranks: this rank's part
        here = here.to_local()
    found = hashlib.blake2b(f"{here.dtype} {tuple(here.shape)}".encode(), digest_size=8)
    if here.layout is not torch.strided:
        here = here.to_dense()
    if sampled and here.numel() >= SAMPLED_FROM_ELEMENTS:
        here = here.reshape(-1)[::SAMPLE_EVERY]
    here = here.resolve_conj().resolve_neg().cpu().contiguous()
    size_bytes = here.numel() * here.element_size()
    if size_bytes:
        found.update((ctypes.c_char * size_bytes).from_address(here.data_ptr()))
    return found.hexdigest()
