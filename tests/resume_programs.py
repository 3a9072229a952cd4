"""A script with much that is random in it, ways to interrupt it at a chosen place, and what must hold afterwards.

The script notes every batch that a model is trained on, every event that its callback gets, and prints every result and a digest
of the complete state. An interrupted run must show what an undisturbed one shows.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from programs import DEADLINE_S, Program, start_program

from torchtrainer import FailureConfig

EXIT_PREEMPTED = 75
EXIT_TERMINATED = 143
EVERY_STEPS = 4
SAMPLES, BATCH = 86, 8
TRIES = 1 + FailureConfig().max_failures
"""How often all workers are lost at one place until the run stops there."""
STEPS = -(-SAMPLES // BATCH)
"""Steps of a pass; the last batch is smaller."""

SCRIPT = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset
from torchtrainer import BATCH_SIZE, CheckpointConfig, TorchTrainer, TrainingOperator

OPTIONS = json.loads(os.environ["OPTIONS"])
os.environ["DRIVER"] = str(os.getpid())
SLOW_S = 0.05  # a step that the driver has time to look during

def note(file, **fields):
    fd = os.open(f"{os.environ['EVENTS']}/{file}", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(fd, (json.dumps({"start": os.environ["START"], **fields}) + "\\n").encode())
    os.close(fd)

def point(where, at):
    plan = json.loads(os.environ["INTERRUPT"])
    if plan.get("in") != where or at < plan["at"]:
        return
    if at > plan["at"]:
        time.sleep(SLOW_S)
        return
    note("fired.jsonl", **plan)
    driver = int(os.environ["DRIVER"])
    how = plan["how"]
    if how == "WORKERS":
        pids = [int(Path(os.environ["EVENTS"], f"pid{rank}").read_text()) for rank in range(int(os.environ["WORLD_SIZE"]))]
        for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # this one last
            os.kill(pid, signal.SIGKILL)
    elif how == "TWICE":
        os.kill(driver, signal.SIGTERM)
        time.sleep(1.0)  # longer than PreemptionConfig.repeat_s, so that it is another one
        os.kill(driver, signal.SIGTERM)
        time.sleep(60)
    elif how == "FILL":
        with open(f"{os.environ['DISK']}/filler", "wb", buffering=0) as file:
            for size in (1024**2, 4096, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass
    elif how == "READONLY":
        os.system(f"mount -o remount,ro {os.environ['DISK']}")
    else:
        os.kill(driver, getattr(signal, "SIG" + how))

def digest(value):
    sha = hashlib.sha256()
    def add(one):
        if isinstance(one, torch.Tensor):
            sha.update(f"{one.dtype}{tuple(one.shape)}".encode() + one.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(one, dict):
            for key in sorted(one, key=str):
                add(str(key)); add(one[key])
        elif isinstance(one, (list, tuple)):
            sha.update(f"[{len(one)}".encode())
            for each in one:
                add(each)
        elif isinstance(one, np.ndarray):
            sha.update(one.tobytes())
        else:
            sha.update(f"{type(one).__name__}{one!r}".encode())
    add(value)
    return sha.hexdigest()

class Net(nn.Module):
    def __init__(self, name, rank, hidden):
        super().__init__()
        self.name, self.rank, self.validated = name, rank, 0
        self.first = nn.Linear(8, hidden)
        self.rest = nn.Sequential(nn.BatchNorm1d(hidden), nn.ReLU(), nn.Dropout(0.3), nn.Linear(hidden, 3))
        self.register_buffer("trained", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            at = int(self.trained)
            note("batches.jsonl", name=self.name, rank=self.rank, step=at, ids=x[:, 0].long().tolist())
            if self.rank == 0:
                point("train", at)
            self.trained += 1
        else:
            if self.rank == 0:
                point("validate", self.validated)
            self.validated += 1
        return self.rest(self.first(x / 10))

class Samples(Dataset):
    def __init__(self, n):
        g = torch.Generator().manual_seed(3)
        self.x, self.y = torch.randn(n, 8, generator=g), torch.randint(0, 3, (n,), generator=g)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        x = self.x[i] + 0.1 * torch.randn(8) + 0.1 * random.random() + 0.1 * float(np.random.rand())
        x[0] = i
        return x, self.y[i]

def model_creator(config):
    rank = int(os.environ.get("RANK", 0))
    Path(os.environ["EVENTS"], f"pid{rank}").write_text(str(os.getpid()))
    if rank == 0:
        point("setup", 0)
    return Net(config["name"], rank, int(os.environ.get("HIDDEN", config["hidden"])))  # no digest sees the environment

class Remembering(torch.utils.data.Sampler):
    def __init__(self, n):  # it shuffles its list in place, by generators of its own, and counts
        self.order, self.own, self.other, self.drawn = list(range(n)), random.Random(7), np.random.default_rng(8), 0

    def __len__(self):
        return len(self.order)

    def __iter__(self):
        self.drawn += 1
        self.own.shuffle(self.order)
        cut = int(self.other.integers(len(self.order))) + self.drawn
        return iter(self.order[cut:] + self.order[:cut])

def data_creator(config):
    many = dict(num_workers=config["loader_workers"], persistent_workers=config["persistent"])
    test = Samples(45)
    test = TensorDataset(test.x, test.y)
    own = config["sampler"]
    order = {"sampler": Remembering(config["samples"])} if own else {"shuffle": True}
    return (DataLoader(Samples(config["samples"]), batch_size=config[BATCH_SIZE], **order, **many),
            DataLoader(test, batch_size=config[BATCH_SIZE]))

def optimizer_creator(model, config):
    return torch.optim.AdamW(model.parameters(), lr=0.01)

def scheduler_creator(optimizer, config):
    return torch.optim.lr_scheduler.StepLR(optimizer, step_size=3 if config["schedule"] == "batch" else 1, gamma=0.9)

class Noted(TrainingOperator):
    # what it counts is in its state, and different on every rank
    def setup(self, config):
        self.total, self.seen, self.draws = 0.0, 0, 0.0

    def state_dict(self):
        return {"total": self.total, "seen": self.seen, "draws": self.draws}

    def load_state_dict(self, state):
        self.total, self.seen, self.draws = state["total"], state["seen"], state["draws"]

    def loss_of(self, batch):
        x, y = batch
        self.draws += random.random() + float(np.random.rand())
        noise = 1 + 0.05 * torch.randn(())
        return self.criterion(self.model(x), y) * noise

class OwnBatch(Noted):
    def train_batch(self, batch, batch_info):
        loss = self.loss_of(batch)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(batch[1]), "at": batch_info["global_step"] + batch_info["batch_idx"]}

class Accumulates(Noted):
    def train_batch(self, batch, batch_info):
        loss = self.loss_of(batch) / 3
        loss.backward()
        if batch_info["global_step"] % 3 == 2:
            self.optimizer.step()
            self.optimizer.zero_grad()
        return {"train_loss": loss.item(), "num_samples": len(batch[1])}

class OwnEpoch(Noted):
    def train_epoch(self, iterator, info):
        self.model.train()
        self.total, self.seen = 0.0, 0
        for batch in iterator:
            loss = self.loss_of(batch)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.total += loss.item() * len(batch[1])
            self.seen += len(batch[1])
        return {"mean": self.total / max(self.seen, 1), "num_samples": self.seen, "index": info["epoch_idx"]}

class Updates(Noted):
    # has state that changes in the update, in three ways, and state that changes in the forward pass
    def setup(self, config):
        super().setup(config)
        bare = getattr(self.model, "module", self.model)
        self.weights = dict(bare.named_parameters())
        self.average = {name: one.detach().clone() for name, one in self.weights.items()}
        self.swa, self.norm = torch.optim.swa_utils.AveragedModel(nn.ParameterList(bare.parameters())), 0.0
        self.optimizer.register_step_post_hook(lambda *_: self.follow())
        bare.register_forward_pre_hook(self.count)

    def count(self, module, inputs):
        self.seen += len(inputs[0])
        self.draws += random.random()

    @torch.no_grad()
    def follow(self):
        for name, one in self.weights.items():
            self.average[name].lerp_(one, 0.1)

    def clip_gradients(self):
        self.norm = 0.9 * self.norm + 0.1 * nn.utils.clip_grad_norm_(self.weights.values(), self.norm + 0.5).item()

    def after_step(self, batch_info):
        self.swa.update_parameters(nn.ParameterList(self.weights.values()))

    def state_dict(self):
        return {**super().state_dict(), "average": self.average, "swa": self.swa.state_dict(), "norm": self.norm}

    def load_state_dict(self, state):
        super().load_state_dict(state)
        self.average, self.norm = state["average"], state["norm"]
        self.swa.load_state_dict(state["swa"])

OPERATORS = {"": None, "updates": Updates, "batch": OwnBatch, "accumulate": Accumulates, "epoch": OwnEpoch}

class Callback:
    def __init__(self, name):
        self.name = name
    def on_step(self, e):
        note("callbacks.jsonl", name=self.name, kind="step", epoch=e.epoch, step=e.step, batch=e.batch, batches=e.batches)
    def on_checkpoint(self, e):
        note("callbacks.jsonl", name=self.name, kind="checkpoint", epoch=e.epoch, step=e.step)
        point("saved", sum(1 for line in open(f"{os.environ['EVENTS']}/callbacks.jsonl") if '"checkpoint"' in line))
    def on_epoch_end(self, e):
        note("callbacks.jsonl", name=self.name, kind="epoch", epoch=e.epoch, step=e.step)
        point("epoch_end", e.epoch)
    def on_validate_end(self, e):
        note("callbacks.jsonl", name=self.name, kind="validate", epoch=e.epoch, step=e.step)
        point("validate_end", e.epoch)

def make(name="", **changes):
    config = {"name": name, "hidden": 16, "samples": 86, BATCH_SIZE: 8, "loader_workers": 0, "persistent": False, "sampler": False,
              "schedule": None, "operator": "", **OPTIONS.get("config", {})}
    schedule = dict(scheduler_creator=scheduler_creator, scheduler_step_freq=config["schedule"]) if config["schedule"] else {}
    return TorchTrainer(**{**dict(
        model_creator=model_creator, data_creator=data_creator, optimizer_creator=optimizer_creator,
        loss_creator=nn.CrossEntropyLoss, training_operator_cls=OPERATORS[config["operator"]], config=config, num_workers=2,
        callbacks=[Callback(name)], **schedule), **OPTIONS.get("trainer", {}), **changes,
        "checkpoint": CheckpointConfig(**{"every_steps": 4, **OPTIONS.get("checkpoint", {})})})

results = 0
def show(result):
    global results
    results += 1
    print("RESULT", json.dumps(result), flush=True)
    point("script", results)
    return result

def streams(operator):
    extras = operator.state_dict()
    return digest([random.getstate(), list(np.random.get_state()), torch.get_rng_state(), extras, operator.global_step])

def freeze(operator):
    for parameter in operator.model.module.first.parameters():
        parameter.requires_grad = False

def finish(t):
    show(t.apply_all_operators(streams))
    show(digest(t.state_dict()))
    t.shutdown()

def loop():
    t = make()
    print("DIRECTORY", t.status().run_dir, flush=True)
    for _ in range(OPTIONS.get("epochs", 3)):
        show(t.train())
        show(t.validate())
    finish(t)

def fit():
    t = make()
    show(t.fit(3, validate_every=2))
    finish(t)

def steps():
    t = make()
    for number in range(4):
        show(t.train(num_steps=8, info={"number": number}))
        show(t.validate(num_steps=2, reduce_results=False))
    show(t.train(num_steps=0))
    show(t.train())
    finish(t)

def early():
    t = make()
    best, least = None, float("inf")
    for _ in range(4):
        show(t.train())
        loss = show(t.validate())["val_loss"]
        if loss < least:
            best, least = t.state_dict(), loss
        elif loss > least * 1.02:
            break
    t.load_state_dict(best)
    show(t.validate())
    show(t.train(num_steps=3))
    finish(t)

def two():
    a = make("a", seed=1)
    b = make("b", seed=2, scheduler_creator=scheduler_creator, scheduler_step_freq="epoch")
    for _ in range(2):
        show(a.train())
        show(b.train(num_steps=9))
        show(b.validate())
    finish(a)
    show(b.train())
    finish(b)

def saves():
    t = make(ddp_args={"find_unused_parameters": True})
    show(t.train())
    show(t.save("model.pt"))
    show(t.train(num_steps=5))
    show(digest(t.get_model().state_dict()))
    t.load("model.pt")
    t.apply_all_operators(freeze)
    show(t.train())
    show(t.apply_all_workers(torch.get_num_threads))
    show(t.validate())
    show(t.train(num_steps=6))
    finish(t)

def plateau():
    t = make(scheduler_creator=lambda o, c: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0, factor=0.5),
             scheduler_step_freq="manual")
    for _ in range(3):
        show(t.train())
        t.update_scheduler(-show(t.validate())["val_accuracy"])
    finish(t)

globals()[OPTIONS.get("script", "loop")]()
"""

