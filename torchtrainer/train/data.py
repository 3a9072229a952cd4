"""One rank's share of a loader: the door through which training and validation get their batches."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchtrainer.errors import InvalidArgumentError
from torchtrainer.train.data_facts import Agreement, LoaderFacts, check_facts, describe, to_json
from torchtrainer.train.data_order import BatchOrder, ListOrder, SampleOrder
from torchtrainer.train.data_passes import DealtPass, Pass, RankBatch, StreamPass, joined
from torchtrainer.train.data_readers import DirectReader, ListReader, Reader, Requests, WorkerReader
from torchtrainer.train.data_streams import DividedStream, PlainStream

__all__ = ["RankBatch", "RankLoader"]


class RankLoader:
    """One rank's share of a loader: passes over it, batch by batch, resumable between calls.

    Pass ``i``, counted from 0, is epoch ``i``. Building one is a collective call, and so is every start of a training
    pass; a step is one only for streams and for loaders used as they are, in training, if their lengths do not tell who
    takes how many steps. Everything runs in the thread that trains.

    Args:
        loader: what the user's data creator returned.
        rank: this rank.
        world_size: how many ranks there are.
        seed: of the trainer; a seed of the loader's own (generator, DistributedSampler) goes first.
        collective: the ranks.
        shard: deal the loader out; False: every rank uses its loader as it is.
        training: the ranks step together, so one without samples borrows some; else it gets a step without data.
        device: of the rank; batches are pinned only for CUDA, and only if the loader asks for it.
        name: what the loader is for, in errors: ``train`` or ``validation``.
        batch_shares: parts of the batch size of all ranks, by rank, where one process has the loaders of all: a loader with
            this rank's part stands for loaders with theirs.

    Attributes:
        passes_started: passes that were started, those of an earlier process included.
        accumulate: batches that are given out as one, as `MicroBatches`; fewer at the end of a pass. May be set between steps.
        any_world_size: a position in a pass means the same to any number of ranks.

    Raises:
        UnshardableLoaderError: the loader cannot be dealt out, or the ranks' loaders do not belong together.
        InvalidArgumentTypeError: it is not iterable.
    """

    def __init__(
        self,
        loader: Any,
        *,
        rank: int,
        world_size: int,
        seed: int,
        collective: Agreement,
        shard: bool,
        training: bool,
        device: torch.device | None,
        name: str,
        batch_shares: Sequence[int] = (),
    ) -> None:
        mine = describe(loader, name=name, seed=seed, world_size=world_size, shard=shard)
        several = world_size > 1
        facts = [LoaderFacts(**one) for one in collective.all_gather(to_json(mine))] if several else [mine]
        if batch_shares and mine.batch_size == batch_shares[rank]:
            facts = [replace(one, batch_size=size) for one, size in zip(facts, batch_shares, strict=True)]
        check_facts(facts)
        self._loader = loader
        self._facts = facts
        self._training = training
        self.accumulate = 1
        self._pinned = (
            isinstance(loader, DataLoader) and loader.pin_memory and device is not None and device.type == "cuda"
        )
        self._name = name
        self._begin(rank, collective if several else None)

    def _begin(self, rank: int, agreement: Agreement | None) -> None:
        self._passes: _DealtPasses | _StreamPasses
        if self._facts[rank].kind in ("plain", "stream"):
            streaming = agreement if self._training else None
            self._passes = _StreamPasses(self._loader, self._facts, rank, streaming, self._pinned)
        else:
            self._passes = _DealtPasses(self._loader, self._facts, rank, agreement, self._training, self._pinned)
        self.passes_started = 0
        self._pass: Pass | None = None
        self._resume: dict[str, int] | None = None
        self._known: tuple[int | None, int | None] = self._passes.outline()
        self.any_world_size = isinstance(self._passes, _DealtPasses)

    def for_rank(self, rank: int) -> RankLoader:
        """Another rank's share of the same loader, at the same place; not a collective call.

        Only for loaders that are dealt out (``any_world_size``): of others each rank has to have its own.
        """
        other = copy.copy(self)
        other._begin(rank, None)
        other.load_state_dict(self.state_dict())
        return other

    @property
    def in_pass(self) -> bool:
        """Whether a pass is running: its first batch was given out, and its last one was not."""
        return self._pass is not None or self._resume is not None

    @property
    def batches_per_pass(self) -> int | None:
        """Batches of a pass for this rank: of the running one, else of the last or the next; None if not known."""
        batches = self._known[0]
        return batches if batches is None else -(-batches // self.accumulate)

    @property
    def samples_per_pass(self) -> int | None:
        """Samples of a pass over all ranks, as for `batches_per_pass`."""
        return self._known[1]

    @property
    def batch_in_pass(self) -> int:
        """Batches of the running pass that were given out; 0 between passes."""
        given = (
            self._resume["batches"] if self._resume is not None else self._pass.batches if self._pass is not None else 0
        )
        return -(-given // self.accumulate)

    def next_batch(self) -> RankBatch | None:
        """The next batch; starts a pass if none is running.

        Returns:
            None if the running pass turns out to have ended, or the new one is empty. Right after a last batch that is
            known as such (always, but for streams that were resumed at their very end) no pass is running any more.

        Raises:
            UnshardableLoaderError: the sampler gives the ranks different orders, a loader that can be iterated only
                once was used up, or a stream has no batch for some rank.
        """
        if self.accumulate == 1:
            return self._next()
        began = self.state_dict()
        parts: list[RankBatch] = []
        try:
            while len(parts) < self.accumulate and (part := self._next()) is not None:
                parts.append(part)
                if not self.in_pass:
                    break
        except BaseException:
            if parts:  # the next call asks for all of them again
                self.load_state_dict(began)
            raise
        return joined(parts) if parts else None

    def _next(self) -> RankBatch | None:
        if self._pass is None:
            self._pass = self._start()
        try:
            batch = self._pass.next()
        except BaseException:
            self._recover()
            raise
        if self._pass.ended:
            self.give_up()
        return batch

    def _start(self) -> Pass:
        resume = self._resume or {"samples": 0, "batches": 0}
        epoch = self.passes_started - 1 if self._resume is not None else self.passes_started
        started = self._passes.start(epoch, resume["samples"], resume["batches"])
        self.passes_started = epoch + 1
        self._resume = None
        self._known = (started.count, started.total)
        return started

    def state_dict(self) -> dict[str, int]:
        """Where this loader stands, as plain integers.

        Returns:
            ``passes_started``; ``samples``: the global position in the running pass, 0 between passes, for any
            number of ranks; ``batches``: what this rank took of it, which only streams need.
        """
        if self._resume is not None:
            return {"passes_started": self.passes_started, **self._resume}
        running = self._pass
        return {
            "passes_started": self.passes_started,
            "samples": running.samples if running is not None else 0,
            "batches": running.batches if running is not None else 0,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where another loader over the same data stood; a pass that is running here is given up.

        Reading goes on there without reading what came before, except for streams, whose first batches are read and
        dropped: they need the same number of ranks and of loader workers.

        Args:
            state: from `state_dict`; ``batches`` may be missing.

        Raises:
            InvalidArgumentError: a number is negative, or a position is given without a pass that was started.
        """
        passes, samples, batches = (int(state.get(key, 0)) for key in ("passes_started", "samples", "batches"))
        if min(passes, samples, batches) < 0 or (samples > 0 and passes == 0):
            raise InvalidArgumentError(f"the state of the {self._name} loader makes no sense: {dict(state)!r}")
        self.give_up()
        self.passes_started = passes
        self._resume = {"samples": samples, "batches": batches} if samples or batches else None

    def close(self) -> None:
        """Ends loader workers. The loader may be used again; a running pass goes on where it was."""
        if self._pass is not None:
            self._resume = {"samples": self._pass.samples, "batches": self._pass.batches}
            self._pass = None
        self._passes.close()

    def _recover(self) -> None:
        """After an error in a batch: the next call asks for the same batch again."""
        if self._pass is None:
            return
        if self._pass.batches == 0:
            self.give_up()
            self.passes_started -= 1
        elif isinstance(self._pass, StreamPass):
            self.close()

    def give_up(self) -> None:
        """Gives up the pass that is running, if one is: the next batch is the first of a new one."""
        if self._pass is not None:
            self._passes.stop()
        self._pass = None
        self._resume = None


