"""Loaders as the ranks see them: dealt exactly once, kept as the user made them, the same wherever a pass starts."""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import select
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError, UnshardableLoaderError
from torchtrainer.train.data import RankLoader
from torchtrainer.train.data_order import Dealing
from torchtrainer.train.refetching import Losing


class Ranks:
    """The ranks of a run as threads that meet at every collective call."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._values: list[Any] = [None] * world_size
        self._barrier = threading.Barrier(world_size)
        self.calls = 0

    def run(self, fn: Callable[[int, Any], Any]) -> list[Any]:
        """``fn(rank, collective)`` on every rank; the first error is raised."""

        def one(rank: int) -> Any:
            try:
                return fn(rank, RankContext(self, rank))
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.world_size) as pool:
            futures = [pool.submit(one, rank) for rank in range(self.world_size)]
            errors = [future.exception() for future in futures]
        real = [error for error in errors if error and not isinstance(error, threading.BrokenBarrierError)]
        if real:
            raise real[0]
        return [future.result() for future in futures]

    def exchange(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value
        self._barrier.wait(20)
        values = list(self._values)
        if self._barrier.wait(20) == 0:
            self.calls += 1
        return values


class RankContext:
    """One rank's collective."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self._ranks = ranks
        self.rank = rank
        self.world_size = ranks.world_size

    def all_gather(self, value: Any) -> list[Any]:
        return self._ranks.exchange(self.rank, value)

    def sum(self, values: list[float]) -> list[float]:
        return [float(sum(column)) for column in zip(*self._ranks.exchange(self.rank, list(values)), strict=True)]


class Alone:
    """The collective of one rank; nobody may call it."""

    rank, world_size = 0, 1


def rank_loader(loader: Any, collective: Any = None, **changes: Any) -> RankLoader:
    collective = collective or Alone()
    how = {name: changes.pop(name) for name in ("shard", "even", "smallest") if name in changes}
    options: dict[str, Any] = {
        "seed": 3,
        "dealing": Dealing(**how),
        "losing": Losing(tell=lambda loss: None),
        "training": True,
        "device": torch.device("cpu"),
        "name": "train",
    }
    return RankLoader(
        loader,
        **{
            "rank": collective.rank,
            "world_size": collective.world_size,
            "collective": collective,
            **options,
            **changes,
        },
    )


def one_pass(loader: RankLoader) -> list[Any]:
    batches = []
    while (batch := loader.next_batch()) is not None:
        batches.append(batch)
        if not loader.in_pass:
            break
    return batches


def values(batches: list[Any]) -> list[int]:
    """The samples that count, as numbers."""
    return [int(value) for batch in batches if batch.size for value in batch.data]


def passes(world_size: int, make: Callable[[int], Any], number: int = 1, **changes: Any) -> list[Any]:
    """What every rank gets in the last of some passes."""

    def go(rank: int, collective: Any) -> list[Any]:
        loader = rank_loader(make(rank), collective, **changes)
        try:
            return [one_pass(loader) for _ in range(number)][-1]
        finally:
            loader.close()

    return Ranks(world_size).run(go)


class Numbers(Dataset):
    """Sample i is i."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Numbers):
    """Sample i is i with noise out of every generator."""

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, random.random(), numpy.random.rand(), torch.rand(()).item()])


class Stream(IterableDataset):
    """0 to n-1, split between loader workers as torch's documentation does; optionally shuffled by the global RNG."""

    def __init__(self, length: int, shuffle: bool = False) -> None:
        self.length = length
        self.shuffle = shuffle

    def __iter__(self):
        info = get_worker_info()
        mine = list(range(self.length))[info.id :: info.num_workers] if info else list(range(self.length))
        if self.shuffle:
            random.shuffle(mine)
        return iter(mine)


def noisy_collate(items):
    return default_collate(items) + torch.rand(()) * 0 + random.random() * 0


# ---- map-style loaders


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("samples", [1, 13, 37])
def test_every_sample_once(world_size, samples, training):
    per_rank = passes(
        world_size, lambda rank: DataLoader(Numbers(samples), batch_size=4, shuffle=True), training=training
    )
    assert sorted(value for batches in per_rank for value in values(batches)) == list(range(samples))
    assert len({len(batches) for batches in per_rank}) == 1
    for step in zip(*per_rank, strict=True):
        assert {batch.global_size for batch in step} == {sum(batch.size for batch in step)}
    for batch in (batch for batches in per_rank for batch in batches):
        assert (batch.data is None) == (batch.size == 0 and not training)  # borrowed in training only


