"""Trainers that are to fail: plain creators, and what holds after every failure."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from torchtrainer import TorchTrainer, TrainingOperator

HANG_S = 5
"""``hang_timeout_s``: more than a busy machine takes for anything but what hangs."""
SAMPLES = 400


def model_creator(config):
    return torch.nn.Linear(20, 5)


def data_creator(config):
    return DataLoader(samples(SAMPLES), batch_size=4), DataLoader(samples(21), batch_size=4)


def samples(n):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 20, generator=generator), torch.randint(0, 5, (n,), generator=generator))


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.1)


CREATORS = {
    "model_creator": model_creator,
    "data_creator": data_creator,
    "optimizer_creator": optimizer_creator,
    "loss_creator": torch.nn.CrossEntropyLoss,
    "num_workers": 2,
    "run_dir": None,
}


class MyError(Exception):
    """An exception of the user's own."""


class At(TrainingOperator):
    """Calls ``config["do"]()`` on some ranks when 37 steps are done."""

    def train_batch(self, batch, batch_info):
        if batch_info["global_step"] == 37 and self.world_rank in self.config.get("ranks", [1]):
            self.config["do"]()
        return super().train_batch(batch, batch_info)


def failure_of(expected, use=None, **arguments) -> BaseException:
    """Makes a trainer and uses it; returns the error, which has exactly the expected type and left no worker behind."""
    before = workers()
    trainer = None
    with pytest.raises(expected) as caught:
        trainer = TorchTrainer(**{**CREATORS, **arguments})
        (use or TorchTrainer.train)(trainer)
    assert type(caught.value) is expected
    try:
        assert workers() == before, "a failed group is gone before its error is raised"
    finally:
        if trainer is not None:
            trainer._close("failed", force=True)
    return caught.value


def story(error: BaseException) -> str:
    """All that the user gets to read."""
    return f"{error}\n{error.__cause__ or ''}"


def workers() -> set[int]:
    """Living processes below the spawners of this process: workers, and what they started."""
    found: set[int] = set()
    generation = _children(os.getpid())
    for depth in range(1, 6):
        if depth > 1:  # 1: the host, which stays for the next trainer, as does the spawner below it
            found.update(pid for pid in generation if depth > 2 or _leads_session(pid))
        generation = [child for parent in generation for child in _children(parent)]
    return {pid for pid in found if _lives(pid)}


def _leads_session(pid: int) -> bool:
    """As workers do, also where the spawner that had forked them is gone."""
    try:
        return os.getsid(pid) == pid
    except ProcessLookupError:
        return False


def _children(pid: int) -> list[int]:
    try:
        return [int(p) for task in Path(f"/proc/{pid}/task").iterdir() for p in (task / "children").read_text().split()]
    except OSError:  # gone meanwhile
        return []


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
