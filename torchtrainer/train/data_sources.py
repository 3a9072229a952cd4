"""Where the passes of a rank come from: a loader whose order is known beforehand, or one whose end shows when it is reached."""

from __future__ import annotations

from typing import Any

from torchtrainer.train.data_drawing import DrawnOrders
from torchtrainer.train.data_facts import Agreement, LoaderFacts, check_orders, check_streams
from torchtrainer.train.data_order import BatchOrder, Dealing, ListOrder, SampleOrder
from torchtrainer.train.data_passes import DealtPass, Pass, StreamPass
from torchtrainer.train.data_readers import DirectReader, ListReader, Reader, Requests, WorkerReader
from torchtrainer.train.data_streams import DividedStream, PlainStream
from torchtrainer.train.refetching import Losing, Refetching, unbroken


class DealtPasses:
    """Passes over loaders whose order is known beforehand.

    Args:
        loader, facts, rank, agreement, pinned: as for `StreamPasses`.
        training: the ranks step together.
        dealing: how the end of a pass is dealt.
        drawn: the orders of the user's sampler, if there is one.
    """

    def __init__(
        self,
        loader: Any,
        facts: list[LoaderFacts],
        rank: int,
        agreement: Agreement | None,
        training: bool,
        pinned: bool,
        dealing: Dealing,
        losing: Losing,
        drawn: DrawnOrders | None,
    ) -> None:
        self._rank = rank
        self._training = training
        self._agreement = agreement if training else None
        self._name = facts[0].name
        self._seed = facts[0].seed
        self._drawn = drawn
        self._reader: Reader
        self._order: SampleOrder | BatchOrder | ListOrder
        if facts[0].kind == "list":
            self._order, self._reader = ListOrder(loader, rank, len(facts), dealing.even), ListReader(loader)
            return
        if facts[0].kind == "samples":
            self._order = SampleOrder(loader, facts, rank, dealing, drawn)
        else:
            assert drawn is not None  # as always where the sampler gives batches
            self._order = BatchOrder(loader, facts, rank, dealing, drawn)
        if loader.num_workers > 0:
            refetching = Refetching(losing, loader=self._name, rank=rank)
            self._reader = WorkerReader(loader, pinned, self._seed, refetching)
        else:
            self._reader = DirectReader(loader, pinned)

    def outline(self) -> tuple[int | None, int | None]:
        """Batches for this rank and samples for all, of every pass, where known."""
        plan = self._order.outline()
        return (None, None) if plan is None else (plan.count(self._training), plan.samples)

    def start(self, epoch: int, samples: int, batches: int) -> Pass:
        """Starts a pass at a global position."""
        plan = self._order.plan(epoch, samples)
        if self._drawn is not None and self._agreement is not None:
            order = self._drawn.draw(epoch)
            orders = self._agreement.all_gather([len(order.elements), order.digest])
            check_orders(self._name, self._drawn.kind, orders, epoch)
        requests = Requests(plan, epoch=epoch, seed=self._seed, rank=self._rank, borrow=self._training)
        return DealtPass(requests, self._reader)

    def stop(self) -> None:
        """Ends the running pass; persistent workers stay."""
        self._reader.stop()

    def close(self) -> None:
        """Ends the loader workers."""
        self._reader.close()


class StreamPasses:
    """Passes over loaders whose end shows only when it is reached.

    Args:
        loader: the user's.
        facts: of all ranks, by rank.
        rank: this one.
        agreement: the other ranks, or None.
        training: they step together.
        pinned: whether batches are to lie in pinned memory.
        dealing: how the loader is dealt out.
        losing: what is done about its processes that die.
    """

    def __init__(
        self,
        loader: Any,
        facts: list[LoaderFacts],
        rank: int,
        agreement: Agreement | None,
        training: bool,
        pinned: bool,
        dealing: Dealing,
        losing: Losing,
    ) -> None:
        mine = facts[rank]
        self._refetching = Refetching(losing, loader=mine.name, rank=rank)
        self._world_size = len(facts)
        self._name = mine.name
        self._length = mine.length
        self._exact = (
            training and agreement is not None and mine.length is not None and len({one.length for one in facts}) == 1
        )
        self._even = dealing.even if mine.kind == "stream" else ""
        stepping = training or bool(self._even)
        self._agreement = agreement if stepping and not self._exact else None
        self._comparing = agreement if mine.kind == "stream" else None
        self._training = training
        self._stream: DividedStream | PlainStream
        if mine.kind == "stream":
            self._stream = DividedStream(
                loader,
                seed=facts[0].seed,
                rank=rank,
                world_size=len(facts),
                pinned=pinned,
                drop_last=loader.drop_last or bool(self._even),
                smallest=dealing.smallest,
            )
        else:
            self._stream = PlainStream(loader, seed=mine.seed, rank=rank, name=mine.name)

    def outline(self) -> tuple[int | None, int | None]:
        """Batches for this rank of every pass, where known."""
        return self._count(), None

    def _compare(self) -> None:
        """The ranks see that they iterate the same stream: in training at each pass, in a validation at the first one."""
        agreement = self._comparing
        if agreement is None:
            return
        if not self._training:
            self._comparing = None
        check_streams(self._name, agreement.all_gather(self._stream.first))

    def _count(self) -> int | None:
        return self._length if self._exact or self._agreement is None else None

    def start(self, epoch: int, samples: int, batches: int) -> Pass:
        """Starts a pass, leaving out batches that were taken before."""
        stream = self._stream
        return StreamPass(
            unbroken(lambda again: stream.open(epoch, again), stream.kill, self._refetching),
            world_size=self._world_size,
            agreement=self._agreement,
            count=self._count(),
            exact=self._exact,
            skip=batches,
            samples=samples,
            name=self._name,
            on_first=self._compare,
            even=self._even,
        )

    def stop(self) -> None:
        """Ends the running pass; persistent workers stay."""
        self._stream.stop()

    def close(self) -> None:
        """Ends the loader workers."""
        self._stream.close()