class _DealtPasses:
    """Passes over loaders whose order is known beforehand. Arguments as for `_StreamPasses`."""

    def __init__(
        self,
        loader: Any,
        facts: list[LoaderFacts],
        rank: int,
        agreement: Agreement | None,
        training: bool,
        pinned: bool,
    ) -> None:
        self._rank = rank
        self._training = training
        self._seed = facts[0].seed
        self._reader: Reader
        self._order: SampleOrder | BatchOrder | ListOrder
        if facts[0].kind == "list":
            self._order, self._reader = ListOrder(loader, rank, len(facts)), ListReader(loader)
            return
        order = SampleOrder if facts[0].kind == "samples" else BatchOrder
        self._order = order(loader, facts, rank, agreement, every_pass=training)
        if loader.num_workers > 0:
            self._reader = WorkerReader(loader, pinned, self._seed)
        else:
            self._reader = DirectReader(loader, pinned)

    def outline(self) -> tuple[int | None, int | None]:
        """Batches for this rank and samples for all, of every pass, where known."""
        plan = self._order.outline()
        return (None, None) if plan is None else (plan.count(self._training), plan.samples)

    def start(self, epoch: int, samples: int, batches: int) -> Pass:
        """Starts a pass at a global position."""
        plan = self._order.plan(epoch, samples)
        requests = Requests(plan, epoch=epoch, seed=self._seed, rank=self._rank, borrow=self._training)
        return DealtPass(requests, self._reader)

    def stop(self) -> None:
        """Ends the running pass; persistent workers stay."""
        self._reader.stop()

    def close(self) -> None:
        """Ends the loader workers."""
        self._reader.close()