def test_each_epoch_has_the_order_of_a_distributed_sampler():
    dataset = Numbers(24)
    for epoch in range(3):
        per_rank = passes(2, lambda rank: DataLoader(dataset, batch_size=3, shuffle=True), number=epoch + 1)
        for rank, batches in enumerate(per_rank):
            theirs = DistributedSampler(dataset, 2, rank, seed=3)
            theirs.set_epoch(epoch)
            assert values(batches) == list(theirs)


def test_without_shuffle_the_order_is_kept():
    assert values(one_pass(rank_loader(DataLoader(Numbers(10), batch_size=4)))) == list(range(10))


def test_the_seed_of_a_generator_or_distributed_sampler_goes_first():
    expected = torch.randperm(16, generator=torch.Generator().manual_seed(42)).tolist()
    generator = torch.Generator().manual_seed(42)
    dataset = Numbers(16)
    loaders = [
        DataLoader(dataset, batch_size=4, shuffle=True, generator=generator),
        DataLoader(dataset, batch_size=4, sampler=RandomSampler(dataset, generator=generator)),
        DataLoader(dataset, batch_size=4, sampler=DistributedSampler(dataset, 1, 0, seed=42)),
    ]
    for loader in loaders:
        assert values(one_pass(rank_loader(loader))) == expected
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(42).get_state())


def test_a_distributed_sampler_of_the_user_does_not_pad():
    dataset = Numbers(7)
    per_rank = passes(
        2, lambda rank: DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, 2, rank, shuffle=False))
    )
    assert [values(batches) for batches in per_rank] == [[0, 2, 4, 6], [1, 3, 5]]


def test_drop_last_drops_the_short_global_batch():
    per_rank = passes(2, lambda rank: DataLoader(Numbers(23), batch_size=3, drop_last=True))
    assert [len(batches) for batches in per_rank] == [3, 3]
    assert sorted(value for batches in per_rank for value in values(batches)) == list(range(18))


def test_an_even_split_of_the_batch_size_is_kept():
    per_rank = passes(2, lambda rank: DataLoader(Numbers(50), batch_size=11 if rank == 0 else 10))
    assert [[batch.size for batch in batches] for batches in per_rank] == [[11, 11, 4], [10, 10, 4]]
    assert [batch.global_size for batch in per_rank[1]] == [21, 21, 8]


def test_counts_and_exact_end():
    loader = rank_loader(DataLoader(Numbers(10), batch_size=4))
    assert (loader.batches_per_pass, loader.samples_per_pass, loader.in_pass, loader.passes_started) == (
        3,
        10,
        False,
        0,
    )
    seen = []
    for _ in range(7):
        batch = loader.next_batch()
        seen.append((batch.size, loader.passes_started, loader.batch_in_pass, loader.in_pass))
    assert seen[:4] == [(4, 1, 1, True), (4, 1, 2, True), (2, 1, 0, False), (4, 2, 1, True)]
    assert seen[6] == (4, 3, 1, True)


def test_an_empty_pass_is_none():
    loader = rank_loader(DataLoader(Numbers(0), batch_size=4))
    assert loader.next_batch() is None
    assert (loader.in_pass, loader.passes_started) == (False, 1)


@pytest.mark.parametrize("kind", ["weighted", "subset", "replacement", "custom"])
def test_samplers_with_an_order_of_their_own_are_dealt(kind):
    class Own(Sampler):
        def __iter__(self):
            order = list(range(12))
            random.shuffle(order)
            yield from order

        def __len__(self):
            return 12

    def make(rank):
        random.seed(rank)
        sampler = {
            "weighted": lambda: WeightedRandomSampler([1.0] * 12, 12),
            "subset": lambda: SubsetRandomSampler(range(12), generator=torch.Generator().manual_seed(5)),
            "replacement": lambda: RandomSampler(Numbers(12), replacement=True, num_samples=12),
            "custom": Own,
        }[kind]()
        return DataLoader(Numbers(12), batch_size=2, sampler=sampler)

    # One process has one set of global generators, so the ranks draw one after the other.
    first = [values(one_pass(rank_loader(make(0)))) for _ in range(2)]
    assert first[0] == first[1]
    loader = rank_loader(make(0))
    epochs = [values(one_pass(loader)) for _ in range(2)]
    assert epochs[0] == first[0]
    assert epochs[1] != epochs[0]
    if kind in ("subset", "custom"):
        assert sorted(epochs[1]) == list(range(12))


