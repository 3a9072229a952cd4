"""One rank's share of a loader: the door through which training and validation get their batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchtrainer.errors import InvalidArgumentError, UnshardableLoaderError
from torchtrainer.train.data_drawing import DrawnOrders, EndlessSamplerError
from torchtrainer.train.data_facts import (
    Agreement,
    LoaderFacts,
    check_even,
    check_facts,
    check_orders,
    check_undivided,
    describe,
    to_json,
)
from torchtrainer.train.data_generators import names_of, samplers_of
from torchtrainer.train.data_order import Dealing
from torchtrainer.train.data_passes import Pass, RankBatch, StreamPass, joined
from torchtrainer.train.data_sources import DealtPasses, StreamPasses
from torchtrainer.train.refetching import Losing

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
        training: the ranks step together, so one without samples borrows some; else it gets a step without data.
        device: of the rank; batches are pinned only for CUDA, and only if the loader asks for it.
        name: what the loader is for, in errors: ``train`` or ``validation``.
        dealing: how the loader is dealt out.
        losing: what is done about its processes that die.

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
        training: bool,
        device: torch.device | None,
        name: str,
        dealing: Dealing,
        losing: Losing,
    ) -> None:
        mine = describe(loader, name=name, seed=seed, world_size=world_size, shard=dealing.shard)
        several = world_size > 1
        facts = [LoaderFacts(**one) for one in collective.all_gather(to_json(mine))] if several else [mine]
        batch_shares = dealing.batch_shares
        if batch_shares and mine.batch_size == batch_shares[rank]:
            facts = [replace(one, batch_size=size) for one, size in zip(facts, batch_shares, strict=True)]
        check_facts(facts)
        self._dealing = dealing
        self._losing = losing
        check_even(facts, self._dealing.even)
        self._drawn = _drawn_orders(loader, facts[rank], rank, facts[0].seed, collective if several else None)
        if facts[rank].drawn and self._drawn is None:
            facts = [describe(loader, name=name, seed=seed, world_size=1, shard=False)]
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
        self._passes: DealtPasses | StreamPasses
        loader, facts, dealing, losing = self._loader, self._facts, self._dealing, self._losing
        if facts[rank].kind in ("plain", "stream"):
            self._passes = StreamPasses(loader, facts, rank, agreement, self._training, self._pinned, dealing, losing)
        else:
            self._passes = DealtPasses(
                loader, facts, rank, agreement, self._training, self._pinned, dealing, losing, self._drawn
            )
        self.passes_started = 0
        self._pass: Pass | None = None
        self._resume: dict[str, int] | None = None
        self._order = 0
        self._known: tuple[int | None, int | None] | None = None
        self.any_world_size = isinstance(self._passes, DealtPasses)

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
        batches = self._outline()[0]
        return batches if batches is None else -(-batches // self.accumulate)

    @property
    def samples_per_pass(self) -> int | None:
        """Samples of a pass over all ranks, as for `batches_per_pass`."""
        return self._outline()[1]

    def _outline(self) -> tuple[int | None, int | None]:
        """Batches and samples of a pass; not before they are asked for, as they may depend on the models."""
        if self._known is None:
            self._known = self._passes.outline()
        return self._known

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
            known as such (always, except for streams that were resumed at their very end) no pass is running any more.

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
        if self._drawn is not None:
            order = self._drawn.draw(epoch).digest
            if self._resume is not None and self._order not in (0, order):
                raise UnshardableLoaderError(self._drawn.changed(epoch))
            self._order = order
        self.passes_started = epoch + 1
        self._resume = None
        self._known = (started.count, started.total)
        return started

    def state_dict(self) -> dict[str, int]:
        """Where this loader stands, as plain integers.

        Returns:
            ``passes_started``; ``samples``: the global position in the running pass, 0 between passes, for any
            number of ranks; ``batches``: what this rank took of it, which only streams need; ``order``: a digest of the
            order of the latest pass, where a sampler of the user's gave it.
        """
        order = {"order": self._order} if self._drawn is not None else {}
        if self._resume is not None:
            return {"passes_started": self.passes_started, **self._resume, **order}
        running = self._pass
        return {
            "passes_started": self.passes_started,
            "samples": running.samples if running is not None else 0,
            "batches": running.batches if running is not None else 0,
            **order,
        }

    def saved_order(self) -> dict[str, Any] | None:
        """The order of the running pass for a checkpoint, alike on all ranks; None where it need not be saved, or cannot be."""
        if self._drawn is None or not self.in_pass:
            return None
        return self._drawn.saved(self.passes_started - 1)

    def put_order(self, saved: Mapping[str, Any]) -> None:
        """Takes the order of the running pass from a checkpoint, for all ranks of this process."""
        if self._drawn is not None:
            self._drawn.put(saved)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Goes to where another loader over the same data stood; a pass that is running here is given up.

        Reading goes on there without reading what came before, except for streams, whose first batches are read and
        dropped: they need the same number of ranks and of loader workers.

        Args:
            state: from `state_dict`; ``batches`` and ``order`` may be missing.

        Raises:
            InvalidArgumentError: a number is negative, or a position is given without a pass that was started.
        """
        passes, samples, batches = (int(state.get(key, 0)) for key in ("passes_started", "samples", "batches"))
        if min(passes, samples, batches) < 0 or (samples > 0 and passes == 0):
            raise InvalidArgumentError(f"the state of the {self._name} loader is invalid: {dict(state)!r}")
        self.give_up()
        self.passes_started = passes
        self._resume = {"samples": samples, "batches": batches} if samples or batches else None
        self._order = int(state.get("order", 0))

    def close(self) -> None:
        """Ends loader workers. The loader may be used again; a running pass continues where it was."""
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


