"""In which order the samples of a loader are dealt: the sampler's own, drawn alike on every rank."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchtrainer.errors import UnshardableLoaderError
from torchtrainer.train.data_facts import (
    AS_THEY_ARE,
    Agreement,
    LoaderFacts,
    generators_of,
    length_of,
    samplers_of,
    standard_order,
)
from torchtrainer.train.fetch import call_set_epoch, seeded
from torchtrainer.train.sampler import BatchPlan, Plan, SamplePlan, derive_seed, epoch_order

_MOST_DRAWN = 1_000_000


class SampleOrder:
    """The order of a map-style loader that makes batches itself: dealt sample by sample.

    Args:
        loader: the user's.
        facts: all ranks', by rank.
        rank: this one.
        agreement: the other ranks, or None if there is only one.
        every_pass: all ranks start every pass together, so that each order can be compared; else only the first.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        facts: Sequence[LoaderFacts],
        rank: int,
        agreement: Agreement | None,
        *,
        every_pass: bool,
    ) -> None:
        self._loader = loader
        self._sampler = loader.batch_sampler.sampler  # type: ignore[union-attr]  # exactly a BatchSampler, see `describe`
        self._standard = standard_order(self._sampler)
        self._drawn = DrawnOrder(loader, self._sampler, facts[0], agreement, every_pass)
        self._seed = facts[0].seed
        self._global_batch = sum(one.batch_size or 0 for one in facts)
        self._drop_last = facts[0].drop_last
        self._rank = rank
        self._world_size = len(facts)

    def plan(self, epoch: int, start: int) -> Plan:
        """What is dealt in an epoch from a global position on."""
        set_epochs(self._loader, epoch)
        if self._standard is None:
            return self._plan(self._drawn.draw(epoch), start)
        shuffle, samples = self._standard
        return self._plan(epoch_order(samples, shuffle=shuffle, seed=self._seed, epoch=epoch), start)

    def outline(self) -> Plan | None:
        """A plan with the lengths of every epoch, but not the order; None if the lengths are not known."""
        samples = self._standard[1] if self._standard is not None else length_of(self._sampler)
        return None if samples is None else self._plan(range(samples), 0)

    def _plan(self, order: Any, start: int) -> Plan:
        return SamplePlan(order, self._global_batch, self._drop_last, self._rank, self._world_size, start)