def test_set_epoch_reaches_sampler_and_dataset():
    class Turning(Numbers):
        epoch = -1

        def set_epoch(self, epoch):
            self.epoch = epoch

    class Rotated(Sampler):
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([(index + self.epoch) % 4 for index in range(4)])

        def __len__(self):
            return 4

    dataset = Turning(4)
    loader = rank_loader(DataLoader(dataset, batch_size=4, sampler=Rotated()))
    assert [values(one_pass(loader)) for _ in range(2)] == [[0, 1, 2, 3], [1, 2, 3, 0]]
    assert dataset.epoch == 1


def test_batches_of_a_batch_sampler_are_dealt_in_turn():
    lists = [[0, 1, 2], [3], [4, 5], [6, 7, 8, 9], [10]]
    per_rank = passes(2, lambda rank: DataLoader(Numbers(11), batch_sampler=lists))
    assert [[batch.data.tolist() for batch in batches] for batches in per_rank] == [
        [[0, 1, 2], [4, 5], [10]],
        [[3], [6, 7, 8, 9], [10]],
    ]
    assert [(batch.size, batch.global_size) for batch in per_rank[1]] == [(1, 4), (4, 6), (0, 1)]
    per_rank = passes(2, lambda rank: DataLoader(Numbers(11), batch_sampler=lists), training=False)
    assert [[batch.size for batch in batches] for batches in per_rank] == [[3, 2, 1], [1, 4, 0]]
    assert per_rank[1][-1].data is None


def test_an_ordinary_batch_sampler_counts_as_its_settings():
    dataset = Numbers(10)
    loader = DataLoader(dataset, batch_sampler=BatchSampler(RandomSampler(dataset), 4, True))
    same = DataLoader(dataset, batch_size=4, shuffle=True, drop_last=True)
    assert values(one_pass(rank_loader(loader))) == values(one_pass(rank_loader(same)))


@pytest.mark.parametrize("workers", [0, 2])
def test_without_automatic_batching_each_element_is_a_batch(workers):
    class Rows(Numbers):
        def __getitem__(self, index):
            return torch.tensor(index)

    dataset = Rows(5)
    batches = one_pass(rank_loader(DataLoader(dataset, batch_size=None, num_workers=workers)))
    assert [(int(batch.data), batch.size, batch.global_size) for batch in batches] == [(i, 1, 1) for i in range(5)]
    sampler = BatchSampler(range(5), 2, False)
    batches = one_pass(rank_loader(DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers)))
    assert [(batch.data.tolist(), batch.size) for batch in batches] == [([0, 1], 2), ([2, 3], 2), ([4], 1)]


# ---- what a loader keeps


def test_every_setting_reaches_the_workers():
    started = []

    def init(worker):
        get_worker_info().dataset.length = 1000 + worker
        started.append(worker)

    class Tell(Numbers):
        def __getitem__(self, index):
            return self.length, type(get_worker_info().dataset).__name__

    loader = DataLoader(
        Tell(8),
        batch_size=2,
        num_workers=2,
        collate_fn=list,
        timeout=30,
        worker_init_fn=init,
        multiprocessing_context="fork",
        persistent_workers=True,
        prefetch_factor=3,
        in_order=False,
    )
    ours = rank_loader(loader)
    batches = [batch.data for batch in one_pass(ours)]
    inner = ours._passes._reader._loader.loader
    for name in ("num_workers", "timeout", "persistent_workers", "prefetch_factor", "in_order"):
        assert getattr(inner, name) == getattr(loader, name)
    assert inner.multiprocessing_context is loader.multiprocessing_context
    assert {length for batch in batches for length, _ in batch} == {1000, 1001}
    assert {name for batch in batches for _, name in batch} == {"Tell"}
    pids = [worker.pid for worker in inner._iterator._workers]
    one_pass(ours)
    assert [worker.pid for worker in inner._iterator._workers] == pids
    workers = inner._iterator._workers
    ours.close()
    assert not any(worker.is_alive() for worker in workers)


def test_workers_end_with_their_pass():
    ours = rank_loader(DataLoader(Numbers(8), batch_size=2, num_workers=1))
    ours.next_batch()
    workers = ours._passes._reader._loader._iterator._workers
    assert all(worker.is_alive() for worker in workers)
    one_pass(ours)
    assert not any(worker.is_alive() for worker in workers)


# ---- randomness


