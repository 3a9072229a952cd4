"""Which samples every rank reads at every step: pure functions of the seed, the epoch and the global position.

The order is that of torch's ``DistributedSampler``: ``perm = randperm(n)`` under a generator seeded with
``seed + epoch``; global batch ``k`` is ``perm[k*B : (k+1)*B]``, and rank ``r`` of ``W`` takes ``batch_k[r::W]``.
Nothing is padded, so each sample comes once per epoch, and the last global batch may give the ranks unequal shares; or
some are left out or repeated, if that is asked for.

::

    order      | 5 2 7 0 | 9 4 1 8 | 3 6 |     n = 10, B = 4, W = 2
    rank 0       5   7     9   1     3
    rank 1         2   0     4   8     6
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

import torch

from torchtrainer.topology import share_of

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


def derive_seed(*values: int) -> int:
    """A 64-bit seed out of several integers: other integers, or the same in another order, give an unrelated seed.

    Each integer is added and mixed with the finalizer of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom
    number generators", 2014). Same result on every platform.

    Args:
        values: any integers; only their low 64 bits count.
    """
    state = _GOLDEN
    for value in values:
        state = (state + _GOLDEN + (value & _MASK)) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def epoch_order(samples: int, *, shuffle: bool, seed: int, epoch: int) -> torch.Tensor | range:
    """The order in which an epoch goes through a dataset.

    Args:
        samples: length of the dataset.
        shuffle: a permutation that depends on the seed and the epoch; else 0, 1, 2, ...
        seed: of the run.
        epoch: passes before this one.

    Returns:
        A tensor of shape ``(samples,)``, int64, or a range.
    """
    if not shuffle:
        return range(samples)
    generator = torch.Generator()
    generator.manual_seed((seed + epoch) & _MASK)
    return torch.randperm(samples, generator=generator)


def count_steps(samples: int, global_batch: int, drop_last: bool) -> int:
    """How many global batches there are in so many samples; ``drop_last`` leaves out a short last one."""
    return samples // global_batch if drop_last else -(-samples // global_batch)


def is_even_split(sizes: Sequence[int]) -> bool:
    """Whether batch sizes, by rank, are the even split of their sum: 11, 11, 10 for 32, larger ones first."""
    total, world_size = sum(sizes), len(sizes)
    return list(sizes) == [share_of(total, rank, world_size) for rank in range(world_size)]


Even = Literal["", "drop", "repeat"]
"""How ranks get equal numbers of samples in each step: not at all, by leaving samples out, or by giving some twice."""


@dataclass(frozen=True)
class Share:
    """The samples that one rank reads in one step.

    Attributes:
        position: samples of the epoch before this step, over all ranks.
        indices: what to read: a list, a tensor or a range of indices, or one element of a sampler.
        size: samples that count for this rank; 0: ``indices`` are borrowed from another rank.
        global_size: samples of the step over all ranks.
        even: all ranks have as many.
        without: ranks without samples.
    """

    position: int
    indices: Any
    size: int
    global_size: int
    even: bool = True
    without: int = 0


@dataclass(frozen=True)
class SamplePlan:
    """The rest of an epoch of samples, dealt one by one.

    The last step may be short. Then so many ranks get a share of it that each has at least ``smallest`` samples. A last step
    with fewer than that in all joins the step before it.

    Attributes:
        order: the whole epoch: a tensor, a range or a list of indices.
        global_batch: samples per step, over all ranks.
        drop_last: leave out the last step if it is short.
        rank: who reads.
        world_size: how many ranks there are.
        start: samples that were read before.
        smallest: fewest samples of a rank that has any, as long as whole batches have as many.
        even: give all ranks as many samples in a short last step: by leaving some out, or by repeating the first of the epoch.
    """

    order: Any
    global_batch: int
    drop_last: bool
    rank: int
    world_size: int
    start: int = 0
    smallest: int = 1
    even: Even = ""
    _steps: int = field(init=False, repr=False)
    _last_size: int = field(init=False, repr=False)
    _last_ranks: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        left = max(len(self.order) - self.start, 0)
        steps = count_steps(left, self.global_batch, self.drop_last)
        tail = min(left - (steps - 1) * self.global_batch, self.global_batch) if steps else 0
        smallest = self._smallest
        ranks = self.world_size
        if tail < self.global_batch and self.even == "repeat":
            tail = max(-(-tail // ranks), smallest) * ranks if tail else 0
        elif tail < self.global_batch and self.even == "drop":
            tail = tail // ranks * ranks if tail // ranks >= smallest else 0
            if not tail and steps:
                steps, tail = steps - 1, self.global_batch
        elif tail < smallest and steps > 1:
            steps, tail = steps - 1, tail + self.global_batch
        elif tail < smallest * ranks:
            ranks = max(tail // smallest, 1)
        for name, value in (("_steps", steps), ("_last_size", tail), ("_last_ranks", ranks)):
            object.__setattr__(self, name, value)

    @property
    def _smallest(self) -> int:
        return max(min(self.smallest, self.global_batch // self.world_size), 1)

    @property
    def samples(self) -> int:
        """Samples of the whole epoch, over all ranks; those that are given twice count twice."""
        return self.start + (self._steps - 1) * self.global_batch + self._last_size if self._steps else self.start

    @property
    def done(self) -> int:
        """Steps before the start."""
        return -(-self.start // self.global_batch)

    def count(self, borrow: bool) -> int:
        """Steps from the start in which this rank has a batch.

        Args:
            borrow: a rank without samples in the last step borrows some, so that all ranks take all steps.
        """
        return self._steps if borrow or not self._steps or self.rank < self._last_ranks else self._steps - 1

    def share(self, step: int) -> Share:
        """This rank's part of a step after the start; without samples it borrows the first ones of the step."""
        first = self.start + step * self.global_batch
        last_step = step == self._steps - 1
        size, ranks = (self._last_size, self._last_ranks) if last_step else (self.global_batch, self.world_size)
        even = ranks == self.world_size and size % ranks == 0
        if self.rank >= ranks:
            lent = self._between(first, first + min(size, max(self._smallest, 2)), 1)
            return Share(first, lent, 0, size, even, self.world_size - ranks)
        mine = self._between(first + self.rank, first + size, ranks)
        return Share(first, mine, len(mine), size, even, self.world_size - ranks)

    def _between(self, first: int, last: int, stride: int) -> Any:
        """Part of the order; beyond its end it starts anew."""
        whole = len(self.order)
        if last <= whole:
            return self.order[first:last:stride]
        places = [place % whole for place in range(first, last, stride)]
        return self.order[places] if isinstance(self.order, torch.Tensor) else [self.order[one] for one in places]


