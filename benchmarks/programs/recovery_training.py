"""The training of `benchmarks/recovery.py`, and what kills its workers from inside, once per round.

Driver and workers share a little memory, in which the driver says where the next kill is to be, and workers write when it was and
when the next step was done.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchtrainer import TrainingOperator

FEATURES, HIDDEN, CLASSES = 64, 256, 10
BATCH, STEPS, MEASURED = 8, 32, 64
"""Samples of a rank per step, steps per epoch, samples of a validation."""
PHASES = ("load", "forward", "backward", "exchange", "exchanged", "step", "stepped", "scheduler", "save", "validation")
"""exchange: while a rank waits for the others' gradients, killed by one of them; exchanged: right after that."""
SAVE_EVERY = 16
"""Steps between two checkpoints."""
WAITING_S = 0.005
"""By how much the rank that kills another one in the exchange comes later than it."""

# Killing, from inside

SERIAL, PHASE, RANK, AT, KILLED_NS, NEEDED, DONE_NS, PIDS = range(8)
"""Places in the memory that driver and workers share: what to do next, and when it was done. Process ids come last, by rank."""
SHARED_SIZE = 64


@dataclass(frozen=True, kw_only=True)
class Kill:
    """A place at which a rank's process is killed: when it comes to a phase for the n-th time."""

    phase: str
    rank: int
    at: int


def shared_memory(path: str) -> torch.Tensor:
    return torch.from_file(path, shared=True, size=SHARED_SIZE, dtype=torch.int64)


class Place:
    """What the user's code in a worker counts."""

    def __init__(self, path: str, world_size: int) -> None:
        self.memory = shared_memory(path)
        self.rank = int(os.environ.get("RANK", "0"))
        self.world_size = world_size
        self.serial = 0
        self.counts = dict.fromkeys(PHASES, 0)
        self.taken = 0
        self.memory[PIDS + self.rank] = os.getpid()

    def visit(self, phase: str) -> None:
        """Ends the process of a rank, if this is where."""
        memory = self.memory
        if self.serial != int(memory[SERIAL]):
            self.serial = int(memory[SERIAL])
            self.counts = dict.fromkeys(PHASES, 0)
        self.counts[phase] += 1
        if not self.serial or int(memory[KILLED_NS]) or int(memory[AT]) != self.counts[phase]:
            return
        wanted, victim = PHASES[int(memory[PHASE])], int(memory[RANK])
        if wanted == phase and victim == self.rank:
            self.kill(victim, needed=self.taken + (2 if phase in ("exchanged", "step") else 1))
        elif wanted == "exchange" and phase == "forward" and victim == (self.rank + 1) % self.world_size:
            later = time.monotonic() + WAITING_S
            while time.monotonic() < later:
                pass
            self.kill(victim, needed=self.taken + 1)

    def kill(self, victim: int, *, needed: int) -> None:
        self.memory[NEEDED] = needed
        self.memory[KILLED_NS] = time.monotonic_ns()
        os.kill(int(self.memory[PIDS + victim]), signal.SIGKILL)

    def stepped(self, taken: int) -> None:
        """An optimizer step has ended."""
        self.taken = taken
        memory = self.memory
        if int(memory[KILLED_NS]) and not int(memory[DONE_NS]) and taken >= int(memory[NEEDED]):
            memory[DONE_NS] = time.monotonic_ns()


def visit(place: Place | None, phase: str) -> None:
    if place is not None:
        place.visit(phase)


def arm(memory: torch.Tensor, serial: int, kill: Kill) -> None:
    memory[PHASE], memory[RANK], memory[AT] = PHASES.index(kill.phase), kill.rank, kill.at
    memory[KILLED_NS] = memory[NEEDED] = memory[DONE_NS] = 0
    memory[SERIAL] = serial


# What is trained


class Samples(Dataset):
    def __init__(self, size, place=None):
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, FEATURES, generator=generator)
        self.y = torch.randint(0, CLASSES, (size,), generator=generator)
        self.place = place

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        visit(self.place, "load")
        return self.x[index] + 0.1 * torch.randn(FEATURES), index, self.y[index]


class Model(nn.Module):
    """An MLP, and a parameter that every sample leaves its mark on."""

    def __init__(self, samples, place=None):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU(), nn.Dropout(0.2), nn.Linear(HIDDEN, CLASSES)
        )
        self.used = nn.Parameter(torch.zeros(max(samples, MEASURED)))
        self.place = place

    def forward(self, x, index):
        visit(self.place, "forward" if self.training else "validation")
        output = self.layers(x)
        if self.training and output.requires_grad:
            output.register_hook(self.in_backward)
        return torch.cat([output, self.used[index][:, None]], dim=1)

    def in_backward(self, gradient):
        visit(self.place, "backward")


class Loss(nn.Module):
    def forward(self, output, target):
        mark = output[:, -1]
        return nn.functional.cross_entropy(output[:, :-1], target) + (mark - mark.detach()).mean()


class Optimizer(torch.optim.SGD):
    def __init__(self, model, place=None):
        parameters = [{"params": list(model.layers.parameters()), "momentum": 0.9}]
        super().__init__([*parameters, {"params": [model.used], "lr": 1.0}], lr=0.05)
        self.param_groups[0]["taken"] = 0
        self.place = place

    def step(self, closure=None):
        visit(self.place, "step")
        super().step(closure)
        self.param_groups[0]["taken"] += 1
        if self.place is not None:
            self.place.stepped(self.param_groups[0]["taken"])
        visit(self.place, "stepped")

    def state_dict(self):
        visit(self.place, "save")
        return super().state_dict()

    def load_state_dict(self, state):
        super().load_state_dict(state)
        if self.place is not None:
            self.place.taken = self.param_groups[0]["taken"]


class Schedule(torch.optim.lr_scheduler.LambdaLR):
    """Each step of the network is a little shorter than the one before; the marks of the samples stay as long as they are."""

    def __init__(self, optimizer):
        super().__init__(optimizer, [lambda step: 0.999**step, lambda _: 1.0])

    def step(self):
        visit(getattr(self.optimizer, "place", None), "scheduler")
        super().step()


def place_of(config):
    """The same for all creators of a worker."""
    if config["path"] and "place" not in config:
        config["place"] = Place(config["path"], config["world_size"])
    return config.get("place")


def model_creator(config):
    return Model(config["samples"], place_of(config))


def data_creator(config):
    train = DataLoader(Samples(config["samples"], place_of(config)), batch_size=BATCH, shuffle=True)
    return train, DataLoader(Samples(MEASURED), batch_size=BATCH)


def optimizer_creator(model, config):
    return Optimizer(model, place_of(config))


def scheduler_creator(optimizer, config):
    return Schedule(optimizer)


class Clipping(TrainingOperator):
    """Comes by between the exchange of gradients and the update."""

    def clip_gradients(self):
        visit(self.config.get("place"), "exchanged")
        super().clip_gradients()
