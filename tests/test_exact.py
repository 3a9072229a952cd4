"""Training is the training that a loop written by hand does, to the last bit; measuring is exact for any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from programs import run_program
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import BATCH_SIZE, TorchTrainer

MODEL = """
import torch
from torch.utils.data import DataLoader, TensorDataset

N, BATCH, EPOCHS = 128, 8, 2

def samples():
    generator = torch.Generator().manual_seed(3)
    return TensorDataset(torch.randn(N, 3, 8, 8, generator=generator), torch.randint(0, 10, (N,), generator=generator))

def model_creator(config):
    return torch.nn.Sequential(
        torch.nn.Conv2d(3, 16, 3), torch.nn.BatchNorm2d(16), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10)
    )

def data_creator(config):
    return DataLoader(samples(), batch_size=BATCH, shuffle=True)

def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
"""

BY_HAND = (
    MODEL
    + """
import sys
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.distributed import DistributedSampler

dist.init_process_group("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
model = model_creator({})
optimizer = optimizer_creator(model, {})
wrapped = DistributedDataParallel(model)
sampler = DistributedSampler(samples(), shuffle=True, seed=0)
for epoch in range(EPOCHS):
    sampler.set_epoch(epoch)
    for x, y in DataLoader(samples(), batch_size=BATCH, sampler=sampler):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(x), y).backward()
        optimizer.step()
if dist.get_rank() == 0:
    torch.save(model.state_dict(), f"{sys.argv[1]}.0")
dist.destroy_process_group()
"""
)

BY_TRAINER = (
    MODEL
    + """
import os, sys
from torchtrainer import TorchTrainer

with TorchTrainer(
    model_creator=model_creator, data_creator=data_creator, optimizer_creator=optimizer_creator,
    loss_creator=torch.nn.CrossEntropyLoss, num_workers=2, num_cpus_per_worker=1,
) as trainer:
    trainer.fit(EPOCHS)
    # Under torchrun both ranks do this: what they save must not depend on which is last.
    torch.save(trainer.get_model().state_dict(), f"{sys.argv[1]}.{os.getpid()}")
    os.replace(f"{sys.argv[1]}.{os.getpid()}", f"{sys.argv[1]}.{os.environ.get('RANK', '0')}")
"""
)
RUN = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def weights(tmp_path: Path, program: str, name: str, python: tuple[str, ...] = ()) -> list[dict[str, torch.Tensor]]:
    """What each rank saved."""
    out = tmp_path / f"{name}.pt"
    done = run_program(tmp_path, program, str(out), python=python)
    assert done.ended_well(), done.errors
    if not python:  # torchrun leaves its own log directory behind
        done.assert_nothing_left()
    return [torch.load(path, weights_only=True) for path in sorted(tmp_path.glob(f"{name}.pt.*"))]


@pytest.mark.slow
def test_two_epochs_equal_plain_ddp_to_the_last_bit(tmp_path) -> None:
    (expected,) = weights(tmp_path, BY_HAND, "hand", python=TORCHRUN)
    for name, python, savers in (("trainer", (), 1), ("trainer_under_our_launcher", RUN, 2)):
        saved = weights(tmp_path, BY_TRAINER, name, python=python)
        assert len(saved) == savers
        for rank, found in enumerate(saved):
            assert expected.keys() == found.keys()
            for key, value in expected.items():
                assert torch.equal(value, found[key]), f"{name}, rank {rank}: {key}"


ROWS = 53
"""A number of samples that none of the worlds, and none of the batches, divides."""


def rows() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(ROWS, 6, generator=generator), torch.randint(0, 3, (ROWS,), generator=generator))


def small_model(config):
    return torch.nn.Linear(6, 3)


def small_data(config):
    return DataLoader(rows(), batch_size=config[BATCH_SIZE], shuffle=True), DataLoader(rows(), batch_size=4)


def small_optimizer(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def in_one_process(epochs: int, batch: int) -> tuple[torch.nn.Module, float]:
    """The same training on whole global batches, and the mean loss of the last epoch by sample."""
    torch.manual_seed(0)
    model = small_model({})
    optimizer = small_optimizer(model, {})
    x, y = rows().tensors
    for epoch in range(epochs):
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(epoch))
        total = 0.0
        for start in range(0, ROWS, batch):
            index = order[start : start + batch]
            loss = torch.nn.functional.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item() * len(index)
    return model, total / ROWS


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_uneven_batches_and_metrics_equal_one_process(world_size) -> None:
    batch, epochs = 9, 2
    model, train_loss = in_one_process(epochs, batch)
    with TorchTrainer(
        model_creator=small_model,
        data_creator=small_data,
        optimizer_creator=small_optimizer,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=world_size,
        config={BATCH_SIZE: batch},
        run_dir=None,
    ) as trainer:
        trainer.train()
        stats, found, trained = trainer.train(), trainer.validate(), trainer.get_model()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, trained.state_dict()[name], atol=1e-6), name
    assert stats["num_samples"] == found["num_samples"] == ROWS
    assert stats["train_loss"] == pytest.approx(train_loss, rel=1e-5)
    x, y = rows().tensors
    with torch.no_grad():
        output = model(x)
    assert found["val_loss"] == pytest.approx(torch.nn.functional.cross_entropy(output, y).item(), rel=1e-5)
    assert found["val_accuracy"] == pytest.approx((output.argmax(1) == y).double().mean().item())
