"""Random number generators of a process: python's, numpy's if it was imported, torch's on the CPU and on GPUs in use."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchtrainer.train.sampler import derive_seed

_NUMPY_SEEDS = 2**32


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
