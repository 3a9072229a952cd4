"""Snapshots in memory: what the ranks copy is what comes back, and half a copy is none."""

from __future__ import annotations

import mmap
import os
import random
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from torchtrainer import SnapshotError
from torchtrainer.checkpoint.memory import available_bytes, map_shared
from torchtrainer.checkpoint.snapshot import Region, assemble, deal
from torchtrainer.control.messages import CheckpointEnded, SnapshotDone, SnapshotGrant, SnapshotRequest
from torchtrainer.engines.snapshots import CheckpointOrders, Snapshots


def regions(tmp_path: Path, world_size: int) -> tuple[list[Region], list[str]]:
    paths = [tmp_path / f"region{rank}" for rank in range(world_size)]
    for path in paths:
        path.touch()
    made = [Region(str(path), rank=rank, world_size=world_size) for rank, path in enumerate(paths)]
    return made, [str(path) for path in paths]


def state() -> dict:
    weights = OrderedDict(a=torch.randn(3, 5), b=torch.arange(7, dtype=torch.int64), half=torch.randn(4).bfloat16())
    weights._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]  # as torch's modules have it
    return {
        "models": [weights],
        "optimizers": [{"state": {0: {"step": torch.tensor(3.0), "m": torch.randn(3, 5)}}, "groups": [{"lr": 0.1}]}],
        "odd": (None, True, float("nan"), "text", [1, (2, 3)], torch.empty(0, 4), torch.eye(3).to_sparse()),
        "flags": torch.tensor([True, False]),
        "slice": torch.arange(12.0).view(3, 4).t(),
    }


def same(one: object, other: object) -> bool:
    if isinstance(one, torch.Tensor):
        assert isinstance(other, torch.Tensor)
        dense = (one.to_dense(), other.to_dense()) if one.is_sparse else (one, other)
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*dense)
    if isinstance(one, dict):
        return type(one) is type(other) and list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    return repr(one) == repr(other)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")  # torch's word on the sparse tensor
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_what_the_ranks_copied_comes_back(tmp_path, world_size) -> None:
    made, paths = regions(tmp_path, world_size)
    shared = state()
    movable = {shared["models"][0]["a"].data_ptr(), shared["optimizers"][0]["state"][0]["m"].data_ptr()}
    own = [
        {"rng": torch.get_rng_state(), "rank": rank, "mine": torch.full((2,), float(rank))}
        for rank in range(world_size)
    ]
    for rank, region in enumerate(made):
        region.write(shared, own[rank], movable, number=1)
    found = assemble(paths, 1)
    assert same(shared, found["shared"])
    assert found["shared"]["models"][0]._metadata == {"": {"version": 2}}
    assert same(own, found["ranks"])


def test_tensors_that_are_not_equal_on_all_ranks_are_those_of_rank_0(tmp_path) -> None:
    made, paths = regions(tmp_path, 2)
    for rank, region in enumerate(made):
        region.write({"buffer": torch.full((1000,), float(rank))}, {}, set(), number=1)
    assert assemble(paths, 1)["shared"]["buffer"].unique().tolist() == [0.0]


def test_shares_are_about_equal() -> None:
    tensors = [torch.zeros(size) for size in (1000, 10, 500, 490, 3, 1)]
    owners = deal(tensors, {one.data_ptr() for one in tensors}, 2)
    loads = [sum(one.numel() for one, owner in zip(tensors, owners, strict=True) if owner == rank) for rank in (0, 1)]
    assert abs(loads[0] - loads[1]) <= 10


def test_a_region_is_written_again_and_grows(tmp_path) -> None:
    (region,), paths = regions(tmp_path, 1)
    for number, size in enumerate((10, 10_000, 10), start=1):
        region.write({"x": torch.full((size,), float(number))}, {}, set(), number)
        assert assemble(paths, number)["shared"]["x"].tolist() == [float(number)] * size


def test_half_a_copy_is_none(tmp_path, monkeypatch) -> None:
    (region,), paths = regions(tmp_path, 1)
    region.write({"x": torch.ones(10)}, {}, set(), number=1)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        region.write({"x": torch.zeros(10)}, {}, set(), number=2)
    for number in (1, 2):
        with pytest.raises(SnapshotError, match="holds snapshot 0"):
            assemble(paths, number)