@pytest.mark.parametrize("shuffle", [False, True])
def test_augmentation_does_not_depend_on_loader_workers(shuffle):
    def run(workers, **extra):
        loader = rank_loader(DataLoader(Noisy(11), batch_size=3, shuffle=shuffle, num_workers=workers, **extra))
        got = [torch.cat([batch.data for batch in one_pass(loader)]) for _ in range(2)]
        loader.close()
        return got

    none, two, kept = run(0), run(2), run(2, persistent_workers=True, in_order=False)
    for epoch in range(2):
        assert torch.equal(none[epoch], two[epoch])
        assert torch.equal(none[epoch], kept[epoch])
    assert not torch.equal(none[0][:, 1:], none[1][:, 1:])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_pass_goes_on_where_another_stood(workers):
    def make(rank=0):
        return DataLoader(Noisy(23), batch_size=3, shuffle=True, num_workers=workers)

    whole = rank_loader(make())
    one_pass(whole)
    expected = one_pass(whole)
    for stop in (0, 1, 7):
        first, second = rank_loader(make()), rank_loader(make())
        one_pass(first)
        for _ in range(stop):
            first.next_batch()
        state = first.state_dict()
        first.close()
        assert all(type(value) is int for value in state.values())
        second.load_state_dict(state)
        assert (second.in_pass, second.batch_in_pass) == (stop > 0, stop)
        rest = one_pass(second)
        assert second.passes_started == 2
        assert len(rest) == len(expected) - stop
        assert all(torch.equal(a.data, b.data) for a, b in zip(rest, expected[stop:], strict=True))


def test_loading_leaves_the_training_random_streams_alone():
    loaders = [
        DataLoader(Noisy(9), batch_size=2, shuffle=True),
        DataLoader(Noisy(9), batch_size=2, sampler=WeightedRandomSampler([1.0] * 9, 9), collate_fn=noisy_collate),
        DataLoader(Noisy(9), batch_size=2, shuffle=True, num_workers=1),
        DataLoader(Stream(9, shuffle=True), batch_size=2),
        DataLoader(Stream(9, shuffle=True), batch_size=2, num_workers=1),
    ]
    for loader in loaders:
        for shard in (True, False):
            before = (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
            ours = rank_loader(loader, shard=shard)
            ours.next_batch()
            ours.close()
            assert before == (random.getstate(), numpy.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_an_error_in_a_batch_comes_out_and_the_batch_comes_again():
    class Fails(Numbers):
        broken = True

        def __getitem__(self, index):
            if index == 5 and self.broken:
                raise KeyError("sample 5 is broken")
            return index

    for workers in (0, 1):
        dataset = Fails(8)
        ours = rank_loader(DataLoader(dataset, batch_size=2, num_workers=workers))
        got = [ours.next_batch(), ours.next_batch()]
        with pytest.raises(KeyError, match="sample 5 is broken"):
            ours.next_batch()
        dataset.broken = False
        assert values(got + one_pass(ours)) == list(range(8))


# ---- the fast path


@pytest.mark.parametrize("shuffle", [False, True])
def test_tensor_datasets_give_what_default_collate_gives(shuffle):
    tensors = (torch.randn(13, 4), torch.arange(13), torch.randn(13, 2, 3).transpose(1, 2))
    whole = TensorDataset(*tensors)
    for dataset in (whole, Subset(whole, [5, 3, 11, 0, 7, 2, 9])):
        ours = rank_loader(DataLoader(dataset, batch_size=4, shuffle=shuffle))
        slow = rank_loader(DataLoader(dataset, batch_size=4, shuffle=shuffle, collate_fn=lambda x: default_collate(x)))  # noqa: PLW0108 - not default_collate itself
        for fast, item in zip(one_pass(ours), one_pass(slow), strict=True):
            assert type(fast.data) is list
            for a, b in zip(fast.data, item.data, strict=True):
                assert torch.equal(a, b)
                assert a.dtype == b.dtype
                assert a.stride() == b.stride()
            fast.data[0].zero_()
    assert tensors[0].abs().sum() > 0


# ---- streams


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.soak)])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_streams_are_divided_by_element(world_size, workers, training):
    samples = 17

    def loader(rank):
        return DataLoader(Stream(samples), batch_size=2, num_workers=workers)

    if training:
        per_rank = passes(world_size, loader, number=2, training=True)
    else:  # ranks do not meet in validation: one after the other, as threads that fork side by side are no ranks
        per_rank = []
        for rank in range(world_size):
            one = type(
                "One", (), {"rank": rank, "world_size": world_size, "all_gather": lambda self, v: [v] * world_size}
            )()
            whole = rank_loader(loader(rank), one, training=False)
            one_pass(whole)
            per_rank.append(one_pass(whole))
            whole.close()
    assert sorted(value for batches in per_rank for value in values(batches)) == list(range(samples))
    if training:
        assert len({len(batches) for batches in per_rank}) == 1
        for step in zip(*per_rank, strict=True):
            assert {batch.global_size for batch in step} == {sum(batch.size for batch in step)}


