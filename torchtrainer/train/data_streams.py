"""Where the batches of a stream come from: a loader used as it is, or this rank's part of an iterable dataset."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert, get_worker_info

from torchtrainer.errors import UnshardableLoaderError
from torchtrainer.train.data_drawing import set_epochs
from torchtrainer.train.data_generators import generator_states, put_generator_states
from torchtrainer.train.fetch import (
    OwnStreams,
    WorkerStart,
    call_set_epoch,
    end_workers,
    rebuild_loader,
    seed_host,
    seeded,
)
from torchtrainer.train.fingerprints import fingerprint
from torchtrainer.train.loader_processes import LoaderDiedError, WatchedLoader
from torchtrainer.train.sampler import derive_seed

_END: Any = object()


class PlainStream:
    """A loader used as it is: iterated anew for each pass, under random streams of its own.

    Args:
        loader: any iterable of batches.
        seed: of the trainer.
        rank: the streams differ between ranks.
        name: what the loader is for.

    Attributes:
        first: None: the ranks need not have the same stream.
    """

    def __init__(self, loader: Any, *, seed: int, rank: int, name: str) -> None:
        self._loader = loader
        self._seed = seed
        self._rank = rank
        self._name = name
        self._passes = 0
        self._iterator: Any = None
        self._watched = WatchedLoader(loader) if isinstance(loader, DataLoader) and loader.num_workers else None
        self._generators: list[tuple[Any, Any]] = []
        self.first: list[int] | None = None

    def open(self, epoch: int, again: bool = False) -> Iterator[Any]:
        """The batches of a pass; again: from its beginning, as they were."""
        if again:
            put_generator_states(self._generators)
        else:
            self._passes += 1
            self._generators = generator_states(self._loader) if self._watched is not None else []
        set_epochs(self._loader, epoch)
        streams = OwnStreams(derive_seed(self._seed, epoch, self._rank))
        return isolated(streams, self._start, self._check_used_up)

    def _start(self) -> Iterator[Any]:
        if self._watched is None:
            self._iterator = iter(self._loader)
            return self._iterator  # type: ignore[no-any-return]  # whatever the user's object gives
        loader = self._loader
        own = loader.worker_init_fn
        loader.worker_init_fn = WorkerStart(own, wrapped=False)
        try:
            self._watched.start()
        finally:
            loader.worker_init_fn = own
        return self._watched

    def _check_used_up(self) -> None:
        if self._passes > 1 and self._iterator is self._loader:
            raise UnshardableLoaderError(
                f"the {self._name} loader is a {type(self._loader).__name__} that can be iterated only once, and this "
                f"is pass {self._passes}; return an object whose __iter__ starts anew, such as a DataLoader or a list"
            )

    def stop(self) -> None:
        """Ends the pass; persistent workers stay."""
        if self._watched is not None:
            self._watched.stop()
        else:
            end_workers(self._iterator)
        self._iterator = None

    def close(self) -> None:
        """Ends the loader's workers, if it has any."""
        if self._watched is not None:
            self._watched.close()
        else:
            end_workers(self._iterator)
        self._iterator = None

    def kill(self) -> list[LoaderDiedError]:
        """Ends the loader's workers after one of them has died; returns those that had."""
        assert self._watched is not None  # it has told of a death
        return self._watched.kill()


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
        drop_last: leave out short last batches.
        smallest: gives the fewest elements of a last batch.

    Attributes:
        first: loader worker, and fingerprint of the first element of its part, of the first batch of the pass; None: there is
            none yet.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        seed: int,
        rank: int,
        world_size: int,
        pinned: bool,
        drop_last: bool,
        smallest: Callable[[], int],
    ) -> None:
        self._source = loader
        self._drop_last = drop_last
        self._smallest = smallest
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._pinned = pinned
        self._loader: WatchedLoader | None = None
        self._next_epoch = 0
        self.first: list[int] | None = None

    def open(self, epoch: int, again: bool = False) -> Iterator[Any]:
        """The batches of a pass; again: from its beginning, as they were."""
        if self._loader is None or epoch != self._next_epoch or not self._source.persistent_workers:
            self.close()
            self._loader = WatchedLoader(self._build(epoch))
        self._next_epoch = epoch + 1
        loader = self._loader

        def start() -> Iterator[Any]:
            loader.start()
            return loader

        self.first = None
        return self._data(isolated(OwnStreams(derive_seed(self._seed, epoch, self._rank)), start, lambda: None))

    def _data(self, batches: Iterator[StreamBatch]) -> Iterator[Any]:
        for worker, first_element, data in batches:
            if self.first is None:
                self.first = [worker, first_element]
            yield data

    def _build(self, epoch: int) -> DataLoader[Any]:
        source = self._source
        set_epochs(source, epoch)
        size, smallest = source.batch_size, self._smallest()
        batches = WholeBatches(size, min(size, smallest), self._drop_last) if size and smallest > 1 else None
        stream = StridedStream(
            source.dataset,
            source.collate_fn,
            seed=self._seed,
            epoch=epoch,
            rank=self._rank,
            world_size=self._world_size,
            batches=batches,
        )
        batching = {"batch_size": size, "drop_last": self._drop_last} if batches is None else {"batch_size": None}
        return rebuild_loader(
            source,
            stream,
            stream.collate,
            pinned=self._pinned,
            seed=derive_seed(self._seed, epoch),
            **batching,
        )

    def stop(self) -> None:
        """Ends the pass; persistent workers stay."""
        if self._loader is not None:
            self._loader.stop()

    def close(self) -> None:
        """Ends the loader workers."""
        if self._loader is not None:
            self._loader.close()
        self._loader = None

    def kill(self) -> list[LoaderDiedError]:
        """Ends the loader workers after one of them has died; returns those that had."""
        assert self._loader is not None  # it has told of a death
        deaths, self._loader = self._loader.kill(), None
        return deaths


