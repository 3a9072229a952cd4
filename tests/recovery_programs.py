"""What the tests of recovery train, and what ends a worker at a chosen place of it.

Nothing is random about when a process ends: it does so itself, from inside the user's code, when it comes to a phase for the
n-th time, and leaves a file that says so. What a disturbed run returns is then compared with that of an undisturbed one.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from torchtrainer import TorchTrainer, TrainingOperator

FEATURES, CLASSES, BATCH = 12, 5, 4
SAMPLES, MEASURED = 93, 21
"""No number of ranks in the tests divides them."""
DEADLINE_S = 30.0
"""Only a deadlock takes this long."""
GONE_S = 10.0
"""How long after its end a trainer's processes may still be there."""
FEW_EPOCHS = 5
"""What most disturbed runs take at most: they are compared with one and the same undisturbed run of so many."""
WAIT = 0
"""In place of a signal: the process waits, for good."""
RAISE = -1
"""In place of a signal: the user's code raises."""

# Ending a process at a place


@dataclass(frozen=True, kw_only=True)
class Strike:
    """Where the process that was started for a rank gets a signal, once in a run.

    Attributes:
        phase: ``build``, ``join``, ``load``, ``forward``, ``backward``, ``exchanged`` (before the update), ``step``, ``stepped``, ``moved``, ``scheduler``, ``validation`` or ``save``.
        rank: for which the process was started; None: any.
        at: how often the process has come there, this time included.
        life: the number of the process among those of this rank, from 1.
        signum: of the signal, or ``WAIT``, or ``RAISE``.
        once: not again; else in every later process of the rank too.
        spawner: the process that forks workers gets it, not the rank's.
    """

    phase: str
    rank: int | None = None
    at: int = 1
    life: int = 1
    signum: int = signal.SIGKILL
    once: bool = True
    spawner: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.phase}-{self.rank}-{self.at}-{self.life}{'-spawner' if self.spawner else ''}"

    def hits(self, place: _Place, phase: str) -> bool:
        """Whether this is the place."""
        return (
            phase == self.phase
            and self.at == place.counts[phase]
            and self.rank in (None, place.rank)
            and (place.life == self.life or (place.life > self.life and not self.once))
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The strikes of a run, and the directory in which they leave their files."""

    directory: str
    strikes: tuple[Strike, ...] = ()

    def path(self, one: Strike) -> Path:
        return Path(self.directory, one.name)

    def fired(self, one: Strike) -> bool:
        return self.path(one).exists()

    def missing(self) -> list[str]:
        """Strikes that did not come to pass."""
        return [one.name for one in self.strikes if not self.fired(one)]

    def pid(self, one: Strike) -> int:
        """Waits until it came to pass; returns the process."""
        wait_for(lambda: self.fired(one) and self.path(one).read_text())
        return int(self.path(one).read_text())

    def disarm(self) -> None:
        """No more strikes from now on."""
        Path(self.directory, DISARMED).touch()

    def lives(self, rank: int) -> int:
        """How many processes were started for a rank so far."""
        return sum(1 for _ in Path(self.directory).glob(f"life-{rank}-*"))


DISARMED = "disarmed"


@dataclass(kw_only=True)
class _Place:
    """This worker process, as the user's code in it counts."""

    pid: int
    rank: int
    life: int
    plan: Plan
    counts: Counter[str] = field(default_factory=Counter)


_places: list[_Place] = []


class UserError(Exception):
    """What the user's code raises."""


def enter(config: Mapping[str, Any]) -> None:
    """To be called first in every worker."""
    plan = config.get("plan")
    if plan is None or "RANK" not in os.environ or (_places and _places[0].pid == os.getpid()):
        return
    rank = int(os.environ["RANK"])
    life = next(n for n in range(1, 1000) if _created(Path(plan.directory, f"life-{rank}-{n}"), str(os.getpid())))
    _places[:] = [_Place(pid=os.getpid(), rank=rank, life=life, plan=plan)]


def visit(phase: str) -> None:
    """To be called in the user's code wherever a process may end; in a loader's process it is the rank's that does."""
    if not _places:
        return
    here = _places[0]
    here.counts[phase] += 1
    for one in here.plan.strikes:
        if one.hits(here, phase) and not Path(here.plan.directory, DISARMED).exists():
            first = _created(here.plan.path(one), str(here.pid))
            if first or not one.once:  # another process of the same loader may have come here before
                _strike(one.signum, _parent_of(here.pid) if one.spawner else here.pid)


def _strike(signum: int, pid: int) -> None:
    if signum == RAISE:
        raise UserError("raised by intent")
    if signum == WAIT:
        wait_for_good()
    os.kill(pid, signum)


def _parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def wait_for_good() -> None:
    """What a worker that hangs does; the name is looked for in its stacks."""
    threading.Event().wait()


def _created(path: Path, text: str) -> bool:
    try:
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        return False
    return True


def wait_for(condition: Callable[[], Any], deadline_s: float = DEADLINE_S) -> None:
    """Looks again and again until something is so."""
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, f"not so after {deadline_s} s: {condition}"
        os.sched_yield()


# What is trained


class Model(nn.Module):
    """Dropout draws random numbers, batch norm has buffers; both are the rank's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, CLASSES)
        )

    def forward(self, x):
        visit("forward" if self.training else "validation")
        output = self.layers(x)
        if self.training:
            output.register_hook(_in_backward)
        return output


def _in_backward(gradient):
    visit("backward")


class Data(Dataset):
    """Each sample is another one each time it is read, if it is augmented."""

    def __init__(self, size, *, augmented):
        generator = torch.Generator().manual_seed(size)
        self.x = torch.randn(size, FEATURES, generator=generator)
        self.y = torch.randint(0, CLASSES, (size,), generator=generator)
        self.augmented = augmented

    def __len__(self):
        return len(self.y)

    def __getitem__(self, index):
        if not self.augmented:
            return self.x[index], self.y[index]
        visit("load")
        return self.x[index] + 0.1 * torch.randn(FEATURES), self.y[index]


class Adam(torch.optim.Adam):
    def step(self, closure=None):
        visit("step")
        super().step(closure)
        visit("stepped")

    def state_dict(self):
        visit("save")
        return super().state_dict()

    def load_state_dict(self, state):
        visit("join")
        super().load_state_dict(state)


class Momentum(torch.optim.SGD):
    def step(self, closure=None):
        visit("step")
        super().step(closure)
        visit("stepped")


class Schedule(torch.optim.lr_scheduler.StepLR):
    def step(self):
        visit("scheduler")
        super().step()


def model_creator(config):
    enter(config)
    visit("build")
    return Model()


def data_creator(config):
    workers = config.get("loader_workers", 0)
    options = {"num_workers": workers, "persistent_workers": bool(workers)}
    train = DataLoader(Data(SAMPLES, augmented=True), batch_size=BATCH, shuffle=True, **options)
    return train, DataLoader(Data(MEASURED, augmented=False), batch_size=BATCH)


def optimizer_creator(model, config):
    if config.get("optimizer") == "momentum":
        return Momentum(model.parameters(), lr=0.05, momentum=0.9)
    return Adam(model.parameters(), lr=0.01)


def scheduler_creator(optimizer, config):
    return Schedule(optimizer, step_size=3, gamma=0.9)


class Stateful(TrainingOperator):
    """Has a state of its own, which each rank keeps for itself; the built-in loop trains it."""

    def setup(self, config):
        # Hooks of the wrapper around the model are not called by the built-in loop in worker processes.
        self.seen = torch.zeros((), dtype=torch.int64)
        getattr(self.model, "module", self.model).register_forward_pre_hook(self._count)

    def _count(self, module, inputs):
        if module.training:
            self.seen += int(len(inputs[0]) * (1 + self.world_rank))

    def clip_gradients(self):
        visit("exchanged")
        super().clip_gradients()

    def state_dict(self):
        return {"seen": self.seen.clone()}

    def load_state_dict(self, state):
        if state:
            self.seen = state["seen"].clone()


class OwnBatch(TrainingOperator):
    """Makes the update itself, so that a process can carry only one rank."""

    def train_batch(self, batch, batch_info):
        x, y = batch
        loss = self.criterion(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        visit("own update")
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(y)}


class OwnEpoch(TrainingOperator):
    """The same with a loop of its own, which keeps nothing in local variables: these end with a process."""

    def train_epoch(self, iterator, info):
        self.model.train()
        for x, y in iterator:
            loss = self.criterion(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return {"latest_loss": loss.item()}


class Averaged(Stateful):
    """Has an average of the weights, moved by a hook of the optimizer, which validation uses; its state is the live tensors."""

    def setup(self, config):
        super().setup(config)
        self.average = {name: one.detach().clone() for name, one in bare(self.model).named_parameters()}
        self.optimizer.register_step_post_hook(lambda *_: self._move())

    @torch.no_grad()
    def _move(self):
        visit("moved")
        for name, one in bare(self.model).named_parameters():
            self.average[name].lerp_(one, 0.1)

    def validate(self, val_iterator, info):
        trained = {name: one.detach().clone() for name, one in bare(self.model).named_parameters()}
        bare(self.model).load_state_dict(self.average, strict=False)
        found = super().validate(val_iterator, info)
        bare(self.model).load_state_dict(trained, strict=False)
        return found

    def state_dict(self):
        return {"average": self.average, "seen": self.seen}

    def load_state_dict(self, state):
        for name, one in state["average"].items():
            self.average[name].copy_(one)
        self.seen.copy_(state["seen"])


class Teacher(TrainingOperator):
    """A copy of the model that follows it, from the fifth step on, and has a say in the loss; its own forward passes
    change its buffers, which are a rank's."""

    def setup(self, config):
        self.updates, self.teacher = 0, copy.deepcopy(bare(self.model))
        student, loss = self.model, self.criterion
        self.criterion = lambda output, target: loss(output, target) + self._distance(output)
        self.register_inputs = getattr(student, "module", student).register_forward_pre_hook(self._note)

    def _note(self, module, inputs):
        self.inputs = inputs[0]

    def _distance(self, output):
        with torch.no_grad():
            wanted = self.teacher.layers(self.inputs)
        return 0.1 * (output - wanted).square().mean()

    def after_step(self, batch_info):
        visit("moved")
        assert batch_info["global_step"] == self.updates and {"batch_idx", "epoch_idx"} <= set(batch_info)
        self.updates += 1
        if self.updates >= 5:
            for one, other in zip(self.teacher.parameters(), bare(self.model).parameters(), strict=True):
                one.data.mul_(0.9).add_(other.data, alpha=0.1)

    def state_dict(self):
        return {"teacher": self.teacher.state_dict(), "updates": self.updates}

    def load_state_dict(self, state):
        self.teacher.load_state_dict(state["teacher"])
        self.updates = state["updates"]


class Swa(TrainingOperator):
    """torch's own average of models, which begins late, and is not there before; validation measures it."""

    def setup(self, config):
        self.swa = None

    def after_step(self, batch_info):
        visit("moved")
        if self.swa is None and batch_info["global_step"] >= 10:
            self.swa = torch.optim.swa_utils.AveragedModel(bare(self.model))
        if self.swa is not None:
            self.swa.update_parameters(bare(self.model))

    def validate_batch(self, batch, batch_info):
        found = super().validate_batch(batch, batch_info)
        if self.swa is not None:
            self.swa.eval()
            found["swa_loss"] = self.criterion(self.swa(batch[0]), batch[1]).item()
        return found

    def state_dict(self):
        return None if self.swa is None else {"swa": self.swa.state_dict()}

    def load_state_dict(self, state):
        if state is not None:
            self.swa = torch.optim.swa_utils.AveragedModel(bare(self.model))
            self.swa.load_state_dict(state["swa"])


class Norms(TrainingOperator):
    """Clips by what the norms of the gradients were so far; and has a moving baseline of the loss, which is a rank's."""

    def setup(self, config):
        self.mean, self.latest, self.baseline = 0.0, [], 0.0
        loss = self.criterion
        self.criterion = lambda output, target: self._against(loss(output, target), output.requires_grad)

    def _against(self, loss, training):
        if training:
            self.baseline = 0.9 * self.baseline + 0.1 * loss.item()
        return loss * (1 + 0.1 * self.baseline)

    def clip_gradients(self):
        most = 2 * self.mean if self.latest else 1.0
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), most).item()
        visit("moved")
        self.mean = 0.9 * self.mean + 0.1 * norm
        self.latest = [*self.latest, norm][-4:]

    def state_dict(self):
        return {"norms": {"mean": self.mean, "latest": self.latest}, "baseline": self.baseline}

    def load_state_dict(self, state):
        self.mean, self.latest = state["norms"]["mean"], list(state["norms"]["latest"])
        self.baseline = state["baseline"]


