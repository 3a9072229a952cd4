"""Steps in which the ranks have unequal numbers of samples: none gets too few, and who exchanges in them hears of it at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from launched import RUN
from programs import start_program
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from torchtrainer import BATCH_SIZE, InvalidArgumentError, OperatorUseError, TorchTrainer, TrainingOperator

BATCH = 4
X = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


class Stream(IterableDataset):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self):
        return iter([(x, x.sum(0, keepdim=True)) for x in X[: self.samples]])


class Normal(TrainingOperator):
    """Cannot take a step with one sample; the loss is the built-in one, or its own step's."""

    def setup(self, config: dict[str, Any]) -> None:
        norm = nn.BatchNorm1d(6) if config.get("norm", True) else nn.Identity()
        model = nn.Sequential(nn.Linear(6, 6), norm, nn.Linear(6, 1))
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        data = Stream(config["samples"]) if config.get("stream") else TensorDataset(X, X.sum(1, keepdim=True))
        if not config.get("stream"):
            data = torch.utils.data.Subset(data, range(config["samples"]))
        self.register_data(train_loader=DataLoader(data, batch_size=config.get(BATCH_SIZE, BATCH)))
        self.model, self.optimizer, self.criterion = self.register(
            models=model, optimizers=optimizer, criterion=nn.MSELoss()
        )
        self.sizes: list[int] = []

    def clip_gradients(self) -> None:
        for parameter in self.model.parameters():
            assert parameter.grad.isfinite().all()


class NormalOwn(Normal):
    def train_batch(self, batch: Any, batch_info: Any = None) -> dict[str, Any]:
        loss = self.criterion(self.model(batch[0]), batch[1]) / batch[0].std(dim=0).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.sizes.append(len(batch[0]))
        return {"train_loss": loss.item(), "num_samples": len(batch[0])}


def make(operator: type[TrainingOperator], ranks: int, config: dict[str, Any], **more: Any) -> TorchTrainer:
    return TorchTrainer(
        training_operator_cls=operator, num_workers=ranks, config=config, use_gpu=False, run_dir=None, **more
    )


@pytest.mark.parametrize(
    ("operator", "ranks", "samples", "more"),
    [
        (Normal, 2, 33, {}),  # one sample is left, which joins the step before
        (Normal, 2, 19, {}),  # three: one rank takes them all
        (NormalOwn, 3, 29, {}),  # five: two ranks
        (NormalOwn, 2, 35, {"norm": False, "min": 2}),
        (NormalOwn, 2, 18, {"stream": True}),
    ],
)
def test_no_rank_gets_a_single_sample(operator, ranks, samples, more):
    least = {"min_batch_size": more.pop("min")} if "min" in more else {}
    with make(operator, ranks, {"samples": samples, **more}, **least) as trainer:
        result = trainer.train()
        sizes = trainer.apply_all_operators(lambda one: one.sizes)
    assert result["num_samples"] == samples
    assert torch.isfinite(torch.tensor(result["train_loss"]))
    assert all(size >= 2 for one in sizes for size in one)


@pytest.mark.parametrize(("even", "samples"), [(True, 22), ("drop", 20)])
@pytest.mark.parametrize("stream", [False, True])
def test_even_batches_are_equal_on_all_ranks(even, samples, stream):
    config = {"samples": 21, "norm": False, "stream": stream}
    with make(NormalOwn, 2, config, even_batches=even) as trainer:
        result = trainer.train()
        one, other = trainer.apply_all_operators(lambda operator: operator.sizes)
    assert one == other
    assert result["num_samples"] == (16 if stream else samples)


def test_even_batches_of_unequal_sizes_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"even_batches='repeat'.*batch sizes \[8, 7\] by rank"):
        make(NormalOwn, 2, {"samples": 20, BATCH_SIZE: 15}, even_batches=True)


