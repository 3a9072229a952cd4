"""A loader's process that dies costs nothing: its batches are fetched again by new ones, and training has the same bits.

Who reads a chosen sample ends its own process, once; or something else ends it at any moment.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest
import torch
from programs import CREATORS, start_program
from recovery_programs import DEADLINE_S, digest
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from torchtrainer import FailureConfig, TorchTrainer, TrainingOperator, WorkerDiedError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SAMPLES, MEASURED, BATCH, FEATURES = 70, 22, 4, 6
EXIT = 0
"""In place of a signal: the process leaves by itself, with code 3."""


# What is trained


def strike(directory: str, kind: str, index: int) -> None:
    """Ends this process if that was planned for this sample, and has not happened yet."""
    for armed in Path(directory).glob(f"{kind}-{index}-*.armed"):
        try:
            armed.rename(armed.with_suffix(".fired"))
        except FileNotFoundError:  # another process was first
            continue
        signum = int(armed.stem.rsplit("-", 1)[1])
        if signum != EXIT:
            os.kill(os.getpid(), signum)
        os._exit(3)


class Samples(Dataset):
    """Each sample is another one each time it is read; with ``wide`` one that fills a pipe."""

    def __init__(self, size: int, config: dict, kind: str) -> None:
        self.size, self.kind = size, kind
        self.directory, self.wide = config["strikes"], config.get("wide", False)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int):
        strike(self.directory, self.kind, index)
        generator = torch.Generator().manual_seed(index)
        x = torch.randn(FEATURES, generator=generator) + 0.1 * torch.randn(FEATURES)
        y = torch.randint(0, 3, (), generator=generator)
        return (x, y, b"." * 60_000) if self.wide else (x, y)


class Stream(IterableDataset):
    """The same samples, divided between the processes of the loader."""

    def __init__(self, samples: Samples) -> None:
        self.samples = samples

    def __iter__(self):
        info = get_worker_info()
        for index in range(info.id, len(self.samples), info.num_workers):
            yield self.samples[index]


def model_creator(config):
    return nn.Sequential(nn.Linear(FEATURES, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))


def data_creator(config):
    options = {"batch_size": BATCH, "num_workers": config["processes"], "persistent_workers": config["persistent"]}
    train = Samples(SAMPLES, config, "train")
    if config["kind"] == "stream":
        return DataLoader(Stream(train), **options)
    generator = torch.Generator().manual_seed(5) if config["kind"] == "plain" else None
    measured = DataLoader(Samples(MEASURED, config, "validation"), **options)
    return DataLoader(train, shuffle=True, generator=generator, **options), measured


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


class Step(TrainingOperator):
    def train_batch(self, batch, batch_info):
        return super().train_batch(batch[:2], batch_info)

    def validate_batch(self, batch, batch_info):
        return super().validate_batch(batch[:2], batch_info)


class OwnBatch(Step):
    def train_batch(self, batch, batch_info):
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(batch[0]), batch[1])
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item()}


class OwnEpoch(OwnBatch):
    """Iterates the registered loader itself, not the iterator that it is given."""

    def train_epoch(self, iterator, info):
        self.model.train()
        losses = [super(OwnEpoch, self).train_batch(batch, {})["train_loss"] for batch in iterator]
        return {"train_loss": sum(losses) / len(losses)}


class Killing(Step):
    """Ends all processes of its loaders in the middle of a step, and takes the step to its end when they are gone."""

    def train_batch(self, batch, batch_info):
        children = multiprocessing.active_children()
        if self.global_step == 3 and self.config["kill"]:
            for child in children:
                os.kill(child.pid, signal.SIGKILL)
            for child in children:
                child.join()
        return super().train_batch(batch, batch_info)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A training, and what ends its loaders' processes: kind of data, sample and signal of each strike."""

    operator: type[TrainingOperator] = TrainingOperator
    kind: str = "map"
    ranks: int = 2
    processes: int = 2
    persistent: bool = False
    local: bool = False
    wide: bool = False
    strikes: tuple[tuple[str, int, int], ...] = ()

    def trainer(self, directory: Path, **more) -> TorchTrainer:
        for kind, index, signum in self.strikes:
            (directory / f"{kind}-{index}-{signum}.armed").touch()
        config = {
            "strikes": str(directory),
            "processes": self.processes,
            "persistent": self.persistent,
            "kind": self.kind,
            "wide": self.wide,
            "kill": bool(more.pop("kill", False)),
        }
        return TorchTrainer(
            model_creator=model_creator,
            data_creator=data_creator,
            optimizer_creator=optimizer_creator,
            loss_creator=nn.CrossEntropyLoss,
            training_operator_cls=self.operator,
            config=config,
            num_workers=self.ranks,
            use_local=self.local,
            add_dist_sampler=self.kind != "plain",
            run_dir=None,
            **more,
        )