Options = dict[str, Any]
Interruption = tuple[str, int, str]
"""Where, at which count there, and how; see ``point`` in the script."""

KINDS: dict[str, Options] = {
    "plain": {"config": {"schedule": "batch"}, "checkpoint": {"asynchronous": False}},
    "workers": {"config": {"loader_workers": 2, "schedule": "epoch"}, "trainer": {"precision": "bf16"}},
    "persistent": {"config": {"loader_workers": 2, "persistent": True, "schedule": "batch"}, "script": "steps"},
    "updates": {"config": {"operator": "updates"}, "trainer": {"num_workers": 3}},
    "batch": {"config": {"operator": "batch", "schedule": "epoch"}},
    "epoch": {"config": {"operator": "epoch", "loader_workers": 2}, "script": "steps"},
    "accumulate": {"config": {"operator": "accumulate"}, "script": "steps"},
    "steps": {"config": {"schedule": "epoch"}, "script": "steps"},
    "fit": {"script": "fit", "config": {"operator": "epoch"}, "trainer": {"precision": "bf16"}},
    "early": {"script": "early", "config": {"operator": "batch"}},
    "two": {"script": "two"},
    "saves": {"script": "saves", "config": {"schedule": "batch"}},
    "plateau": {"script": "plateau", "config": {"loader_workers": 2}},
    "sampler": {"config": {"sampler": True, "operator": "batch"}, "script": "steps"},
    "sampler, seats": {"config": {"sampler": True}},
    "alone": {"config": {"schedule": "batch", "operator": "accumulate"}, "trainer": {"num_workers": 1}},
}
"""What a script does, by what is special in it."""