@dataclass(frozen=True)
class BatchPlan:
    """The rest of an epoch of ready batches: of ``W`` consecutive ones, every rank takes one.

    Attributes:
        batches: the whole epoch: what to read for each batch.
        sizes: samples in each of them.
        rank: who reads.
        world_size: how many ranks there are.
        start: samples that were read before.
        even: give all ranks as many batches: by leaving out the last ones, or by repeating the first of the epoch.
    """

    batches: Sequence[Any]
    sizes: Sequence[int]
    rank: int
    world_size: int
    start: int = 0
    even: Even = ""
    _positions: list[int] = field(init=False, repr=False)
    _steps: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_positions", [0, *accumulate(self.sizes)])
        whole = len(self.batches) // self.world_size
        steps = whole if self.even == "drop" else -(-len(self.batches) // self.world_size)
        object.__setattr__(self, "_steps", steps)

    @property
    def samples(self) -> int:
        """Samples of the whole epoch, over all ranks; those that are given twice count twice."""
        if not self.even:
            return self._positions[-1]
        return sum(self.sizes[one % len(self.sizes)] for one in range(self._steps * self.world_size))

    @property
    def done(self) -> int:
        """Steps before the start."""
        return -(-bisect_left(self._positions, self.start) // self.world_size)

    def count(self, borrow: bool) -> int:
        """Steps from the start in which this rank has a batch; ``borrow`` as in `SamplePlan.count`."""
        steps = self._steps
        tail = len(self.batches) - (steps - 1) * self.world_size
        mine = steps - 1 if steps and not borrow and not self.even and tail <= self.rank else steps
        return max(mine - self.done, 0)

    def share(self, step: int) -> Share:
        """This rank's part of a step after the start; without a batch it borrows from the first one of the step."""
        first = (self.done + step) * self.world_size
        end = first + self.world_size
        places = range(first, end if self.even else min(end, len(self.batches)))
        sizes = [self.sizes[one % len(self.sizes)] for one in places]
        position, without = self._positions[first], self.world_size - len(places)
        even = not without and len(set(sizes)) == 1
        if self.rank < len(places):
            mine = self.batches[places[self.rank] % len(self.batches)]
            return Share(position, mine, sizes[self.rank], sum(sizes), even, without)
        lent = self.batches[first]
        return Share(position, lent[:2] if isinstance(lent, list) else lent, 0, sum(sizes), even, without)


Plan = SamplePlan | BatchPlan
