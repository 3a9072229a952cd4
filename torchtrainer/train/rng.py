"""Random number generators of a process: python's, numpy's if it was imported, torch's on the CPU and on GPUs in use."""

from __future__ import annotations

import ctypes
import marshal
import random
import struct
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchtrainer.train.sampler import derive_seed

_NUMPY_SEEDS = 2**32
_TWISTER_BYTES = 625 * 4
_HAS_GAUSS = 3
"""Where numpy's legacy state says that one of a pair of normal numbers is kept."""


def seed_all(seed: int) -> None:
    """Seeds every generator of this process."""
    random.seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % _NUMPY_SEEDS)
    torch.manual_seed(seed)


@dataclass(frozen=True)
class RngState:
    """The state of every generator of a process at one moment. GPUs' are there if CUDA was in use."""

    python: Any
    numpy: Any
    cpu: torch.Tensor
    cuda: list[torch.Tensor]


def rng_state() -> RngState:
    """The present state of every generator."""
    numpy = sys.modules.get("numpy")
    return RngState(
        python=random.getstate(),
        numpy=numpy.random.get_state() if numpy is not None else None,
        cpu=torch.get_rng_state(),
        cuda=torch.cuda.get_rng_state_all()
        if torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # torch has no types here
        else [],
    )


def set_rng_state(state: RngState) -> None:
    """Puts every generator back to where it was."""
    random.setstate(state.python)
    if state.numpy is not None:
        sys.modules["numpy"].random.set_state(state.numpy)
    torch.set_rng_state(state.cpu)
    if state.cuda:
        torch.cuda.set_rng_state_all(state.cuda)


def rng_to_data() -> dict[str, Any]:
    """The present state of every generator as numbers, text and tensors, which loads with ``weights_only=True``."""
    state = rng_state()
    numpy = None
    if state.numpy is not None:
        kind, keys, *rest = state.numpy
        numpy = [kind, torch.tensor(keys.tolist(), dtype=torch.int64), *rest]
    return {"python": state.python, "numpy": numpy, "cpu": state.cpu, "cuda": state.cuda}


def rng_from_data(data: Mapping[str, Any]) -> None:
    """Puts every generator to where `rng_to_data` found it."""
    numpy = data["numpy"]
    if numpy is not None:
        import numpy as np

        kind, keys, *rest = numpy
        numpy = (kind, np.asarray(keys.tolist(), dtype=np.uint32), *rest)
    set_rng_state(RngState(python=data["python"], numpy=numpy, cpu=data["cpu"], cuda=list(data["cuda"])))


class StreamReader:
    """Reads the generators of this process again and again, for records.

    To have the states of Python's and numpy's generators as objects takes longer than all the rest together, so that their memory
    is compared first: as long as the words and the position of a generator are the same, and no second half of a pair of normal
    numbers is kept, it has not been drawn from.
    """

    def __init__(self) -> None:
        self._python = b""
        self._python_words: Any = None
        self._python_address = _python_twister()
        self._numpy: tuple[Any, ...] | None = None
        self._words = b""
        self._generator: Any = None
        self._address: int | None = None

    def read(self) -> dict[str, Any]:
        """The present state of every generator, as numbers, text and bytes."""
        cpu = torch.get_rng_state().numpy().tobytes()
        return {"python": self._read_python(), "numpy": self._read_numpy(), "cpu": cpu}

    def _read_python(self) -> bytes:
        address, kept = self._python_address, random._inst.gauss_next  # type: ignore[attr-defined]  # no other way
        words = None if address is None else (ctypes.string_at(address, _TWISTER_BYTES), kept)
        if words is None or words != self._python_words:
            self._python, self._python_words = marshal.dumps(random.getstate()), words
        return self._python

    def _read_numpy(self) -> tuple[Any, ...] | None:
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return None
        words = self._read_words(numpy)
        if self._numpy is None or words is None or words != self._words or self._numpy[_HAS_GAUSS]:
            kind, keys, *rest = numpy.random.get_state()
            self._numpy, self._words = (kind, keys.tobytes(), *rest), words or b""
        return self._numpy

    def _read_words(self, numpy: Any) -> bytes | None:
        """The memory of numpy's Mersenne twister: its words and the position among them; None for another generator."""
        if not hasattr(numpy.random, "get_bit_generator"):
            return None
        generator = numpy.random.get_bit_generator()
        if generator is not self._generator:
            self._generator = generator
            known = type(generator).__name__ == "MT19937"
            self._address = generator.ctypes.state_address if known else None
        return None if self._address is None else ctypes.string_at(self._address, _TWISTER_BYTES)


def _python_twister() -> int | None:
    """Where Python's generator has its position and its words, one after the other; None if they are not found there."""
    if sys.implementation.name != "cpython":
        return None
    address = id(random._inst) + object.__basicsize__  # no other way
    *words, position = random.getstate()[1]
    found = struct.unpack(f"{len(words) + 1}I", ctypes.string_at(address, _TWISTER_BYTES))
    return address if found == (position, *words) else None


def streams_from_plain(data: Mapping[str, Any]) -> RngState:
    """What a `StreamReader` read, as generators take it."""
    numpy = data["numpy"]
    if numpy is not None:
        import numpy as np

        numpy = (numpy[0], np.frombuffer(numpy[1], dtype=np.uint32), *numpy[2:])
    cpu = torch.frombuffer(bytearray(data["cpu"]), dtype=torch.uint8)
    python = marshal.loads(data["python"])  # noqa: S302  # as the record that it came on
    return RngState(python=python, numpy=numpy, cpu=cpu, cuda=[])


@contextmanager
def isolated_rng() -> Iterator[None]:
    """What the block draws leaves the generators around it as they were."""
    state = rng_state()
    try:
        yield
    finally:
        set_rng_state(state)


def seed_rank(seed: int, rank: int) -> None:
    """Gives this process the random stream of a rank: what dropout and the like draw differs between ranks."""
    seed_all(derive_seed(seed, rank))