@dataclass
class Run:
    """A script that is started again and again in one directory until it comes to its end."""

    place: Path
    options: Options = field(default_factory=dict)
    script: str = SCRIPT
    programs: list[Program] = field(default_factory=list)

    def start(self, interruption: Interruption | None = None, **environ: str) -> Program:
        """Starts the script, to be interrupted at a place."""
        self.events.mkdir(parents=True, exist_ok=True)
        plan = {} if interruption is None else dict(zip(("in", "at", "how"), interruption, strict=True))
        environ = {
            "EVENTS": str(self.events),
            "OPTIONS": json.dumps(self.options),
            "START": str(len(self.programs)),
            "INTERRUPT": json.dumps(plan),
            **environ,
        }
        program = start_program(self.place, self.script, **environ)
        self.programs.append(program)
        return program

    def once(self, interruption: Interruption | None = None, **environ: str) -> Program:
        """Starts the script and waits for its end; nothing of it may be left."""
        before = shared_memory()
        program = self.start(interruption, **environ)
        program.finish()
        program.assert_nothing_left()
        left = [name for name in shared_memory() - before if not _is_living(name)]
        assert left == [], f"left in /dev/shm: {left}"
        return program

    @property
    def events(self) -> Path:
        """Where the script notes what happens."""
        return self.place / "events"

    @property
    def directories(self) -> list[Path]:
        """The run directories of the script, oldest first."""
        return sorted(
            (self.place / "runs" / "program").iterdir(),
            key=lambda path: json.loads((path / "run.json").read_text())["started_s"],
        )

    @property
    def directory(self) -> Path:
        """The only run directory of the script."""
        (found,) = self.directories
        return found

    def noted(self, file: str) -> list[dict[str, Any]]:
        """The lines of a file of events."""
        path = self.events / file
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def history(self) -> list[dict[str, Any]]:
        """The lines of all histories."""
        return [
            json.loads(line) for path in self.directories for line in (path / "history.jsonl").read_text().splitlines()
        ]

    def batches(self) -> Counter[tuple[Any, ...]]:
        """What models were trained on: how often each (trainer, step, rank, samples)."""
        return Counter((e["name"], e["step"], e["rank"], tuple(e["ids"])) for e in self.noted("batches.jsonl"))