def test_a_shuffled_stream_is_the_same_on_every_rank():
    def read(rank):
        one = type("One", (), {"rank": rank, "world_size": 3, "all_gather": lambda self, value: [value] * 3})()
        stream = DataLoader(Stream(20, shuffle=True), batch_size=2, collate_fn=noisy_collate)
        return values(one_pass(rank_loader(stream, one, training=False)))

    assert sorted(read(0) + read(1) + read(2)) == list(range(20))
    assert read(0) != sorted(read(0))


def test_the_end_of_a_stream_is_exact_and_a_rank_that_ran_out_borrows():
    def go(rank, collective):
        loader = rank_loader(DataLoader(Stream(5), batch_size=2), collective)
        seen = []
        for _ in range(4):
            batch = loader.next_batch()
            seen.append((batch.data.tolist(), batch.size, batch.global_size, loader.in_pass))
        return seen, loader.passes_started

    (zero, started), (one, _) = Ranks(2).run(go)
    assert zero == [([0, 2], 2, 4, True), ([4], 1, 1, False)] * 2
    assert one == [([1, 3], 2, 4, True), ([1, 3], 0, 1, False)] * 2
    assert started == 2


def test_a_stream_with_too_few_elements_says_so():
    with pytest.raises(UnshardableLoaderError, match=r"train loader gave no batch at all to 2 of 3 ranks"):
        passes(3, lambda rank: DataLoader(Stream(1), batch_size=2))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_where_another_stood(workers):
    def make():
        return rank_loader(DataLoader(Stream(17, shuffle=True), batch_size=2, num_workers=workers))

    whole, first, second = make(), make(), make()
    expected = values(one_pass(whole))
    got = [first.next_batch() for _ in range(3)]
    second.load_state_dict(first.state_dict())
    first.close()
    assert values(got + one_pass(second)) == expected
    assert second.passes_started == 1


def test_persistent_workers_of_a_stream_get_a_new_order_each_epoch():
    def run(**extra):
        loader = rank_loader(DataLoader(Stream(9, shuffle=True), batch_size=2, num_workers=1, **extra))
        got = [values(one_pass(loader)) for _ in range(3)]
        loader.close()
        return got

    kept = run(persistent_workers=True)
    assert kept == run()
    assert kept[0] != kept[1] != kept[2]


# ---- loaders used as they are


def test_unsharded_loaders_of_equal_length_need_no_exchange():
    ranks = Ranks(2)

    def go(rank, collective):
        loader = rank_loader(DataLoader(Numbers(10 + rank), batch_size=4), collective, shard=False)
        return loader.batches_per_pass, [(batch.size, batch.global_size) for batch in one_pass(loader)]

    assert ranks.run(go) == [(3, [(4, 8), (4, 8), (2, 4)]), (3, [(4, 8), (4, 8), (3, 6)])]
    assert ranks.calls == 1


def test_unsharded_loaders_of_unequal_length_agree_step_by_step():
    per_rank = passes(2, lambda rank: DataLoader(Numbers(4 + 4 * rank), batch_size=4), shard=False)
    assert [[(batch.size, batch.global_size) for batch in batches] for batches in per_rank] == [
        [(4, 8), (0, 4)],
        [(4, 8), (4, 4)],
    ]


def test_an_unsharded_loader_gets_set_epoch():
    dataset = Numbers(8)

    def make(rank):
        return DataLoader(dataset, batch_size=2, sampler=DistributedSampler(dataset, 2, rank))

    first, second = (passes(2, make, number=number, shard=False) for number in (1, 2))
    assert values(first[0]) != values(second[0])
    assert sorted(values(second[0]) + values(second[1])) == list(range(8))


def test_a_length_that_is_not_true_is_an_error():
    class Liar:
        def __len__(self):
            return 3

        def __iter__(self):
            return iter([torch.zeros(2)] * 2)

    with pytest.raises(UnshardableLoaderError, match=r"ended after 2 batches, but its len\(\) promised 3"):
        passes(2, lambda rank: Liar(), shard=False)


