"""One pass over a loader, on one rank: dealt by a plan, or taken from a stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torchtrainer.errors import UnshardableLoaderError
from torchtrainer.train.data_facts import Agreement
from torchtrainer.train.data_order import size_of
from torchtrainer.train.data_readers import Reader, Requests
from torchtrainer.train.sampler import Even

_END: Any = object()


@dataclass(frozen=True, slots=True)
class RankBatch:
    """A rank's data of one step.

    Attributes:
        data: the batch, as the loader's ``collate_fn`` made it; None in a validation step without samples for this rank. In a
            step of several ranks of a process, the batch of each by rank.
        size: samples that count for this rank; 0: the data is borrowed, and the gradient has to weigh nothing; in
            validation there is none, and the step only counts.
        global_size: samples of the step over all ranks. ``size * world_size`` where nobody needs to know better: in a
            pass of a stream over validation data, and for loaders used as they are with equal lengths.
        even: all ranks have as many samples, as far as is known.
        without: ranks without samples.
    """

    data: Any
    size: int
    global_size: int
    even: bool = True
    without: int = 0


@dataclass(frozen=True, slots=True)
class MicroBatches:
    """Batches of a rank whose gradients are added up for one step; as many for every rank.

    Attributes:
        parts: in the order of the loader.
    """

    parts: tuple[RankBatch, ...]


def data_of(batch: RankBatch) -> Any:
    """What a loader's ``collate_fn`` made, in lists where the batch is of several ranks, or several batches of one."""
    if isinstance(batch.data, MicroBatches):
        return [data_of(part) for part in batch.data.parts]
    if isinstance(batch.data, Mapping) and all(isinstance(part, RankBatch) for part in batch.data.values()):
        return [data_of(part) for part in batch.data.values()]
    return batch.data


def joined(parts: Sequence[RankBatch]) -> RankBatch:
    """Batches of a rank as one step's."""
    size, global_size = sum(part.size for part in parts), sum(part.global_size for part in parts)
    return RankBatch(MicroBatches(tuple(parts)), size, global_size, all(part.even for part in parts))


class Pass(Protocol):
    """One pass: batches, and where it stands.

    Attributes:
        ended: the last batch was given out.
        samples: global position: samples that were given out, over all ranks.
        batches: batches of this pass that were given out to this rank, those of an earlier process included.
        count: batches of the whole pass for this rank, if known.
        total: samples of the whole pass over all ranks, if known.
    """

    ended: bool
    samples: int
    batches: int
    count: int | None
    total: int | None

    def next(self) -> RankBatch | None:
        """The next batch; None after the last one."""
        ...


class DealtPass:
    """A pass whose steps are known beforehand. Every rank takes all of them, so that a later call starts at the same step.

    Args:
        requests: what to read.
        reader: reads it.
    """

    def __init__(self, requests: Requests, reader: Reader) -> None:
        plan = requests.plan
        self._plan = plan
        self._reader = reader
        self._taken = 0
        self._left = plan.count(borrow=True)
        self._read = requests.count
        self.samples = plan.start
        self.batches = plan.done
        self.count: int | None = plan.done + requests.count
        self.total: int | None = plan.samples
        self.ended = self._left == 0
        reader.start(requests)

    def next(self) -> RankBatch | None:
        """The next batch; None after the last one. After an error the same batch comes again."""
        if self.ended:
            return None
        share = self._plan.share(self._taken)
        data = self._reader.take(self._taken, share) if self._taken < self._read else None
        self._taken += 1
        self.batches += 1
        self.samples = share.position + share.global_size
        if self._taken == self._left:
            self.ended = True
        return RankBatch(data, share.size, share.global_size, share.even, share.without)


class StreamPass:
    """A pass whose end shows only when it is reached.

    One batch is read ahead, so that the last one is known as such. Where the ranks train in step, they sum up at each
    step how many samples they have and who has more; a rank that ran out repeats its last batch with size 0.

    Args:
        batches: this rank's.
        world_size: how many ranks there are.
        agreement: the ranks that train in step; None: nobody waits for anybody.
        count: batches of the pass, if known.
        exact: ``count`` is binding: all ranks take so many steps, without asking each other.
        skip: batches to leave out, which an earlier process had.
        samples: samples in them, over all ranks.
        name: what the loader is for.
        on_first: called when the first batch was read that is not left out, or there is none.
        even: give all ranks as many batches: end when the first rank has none any more, or repeat the last ones of those.
    """

    def __init__(
        self,
        batches: Iterator[Any],
        *,
        world_size: int,
        agreement: Agreement | None,
        count: int | None,
        exact: bool,
        skip: int,
        samples: int,
        name: str,
        on_first: Callable[[], None],
        even: Even,
    ) -> None:
        self._even = even
        self._iterator = batches
        self._on_first = on_first
        self._world_size = world_size
        self._agreement = agreement
        self._exact = exact
        self._name = name
        self._last = _END
        for _ in range(skip):
            self._last = next(self._iterator, self._last)
        self._upcoming = _END
        self._started = False
        self.samples = samples
        self.batches = skip
        self.count = count
        self.total: int | None = None
        self.ended = False

    def next(self) -> RankBatch | None:
        """The next batch; None after the last one, and at once if there is none at all."""
        if self.ended:
            return None
        batch = self._next_exact() if self._exact else self._next_seen()
        if batch is None:
            self.ended = True
            return None
        self._last = batch.data
        self.batches += 1
        self.samples += batch.global_size
        return batch

    def _next_exact(self) -> RankBatch | None:
        if self.batches == self.count:
            return None
        data = next(self._iterator, _END)
        if data is _END:
            raise UnshardableLoaderError(
                f"the {self._name} loader ended after {self.batches} batches, but its len() promised {self.count}, on "
                f"which all ranks rely; return the right number from __len__, or remove it"
            )
        self.ended = self.batches + 1 == self.count
        return self._weighed(data)

    def _next_seen(self) -> RankBatch | None:
        if not self._started:
            self._upcoming = next(self._iterator, _END)
            self._started = True
            self._on_first()
        data = self._upcoming
        self._upcoming = _END if data is _END else next(self._iterator, _END)
        if self._agreement is not None:
            return self._agree(self._agreement, data)
        self.ended = self._upcoming is _END
        return None if data is _END else self._weighed(data)

    def _agree(self, agreement: Agreement, data: Any) -> RankBatch | None:
        ranks, having = self._world_size, data is not _END
        if not having and self._even == "repeat" and self._last is not _END:
            data = self._last
        size = 0 if data is _END else size_of(data)
        total, squares, present, more = agreement.sum([size, size * size, having, self._upcoming is not _END])
        self.ended = more == 0 or (self._even == "drop" and more < ranks)
        if present == 0 or (self._even == "drop" and present < ranks):
            self.ended = True
            return None
        if self.batches == 0 and present < ranks:
            raise UnshardableLoaderError(
                f"the {self._name} loader gave no batch at all to {ranks - int(present)} of {ranks} ranks, which cannot take "
                f"a step; use fewer ranks"
            )
        without = 0 if self._even else ranks - int(present)
        even = not without and ranks * squares == total * total
        return RankBatch(self._last if data is _END else data, size, int(total), even, without)

    def _weighed(self, data: Any) -> RankBatch:
        size = size_of(data)
        return RankBatch(data, size, size * self._world_size)