def shared_memory() -> set[str]:
    """Names of torch's files in shared memory; the number in them is of the process that made them."""
    return {path.name for path in Path("/dev/shm").glob("torch_*")}


def _is_living(name: str) -> bool:
    pid = name.removeprefix("torch_").split("_")[0]
    return Path("/proc", pid).exists()


def results_of(program: Program) -> list[Any]:
    """Everything that the calls of the script returned, with the digests of the complete state at the end."""
    return [
        json.loads(line.removeprefix("RESULT ")) for line in program.output.splitlines() if line.startswith("RESULT ")
    ]


def told(program: Program) -> list[str]:
    """The lines that the package wrote for the user."""
    return [line for line in program.errors.splitlines() if line.startswith("torchtrainer: ")]


def explained(run: Run) -> str:
    """Everything that the programs of a run said, for the message of a failing test."""
    return "\n".join(
        f"--- start {number}: exit code {one.process.returncode}\n{one.output}{one.errors}"
        for number, one in enumerate(run.programs)
    )


class Undisturbed:
    """Runs without interruptions, one of each kind, made when first needed."""

    def __init__(self) -> None:
        self._runs: dict[str, Run] = {}
        self._places: list[Path] = []

    def get(self, options: Options) -> Run:
        """The run with these options."""
        key = json.dumps(options, sort_keys=True)
        if key not in self._runs:
            place = Path(tempfile.mkdtemp(prefix="tt-undisturbed-"))
            self._places.append(place)
            run = Run(place, options)
            program = run.once()
            assert program.process.returncode == 0, explained(run)
            self._runs[key] = run
        return self._runs[key]

    def close(self) -> None:
        """Removes what they wrote."""
        for place in self._places:
            shutil.rmtree(place, ignore_errors=True)


