"""The sampler: every sample once, for any number of ranks, in torch's own order."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from torchtrainer.train.sampler import (
    BatchPlan,
    SamplePlan,
    count_steps,
    derive_seed,
    epoch_order,
    is_even_split,
)

pytestmark = pytest.mark.pure


def _plan(
    samples: int, world_size: int, rank: int, *, batch: int = 3, drop_last: bool = False, start: int = 0, **order
):
    order = {"shuffle": True, "seed": 7, "epoch": 2, **order}
    return SamplePlan(epoch_order(samples, **order).tolist(), batch * world_size, drop_last, rank, world_size, start)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("samples", [1, 2, 7, 23, 61, 97])
def test_every_sample_is_read_once(world_size, samples):
    read = []
    for rank in range(world_size):
        plan = _plan(samples, world_size, rank)
        for step in range(plan.count(borrow=False)):
            share = plan.share(step)
            assert share.size == len(share.indices) > 0
            read += share.indices
    assert sorted(read) == list(range(samples))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_all_ranks_take_all_steps_with_borrowed_shares(world_size):
    samples = 3 * world_size * 2 + 1  # the last step has one sample
    plans = [_plan(samples, world_size, rank) for rank in range(world_size)]
    assert {plan.count(borrow=True) for plan in plans} == {3}
    assert [plan.count(borrow=False) for plan in plans] == [3] + [2] * (world_size - 1)
    last = [plan.share(2) for plan in plans]
    assert [share.size for share in last] == [1] + [0] * (world_size - 1)
    assert {share.global_size for share in last} == {1}
    assert all(share.indices == last[0].indices for share in last)


def test_a_borrowed_share_is_at_most_two_samples():
    assert len(_plan(2, 4, 3).share(0).indices) == 2


@pytest.mark.parametrize("epoch", [0, 1, 5])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_the_order_is_that_of_a_distributed_sampler(world_size, epoch):
    dataset = TensorDataset(torch.arange(48))
    for rank in range(world_size):
        theirs = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=7)
        theirs.set_epoch(epoch)
        plan = _plan(48, world_size, rank, epoch=epoch)
        ours = [index for step in range(plan.count(True)) for index in plan.share(step).indices]
        assert ours == list(theirs)


def test_drop_last_drops_the_last_global_batch_only():
    plans = [_plan(23, 2, rank, drop_last=True) for rank in range(2)]
    assert [plan.count(True) for plan in plans] == [3, 3]
    assert plans[0].samples == 18
    assert all(plan.share(step).size == 3 for plan in plans for step in range(3))
    assert count_steps(18, 6, True) == count_steps(18, 6, False) == 3
    assert count_steps(5, 6, True) == 0


def test_uneven_batch_sizes_come_out_of_the_even_split():
    plans = [SamplePlan(range(63), 21, False, rank, 2) for rank in range(2)]
    assert [plan.share(1).size for plan in plans] == [11, 10]
    assert is_even_split([11, 10])
    assert is_even_split([4])
    assert is_even_split([2, 2, 1])
    assert not is_even_split([10, 11])
    assert not is_even_split([4, 2])
    assert not is_even_split([3, 1, 1])


def test_a_plan_goes_on_at_any_position():
    whole = _plan(61, 2, 1)
    for start in (6, 12, 60):
        rest = _plan(61, 2, 1, start=start)
        assert rest.done == start // 6
        steps = range(rest.count(False))
        assert [rest.share(step) for step in steps] == [whole.share(step + rest.done) for step in steps]
    odd = [SamplePlan(range(10), 4, False, rank, 2, start=3) for rank in range(2)]
    assert sorted(i for plan in odd for step in range(2) for i in plan.share(step).indices) == list(range(3, 10))
    assert SamplePlan(range(10), 4, False, 0, 2, start=12).count(True) == 0


def test_batches_are_dealt_in_turn():
    batches, sizes = [[0, 1], [2], [3, 4, 5], [6], [7, 8]], [2, 1, 3, 1, 2]
    plans = [BatchPlan(batches, sizes, rank, 2) for rank in range(2)]
    assert [plan.share(0).indices for plan in plans] == [[0, 1], [2]]
    assert [(plan.share(1).size, plan.share(1).global_size, plan.share(1).position) for plan in plans] == [
        (3, 4, 3),
        (1, 4, 3),
    ]
    assert [plan.count(False) for plan in plans] == [3, 2]
    assert [plan.count(True) for plan in plans] == [3, 3]
    borrowed = plans[1].share(2)
    assert (borrowed.indices, borrowed.size, borrowed.global_size) == ([7, 8], 0, 2)
    rest = BatchPlan(batches, sizes, 0, 2, start=7)
    assert (rest.done, rest.count(True), rest.share(0).indices) == (2, 1, [7, 8])
    assert rest.samples == 9


def test_seeds_are_mixed_and_stable():
    assert derive_seed(1, 2) == derive_seed(1, 2)
    assert 0 <= derive_seed(-5, 2**70) < 2**64
    many = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(many) == 1000
    assert derive_seed(1, 2) != derive_seed(2, 1)
    assert (derive_seed(0), derive_seed(1, 2, 3)) == (0x6E789E6AA1B965F4, 0xD306214C1FE59365)
