"""Samplers of the user's, whatever they remember: each sample once, in the order of an undisturbed run, whoever carries the ranks."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler

from torchtrainer import TorchTrainer, TrainingOperator, UnshardableLoaderError
from torchtrainer.train.data import RankLoader
from torchtrainer.train.data_order import Dealing
from torchtrainer.train.refetching import Losing

SAMPLES, BATCH = 22, 4


class Counting(Sampler):
    """What every sampler here does at least: it knows how many samples there are."""

    def __init__(self, n: int = SAMPLES) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def order(self) -> list[int]:
        return list(range(self.n))

    def __iter__(self) -> Iterator[int]:
        return iter(self.order())


class OwnPython(Counting):
    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.rng = random.Random(7)

    def order(self):
        return self.rng.sample(range(self.n), self.n)


class OwnNumpy(Counting):
    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.held = {"old": numpy.random.RandomState(3), "new": [numpy.random.default_rng(4)]}

    def order(self):
        return self.held["old"].permutation(self.held["new"][0].permutation(self.n)).tolist()


class Unseeded(Counting):
    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.rng = numpy.random.default_rng()

    def order(self):
        return self.rng.permutation(self.n)


class InPlace(Counting):
    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.indices = list(range(n))

    def order(self):
        random.shuffle(self.indices)
        return self.indices


class Counter(Counting):
    drawn = 0

    def order(self):
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)
        return torch.randperm(self.n, generator=generator).tolist()


class Consumed(Counting):
    """Takes its orders from a generator function that goes on from pass to pass."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.source = self.orders()

    def orders(self):
        turn = 0
        while True:
            turn += 3
            yield [(index + turn) % self.n for index in range(self.n)]

    def order(self):
        return next(self.source)


class OwnTorch(Counting):
    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.mine = torch.Generator().manual_seed(9)

    def order(self):
        return torch.randperm(self.n, generator=self.mine).tolist()


class Changing(Counting):
    """Half of the samples in every other pass."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self):
        some = torch.randperm(self.n).tolist()
        return some if self.epoch % 2 == 0 else some[: self.n // 2]


_SHARED = random.Random(1)


class OfTheModule(Counting):
    def order(self):
        order = list(range(self.n))
        _SHARED.shuffle(order)
        return order


class Batches(Counting):
    """Batches whose sizes and order come from a generator of its own."""

    def __init__(self, n: int = SAMPLES) -> None:
        super().__init__(n)
        self.rng = random.Random(2)
        self.lists = [list(range(first, min(first + 3, n))) for first in range(0, n, 3)]

    def order(self):
        self.rng.shuffle(self.lists)
        return self.lists


KINDS = [OwnPython, OwnNumpy, InPlace, Counter, Consumed, OwnTorch, Changing, OfTheModule, Batches]


class Numbers(Dataset):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> int:
        return int(index)


def loader_of(kind: type[Counting]) -> DataLoader:
    if kind is Batches:
        return DataLoader(Numbers(), batch_sampler=Batches())
    return DataLoader(Numbers(), batch_size=BATCH, sampler=kind())


def alone(loader: DataLoader) -> RankLoader:
    options = {
        "seed": 5,
        "collective": None,
        "training": True,
        "device": None,
        "name": "train",
        "dealing": Dealing(),
        "losing": Losing(tell=print),
    }
    return RankLoader(loader, rank=0, world_size=1, **options)


def taken(loader: RankLoader, batches: int) -> list[list[int]]:
    return [loader.next_batch().data.tolist() for _ in range(batches)]


@pytest.mark.parametrize("kind", [*KINDS, Unseeded])
@pytest.mark.parametrize("stop", [0, 3, 8, 15])
def test_a_later_process_goes_on_with_the_same_orders(kind, stop):
    undisturbed, cut_off, later = alone(loader_of(kind)), alone(loader_of(kind)), alone(loader_of(kind))
    if (
        kind is Unseeded
    ):  # three processes have three orders: of the running pass nothing is lost, the next ones are others
        taken(cut_off, stop)
        expected = alone(loader_of(OwnPython))
    else:
        expected = undisturbed
        assert taken(cut_off, stop) == taken(undisturbed, stop)
    position, order = cut_off.state_dict(), cut_off.saved_order()
    assert (order is not None) == cut_off.in_pass
    later.load_state_dict(position)
    if order is not None:
        later.put_order(order)
    if kind is not Unseeded:
        assert taken(later, 14) == taken(expected, 14)
        return
    rest = []
    while cut_off.in_pass:
        rest.append(cut_off.next_batch().data.tolist())
    assert [later.next_batch().data.tolist() for _ in rest] == rest
    assert sorted(one for batch in taken(later, 6) for one in batch) == list(range(SAMPLES))


def test_an_order_that_cannot_be_found_again_is_an_error():
    class Named(Dataset):
        def __getitem__(self, name: str) -> torch.Tensor:
            return torch.zeros(1)

        def __len__(self) -> int:
            return 4

    class ByTime(Sampler):
        def __iter__(self):
            return iter([f"{name}{os.urandom(4).hex()}" for name in "abcd"])

        def __len__(self) -> int:
            return 4

    first, second = (alone(DataLoader(Named(), batch_size=2, sampler=ByTime())) for _ in range(2))
    first.next_batch()
    second.load_state_dict(first.state_dict())
    with pytest.raises(
        UnshardableLoaderError, match=r"ByTime gives another order for epoch 0 than when this pass began"
    ):
        second.next_batch()


# Processes


class Rows(Dataset):
    """Each sample is told from the others by a bit, twice as many as fit into one number."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([2.0**i, float(i)], dtype=torch.double), torch.zeros(1, dtype=torch.double)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1, dtype=torch.double))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, :1] + (x[:, 1:] + 1) * self.weight