def assert_each_sample_once(run: Run, samples: int = SAMPLES, batch: int = BATCH) -> None:
    """Every sample is trained on exactly once in each pass, and a step that was redone had the same samples again."""
    passes: dict[tuple[str, int], list[int]] = {}
    steps = -(-samples // batch)
    for name, step, _, ids in run.batches():
        passes.setdefault((name, step // steps), []).extend(ids)
    last = max(passes)
    for place, ids in sorted(passes.items()):
        assert len(ids) == len(set(ids)), (
            f"pass {place}: more than once: {[i for i, n in Counter(ids).items() if n > 1]}"
        )
        if place != last and place[1] < max(number for name, number in passes if name == place[0]):
            assert sorted(ids) == list(range(samples)), f"pass {place}: missing {set(range(samples)) - set(ids)}"


def assert_same(run: Run, undisturbed: Run, *, redone: bool, cut_off: bool = False) -> None:
    """An interrupted run shows what an undisturbed one shows.

    Args:
        run, undisturbed: both came to their end.
        redone: steps may have been made again, with the same samples.
        cut_off: a signal from outside may have come when a call was recorded and not yet told of, or after the last one.
    """
    assert run.programs[-1].process.returncode == 0 or cut_off, explained(run)
    expected = results_of(undisturbed.programs[-1])
    assert results_of(run.programs[-1]) == expected, explained(run)
    for program in run.programs[:-1]:  # a script sees the same results in each start, as far as it came
        seen = results_of(program)
        assert seen == expected[: len(seen)], explained(run)
    made, wanted = run.batches(), undisturbed.batches()
    if redone:
        assert set(made) == set(wanted)
    else:
        assert made == wanted
    assert_told_once(run, undisturbed, redone=redone, cut_off=cut_off)


def assert_told_once(run: Run, undisturbed: Run, *, redone: bool, cut_off: bool) -> None:
    """Callbacks and the history see each pass once, and no step twice that was not redone."""

    def events(one: Run, kind: str) -> Counter[tuple[Any, ...]]:
        return Counter((e["name"], e["epoch"], e["step"]) for e in one.noted("callbacks.jsonl") if e["kind"] == kind)

    for kind in ("epoch", "validate"):
        assert_equal(events(run, kind), events(undisturbed, kind), cut_off=cut_off)
    if not redone:
        seen = Counter(
            (e["name"], e["epoch"], e["step"], e["batch"], e["batches"])
            for e in run.noted("callbacks.jsonl")
            if e["kind"] == "step"
        )
        assert [event for event, times in seen.items() if times > events_of_validation(undisturbed, event)] == []

    def history(one: Run) -> Counter[tuple[Any, ...]]:
        lines = [line for line in one.history() if line["kind"] != "failure"]
        return Counter((line["kind"], line["epoch"], line["step"], json.dumps(line["metrics"])) for line in lines)

    assert_equal(history(run), history(undisturbed), cut_off=cut_off)


def assert_equal(seen: Counter[Any], expected: Counter[Any], *, cut_off: bool) -> None:
    """What was seen is what was to be expected; if the driver was killed in between, the last thing may be missing."""
    assert seen <= expected if cut_off else seen == expected, f"missing {expected - seen}, too many {seen - expected}"


def events_of_validation(undisturbed: Run, event: tuple[Any, ...]) -> int:
    """How often a step event may be seen: as often as in an undisturbed run, where validations repeat their batches."""
    return max(
        1,
        sum(
            event == (e["name"], e["epoch"], e["step"], e["batch"], e["batches"])
            for e in undisturbed.noted("callbacks.jsonl")
            if e["kind"] == "step"
        ),
    )


def assert_stopped_as_asked(program: Program, interruption: Interruption) -> None:
    """The program noticed the interruption, and ended in the way that belongs to it."""
    code = program.process.returncode
    how, lines = interruption[2], told(program)
    said = program.output + program.errors
    if how == "TERM":
        assert code == EXIT_PREEMPTED, said
        assert sum("start the same command again" in line for line in lines) == 1, said
    elif how == "TWICE":
        assert code == EXIT_TERMINATED, said
        assert sum("leaving at once" in line for line in lines) == 1, said
    elif how == "KILL":
        assert code == -9, said
    elif how == "WORKERS":
        assert code == 1, said
        assert re.search(r"WorkerDiedError: .* was killed by SIGKILL", program.errors), said


def assert_tells_of_steps_again(program: Program, interruption: Interruption) -> None:
    """The start after an interruption says how many steps are taken again: those after the state that it goes on from."""
    (line,) = resuming(program)
    found = re.search(r"state after step (\d+) saved", line)
    again = re.search(r", (\d+) steps? (?:is|are) taken again\)", line)
    if interruption[2] == "TERM":
        assert again is None, line
        return
    assert found is not None, line
    saved, steps = int(found[1]), int(again[1]) if again is not None else 0
    assert steps >= interruption[1] - saved, line  # the ranks may have taken another one before they were gone


def resuming(program: Program) -> list[str]:
    """The lines in which a program said what it goes on with."""
    return [
        line for line in told(program) if re.match(r"torchtrainer: resuming \S+ \(.* done.*\); pass resume=False", line)
    ]


def interrupt(
    run: Run, undisturbed: Undisturbed, interruptions: Sequence[Interruption], environs: Sequence[dict[str, str]] = ()
) -> Run:
    """Interrupts a run at each place, one start for each, and lets it come to its end; returns the undisturbed one."""
    found: list[Run] = []
    beside = threading.Thread(target=lambda: found.append(undisturbed.get(run.options)))  # a second core is there
    beside.start()
    try:
        for number, interruption in enumerate(interruptions):
            program = run.once(interruption, **(environs[number] if number < len(environs) else {}))
            fired = sum(one["start"] == str(number) for one in run.noted("fired.jsonl"))
            assert fired, f"{interruption} was never reached\n{explained(run)}"
            # The driver may have heard of one step less than the ranks took before they were lost.
            assert fired in ((TRIES, TRIES + 1) if interruption[2] == "WORKERS" else (1,)), explained(run)
            assert_stopped_as_asked(program, interruption)
        program = run.once()
        if interruptions[-1][0] == "train" and run.options.get("script") not in ("two", "saves"):
            assert_tells_of_steps_again(program, interruptions[-1])
    finally:
        beside.join(DEADLINE_S)
    assert len(resuming(program)) == (2 if run.options.get("script") == "two" else 1), explained(run)
    return found[0]


def interrupt_and_compare(
    run: Run, undisturbed: Undisturbed, interruptions: Sequence[Interruption], environs: Sequence[dict[str, str]] = ()
) -> None:
    """Interrupts a run, and demands that it ends as if nobody had."""
    other = interrupt(run, undisturbed, interruptions, environs)
    assert_same(run, other, redone=any(how != "TERM" for _, _, how in interruptions))
    if run.options.get("script") not in ("early", "saves"):  # they go back to steps that they had made
        assert_each_sample_once(run)