def outcome(case: Case, trainer: TorchTrainer, during: Callable[[], None] | None = None) -> list[object]:
    """What two passes and a validation between them come to."""
    found: list[object] = [trainer.train()]
    if during is not None:
        during()
    if case.kind != "stream":
        found.append(trainer.validate())
    return [*found, trainer.train(), digest(trainer.state_dict())]


@cache
def undisturbed(case: Case) -> list[object]:
    with replace(case, strikes=()).trainer(Path(os.devnull)) as trainer:
        found = outcome(case, trainer)
        assert trainer.status().failures == ()
    return found


def as_undisturbed(case: Case) -> list[object]:
    return undisturbed(replace(case, strikes=()))


KILL, CRASH = int(signal.SIGKILL), int(signal.SIGSEGV)
CASES = {
    "one process": Case(processes=1, strikes=(("train", 9, KILL), ("validation", 8, KILL), ("train", 60, KILL))),
    "persistent": Case(
        processes=4, persistent=True, operator=OwnBatch, strikes=(("train", 30, CRASH), ("validation", 8, CRASH))
    ),
    "own loop": Case(ranks=3, operator=OwnEpoch, strikes=(("train", 30, KILL), ("train", 31, EXIT))),
    "stream": Case(kind="stream", strikes=(("train", 33, KILL), ("train", 69, CRASH))),
    "persistent stream": Case(kind="stream", persistent=True, operator=OwnBatch, strikes=(("train", 33, KILL),)),
    "not dealt out": Case(kind="plain", persistent=True, strikes=(("train", 33, KILL), ("validation", 0, KILL))),
    "in this process": Case(local=True, strikes=(("train", 33, KILL), ("validation", 21, CRASH))),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_batches_of_a_process_that_dies_are_fetched_again(tmp_path, capfd, case) -> None:
    with case.trainer(tmp_path) as trainer:
        assert outcome(case, trainer) == as_undisturbed(case)
        failures = trainer.status().failures
    assert not list(tmp_path.glob("*.armed"))
    assert len(failures) >= len(case.strikes)
    causes = {
        "loader process exited with code 3"
        if signum == EXIT
        else f"loader process was killed by {signal.Signals(signum).name}"
        for _, _, signum in case.strikes
    }
    assert {one.cause for one in failures} == causes
    assert {one.how for one in failures} == {"refetched"}
    assert all(one.rank in range(case.ranks) and one.seconds < DEADLINE_S and not one.redone for one in failures)
    assert "fetched its batches again" in capfd.readouterr().err


@pytest.mark.parametrize("operator", [Killing])
@pytest.mark.parametrize("persistent", [False, True])
def test_a_death_in_the_middle_of_a_step_does_not_disturb_the_step(tmp_path, operator, persistent) -> None:
    case = Case(operator=operator, persistent=persistent)
    with case.trainer(tmp_path, kill=True) as trainer:
        assert outcome(case, trainer) == as_undisturbed(case)
        assert {one.cause for one in trainer.status().failures} == {"loader process was killed by SIGKILL"}


def test_deaths_between_two_calls_are_made_up_for_in_the_next(tmp_path) -> None:
    case = Case(persistent=True)

    def kill_children():
        for child in multiprocessing.active_children():
            child.kill()
            child.join()

    with case.trainer(tmp_path) as trainer:
        found = outcome(case, trainer, during=lambda: trainer.apply_all_workers(kill_children))
        assert found == as_undisturbed(case)
        assert sorted(one.rank for one in trainer.status().failures) == [0, 0, 1, 1]


class Deadly(Samples):
    def __getitem__(self, index: int):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


@pytest.mark.parametrize("allowed", [0, 2])
def test_a_sample_that_kills_whoever_reads_it_ends_the_run(tmp_path, allowed) -> None:
    def deadly(config):
        return DataLoader(Deadly(SAMPLES, config, "train"), batch_size=BATCH, num_workers=1)

    trainer = TorchTrainer(
        model_creator=model_creator,
        data_creator=deadly,
        optimizer_creator=optimizer_creator,
        loss_creator=nn.CrossEntropyLoss,
        config={"strikes": str(tmp_path)},
        failure=FailureConfig(max_failures=allowed),
        num_workers=2,
        run_dir=None,
    )
    times = f", as {allowed + 1} in a row did before a batch was read" if allowed else ""
    with trainer, pytest.raises(WorkerDiedError) as raised:
        trainer.train()
    assert f"of the train loader was killed by SIGKILL{times}; FailureConfig(max_failures={allowed})" in str(
        raised.value
    )
    assert raised.value.exit_code == -signal.SIGKILL


def test_what_user_code_raises_in_a_process_is_still_its_error(tmp_path) -> None:
    def vanished(index):
        raise FileNotFoundError("sample.png")

    class Vanishing(Samples):
        def __getitem__(self, index: int):
            return vanished(index)

    def data(config):
        return DataLoader(Vanishing(SAMPLES, config, "train"), batch_size=BATCH, num_workers=2)

    creators = {"model_creator": model_creator, "optimizer_creator": optimizer_creator}
    with (
        TorchTrainer(
            **creators,
            data_creator=data,
            loss_creator=nn.CrossEntropyLoss,
            config={"strikes": str(tmp_path)},
            run_dir=None,
        ) as trainer,
        pytest.raises(FileNotFoundError, match=r"sample\.png"),
    ):
        trainer.train()


LAUNCHED = (
    CREATORS
    + """
import hashlib, pathlib, sys

class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 64
    def __getitem__(self, index):
        armed = pathlib.Path(sys.argv[1])
        if index in (9, 40) and armed.name != "none":
            try:
                (armed / str(index)).unlink()
            except FileNotFoundError:
                pass
            else:
                os.kill(os.getpid(), 9)
        return torch.full((20,), float(index)) + torch.randn(20), torch.tensor(index % 2)

def data_creator(config):
    return DataLoader(Data(), batch_size=4, num_workers=2, shuffle=True)

CREATORS["data_creator"] = data_creator
with TorchTrainer(**CREATORS, run_dir=None) as trainer:
    trainer.train()
    weights = torch.cat([one.detach().flatten() for one in trainer.get_model().parameters()])
    causes = [one.cause for one in trainer.status().failures]
    told = f"rank {os.environ['RANK']} {hashlib.sha256(weights.numpy().tobytes()).hexdigest()} {causes}\\n"
    os.write(1, told.encode())
"""
)


def test_under_a_launcher_too(tmp_path) -> None:
    armed = tmp_path / "armed"
    armed.mkdir()
    (armed / "9").touch()
    (armed / "40").touch()
    told = []
    for directory in (armed, tmp_path / "none"):
        python = ("-m", "torchtrainer", "run", "--nproc-per-node", "2")
        program = start_program(
            tmp_path, LAUNCHED, str(directory), python=(sys.executable, *python), OMP_NUM_THREADS="1"
        )
        assert program.finish() == 0, program.errors
        told.append((program.output, program.errors))
    disturbed, plain = (
        [line.split()[2] for line in sorted(output.splitlines()) if line.startswith("rank")] for output, _ in told
    )
    assert disturbed == plain
    assert len(plain) == 2
    assert told[0][0].count("loader process was killed by SIGKILL") in (1, 2), "both may be ended for the first"
    assert "fetched its batches again" in told[0][1]
    assert not list(armed.iterdir())


# At any moment


class Killer(threading.Thread):
    """Ends processes of the trainer's loaders, at moments and by signals that a seed chooses.

    Attributes:
        killed: how many.
    """

    def __init__(self, seed: int, trainer: TorchTrainer) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._trainer = trainer
        self._done = threading.Event()
        self.killed = 0

    def run(self) -> None:
        while not self._done.wait(self._random.uniform(0.0, 0.4)) and self.killed < 2:
            workers = {one.pid for one in self._trainer.status().processes}
            found = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if parent_of(pid) in workers]
            if found:
                self.killed += signal_one(self._random.choice(found), self._random.choice((KILL, CRASH, signal.SIGBUS)))

    def __exit__(self, *_) -> None:
        self._done.set()
        self.join()

    def __enter__(self) -> Killer:
        self.start()
        return self


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def signal_one(pid: int, signum: int) -> bool:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


ANY = (
    Case(operator=Step, processes=1, wide=True),
    Case(processes=2, persistent=True, operator=OwnBatch),
    Case(processes=3, operator=OwnEpoch, wide=True),
    Case(operator=Step, processes=4, persistent=True, wide=True),
    Case(kind="stream", processes=2, operator=OwnBatch),
)


@pytest.mark.parametrize("seed", [*range(2), *(pytest.param(seed, marks=pytest.mark.soak) for seed in range(2, 200))])
def test_deaths_at_any_moment_cost_nothing(tmp_path, seed) -> None:
    case = ANY[seed % len(ANY)]
    expected = as_undisturbed(case)
    with case.trainer(tmp_path) as trainer, Killer(seed, trainer) as killer:
        found = [outcome(case, trainer), *([] if killer.killed else [outcome(case, trainer)])]
        failures = trainer.status().failures
    assert found[0] == expected
    assert len(failures) <= killer.killed  # those that had nothing left to read are not missed
    assert {one.how for one in failures} <= {"refetched"}
    print(f"seed {seed}: {killer.killed} killed, {len(failures)} recovered")