class Mean(torch.nn.Module):
    def forward(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return output.mean() if target is not None else output


class Seeing(TrainingOperator):
    """Notes the samples that it sees; with ``own`` it makes the update itself."""

    def setup(self, config: dict[str, Any]) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        self.model, self.optimizer, self.criterion = self.register(models=model, optimizers=optimizer, criterion=Mean())
        kind = config["kind"]
        how = {"batch_sampler": Batches()} if kind is Batches else {"batch_size": BATCH, "sampler": kind()}
        self.register_data(train_loader=DataLoader(Rows(), **how))


class Updating(Seeing):
    def train_batch(self, batch: Any, batch_info: Any = None) -> dict[str, Any]:
        loss = self.criterion(self.model(batch[0]), batch[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(batch[1])}


@dataclass
class KillAt:
    """Kills the process of a rank at a step."""

    step: int
    rank: int
    trainer: Any = None
    struck: threading.Event = field(default_factory=threading.Event)

    def on_step(self, event: Any) -> None:
        if event.step >= self.step and not self.struck.is_set():
            self.struck.set()
            pid = next(one.pid for one in self.trainer.status().processes if self.rank in one.ranks)
            os.kill(pid, signal.SIGKILL)


def trained(kind: type, operator: type, ranks: int, kill: KillAt | None = None, processes: int | None = None) -> Any:
    """Four passes; a process is killed in them, or the ranks are moved to fewer processes after the first one."""
    results = []
    with TorchTrainer(
        training_operator_cls=operator,
        config={"kind": kind},
        num_workers=ranks,
        use_gpu=False,
        run_dir=None,
        callbacks=[kill] if kill else [],
    ) as trainer:
        if kill:
            kill.trainer = trainer
        for epoch in range(4):
            results.append(trainer.train())
            if processes and epoch == 0:
                trainer.resize(processes)
        weight = trainer.state_dict()["models"][0]["weight"].item()
    return [(one["num_samples"], one["train_loss"]) for one in results], weight


@pytest.mark.parametrize(
    ("kind", "operator", "ranks"),
    [
        (OwnPython, Seeing, 2),
        (Batches, Updating, 2),
        (InPlace, Seeing, 3),
        pytest.param(Counter, Updating, 3, marks=pytest.mark.soak),
        pytest.param(Consumed, Seeing, 2, marks=pytest.mark.soak),
        pytest.param(OwnNumpy, Updating, 2, marks=pytest.mark.soak),
    ],
)
def test_a_killed_process_changes_no_order(kind, operator, ranks):
    undisturbed = trained(kind, operator, ranks)
    assert [samples for samples, _ in undisturbed[0]] == [SAMPLES] * 4
    first = undisturbed[0][0][1] * SAMPLES
    assert first == pytest.approx(2.0**SAMPLES - 1, rel=1e-3)  # every bit once: each sample
    kill = KillAt(step=4, rank=ranks - 1)
    assert trained(kind, operator, ranks, kill) == undisturbed
    assert kill.struck.is_set()
    if operator is Seeing:
        assert trained(kind, operator, ranks, processes=1) == undisturbed


# What divides itself


class OwnPart(Counting):
    """A rank's part, as torchvision's RASampler gives it: all ranks have the same samples, augmented in different ways."""

    def __init__(self) -> None:
        super().__init__(SAMPLES // 2)
        self.replica, self.replicas = dist.get_rank(), dist.get_world_size()

    def order(self):
        twice = torch.randperm(SAMPLES).repeat_interleave(self.replicas).tolist()
        return twice[self.replica :: self.replicas][: self.n]


class Sorted(DistributedSampler):
    def __init__(self) -> None:
        super().__init__(Rows())

    def __iter__(self):
        return iter(sorted(super().__iter__()))


class PartLater(Counting):
    """Alike on all ranks in the first pass only."""

    epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def order(self):
        return random.Random(os.getpid() if self.epoch else 0).sample(range(self.n), self.n)


class Shards(IterableDataset):
    """Divides itself by the rank, and by the loader's worker, if asked for."""

    def __iter__(self):
        return iter(torch.arange(64.0)[dist.get_rank() :: dist.get_world_size()].view(-1, 1))


class SelfDividing(Updating):
    """Validates with what divides itself too, if asked for."""

    def setup(self, config: dict[str, Any]) -> None:
        super().setup({"kind": Counting})
        whole = DataLoader(Rows(), batch_size=BATCH)
        kind = config["kind"]
        if kind is Shards:
            loader = DataLoader(Shards(), batch_size=4, num_workers=config.get("loader_workers", 0))
        elif kind == "subset":
            part = torch.utils.data.Subset(Rows(), range(dist.get_rank(), SAMPLES, dist.get_world_size()))
            loader = DataLoader(part, batch_size=BATCH)
        else:
            loader = DataLoader(Rows(), batch_size=BATCH, sampler=kind())
        validating = config.get("validating", False)
        self.register_data(
            train_loader=whole if validating else loader, validation_loader=loader if validating else whole
        )

    def train_batch(self, batch: Any, batch_info: Any = None) -> dict[str, Any]:
        if isinstance(batch, list):
            return super().train_batch(batch, batch_info)
        loss = self.model(torch.cat([batch.double(), batch.double()], dim=1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(batch)}

    def validate_batch(self, batch: Any, batch_info: Any = None) -> dict[str, Any]:
        return {"num_samples": len(batch)}


class BuiltIn(SelfDividing):
    train_batch = TrainingOperator.train_batch


@pytest.mark.parametrize(
    ("kind", "operator", "ranks", "more", "text"),
    [
        (
            OwnPart,
            BuiltIn,
            2,
            {},
            r"sampler OwnPart gives 11 samples of a data set of 22, and OwnPart.replica is the number",
        ),
        (Sorted, SelfDividing, 3, {}, r"sampler Sorted gives different orders.*\[8, 8, 8\].*add_dist_sampler=False"),
        (Sorted, BuiltIn, 2, {"validating": True}, r"validation loader's sampler Sorted gives different orders"),
        (PartLater, BuiltIn, 2, {}, r"another order than this process in pass 2"),
        (PartLater, SelfDividing, 3, {}, r"another order than this process in pass 2"),
        ("subset", BuiltIn, 2, {}, r"different parts of the data set"),
        (Shards, SelfDividing, 2, {}, r"train loader's data set gives ranks \[0\] and \[1\] different streams"),
        (Shards, SelfDividing, 3, {"validating": True}, r"validation loader's data set gives ranks"),
        pytest.param(Shards, SelfDividing, 2, {"loader_workers": 2}, r"different streams", marks=pytest.mark.soak),
    ],
)
def test_what_divides_itself_is_refused(kind, operator, ranks, more, text):
    with (
        pytest.raises(UnshardableLoaderError, match=text) as caught,
        TorchTrainer(
            training_operator_cls=operator,
            config={"kind": kind, **more},
            num_workers=ranks,
            use_gpu=False,
            run_dir=None,
        ) as trainer,
    ):
        trainer.train()
        assert kind is not Sorted, "it was made, though it cannot be dealt out"
        trainer.validate() if more.get("validating") else trainer.train()
    assert "add_dist_sampler=False" in str(caught.value)


def test_what_divides_itself_can_be_used_as_it_is():
    with TorchTrainer(
        training_operator_cls=SelfDividing,
        config={"kind": Shards},
        num_workers=2,
        use_gpu=False,
        run_dir=None,
        add_dist_sampler=False,
    ) as trainer:
        assert trainer.train()["num_samples"] == 64