def test_one_rank_takes_any_iterable():
    class Own(DataLoader):
        def __iter__(self):
            for batch in super().__iter__():
                yield batch + 100

    loader = rank_loader(Own(Numbers(4), batch_size=2))
    assert [values(one_pass(loader)) for _ in range(2)] == [[100, 101, 102, 103]] * 2
    once = rank_loader(iter([torch.zeros(3), torch.zeros(2)]))
    assert [batch.size for batch in one_pass(once)] == [3, 2]
    with pytest.raises(UnshardableLoaderError, match="can be iterated only once, and this is pass 2"):
        once.next_batch()


def test_a_list_of_batches_is_dealt():
    batches = [torch.tensor([0, 1]), torch.tensor([2]), torch.tensor([3, 4])]
    per_rank = passes(2, lambda rank: batches)
    assert [[(batch.data.tolist(), batch.size) for batch in one] for one in per_rank] == [
        [([0, 1], 2), ([3, 4], 2)],
        [([2], 1), ([3, 4], 0)],
    ]


# ---- refusals


def _own_iter():
    class Own(DataLoader):
        def __iter__(self):
            return iter(())

    return Own(Numbers(4))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda rank: iter([1]),
            r"train loader of rank 0 cannot be dealt out to 2 ranks: it is a list_iterator.*DataLoader",
        ),
        (lambda rank: _own_iter(), r"it is a Own, which overrides DataLoader.__iter__.*add_dist_sampler=False"),
        (lambda rank: DataLoader(Numbers(8), batch_size=4 - 2 * rank), r"batch sizes \[4, 2\] by rank.*BATCH_SIZE"),
        (lambda rank: DataLoader(Numbers(8 + rank)), r"different dataset lengths by rank: \[8, 9\]"),
        (lambda rank: [0] * (1 + rank), r"different numbers of batches in the list by rank: \[1, 2\]"),
        (lambda rank: DataLoader(Numbers(8), drop_last=rank == 0), r"different values of drop_last by rank"),
        (
            lambda rank: DataLoader(Numbers(8), sampler=list(range(rank, 8, 2))),
            r"sampler list gives different orders on different ranks in epoch 0",
        ),
        (
            lambda rank: DataLoader(Stream(8)) if rank else DataLoader(Numbers(8)),
            r"different kinds of loaders by rank: \['train: samples', 'train: stream'\]",
        ),
    ],
)
def test_loaders_that_cannot_be_dealt_are_refused(make, text):
    with pytest.raises(UnshardableLoaderError, match=text):
        passes(2, make)


def test_endless_samplers_are_refused():
    class Endless(Sampler):
        def __iter__(self):
            while True:
                yield 0

    with pytest.raises(UnshardableLoaderError, match="sampler Endless did not end after 1000000 elements"):
        passes(2, lambda rank: DataLoader(Numbers(4), sampler=Endless()))


def test_one_rank_takes_an_endless_sampler():
    class Endless(Sampler):
        def __iter__(self):
            return itertools.cycle(range(4))

    loader = rank_loader(DataLoader(Numbers(4), batch_size=3, sampler=Endless()))
    assert [loader.next_batch().data.tolist() for _ in range(3)] == [[0, 1, 2], [3, 0, 1], [2, 3, 0]]
    again = rank_loader(DataLoader(Numbers(4), batch_size=3, sampler=Endless()))
    again.load_state_dict(loader.state_dict())
    assert again.next_batch().data.tolist() == loader.next_batch().data.tolist()


def test_bad_arguments():
    with pytest.raises(InvalidArgumentTypeError, match=r"train loader must be a DataLoader.*got int: 5"):
        rank_loader(5)
    with pytest.raises(InvalidArgumentError, match="loader is invalid"):
        rank_loader(DataLoader(Numbers(4))).load_state_dict({"passes_started": 0, "samples": 3})


_ORPHAN = """
import sys, torch
from torch.utils.data import DataLoader
from tests.test_data import Numbers, rank_loader
loader = rank_loader(DataLoader(Numbers(99), batch_size=2, num_workers=1, persistent_workers=True))
loader.next_batch()
print(loader._passes._reader._loader._iterator._workers[0].pid, flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the parent-death signal is Linux's")
def test_loader_workers_die_with_their_parent():
    root = pathlib.Path(__file__).parents[1]
    command = [sys.executable, "-c", _ORPHAN]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as parent:
        worker = os.pidfd_open(int(parent.stdout.readline()))
        parent.kill()
        ended, _, _ = select.select([worker], [], [], 4)  # torch's own check takes up to 5 s
        os.close(worker)
    assert ended
