"""In which order the samples of a loader are dealt: by its settings, or as a sampler of the user's gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader

from torchtrainer.train.data_drawing import DrawnOrders, set_epochs
from torchtrainer.train.data_facts import LoaderFacts, length_of, standard_order
from torchtrainer.train.sampler import BatchPlan, Even, Plan, SamplePlan, epoch_order


def one_sample() -> int:
    """The least that a rank with any samples can have."""
    return 1


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """How a loader is dealt to the ranks.

    Attributes:
        shard: deal it out; False: every rank uses its loader as it is.
        batch_shares: parts of the batch size of all ranks, by rank, where one process has the loaders of all: a loader with
            this rank's part stands for loaders with theirs.
        even: what is done so that all ranks have as many samples in each step.
        smallest: gives the fewest samples of a rank in a step; asked when a pass starts, and the same on all ranks.
    """

    shard: bool = True
    batch_shares: Sequence[int] = ()
    even: Even = ""
    smallest: Callable[[], int] = one_sample


def even_of(even_batches: bool | str) -> Even:
    """The option ``even_batches`` as a part of `Dealing`."""
    if even_batches is True or even_batches == "repeat":
        return "repeat"
    return "drop" if even_batches == "drop" else ""


class SampleOrder:
    """The order of a map-style loader that makes batches itself: dealt sample by sample.

    Args:
        loader: the user's.
        facts: all ranks', by rank.
        rank: this one.
        dealing: how the end of a pass is dealt.
        drawn: the sampler's orders, or None if they follow from the settings.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        facts: Sequence[LoaderFacts],
        rank: int,
        dealing: Dealing,
        drawn: DrawnOrders | None,
    ) -> None:
        self._loader = loader
        self._sampler = loader.batch_sampler.sampler  # type: ignore[union-attr]  # exactly a BatchSampler, see `describe`
        self._standard = standard_order(self._sampler)
        self._drawn = drawn
        self._seed = facts[0].seed
        self._global_batch = sum(one.batch_size or 0 for one in facts)
        self._drop_last = facts[0].drop_last
        self._rank = rank
        self._world_size = len(facts)
        self._dealing = dealing

    def plan(self, epoch: int, start: int) -> Plan:
        """What is dealt in an epoch from a global position on."""
        order: Any
        if self._drawn is not None:
            order = self._drawn.draw(epoch).elements
        else:
            assert self._standard is not None  # else it is drawn
            shuffle, samples = self._standard
            order = epoch_order(samples, shuffle=shuffle, seed=self._seed, epoch=epoch)
        set_epochs(self._loader, epoch)
        return self._plan(order, start)

    def outline(self) -> Plan | None:
        """A plan with the lengths of every epoch, but not the order; None if the lengths are not known."""
        samples = self._standard[1] if self._standard is not None else length_of(self._sampler)
        return None if samples is None else self._plan(range(samples), 0)

    def _plan(self, order: Any, start: int) -> Plan:
        return SamplePlan(
            order,
            self._global_batch,
            self._drop_last,
            self._rank,
            self._world_size,
            start,
            self._dealing.smallest(),
            self._dealing.even,
        )


class BatchOrder:
    """The order of a map-style loader whose sampler gives whole batches: dealt batch by batch.

    That is a ``batch_sampler`` of the user's own, or ``batch_size=None``, where each element of the sampler is a batch:
    of one sample, or of as many as it has indices. Arguments as for `SampleOrder`.
    """

    def __init__(
        self, loader: DataLoader[Any], facts: Sequence[LoaderFacts], rank: int, dealing: Dealing, drawn: DrawnOrders
    ) -> None:
        self._loader = loader
        self._drawn = drawn
        self._rank = rank
        self._world_size = len(facts)
        self._even = dealing.even

    def plan(self, epoch: int, start: int) -> Plan:
        """What is dealt in an epoch from a global position on."""
        batches = self._drawn.draw(epoch).elements
        set_epochs(self._loader, epoch)
        single = self._loader.batch_sampler is None
        sizes = [1 if single and not isinstance(batch, list | tuple) else len(batch) for batch in batches]
        return BatchPlan(batches, sizes, self._rank, self._world_size, start, self._even)

    def outline(self) -> Plan | None:
        """None: how many samples the batches have is known once they are drawn."""
        return None


class ListOrder:
    """The order of a list of ready batches: as it is, dealt batch by batch.

    Args:
        batches: the user's.
        rank: who reads.
        world_size: how many ranks there are.
        even: what is done so that all ranks have as many batches.
    """

    def __init__(self, batches: Sequence[Any], rank: int, world_size: int, even: Even) -> None:
        self._batches = batches
        self._rank = rank
        self._world_size = world_size
        self._even = even

    def plan(self, epoch: int, start: int) -> Plan:
        """What is dealt in an epoch from a global position on; the same in every epoch."""
        sizes = [size_of(batch) for batch in self._batches]
        return BatchPlan(range(len(self._batches)), sizes, self._rank, self._world_size, start, self._even)

    def outline(self) -> Plan | None:
        """A plan with the lengths of every epoch."""
        return self.plan(0, 0)


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
