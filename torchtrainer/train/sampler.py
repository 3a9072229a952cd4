"""Which samples every rank reads at every step: pure functions of the seed, the epoch and the global position.

The order is that of torch's ``DistributedSampler``: ``perm = randperm(n)`` under a generator seeded with
``seed + epoch``; global batch ``k`` is ``perm[k*B : (k+1)*B]``, and rank ``r`` of ``W`` takes ``batch_k[r::W]``.
Nothing is padded, so each sample comes once per epoch, and the last global batch may give the ranks unequal shares.

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
from typing import Any

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


@dataclass(frozen=True)
class Share:
    """What one rank reads in one step.

    Attributes:
        position: samples of the epoch before this step, over all ranks.
        indices: what to read: a list, a tensor or a range of indices, or one element of a sampler.
        size: samples that count for this rank; 0: ``indices`` are borrowed from another rank.
        global_size: samples of the step over all ranks.
    """

    position: int
    indices: Any
    size: int
    global_size: int


@dataclass(frozen=True)
class SamplePlan:
    """The rest of an epoch of samples, dealt one by one.

    Attributes:
        order: the whole epoch: a tensor, a range or a list of indices.
        global_batch: samples per step, over all ranks.
        drop_last: leave out the last step if it is short.
        rank: who reads.
        world_size: how many ranks there are.
        start: samples that were read before.
    """

    order: Any
    global_batch: int
    drop_last: bool
    rank: int
    world_size: int
    start: int = 0

    @property
    def samples(self) -> int:
        """Samples of the whole epoch over all ranks, those that ``drop_last`` leaves out not counted."""
        total = len(self.order)
        return total - total % self.global_batch if self.drop_last else total

    @property
    def done(self) -> int:
        """Steps before the start."""
        return -(-self.start // self.global_batch)

    def count(self, borrow: bool) -> int:
        """Steps from the start in which this rank has a batch.

        Args:
            borrow: a rank without samples in the last step borrows some, so that all ranks take all steps.
        """
        left = max(len(self.order) - self.start, 0)
        steps = count_steps(left, self.global_batch, self.drop_last)
        tail = left - (steps - 1) * self.global_batch
        return steps - 1 if steps and not borrow and tail <= self.rank else steps

    def share(self, step: int) -> Share:
        """This rank's part of a step after the start; without samples it borrows the first two of the step."""
        first = self.start + step * self.global_batch
        last = min(first + self.global_batch, len(self.order))
        mine = self.order[first + self.rank : last : self.world_size]
        size = len(mine)
        return Share(first, mine if size else self.order[first : min(first + 2, last)], size, last - first)


@dataclass(frozen=True)
class BatchPlan:
    """The rest of an epoch of ready batches: of ``W`` consecutive ones, every rank takes one.

    Attributes:
        batches: the whole epoch: what to read for each batch.
        sizes: samples in each of them.
        rank: who reads.
        world_size: how many ranks there are.
        start: samples that were read before.
    """

    batches: Sequence[Any]
    sizes: Sequence[int]
    rank: int
    world_size: int
    start: int = 0
    _positions: list[int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_positions", [0, *accumulate(self.sizes)])

    @property
    def samples(self) -> int:
        """Samples of the whole epoch, over all ranks."""
        return self._positions[-1]

    @property
    def done(self) -> int:
        """Steps before the start."""
        return -(-bisect_left(self._positions, self.start) // self.world_size)

    def count(self, borrow: bool) -> int:
        """Steps from the start in which this rank has a batch; ``borrow`` as in `SamplePlan.count`."""
        steps = -(-len(self.batches) // self.world_size)
        tail = len(self.batches) - (steps - 1) * self.world_size
        mine = steps - 1 if steps and not borrow and tail <= self.rank else steps
        return max(mine - self.done, 0)

    def share(self, step: int) -> Share:
        """This rank's part of a step after the start; without a batch it borrows from the first one of the step."""
        first = (self.done + step) * self.world_size
        last = min(first + self.world_size, len(self.batches))
        size = self._positions[last] - self._positions[first]
        mine = first + self.rank
        if mine < last:
            return Share(self._positions[first], self.batches[mine], self.sizes[mine], size)
        lent = self.batches[first]
        return Share(self._positions[first], lent[:2] if isinstance(lent, list) else lent, 0, size)


Plan = SamplePlan | BatchPlan