def _drawn_orders(
    loader: Any, facts: LoaderFacts, rank: int, seed: int, collective: Agreement | None
) -> DrawnOrders | None:
    """The orders of the user's sampler, if they are drawn, the first one compared between the ranks.

    None also if it never ends, which does not matter to a rank that is alone.
    """
    if not facts.drawn:
        return None
    sampler = loader.batch_sampler.sampler if facts.kind == "samples" else loader.batch_sampler or loader.sampler
    drawn = DrawnOrders(loader, sampler, seed=seed, name=facts.name)
    try:
        first = drawn.draw(0)
    except EndlessSamplerError:
        if collective is None:
            return None
        raise
    if collective is not None:
        known = names_of(rank, samplers_of(loader), loader)
        told = collective.all_gather([len(first.elements), first.digest, known])
        orders = [one[:2] for one in told]
        orders[rank] = [
            len(first.elements),
            first.digest,
        ]  # a process that is built later gets answers of an earlier one
        check_orders(facts.name, drawn.kind, orders, 0)
        check_undivided(facts, drawn.kind, first.samples, [one[2] for one in told])
    drawn.forget()
    return drawn


class LoaderView:
    """A registered loader as one rank sees it: ``len()`` and iteration are of the rank's batches, the rest is the loader's.

    Iterating it takes the batches that the hooks' iterator would get next, up to the end of the pass.
    """

    def __init__(self, loader: Any, rank_loader: RankLoader) -> None:
        self._loader = loader
        self._rank_loader = rank_loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__.get("_loader"), name)

    def __len__(self) -> int:
        batches = self._rank_loader.batches_per_pass
        if batches is None:
            raise TypeError(f"the number of batches of {type(self._loader).__name__} is not known")
        return batches

    def __bool__(self) -> bool:
        return True

    def __iter__(self) -> Iterator[Any]:
        while (batch := self._rank_loader.next_batch()) is not None:
            if batch.size or batch.data is not None:  # not a validation step without samples for this rank
                yield batch.data
            if not self._rank_loader.in_pass:
                return


class JointLoader:
    """The loaders of the ranks of a process, as one. All of them stand at the same place.

    Args:
        loaders: gives them by rank, as they are now.
        on_error: called with the rank whose loader raises.
    """

    def __init__(self, loaders: Callable[[], Mapping[int, RankLoader]], on_error: Callable[[int], None]) -> None:
        self._loaders = loaders
        self._on_error = on_error

    def __getattr__(self, name: str) -> Any:
        loaders = self.__dict__["_loaders"]()
        return getattr(loaders[min(loaders)], name)

    def next_batch(self) -> RankBatch | None:
        """The batches of all ranks by rank, as one; None after the last step of a pass."""
        parts: dict[int, RankBatch] = {}
        size = global_size = 0
        for rank, loader in sorted(self._loaders().items()):
            try:
                part = loader.next_batch()
            except BaseException:  # ``sys.exit`` too
                self._on_error(rank)
                raise
            if part is None:
                return None
            parts[rank] = part
            size, global_size = size + part.size, part.global_size
        return RankBatch(parts, size, global_size)