def test_what_may_not_go_into_a_checkpoint_is_named(tmp_path) -> None:
    (region,), paths = regions(tmp_path, 1)
    with pytest.raises(SnapshotError, match=r"that a checkpoint cannot hold.*let state_dict\(\)"):
        region.write({"x": lambda: None}, {}, set(), number=1)
    region.write({"x": Path("here")}, {}, set(), number=1)
    with pytest.raises(SnapshotError, match="that a checkpoint cannot hold"):
        assemble(paths, 1)


def test_memory_that_is_not_there_is_an_error_before_anything_is_touched(tmp_path) -> None:
    path = tmp_path / "memory"
    path.touch()
    available = available_bytes()
    assert available is not None
    with pytest.raises(OSError, match="MB are free"):
        map_shared(str(path), available * 2)
    assert path.stat().st_size == 0
    assert isinstance(map_shared(str(path), 4096), mmap.mmap)


ORDERS = CheckpointOrders(root="", keep=3, generation=1, every_steps=None, asynchronous=True, write_s=1.0)


def snapshots(tmp_path: Path, world_size: int = 2) -> Snapshots:
    return Snapshots(orders=ORDERS, world_size=world_size, private_dir=tmp_path)


def want(one: Snapshots, rank: int, number: int, *, must: bool = False) -> list[tuple[int, bool]]:
    message = SnapshotRequest(group="g", worker=rank, number=number, must=must)
    return [(rank, answer.go) for rank, answer in one.want(message)]


def taken(one: Snapshots, rank: int, number: int, error: str = "") -> object:
    return one.copied(
        SnapshotDone(group="g", worker=rank, number=number, ranks=[rank], meta={"step": 7}, stall_s=0.1, error=error)
    )


def test_all_ranks_get_the_same_answer_even_if_the_writer_ends_between(tmp_path) -> None:
    one = snapshots(tmp_path)
    assert want(one, 0, 1) == [(0, True)]
    assert want(one, 1, 1) == [(1, True)]
    taken(one, 0, 1)
    assert one.due(ranks_left=True) == 0
    taken(one, 1, 1)
    assert one.due(ranks_left=True) == 1
    one.begin(1)
    assert want(one, 0, 2) == [(0, False)], "one is being written: this one is left out"
    assert one.end({"path": "p"}, "g").step == 7
    assert want(one, 1, 2) == [(1, False)], "as for rank 0"
    assert want(one, 0, 3) == [(0, True)]
    one.close()


def test_a_snapshot_that_must_be_waits_for_the_writer(tmp_path) -> None:
    one = snapshots(tmp_path)
    for rank in (0, 1):
        want(one, rank, 1)
        taken(one, rank, 1)
    one.begin(1)
    assert want(one, 0, 2, must=True) == []
    one.end({}, "g")
    assert [(rank, answer.go) for rank, answer in one.answers("g")] == [(0, True)]
    assert want(one, 1, 2, must=True) == [(1, True)]
    one.close()


def test_a_snapshot_that_failed_on_a_rank_is_told_and_not_written(tmp_path) -> None:
    one = snapshots(tmp_path)
    for rank in (0, 1):
        want(one, rank, 1)
    assert taken(one, 0, 1, error="no memory") is None
    ended = taken(one, 1, 1)
    assert getattr(ended, "error", None) == "no memory"
    assert one.due(ranks_left=True) == 0
    one.close()


def test_a_snapshot_that_was_left_out_is_not_missed_when_a_worker_is_gone(tmp_path) -> None:
    one = snapshots(tmp_path)
    for rank in (0, 1):
        want(one, rank, 1)
        taken(one, rank, 1)
    one.begin(1)
    assert want(one, 0, 2) + want(one, 1, 2) == [(0, False), (1, False)]
    assert one.give_up("g", 7) == []
    one.end({}, "g")
    assert one.give_up("g", 7) == []
    assert want(one, 0, 3) == [(0, True)]
    assert [ended.number for ended in one.give_up("g", 8)] == [3], "rank 1 did not copy this one"
    one.close()


