"""Reads a batch, in this process or in loader workers, always under random streams that belong to the batch.

User code that makes a batch (``dataset[i]`` or ``__getitems__``, then ``collate_fn``) runs under python's, numpy's and
torch's CPU generators seeded for this batch. So augmentation depends neither on how many loader workers there are nor
on where a pass was started, and reading leaves the training's own streams alone.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    Subset,
    TensorDataset,
    default_collate,
    get_worker_info,
)

from torchtrainer.process.crashes import crash_file
from torchtrainer.process.guard import be_killed_with_parent

_WORD = 2**32


class HostStreams(NamedTuple):
    """State of the generators that data code draws from: python's, numpy's if it was imported, torch's on the CPU."""

    python: Any
    numpy: Any
    torch: torch.Tensor

    @classmethod
    def now(cls) -> HostStreams:
        """The present state."""
        numpy = sys.modules.get("numpy")
        state = numpy.random.get_state() if numpy is not None else None
        return cls(random.getstate(), state, torch.default_generator.get_state())

    def put_back(self) -> None:
        """Makes the generators continue from this state."""
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)
        torch.default_generator.set_state(self.torch)


def seed_host(seed: int) -> None:
    """Seeds the generators that data code draws from.

    Args:
        seed: 64 bits.
    """
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed([seed % _WORD, seed // _WORD % _WORD])
    torch.default_generator.manual_seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs a block under seeded streams and leaves those around it as they were."""
    outer = HostStreams.now()
    seed_host(seed)
    try:
        yield
    finally:
        outer.put_back()


class OwnStreams:
    """Random streams that continue from block to block, apart from those of the training.

    Args:
        seed: where they start.
    """

    def __init__(self, seed: int) -> None:
        with seeded(seed):
            self._state = HostStreams.now()

    @contextmanager
    def use(self) -> Iterator[None]:
        """Runs a block under these streams."""
        outer = HostStreams.now()
        self._state.put_back()
        try:
            yield
        finally:
            self._state = HostStreams.now()
            outer.put_back()


class Request(NamedTuple):
    """One batch to read.

    Attributes:
        number: its place in the pass, by which it is recognised when it comes back.
        indices: a list of indices, or one element of a sampler.
        seed: of the streams under which it is read.
        epoch: for datasets with ``set_epoch``.
    """

    number: int
    indices: Any
    seed: int
    epoch: int


def read(dataset: Any, collate_fn: Callable[[Any], Any], indices: Any, batched: bool) -> Any:
    """One batch of a map-style dataset, as torch's ``DataLoader`` makes it.

    Args:
        dataset: the user's.
        collate_fn: the loader's.
        indices: a list of indices, or one element of a sampler.
        batched: False for a loader with ``batch_size=None``: what the dataset returns for the element is the batch.
    """
    if not batched:
        return collate_fn(dataset[indices])
    whole = getattr(dataset, "__getitems__", None)
    return collate_fn(whole(indices) if whole else [dataset[index] for index in indices])


class TensorReader:
    """Reads whole batches of a `TensorDataset` by indexing: the same values as item by item, without the items."""

    def __init__(self, tensors: tuple[torch.Tensor, ...], subset: torch.Tensor | None) -> None:
        self._tensors = tensors
        self._subset = subset

    @classmethod
    def of(cls, dataset: Any, collate_fn: Any) -> TensorReader | None:
        """The reader of a dataset, or None if it does not do: another dataset, or a ``collate_fn`` of the user's."""
        subset = None
        if type(dataset) is Subset and type(dataset.dataset) is TensorDataset:
            try:
                subset = torch.as_tensor(dataset.indices)
            except (TypeError, ValueError, RuntimeError):
                return None
            if subset.dtype is not torch.int64 or subset.dim() != 1:
                return None
            dataset = dataset.dataset
        if type(dataset) is not TensorDataset or collate_fn is not default_collate:
            return None
        plain = all(type(one) is torch.Tensor and one.layout is torch.strided for one in dataset.tensors)
        return cls(dataset.tensors, subset) if plain else None

    def read(self, indices: Any) -> list[torch.Tensor]:
        """The batch of some indices (a tensor, a range or a list), which shares no memory with the dataset."""
        if self._subset is None and isinstance(indices, range):
            part = slice(indices.start, indices.stop, indices.step)
            return [one[part].clone(memory_format=torch.contiguous_format) for one in self._tensors]
        if isinstance(indices, range):
            indices = torch.arange(indices.start, indices.stop, indices.step)
        wanted = torch.as_tensor(indices, dtype=torch.int64)
        if self._subset is not None:
            wanted = self._subset[wanted]
        return [one[wanted].contiguous() for one in self._tensors]


def pin(batch: Any) -> Any:
    """A batch with its tensors in pinned memory; mappings, lists, tuples and what has ``pin_memory`` are followed."""
    if hasattr(batch, "pin_memory"):
        return batch.pin_memory()
    if isinstance(batch, str | bytes):
        return batch
    if isinstance(batch, Mapping):
        pinned = {key: pin(value) for key, value in batch.items()}
        return pinned if type(batch) is dict else type(batch)(pinned)  # type: ignore[call-arg]  # as torch does
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(pin(value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(pin(value) for value in batch)
    return batch


class WorkerStart:
    """What a loader worker does first: it ties its life to its parent's, then runs the user's ``worker_init_fn``.

    Linux only: the kernel kills the worker when the thread that started it ends. Elsewhere torch's own check, every few
    seconds, has to do.

    Args:
        worker_init_fn: the user's, or None.
        wrapped: the workers' dataset is one of this module's wrappers; ``worker_info.dataset`` is to be the user's.
    """

    def __init__(self, worker_init_fn: Callable[[int], None] | None, *, wrapped: bool) -> None:
        self.worker_init_fn = worker_init_fn
        self._wrapped = wrapped

    def __call__(self, worker_id: int) -> None:
        """Runs in the worker."""
        die_with_parent()
        crash_file.write_again()  # torch has handlers of its own in a loader's process, which tell no stack
        info = get_worker_info()
        if self._wrapped and info is not None:
            object.__setattr__(info, "dataset", info.dataset.dataset)  # type: ignore[attr-defined]  # our wrapper has it
        if self.worker_init_fn is not None:
            self.worker_init_fn(worker_id)


def die_with_parent() -> None:
    """Ends this loader worker with its parent, at once."""
    be_killed_with_parent()
    parent = multiprocessing.parent_process()
    try:
        if parent is not None and parent.pid is not None:
            os.kill(parent.pid, 0)
    except ProcessLookupError:  # it went before the kernel was asked
        os._exit(1)


class RequestDataset(Dataset[Any]):
    """A map-style dataset in a loader worker: reads a whole `Request` under the request's streams.

    Args:
        dataset: the user's; other attributes than ours are looked up on it.
        collate_fn: the user's.
        batched: as in `read`.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any], batched: bool) -> None:
        self.dataset = dataset
        self._collate_fn = collate_fn
        self._batched = batched
        self._epoch: int | None = None

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitems__(self, request: Request) -> tuple[int, Any]:
        """The batch, with its number."""
        if request.epoch != self._epoch:
            self._epoch = request.epoch
            call_set_epoch(self.dataset, request.epoch)
        seed_host(request.seed)
        return request.number, read(self.dataset, self._collate_fn, request.indices, self._batched)


def as_read(batch: Any) -> Any:
    """The batch as it is: the ``collate_fn`` of a loader whose dataset already collates."""
    return batch


def rebuild_loader(
    loader: DataLoader[Any], dataset: Any, collate_fn: Callable[[Any], Any], *, pinned: bool, seed: int, **batching: Any
) -> DataLoader[Any]:
    """A loader over a wrapping dataset with all other settings of the user's.

    Args:
        loader: the user's.
        dataset: wraps the user's.
        collate_fn: goes with the wrapper.
        pinned: whether batches are to lie in pinned memory.
        seed: of the generator from which loader workers are seeded; the training's own is not drawn from.
        batching: ``batch_sampler``, or ``batch_size`` and ``drop_last``.
    """
    settings: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "timeout": loader.timeout,
        "worker_init_fn": WorkerStart(loader.worker_init_fn, wrapped=True),
        "multiprocessing_context": loader.multiprocessing_context,
        "persistent_workers": loader.persistent_workers,
        "pin_memory": pinned,
    }
    if pinned:
        settings["pin_memory_device"] = loader.pin_memory_device
    if loader.num_workers > 0:
        settings["prefetch_factor"] = loader.prefetch_factor
    if hasattr(loader, "in_order"):
        settings["in_order"] = loader.in_order
    generator = torch.Generator()
    generator.manual_seed(seed)
    return DataLoader(dataset, collate_fn=collate_fn, generator=generator, **settings, **batching)


def end_workers(iterator: Any) -> None:
    """Ends the worker processes of a torch iterator now, rather than when the last reference to it goes."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()


def call_set_epoch(target: Any, epoch: int) -> None:
    """Calls ``set_epoch(epoch)`` of a sampler or dataset that has it."""
    set_epoch = getattr(target, "set_epoch", None)
    if callable(set_epoch):
        set_epoch(epoch)