class BatchOrder:
    """The order of a map-style loader whose sampler gives whole batches: dealt batch by batch.

    That is a ``batch_sampler`` of the user's own, or ``batch_size=None``, where each element of the sampler is a batch:
    of one sample, or of as many as it has indices. Arguments as for `SampleOrder`.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        facts: Sequence[LoaderFacts],
        rank: int,
        agreement: Agreement | None,
        *,
        every_pass: bool,
    ) -> None:
        self._loader = loader
        self._source = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
        self._drawn = DrawnOrder(loader, self._source, facts[0], agreement, every_pass)
        self._rank = rank
        self._world_size = len(facts)

    def plan(self, epoch: int, start: int) -> Plan:
        """What is dealt in an epoch from a global position on."""
        set_epochs(self._loader, epoch)
        batches = self._drawn.draw(epoch)
        single = self._loader.batch_sampler is None
        sizes = [1 if single and not isinstance(batch, list | tuple) else len(batch) for batch in batches]
        return BatchPlan(batches, sizes, self._rank, self._world_size, start)

    def outline(self) -> Plan | None:
        """None: how many samples the batches have is known once they are drawn."""
        return None


class ListOrder:
    """The order of a list of ready batches: as it is, dealt batch by batch.

    Args:
        batches: the user's.
        rank: who reads.
        world_size: how many ranks there are.
    """

    def __init__(self, batches: Sequence[Any], rank: int, world_size: int) -> None:
        self._batches = batches
        self._rank = rank
        self._world_size = world_size

    def plan(self, epoch: int, start: int) -> Plan:
        """What is dealt in an epoch from a global position on; the same in every epoch."""
        sizes = [size_of(batch) for batch in self._batches]
        return BatchPlan(range(len(self._batches)), sizes, self._rank, self._world_size, start)

    def outline(self) -> Plan | None:
        """A plan with the lengths of every epoch."""
        return self.plan(0, 0)


class DrawnOrder:
    """The sequence that a sampler gives, drawn on every rank alike.

    The sampler runs under python's, numpy's and torch's generators, and its own, seeded by (seed, epoch); all of them
    are put back. The ranks compare what they drew.

    Args:
        loader: the user's.
        sampler: what is drawn from.
        facts: of the first rank, whose seed all take.
        agreement: the other ranks, or None.
        every_pass: as for `SampleOrder`.
    """

    def __init__(
        self, loader: Any, sampler: Any, facts: LoaderFacts, agreement: Agreement | None, every_pass: bool
    ) -> None:
        self._loader = loader
        self._sampler = sampler
        self._seed = facts.seed
        self._name = facts.name
        self._agreement = agreement
        self._every_pass = every_pass

    def draw(self, epoch: int) -> list[Any]:
        """The sequence of an epoch.

        Raises:
            UnshardableLoaderError: it does not end, or the ranks got different ones.
        """
        seed = derive_seed(self._seed, epoch)
        known = max(length_of(self._sampler) or 0, length_of(self._loader.dataset) or 0)
        most = max(_MOST_DRAWN, 20 * known)
        with seeded(seed), _generators_seeded(self._loader, seed):
            drawn = list(islice(iter(self._sampler), most + 1))
        if len(drawn) > most:
            raise UnshardableLoaderError(
                f"the {self._name} loader's sampler {type(self._sampler).__name__} did not end after {most} elements, "
                f"so it cannot be dealt out; let it end after one epoch, or pass add_dist_sampler=False"
            )
        self._compare(drawn, epoch)
        return drawn

    def _compare(self, drawn: list[Any], epoch: int) -> None:
        agreement = self._agreement
        if agreement is None:
            return
        if not self._every_pass:
            self._agreement = None
        digest = hashlib.blake2b(repr(drawn).encode(), digest_size=16).hexdigest()
        orders = agreement.all_gather([len(drawn), digest])
        if any(order != orders[0] for order in orders):
            raise UnshardableLoaderError(
                f"the {self._name} loader's sampler {type(self._sampler).__name__} gives different orders on different "
                f"ranks in epoch {epoch} (elements by rank: {[order[0] for order in orders]}), so dealing them out "
                f"would repeat and lose samples; let it depend only on the epoch and on its seed, not on the rank; or "
                f"{AS_THEY_ARE}"
            )


@contextmanager
def _generators_seeded(loader: Any, seed: int) -> Iterator[None]:
    """Seeds the torch generators of a loader and its samplers, and puts them back."""
    found = {id(one): one for one in generators_of(loader)}
    states = [(one, one.get_state()) for one in found.values()]
    for one, _ in states:
        one.manual_seed(seed)
    try:
        yield
    finally:
        for one, state in states:
            one.set_state(state)


def set_epochs(loader: Any, epoch: int) -> None:
    """Calls ``set_epoch`` of whatever has it: the samplers of a loader and its dataset."""
    for one in (*samplers_of(loader), getattr(loader, "dataset", None)):
        call_set_epoch(one, epoch)


def size_of(batch: Any) -> int:
    """How many samples a batch of unknown structure has: the first dimension of the first tensor in it.

    Mappings, lists and tuples are searched in order. Without a tensor: the length of the batch, if it is a list, else
    1. A batch counts at least as one sample, and a tensor without dimensions as one.
    """
    tensor = _first_tensor(batch)
    if tensor is not None:
        return max(tensor.shape[0], 1) if tensor.dim() > 0 else 1
    return max(len(batch), 1) if isinstance(batch, list) else 1


def _first_tensor(batch: Any) -> torch.Tensor | None:
    if isinstance(batch, torch.Tensor):
        return batch
    if isinstance(batch, dict):
        batch = list(batch.values())
    if isinstance(batch, list | tuple):
        return next((found for found in map(_first_tensor, batch) if found is not None), None)
    return None