class Unlike(TrainingOperator):
    """Changes in the update what is a rank's: only the rank's own process can do that."""

    def setup(self, config):
        self.latest, self.baseline, loss = 0.0, 0.0, self.criterion
        self.criterion = lambda output, target: self._note(loss(output, target))

    def _note(self, loss):
        self.latest = loss.item()
        return loss * (1 + 0.1 * self.baseline)

    def after_step(self, batch_info):
        self.baseline = 0.9 * self.baseline + 0.1 * self.latest

    def state_dict(self):
        return {"latest": self.latest, "baseline": self.baseline}

    def load_state_dict(self, state):
        self.latest, self.baseline = state["latest"], state["baseline"]


class OwnAveraged(Averaged):
    """The same with an update of its own."""

    def train_batch(self, batch, batch_info):
        return OwnBatch.train_batch(self, batch, batch_info)


def bare(model):
    """Without what is wrapped around it."""
    return getattr(model, "module", model)


OPERATORS = {
    "": None,
    "stateful": Stateful,
    "own batch": OwnBatch,
    "own epoch": OwnEpoch,
    "averaged": Averaged,
    "teacher": Teacher,
    "swa": Swa,
    "norms": Norms,
    "unlike": Unlike,
    "own averaged": OwnAveraged,
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """A training whose result does not depend on what happens to its processes."""

    ranks: int = 2
    operator: str = ""
    optimizer: str = "adam"
    loader_workers: int = 0

    def trainer(self, plan: Plan | None = None, **arguments: Any) -> TorchTrainer:
        """Starts the ranks."""
        config = {"optimizer": self.optimizer, "loader_workers": self.loader_workers, "plan": plan}
        defaults = {
            "model_creator": model_creator,
            "data_creator": data_creator,
            "optimizer_creator": optimizer_creator,
            "loss_creator": nn.CrossEntropyLoss,
            "scheduler_creator": scheduler_creator,
            "scheduler_step_freq": "batch",
            "training_operator_cls": OPERATORS[self.operator],
            "num_workers": self.ranks,
            "num_cpus_per_worker": 1,
            "config": config,
            "run_dir": None,
        }
        return TorchTrainer(**{**defaults, **arguments})


# What a run comes to


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """What an epoch left behind: the metrics of its two calls, and the digest of the whole state after it."""

    train: dict[str, Any]
    validate: dict[str, Any]
    digest: str


def one_epoch(trainer: TorchTrainer) -> Epoch:
    """Trains and measures; says where the processes were if it does not come to an end."""
    try:
        return Epoch(train=trainer.train(), validate=trainer.validate(), digest=digest(trainer.state_dict()))
    except pytest.fail.Exception:
        print(trainer.status())
        raise


def epochs_of(trainer: TorchTrainer, epochs: int) -> list[Epoch]:
    """Trains and measures several times."""
    return [one_epoch(trainer) for _ in range(epochs)]


@cache
def undisturbed(job: Job, epochs: int = FEW_EPOCHS) -> tuple[Epoch, ...]:
    """The epochs of a run to which nothing happens; made once."""
    with job.trainer() as trainer:
        found = tuple(epochs_of(trainer, epochs))
        assert trainer.status().failures == ()
    return found


def assert_as_undisturbed(found: Sequence[Epoch], job: Job) -> None:
    """Fails at the first epoch that is not what it is without any failure, to the last bit."""
    expected = undisturbed(job) if len(found) <= FEW_EPOCHS else undisturbed(job, len(found))
    for number, (here, there) in enumerate(zip(found, expected, strict=False), start=1):
        assert here == there, f"epoch {number} differs"


def digest(value: Any) -> str:
    """SHA-256 over everything in a state: names, numbers, and the bits of tensors."""
    sha = hashlib.sha256()
    for part in _parts(value):
        sha.update(part)
    return sha.hexdigest()


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            yield f"{key!r}:".encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for one in value:
            yield from _parts(one)
    elif isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    else:
        yield repr(value).encode()


# What the driver and the host take


@dataclass(frozen=True, kw_only=True)
class EngineUse:
    """What this process and the host process below it hold."""

    threads: int
    descriptors: tuple[int, ...]
    shared_bytes: int
    resident_bytes: int


def engine_use() -> EngineUse:
    """What they hold now."""
    pids = [os.getpid(), *_children(os.getpid())]
    return EngineUse(
        threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
        descriptors=tuple(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
        shared_bytes=sum(map(_shared_bytes, pids)),
        resident_bytes=sum(_resident_bytes(pid) for pid in pids),
    )


def _children(pid: int) -> list[int]:
    return [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]


def _shared_bytes(pid: int) -> int:
    """What the files in memory take that a process has open."""
    found = 0
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if "memfd:" in os.readlink(entry):
                found += entry.stat().st_blocks * 512
    return found


def _resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