def isolated(streams: OwnStreams, start: Callable[[], Iterator[Any]], on_empty: Callable[[], None]) -> Iterator[Any]:
    """The elements of an iterator, each of them drawn under random streams apart from the training's.

    Args:
        streams: continue from element to element.
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


class StridedStream(IterableDataset[Any]):
    """Every ``world_size``-th element of a stream, under streams of random numbers that are the same on all ranks.

    Every rank iterates the same stream, so what the stream draws must not depend on the rank, or elements would come
    twice or not at all. ``collate_fn``, which sees only this rank's elements, has streams of its own.

    Args:
        dataset: the user's; other attributes than ours are looked up on it.
        collate_fn: the user's.
        seed: of the loader.
        epoch: of the first pass; each further iteration is one epoch more.
        rank: which elements are kept: ``rank``, ``rank + world_size``, ...
        world_size: how many ranks there are.
        batches: puts the elements into batches; None: the loader does.
    """

    def __init__(
        self,
        dataset: Any,
        collate_fn: Callable[[Any], Any],
        *,
        seed: int,
        epoch: int,
        rank: int,
        world_size: int,
        batches: Callable[[Iterator[Any]], Iterator[list[Any]]] | None,
    ) -> None:
        self.dataset = dataset
        self.collate = SeededCollate(collate_fn)
        self._seed = seed
        self._next_epoch = epoch
        self._rank = rank
        self._world_size = world_size
        self._batches = batches

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __iter__(self) -> Iterator[Any]:
        epoch, self._next_epoch = self._next_epoch, self._next_epoch + 1
        info = get_worker_info()
        worker = info.id if info is not None else 0
        call_set_epoch(self.dataset, epoch)
        self.collate.restart(worker, derive_seed(self._seed, epoch, worker, self._rank))
        seed_host(derive_seed(self._seed, epoch, worker))
        mine = self._mine(iter(self.dataset))
        return mine if self._batches is None else self._batches(mine)

    def _mine(self, stream: Iterator[Any]) -> Iterator[Any]:
        for number, element in enumerate(stream):
            if number == 0:
                self.collate.first_element = fingerprint(element)
            if number % self._world_size == self._rank:
                yield element


@dataclass(frozen=True)
class WholeBatches:
    """Puts elements into batches, of which the last one has no fewer than a smallest number: else it joins the one before.

    Attributes:
        size: of a batch.
        smallest: as said.
        drop_last: leave out a short last batch.
    """

    size: int
    smallest: int
    drop_last: bool

    def __call__(self, elements: Iterator[Any]) -> Iterator[list[Any]]:
        """The batches; one is read ahead."""
        held: list[Any] = []
        while batch := list(islice(elements, self.size)):
            if len(batch) < self.size and self.drop_last:
                break
            if held and len(batch) < self.smallest:
                held += batch
                continue
            if held:
                yield held
            held = batch
        if held:
            yield held


class StreamBatch(NamedTuple):
    """A batch of a stream, and by what the ranks see that they iterate the same stream.

    Attributes:
        worker: of the loader.
        first_element: a fingerprint of the first element of this worker's part in the pass, whichever rank's it is.
        data: the batch.
    """

    worker: int
    first_element: int
    data: Any


class SeededCollate:
    """A ``collate_fn`` under random streams of its own, so that it does not disturb those of the stream it follows.

    Attributes:
        first_element: of the stream in this pass, as a fingerprint.
    """

    def __init__(self, collate_fn: Callable[[Any], Any]) -> None:
        self._collate_fn = collate_fn
        self._seed = 0
        self._batches = 0
        self._worker = 0
        self.first_element = 0

    def restart(self, worker: int, seed: int) -> None:
        """Starts a pass."""
        self._worker, self._seed, self._batches = worker, seed, 0

    def __call__(self, elements: Any) -> StreamBatch:
        """The batch of some elements."""
        return StreamBatch(self._worker, self.first_element, self._collated(elements))

    def _collated(self, elements: Any) -> Any:
        if self._collate_fn is default_collate or self._collate_fn is default_convert:
            return self._collate_fn(elements)
        self._batches += 1
        with seeded(derive_seed(self._seed, self._batches)):
            return self._collate_fn(elements)