def test_who_waits_for_a_snapshot_that_is_given_up_gets_an_answer(tmp_path) -> None:
    one = snapshots(tmp_path)
    assert want(one, 0, 1) + want(one, 1, 1) == [(0, True), (1, True)]
    taken(one, 0, 1)
    assert want(one, 0, 2, must=True) == []
    assert [ended.number for ended in one.give_up("g", 7)] == [1], "rank 1 is gone, and did not copy"
    assert [answer.go for _, answer in one.answers("g")] == [True]
    assert one.give_up("g", 7) != [], "the second one is under way now"
    assert one.give_up("g", 7) == [], "what was told is not told again"
    one.close()


class Story:
    """Three ranks that ask, are answered and copy, a writer, and workers that are lost: in an order that a seed chooses."""

    def __init__(self, one: Snapshots, seed: int) -> None:
        self.one, self.chance, self.ranks = one, random.Random(seed), range(3)
        self.at = dict.fromkeys(self.ranks, 0)
        self.waiting: set[int] = set()
        self.copying: dict[int, int] = {}
        self.told: dict[int, set[bool]] = {}
        self.ended: list[int] = []

    def answer(self, given: list[tuple[int, SnapshotGrant]]) -> None:
        for rank, said in given:
            self.told.setdefault(said.number, set()).add(said.go)
            self.waiting.discard(rank)
            if said.go:
                self.copying[rank] = said.number

    def ask(self) -> None:
        """The rank that is behind comes to its next snapshot: they are in step."""
        rank = min(self.ranks, key=lambda rank: (self.at[rank], self.chance.random()))
        if rank in self.waiting or rank in self.copying:
            return
        self.at[rank] += 1
        self.waiting.add(rank)
        must = self.chance.random() < 0.3
        self.answer(self.one.want(SnapshotRequest(group="g", worker=rank, number=self.at[rank], must=must)))

    def copy(self) -> None:
        if not self.copying:
            return
        rank = self.chance.choice(sorted(self.copying))
        error = "no memory" if self.chance.random() < 0.1 else ""
        failed = taken(self.one, rank, self.copying.pop(rank), error=error)
        self.ended += [failed.number] if isinstance(failed, CheckpointEnded) else []

    def write(self) -> None:
        if self.one.writing:
            self.ended.append(self.one.end({}, "g").number)
            self.answer(self.one.answers("g"))
        elif due := self.one.due(ranks_left=True):
            self.one.begin(due)

    def lose(self) -> None:
        """Another worker does what was left of its rank's share of the step, and asks on for it."""
        if self.chance.random() < 0.1:
            self.copying.pop(self.chance.choice(self.ranks), None)
            self.ended += [lost.number for lost in self.one.give_up("g", 7)]
            self.answer(self.one.answers("g"))


@pytest.mark.parametrize("seed", range(40))
def test_in_any_order_of_events_answers_are_alike_and_each_snapshot_ends_once(tmp_path, seed) -> None:
    one = snapshots(tmp_path, 3)
    story = Story(one, seed)
    for _ in range(400):
        story.chance.choice((story.ask, story.copy, story.copy, story.write, story.lose))()
    steps = 0
    while story.copying or story.waiting or one.writing or one.due(ranks_left=True):
        for go_on in (story.copy, story.write, story.ask):
            go_on()
        steps += 1
        assert steps < 1000, f"all wait: {story.at}"
    assert all(len(said) == 1 for said in story.told.values())
    assert len(story.ended) == len(set(story.ended))
    assert len(story.ended) > 10
    one.close()


def test_what_the_dead_had_copied_whole_is_due(tmp_path) -> None:
    one = snapshots(tmp_path)
    for rank in (0, 1):
        want(one, rank, 1)
        region = Region(one.regions[rank], rank=rank, world_size=2)
        region.write({"x": torch.ones(3)}, {}, set(), number=1)
    taken(one, 0, 1)  # rank 1 died before it could say so
    assert one.due(ranks_left=True) == 0
    assert one.due(ranks_left=False) == 1
    one.begin(1)
    one.end({}, "g")
    assert one.due(ranks_left=False) == 0
    one.close()


def test_regions_are_gone_with_who_holds_them(tmp_path) -> None:
    one = snapshots(tmp_path)
    path = one.regions[0]
    assert os.path.exists(path)
    one.close()
    assert not os.path.exists(path)
    assert list(tmp_path.iterdir()) == []
