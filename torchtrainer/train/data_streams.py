"""Where the batches of a stream come from: a loader used as it is, or this rank's part of an iterable dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from torchtrainer.errors import UnshardableLoaderError
from torchtrainer.train.data_order import set_epochs
from torchtrainer.train.fetch import (
    OwnStreams,
    StridedStream,
    WorkerStart,
    end_persistent,
    end_workers,
    rebuild_loader,
)
from torchtrainer.train.sampler import derive_seed

_END: Any = object()


class PlainStream:
    """A loader used as it is: iterated anew for each pass, under random streams of its own.

    Args:
        loader: any iterable of batches.
        seed: of the trainer.
        rank: the streams differ between ranks.
        name: what the loader is for.
    """

    def __init__(self, loader: Any, *, seed: int, rank: int, name: str) -> None:
        self._loader = loader
        self._seed = seed
        self._rank = rank
        self._name = name
        self._passes = 0
        self._iterator: Any = None

    def open(self, epoch: int) -> Iterator[Any]:
        """The batches of a pass."""
        set_epochs(self._loader, epoch)
        self._passes += 1
        streams = OwnStreams(derive_seed(self._seed, epoch, self._rank))
        return isolated(streams, self._start, self._check_used_up)

    def _start(self) -> Iterator[Any]:
        loader = self._loader
        if not isinstance(loader, DataLoader) or loader.num_workers == 0:
            self._iterator = iter(loader)
            return self._iterator  # type: ignore[no-any-return]  # whatever the user's object gives
        own = loader.worker_init_fn
        loader.worker_init_fn = WorkerStart(own, wrapped=False)
        try:
            self._iterator = iter(loader)
        finally:
            loader.worker_init_fn = own
        return self._iterator  # type: ignore[no-any-return]

    def _check_used_up(self) -> None:
        if self._passes > 1 and self._iterator is self._loader:
            raise UnshardableLoaderError(
                f"the {self._name} loader is a {type(self._loader).__name__} that can be iterated only once, and this "
                f"is pass {self._passes}; return an object whose __iter__ starts anew, such as a DataLoader or a list"
            )

    def stop(self) -> None:
        """Ends the pass; persistent workers stay."""
        if not getattr(self._loader, "persistent_workers", False):
            end_workers(self._iterator)
        self._iterator = None

    def close(self) -> None:
        """Ends the loader's workers, if it is a torch loader."""
        end_workers(self._iterator)
        if isinstance(self._loader, DataLoader):
            end_persistent(self._loader)
        self._iterator = None


class DividedStream:
    """A loader over an iterable dataset, of which this rank keeps its elements.

    Every rank iterates the stream as plain torch would, and keeps the elements ``rank``, ``rank + world_size``, ... of
    every loader worker's part of it, before they are put into batches.

    Args:
        loader: the user's.
        seed: of the trainer.
        rank: this one.
        world_size: how many there are.
        pinned: whether batches are to lie in pinned memory.
    """

    def __init__(self, loader: DataLoader[Any], *, seed: int, rank: int, world_size: int, pinned: bool) -> None:
        self._source = loader
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._pinned = pinned
        self._loader: DataLoader[Any] | None = None
        self._next_epoch = 0
        self._iterator: Any = None

    def open(self, epoch: int) -> Iterator[Any]:
        """The batches of a pass."""
        if self._loader is None or epoch != self._next_epoch or not self._source.persistent_workers:
            self.close()
            self._loader = self._build(epoch)
        self._next_epoch = epoch + 1
        loader = self._loader

        def start() -> Iterator[Any]:
            self._iterator = iter(loader)
            return self._iterator  # type: ignore[no-any-return]

        return isolated(OwnStreams(derive_seed(self._seed, epoch, self._rank)), start, lambda: None)

    def _build(self, epoch: int) -> DataLoader[Any]:
        source = self._source
        set_epochs(source, epoch)
        stream = StridedStream(
            source.dataset,
            source.collate_fn,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world_size=self._world_size,
        )
        return rebuild_loader(
            source,
            stream,
            stream.collate,
            pinned=self._pinned,
            seed=derive_seed(self._seed, epoch),
            batch_size=source.batch_size,
            drop_last=source.drop_last,
        )

    def stop(self) -> None:
        """Ends the pass; persistent workers stay."""
        if not self._source.persistent_workers:
            end_workers(self._iterator)
        self._iterator = None

    def close(self) -> None:
        """Ends the loader workers."""
        end_workers(self._iterator)
        end_persistent(self._loader)
        self._iterator = self._loader = None


def isolated(streams: OwnStreams, start: Callable[[], Iterator[Any]], on_empty: Callable[[], None]) -> Iterator[Any]:
    """The elements of an iterator, each of them drawn under random streams apart from the training's.

    Args:
        streams: go on from element to element.
        start: gives the iterator; called under the streams too.
        on_empty: called if there is no element at all.
    """
    with streams.use():
        iterator = start()
        element = next(iterator, _END)
    if element is _END:
        on_empty()
    while element is not _END:
        yield element
        with streams.use():
            element = next(iterator, _END)