class _StreamPasses:
    """Passes over loaders whose end shows only when it is reached.

    Args:
        loader: the user's.
        facts: of all ranks, by rank.
        rank: this one.
        agreement: the ranks that step together, or None.
        pinned: whether batches are to lie in pinned memory.
    """

    def __init__(
        self, loader: Any, facts: list[LoaderFacts], rank: int, agreement: Agreement | None, pinned: bool
    ) -> None:
        mine = facts[rank]
        self._world_size = len(facts)
        self._name = mine.name
        self._length = mine.length
        self._exact = agreement is not None and mine.length is not None and len({one.length for one in facts}) == 1
        self._agreement = None if self._exact else agreement
        self._stream: DividedStream | PlainStream
        if mine.kind == "stream":
            self._stream = DividedStream(loader, seed=facts[0].seed, rank=rank, world_size=len(facts), pinned=pinned)
        else:
            self._stream = PlainStream(loader, seed=mine.seed, rank=rank, name=mine.name)

    def outline(self) -> tuple[int | None, int | None]:
        """Batches for this rank of every pass, where known."""
        return self._count(), None

    def _count(self) -> int | None:
        return self._length if self._exact or self._agreement is None else None

    def start(self, epoch: int, samples: int, batches: int) -> Pass:
        """Starts a pass, leaving out batches that were taken before."""
        return StreamPass(
            self._stream.open(epoch),
            world_size=self._world_size,
            agreement=self._agreement,
            count=self._count(),
            exact=self._exact,
            skip=batches,
            samples=samples,
            name=self._name,
        )

    def stop(self) -> None:
        """Ends the running pass; persistent workers stay."""
        self._stream.stop()

    def close(self) -> None:
        """Ends the loader workers."""
        self._stream.close()