class Gathering(nn.Module):
    """Compares each embedding with those of all ranks."""

    def forward(self, embedded: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        everyone = [torch.zeros_like(embedded) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, embedded.detach())
        return (embedded @ torch.cat(everyone).T).square().mean() + 0 * target.mean()


class Exchanging(TrainingOperator):
    """Exchanges in its loss, in training and in validation."""

    def setup(self, config: dict[str, Any]) -> None:
        model = nn.Linear(6, 6)
        self.model, self.optimizer, self.criterion = self.register(
            models=model, optimizers=torch.optim.SGD(model.parameters(), 0.01), criterion=Gathering()
        )
        train, validation = (
            DataLoader(TensorDataset(X[:samples], X[:samples]), batch_size=BATCH) for samples in config["samples"]
        )
        self.register_data(train_loader=train, validation_loader=validation)


class ExchangingOwn(Exchanging):
    """Exchanges a number of fixed shape in validation, which needs all ranks only."""

    def train_batch(self, batch: Any, batch_info: Any = None) -> dict[str, Any]:
        loss = self.criterion(self.model(batch[0]), batch[1])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(batch[0])}

    def validate_batch(self, batch: Any, batch_info: Any = None) -> dict[str, Any]:
        mean = self.model(batch[0]).mean()
        dist.all_reduce(mean)
        return {"mean": mean.item(), "num_samples": len(batch[0])}


@pytest.mark.parametrize(
    ("operator", "ranks", "samples", "more", "text"),
    [
        (
            Exchanging,
            2,
            (35, 32),
            {},
            r"uneven batches.*allgather_ .*by rank: \[2, 1\]\); give all ranks.*even_batches=True",
        ),
        (ExchangingOwn, 3, (35, 24), {}, r"uneven batches.*by rank: \[4, 4, 3\]"),
        (Exchanging, 2, (32, 35), {}, r"uneven batches.*by rank: \[2, 1\]"),
        (
            ExchangingOwn,
            2,
            (32, 25),
            {},
            r"1 rank has none, so 1 of the ranks would not take part in the collective allreduce_",
        ),
        (ExchangingOwn, 3, (24, 26), {}, r"1 rank has none"),
        (Exchanging, 2, (35, 32), {"comm_hook": "bf16"}, r"uneven batches.*by rank: \[2, 1\]"),
    ],
)
def test_a_collective_in_an_uneven_step_says_so(operator, ranks, samples, more, text):
    with (
        pytest.raises(OperatorUseError, match=text),
        make(operator, ranks, {"samples": samples}, timeout_s=100, **more) as trainer,
    ):
        trainer.train()
        trainer.validate()


@pytest.mark.parametrize(("operator", "ranks"), [(Exchanging, 2), (ExchangingOwn, 3)])
@pytest.mark.parametrize("even", [True, "drop"])
def test_even_batches_serve_collectives(operator, ranks, even):
    with make(operator, ranks, {"samples": (35, 26)}, even_batches=even) as trainer:
        for _ in range(2):
            assert trainer.train()["num_samples"] % ranks == 0
            assert trainer.validate()["num_samples"] % ranks == 0


def test_a_collective_of_a_fixed_shape_is_left_alone():
    with make(ExchangingOwn, 2, {"samples": (32, 35)}) as trainer:
        trainer.train()
        assert trainer.validate()["num_samples"] == 35


LAUNCHED = """
import sys
import torch, torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset
from torchtrainer import OperatorUseError, TorchTrainer

class Gathering(torch.nn.Module):
    def forward(self, embedded, target):
        everyone = [torch.zeros_like(embedded) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, embedded.detach())
        return (embedded @ torch.cat(everyone).T).square().mean()

for even in (True, False):
    with TorchTrainer(model_creator=lambda config: torch.nn.Linear(3, 3), loss_creator=Gathering,
                      data_creator=lambda config: DataLoader(TensorDataset(torch.ones(11, 3), torch.ones(11)), batch_size=4),
                      optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), 0.01),
                      use_gpu=False, run_dir=None, even_batches=even) as trainer:
        print("num_samples", trainer.train()["num_samples"], flush=True)
"""


@pytest.mark.slow
def test_under_a_launcher_a_collective_in_an_uneven_step_says_so(tmp_path):
    program = start_program(tmp_path, LAUNCHED, python=(*RUN, "--nproc-per-node", "2"))
    program.finish()
    assert "num_samples 12" in program.output
    assert program.process.returncode != 0
    assert "uneven batches" in program.errors
    assert "by rank: [2, 1]" in program.errors
