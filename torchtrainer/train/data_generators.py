"""The random generators of a loader and its samplers: found wherever they are, seeded for a draw, and restored."""

from __future__ import annotations

import hashlib
import marshal
import random
import sys
import types
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

MOST_PARTS = 100_000
"""Maximum number of a sampler's objects that are examined."""
_MARSHAL_WITHOUT_REFERENCES = 2
"""Later formats depend on who else refers to an object."""
_WORD = 2**32
_APART = (Dataset, DataLoader, nn.Module, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType)


def samplers_of(loader: Any) -> list[Any]:
    """The samplers of a loader, innermost first."""
    batching = getattr(loader, "batch_sampler", None)
    found = [getattr(batching, "sampler", None), getattr(loader, "sampler", None), batching]
    return list({id(one): one for one in found if one is not None}.values())


def seed_of(loader: Any, seed: int) -> int:
    """The seed of a loader's order: a DistributedSampler's, that of a ``generator`` of the user's, or the trainer's.

    Generators that a sampler keeps in other places change it by the state in which they were made.
    """
    samplers = samplers_of(loader)
    for sampler in samplers:
        if type(sampler) is DistributedSampler:
            return int(sampler.seed)
    named = [getattr(owner, "generator", None) for owner in (*samplers, loader)]
    given = [one for one in named if isinstance(one, torch.Generator)]
    if given:
        seed = int(given[0].initial_seed())
    states = [_state(one) for one in generators_of(loader) if not any(one is other for other in given)]
    if not states:
        return seed
    digest = hashlib.blake2b(repr((seed, states)).encode(), digest_size=7)
    return int.from_bytes(digest.digest(), "big")


@contextmanager
def generators_seeded(loader: Any, seed: int) -> Iterator[None]:
    """Seeds the generators of a loader and its samplers, and puts them back."""
    states = generator_states(loader)
    for one, _ in states:
        _seed(one, seed)
    try:
        yield
    finally:
        put_generator_states(states)


def generator_states(loader: Any) -> list[tuple[Any, Any]]:
    """The generators of a loader and its samplers, each with its present state."""
    return [(one, _state(one)) for one in generators_of(loader)]


def put_generator_states(states: Sequence[tuple[Any, Any]]) -> None:
    """Makes generators continue from what `generator_states` found."""
    for one, state in states:
        _put_state(one, state)


def generators_of(loader: Any) -> list[Any]:
    """The random generators of a loader and its samplers, and those that the code of the samplers names."""
    samplers = samplers_of(loader)
    found = {id(one): one for sampler in samplers for one in _named_by(type(sampler)) if is_generator(one)}
    found |= {
        id(one): one for one in (getattr(loader, "generator", None), *parts_of(samplers, loader)) if is_generator(one)
    }
    return list(found.values())


def _named_by(kind: type) -> Iterator[Any]:
    """The values of the globals and closures that the methods of a class use."""
    for owner in kind.__mro__:
        if owner.__module__.partition(".")[0] in ("torch", "builtins"):
            continue
        for method in vars(owner).values():
            if isinstance(method, types.FunctionType):
                yield from (method.__globals__[name] for name in method.__code__.co_names if name in method.__globals__)
                yield from (cell.cell_contents for cell in method.__closure__ or () if cell != types.CellType())


def is_generator(one: Any) -> bool:
    """Whether an object is a generator of random numbers: python's, numpy's or torch's."""
    numpy = sys.modules.get("numpy")
    theirs = (numpy.random.Generator, numpy.random.RandomState) if numpy is not None else ()
    return isinstance(one, (random.Random, torch.Generator, *theirs))


def _state(one: Any) -> Any:
    if isinstance(one, random.SystemRandom):
        return None
    if isinstance(one, random.Random):
        return one.getstate()
    if isinstance(one, torch.Generator):
        return bytes(one.get_state().tolist())
    return one.bit_generator.state if hasattr(one, "bit_generator") else one.get_state()


def _put_state(one: Any, state: Any) -> None:
    if isinstance(one, random.Random):
        if state is not None:
            one.setstate(state)
    elif isinstance(one, torch.Generator):
        one.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))
    elif hasattr(one, "bit_generator"):
        one.bit_generator.state = state
    else:
        one.set_state(state)


def _seed(one: Any, seed: int) -> None:
    if isinstance(one, random.Random):
        one.seed(seed)
    elif isinstance(one, torch.Generator):
        one.manual_seed(seed)
    elif hasattr(one, "bit_generator"):
        one.bit_generator.state = type(one.bit_generator)(seed).state
    else:
        one.seed([seed % _WORD, seed // _WORD % _WORD])


def parts_of(roots: Sequence[Any], loader: Any) -> Iterator[Any]:
    """What objects consist of, they themselves first: data sets, models and code left out. Plain data come whole."""
    apart = {id(loader), id(getattr(loader, "dataset", None))}
    ahead, seen = deque(roots), set(apart)
    kept: list[Any] = []  # so that no two of them can have the same id
    while ahead and len(kept) < MOST_PARTS:
        one = ahead.popleft()
        if id(one) in seen or isinstance(one, _APART):
            continue
        seen.add(id(one))
        kept.append(one)
        yield one
        if plain_bytes(one) is not None or is_generator(one):
            continue
        if isinstance(one, Mapping):
            ahead.extend(one.values())
        elif isinstance(one, list | tuple | set | frozenset | deque):
            ahead.extend(one)
        ahead.extend(getattr(one, "__dict__", {}).values())
        if isinstance(one, types.MethodType):
            ahead.append(one.__self__)


def names_of(value: int, roots: Sequence[Any], loader: Any) -> list[str]:
    """The attributes of objects, and of what they consist of, that have a value."""
    return [
        f"{type(one).__name__}.{name}"
        for one in parts_of(roots, loader)
        for name, held in getattr(one, "__dict__", {}).items()
        if type(held) is int and held == value
    ]


def plain_bytes(one: Any) -> bytes | None:
    """Plain data as bytes; None for anything else."""
    try:
        return marshal.dumps(one, _MARSHAL_WITHOUT_REFERENCES)
    except ValueError:
        return None
