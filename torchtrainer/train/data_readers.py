"""How the batches of a dealt pass are read: in this process, in loader workers, or out of a list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader

from torchtrainer.train.fetch import (
    Request,
    RequestDataset,
    TensorReader,
    as_read,
    pin,
    read,
    rebuild_loader,
    seeded,
)
from torchtrainer.train.loader_processes import LoaderDiedError, WatchedLoader
from torchtrainer.train.refetching import Refetching
from torchtrainer.train.sampler import Plan, Share, derive_seed


class Requests:
    """The shares of a pass from its start on, as requests to read.

    Args:
        plan: what is dealt.
        epoch: of the pass.
        seed: of the loader.
        rank: who reads.
        borrow: ranks without samples borrow some.
    """

    def __init__(self, plan: Plan, *, epoch: int, seed: int, rank: int, borrow: bool) -> None:
        self.plan = plan
        self.count = plan.count(borrow)
        self._epoch = epoch
        self._seed = seed
        self._rank = rank

    def request(self, number: int, share: Share) -> Request:
        """A share as a request, with the indices as python integers and the seed of its streams."""
        indices = share.indices
        if isinstance(indices, torch.Tensor):
            indices = indices.tolist()
        elif isinstance(indices, range):
            indices = list(indices)
        return Request(number, indices, derive_seed(self._seed, self._epoch, share.position, self._rank), self._epoch)

    def starting_at(self, first: int) -> Iterator[Request]:
        """The requests from a step on."""
        return (self.request(number, self.plan.share(number)) for number in range(first, self.count))


class Reader(Protocol):
    """Reads the batches of a pass, in order."""

    def start(self, requests: Requests) -> None:
        """Turns to a pass."""
        ...

    def take(self, number: int, share: Share) -> Any:
        """The batch of a share, which is number ``number`` of the pass."""
        ...

    def stop(self) -> None:
        """Ends the pass."""
        ...

    def close(self) -> None:
        """Ends what reads."""
        ...


class DirectReader:
    """Reads batches in this process, when they are asked for.

    Args:
        loader: the user's, with ``num_workers=0``.
        pinned: whether batches are to lie in pinned memory.
    """

    def __init__(self, loader: DataLoader[Any], pinned: bool) -> None:
        self._loader = loader
        self._pinned = pinned
        self._requests: Requests | None = None
        self._tensors: TensorReader | None = None
        self._batched = loader.batch_sampler is not None

    def start(self, requests: Requests) -> None:
        """Turns to a pass."""
        self._requests = requests
        self._tensors = TensorReader.of(self._loader.dataset, self._loader.collate_fn) if self._batched else None

    def take(self, number: int, share: Share) -> Any:
        """The batch of a share."""
        assert self._requests is not None
        batch: Any
        if self._tensors is not None:
            batch = self._tensors.read(share.indices)
        else:
            request = self._requests.request(number, share)
            with seeded(request.seed):
                batch = read(self._loader.dataset, self._loader.collate_fn, request.indices, self._batched)
        return pin(batch) if self._pinned else batch

    def stop(self) -> None:
        """Ends the pass."""
        self._requests = None

    def close(self) -> None:
        """Releases what the pass held."""
        self._requests = self._tensors = None


class AskedRequests:
    """What a torch loader asks its workers for; it takes this for its ``batch_sampler``."""

    def __init__(self) -> None:
        self.requests: Requests | None = None
        self.first = 0

    def __iter__(self) -> Iterator[Request]:
        return iter(()) if self.requests is None else self.requests.starting_at(self.first)


class WorkerReader:
    """Reads batches in loader workers, ahead of time. They come in order also with ``in_order=False``.

    Args:
        loader: the user's, with ``num_workers > 0``.
        pinned: whether batches are to lie in pinned memory.
        seed: from which the workers' own seeds come, until their first batch.
        refetching: counts workers that die.
    """

    def __init__(self, loader: DataLoader[Any], pinned: bool, seed: int, refetching: Refetching) -> None:
        self._source = loader
        self._pinned = pinned
        self._seed = seed
        self._refetching = refetching
        self._asked = AskedRequests()
        self._loader: WatchedLoader | None = None
        self._reading: WatchedLoader | None = None
        self._early: dict[int, Any] = {}

    def start(self, requests: Requests) -> None:
        """Turns to a pass; workers start, or start over, at its first batch."""
        self.stop()
        self._asked.requests = requests

    def take(self, number: int, share: Share) -> Any:
        """The batch with a number. After an error the workers are restarted at the batch that is asked for.

        Raises:
            WorkerDiedError: too many workers in a row died.
        """
        while True:
            try:
                batch = self._read(number)
            except LoaderDiedError:
                self._refetching.lost(self._kill())
            except BaseException:
                self.close()
                raise
            else:
                self._refetching.fetched()
                return batch

    def _read(self, number: int) -> Any:
        if self._reading is None:
            self._reading = self._open(number)
        while number not in self._early:
            came, batch = next(self._reading)
            self._early[came] = batch
        return self._early.pop(number)

    def _open(self, first: int) -> WatchedLoader:
        self._asked.first = first
        self._early.clear()
        if self._loader is None:
            source = self._source
            wrapped = RequestDataset(source.dataset, source.collate_fn, source.batch_sampler is not None)
            self._loader = WatchedLoader(
                rebuild_loader(
                    source, wrapped, as_read, pinned=self._pinned, seed=self._seed, batch_sampler=self._asked
                )
            )
        self._loader.start()
        return self._loader

    def stop(self) -> None:
        """Ends the pass; persistent workers stay."""
        if self._reading is not None:
            self._reading.stop()
        self._reading = None
        self._early.clear()

    def close(self) -> None:
        """Ends the workers."""
        if self._loader is not None:
            self._loader.close()
        self._loader = self._reading = None
        self._early.clear()

    def _kill(self) -> list[LoaderDiedError]:
        assert self._loader is not None  # it has told of a death
        deaths = self._loader.kill()
        self.close()
        return deaths


class ListReader:
    """Gives out the elements of a list.

    Args:
        batches: the user's.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def start(self, requests: Requests) -> None:
        """Turns to a pass."""

    def take(self, number: int, share: Share) -> Any:
        """The batch of a share."""
        return self._batches[share.indices]

    def stop(self) -> None:
        """Ends the pass."""

    def close(self) -> None:
        """Releases nothing."""
