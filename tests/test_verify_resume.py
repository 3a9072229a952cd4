"""``torchtrainer verify-resume``: real scripts, sound and with planted faults, and the comparison of their logs."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from torchtrainer import TrainingOperator
from torchtrainer.comm.group import SingleCollective
from torchtrainer.config import TrainSettings
from torchtrainer.launcher import cli
from torchtrainer.launcher.verify_compare import changing_anyway, first_difference
from torchtrainer.launcher.verify_resume import UsageError, choose
from torchtrainer.observe.digest_log import Details, DigestFile, DigestWriter, Place, log_path
from torchtrainer.spec import BuildSpec
from torchtrainer.train.digest import digest, digest_of_all, leaves
from torchtrainer.train.loop import StepIterator
from torchtrainer.train.progress import Progress
from torchtrainer.worker.assembly import build_rank
from torchtrainer.worker.checkpointer import step_iterator
from torchtrainer.worker.held import held_values

DEADLINE_S = 250
"""Only a deadlock takes this long."""

HEAD = """
import sys, time
from pathlib import Path
from torchtrainer import CheckpointConfig, TorchTrainer

def samples(n):
    import torch
    g = torch.Generator().manual_seed(0)
    return torch.utils.data.TensorDataset(torch.randn(n, 4, generator=g), torch.randint(0, 2, (n,), generator=g))

def loader(dataset, **settings):
    from torch.utils.data import DataLoader
    return DataLoader(dataset, batch_size=4, **settings)

def data(config):
    return loader(samples(32), shuffle=True)

def model(config):
    import torch
    return torch.nn.Linear(4, 2)

def optimizer(model, config):
    import torch
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

def loss(config):
    import torch
    return torch.nn.CrossEntropyLoss()

def trainer(**changed):
    creators = dict(model_creator=model, data_creator=data, optimizer_creator=optimizer, loss_creator=loss)
    return TorchTrainer(**{**creators, **changed})
"""
"""What scripts begin with. The driver imports torch only if it has to, which is most of the time that a start takes."""

SOUND = """
def model(config):
    from torch import nn
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))

def data(config):
    return loader(samples(60), shuffle=True), loader(samples(19))

def scheduler(optimizer, config):
    import torch
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)

with trainer(model_creator=model, data_creator=data, scheduler_creator=scheduler, scheduler_step_freq="batch",
             num_workers=2, run_dir=sys.argv[1], checkpoint=CheckpointConfig(every_steps=5, path="saved")) as made:
    made.fit(3)
"""

TIME_SEEDED = """
class Noisy:
    def __len__(self):
        return 32
    def __getitem__(self, index):
        import torch
        return torch.randn(4, generator=torch.Generator().manual_seed(time.time_ns())), index % 2

with trainer(data_creator=lambda config: loader(Noisy())) as made:
    made.train()
"""

COUNTER = """
from torchtrainer import TrainingOperator

class Counting(TrainingOperator):
    calls = 0
    def train_batch(self, batch, batch_info):
        self.calls += 1
        features, target = batch
        loss = self.criterion(self.model(features), target) * (1 + 0.1 * self.calls)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item()}

with trainer(training_operator_cls=Counting, num_workers=2) as made:
    made.train()
    made.train()
"""

UNSAVED_AVERAGE = """
from torchtrainer import TrainingOperator

class Averaged(TrainingOperator):
    def setup(self, config):
        import torch
        self.made, self.output = time.time(), None
        self.average = torch.optim.swa_utils.AveragedModel(getattr(self.model, "module", self.model))
    def after_step(self, batch_info):
        self.average.update_parameters(getattr(self.model, "module", self.model))
        self.stepped = time.time()
    def validate_batch(self, batch, batch_info):
        self.output = self.average(batch[0])
        return super().validate_batch(batch, batch_info)

def both(config):
    return data(config), loader(samples(8))

with trainer(training_operator_cls=Averaged, data_creator=both, num_workers=2) as made:
    for _ in range(2):
        made.train()
        made.validate()
"""

FILE_POINTER = """
Path("numbers").write_bytes(bytes(range(256)))

class FromFile:
    def __init__(self):
        self.file = open("numbers", "rb")
    def __len__(self):
        return 32
    def __getitem__(self, index):
        import torch
        return torch.tensor(list(self.file.read(4))) / 256, index % 2

with trainer(data_creator=lambda config: loader(FromFile())) as made:
    made.train()
"""

LOCAL_AVERAGE = """
from torchtrainer import TrainingOperator

class Smoothed(TrainingOperator):
    def train_epoch(self, iterator, info):
        average = 0.0
        for features, target in iterator:
            loss = self.criterion(self.model(features), target)
            average = 0.9 * average + 0.1 * loss.item()
            self.optimizer.zero_grad()
            (loss * (1 + average)).backward()
            self.optimizer.step()
        return {"train_loss": average}

with trainer(training_operator_cls=Smoothed) as made:
    made.train()
"""

OTHER_CALLS = """
starts = Path("starts")
starts.write_text(starts.read_text() + "x" if starts.exists() else "x")
with trainer() as made:
    made.train(num_steps=6 if len(starts.read_text()) < 3 else 5)
"""

KEEPS_NOTHING = """
with trainer(run_dir=None) as made:
    made.train()
"""


WITHOUT_TRAINING = """
import os, signal, sys
from pathlib import Path
from torchtrainer.config import DIGESTS, VERIFY_RUNS
from torchtrainer.observe.digest_log import HELD, Details, DigestWriter, DigestOrders, Place

how, logs, runs = sys.argv[1], Path(os.environ[DIGESTS]), Path(os.environ[VERIFY_RUNS])
runs.mkdir(exist_ok=True)
(runs / "run.json").touch()
saved = runs / "saved"
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
orders, writer = DigestOrders.read(logs), DigestWriter(logs, 1, 0, {"operator": "Any", "own_hooks": []})
for step in range(int(saved.read_text()) if saved.exists() and how != "anew" else 0, 9):
    place = Place(call=0, batch=step)
    details = Details(state={"step": str(step)})
    writer.add(place, step=step, whole=str(step), data="", call="train()", details=details)
    if orders.hold is not None and orders.hold.place == place:
        (logs / HELD).touch()
        signal.sigwait([signal.SIGTERM])
        if how == "unsaved":
            sys.exit(143)
        saved.write_text(str(step))
        sys.exit(75)
"""
"""Stands in for a training: takes 8 steps, holds, saves and goes on as ranks do, and needs no torch."""


@dataclass(frozen=True)
class Verified:
    code: int
    out: str
    err: str


@pytest.fixture
def temporary():
    """A directory for temporary files; its path is short, as sockets want it."""
    path = tempfile.mkdtemp(prefix="tt-")
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def verify(tmp_path, temporary):
    """Runs the command on a script in ``tmp_path``."""

    def run(text: str, *options: str, arguments: tuple[str, ...] = ()) -> Verified:
        (tmp_path / "train.py").write_text(text)
        command = [sys.executable, "-m", "torchtrainer", "verify-resume", *options, "train.py", *arguments]
        environ = {**os.environ, "TMPDIR": temporary}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=DEADLINE_S)
        return Verified(done.returncode, done.stdout, done.stderr)

    return run


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
def test_sound_script_is_equal_and_its_own_directories_are_left_alone(verify, tmp_path, temporary):
    done = verify(HEAD + SOUND, "--interruptions", "2", "--seed", "3", arguments=("mine",))
    assert done.code == 0, done
    assert done.out.startswith("equal: 24 steps on 2 ranks")
    assert done.out.count("SIG") == 2 and "SIGTERM at step" in done.out and "SIGKILL at step" in done.out
    assert "undisturbed run: 24 steps" in done.err and "start 3: from step" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]
    assert not [name for name in os.listdir(temporary) if "verify" in name]


IN_THE_DEFAULT_SUITE = 1
"""So many of the faults; the others only with `make soak`."""
FAULTS = {
    "average that is not saved": (
        UNSAVED_AVERAGE,
        "different: step 6, rank 0: self.average.n_averaged and 2 more\nafter: SIGTERM at step 5\n",
        (
            "likely reason: a state that is not in the checkpoint: Averaged holds self.average.n_averaged, self.average.module.weight, "
            "self.average.module.bias, which training changes and Averaged.state_dict does not return. It differs right after"
        ),
    ),
    "seed from the time": (
        TIME_SEEDED,
        "different: step 1, rank 0: models[0].weight and",
        (
            "likely reason: an unseeded source of randomness: two undisturbed runs differ as well, first at step 1, rank 0, "
            "where the batch has other data"
        ),
    ),
    "counter in the operator": (
        COUNTER,
        "different: step 6, rank 0: models[0].weight and",
        (
            "likely reason: a state that is not in the checkpoint: it differs right after the run resumed at step 5, where "
            "self.calls was 5 and is 0. Return it from Counting.state_dict"
        ),
    ),
    "position in a file": (
        FILE_POINTER,
        "different: step 6, rank 0: models[0].weight and",
        (
            "likely reason: data order or sample content: it differs right after the run resumed at step 5, and its batch has "
            "other data"
        ),
    ),
    "variable of an epoch hook": (
        LOCAL_AVERAGE,
        "different: step 6, rank 0: models[0].weight and",
        "likely reason: Smoothed.train_epoch has local variables",
    ),
}


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        pytest.param(*fault, id=name, marks=[] if at < IN_THE_DEFAULT_SUITE else [pytest.mark.soak])
        for at, (name, fault) in enumerate(FAULTS.items())
    ],
)
def test_planted_fault_is_found_at_its_step_with_its_reason(text, where, reason, verify):
    done = verify(HEAD + text, "--at", "5")
    assert done.code == 1, done
    assert where in done.out
    assert (", largest difference " in done.out) == ("models[0]" in where)
    assert reason in done.out


@pytest.mark.slow
@pytest.mark.timeout(DEADLINE_S)
@pytest.mark.soak
def test_script_that_makes_other_calls_shows_the_error_as_it_is(verify):
    done = verify(HEAD + OTHER_CALLS, "--at", "3")
    assert done.code == 1, done
    assert done.out.startswith(
        "failed: start 2, after SIGTERM at step 3, ended with exit code 1; its output ends with:"
    )
    assert "CallMismatchError: the script asks for train(num_steps=5) as call 1" in done.out


def test_every_interruption_takes_place_in_turn(verify):
    done = verify(WITHOUT_TRAINING, "--interruptions", "5", arguments=("sound",))
    assert done.code == 0, done
    assert done.out.startswith("equal: 8 steps on 1 rank, 9 states compared, interrupted by SIGTERM at step ")
    assert (done.out.count("SIGTERM"), done.out.count("SIGKILL")) == (3, 2)


def test_script_that_always_starts_anew_is_told_so(verify):
    done = verify(WITHOUT_TRAINING, "--at", "3", arguments=("anew",))
    assert done.code == 1, done
    assert "failed: start 2 began at the beginning, though the state after step 3 was saved" in done.out
    assert "resume=False" in done.out


def test_script_that_saves_nothing_on_sigterm_is_told_so(verify):
    done = verify(WITHOUT_TRAINING, "--at", "3", arguments=("unsaved",))
    assert done.code == 1, done
    assert "failed: SIGTERM at step 3 ended the script without a saved state, with exit code 143" in done.out


@pytest.mark.parametrize(
    ("text", "reason"),
    [(KEEPS_NOTHING, "its trainer has run_dir=None"), ("print('hello')", "it makes no TorchTrainer")],
    ids=["run_dir=None", "no trainer"],
)
def test_script_without_anything_to_resume_cannot_be_verified(text, reason, verify):
    done = verify(HEAD + text)
    assert done.code == 2, done
    assert f"torchtrainer verify-resume: nothing to verify: {reason}" in done.err and done.out == ""


def test_script_that_fails_by_itself_shows_its_error(verify):
    done = verify("raise RuntimeError('the disk is gone')")
    assert done.code == 1
    assert done.out.startswith("failed: the undisturbed run of the script itself ended with exit code 1")
    assert "RuntimeError: the disk is gone" in done.out


def test_start_that_takes_too_long_is_ended(verify):
    done = verify("import threading; threading.Event().wait()", "--timeout", "0.5")
    assert done.code == 1
    assert "failed: undisturbed run did not end within 0.5 s (--timeout)" in done.out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_script_does_not_outlive_the_command(signum, tmp_path, temporary):
    os.mkfifo(tmp_path / "alive")
    (tmp_path / "train.py").write_text(
        "import threading\nfile = open('alive', 'w')\nprint('started', file=file, flush=True)\nthreading.Event().wait()"
    )
    command = [sys.executable, "-m", "torchtrainer", "verify-resume", "train.py"]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "TMPDIR": temporary}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with open(tmp_path / "alive") as alive:
        assert alive.readline() == "started\n"
        process.send_signal(signum)
        assert alive.read() == ""  # comes when the script is gone
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}[signum]
    assert signum == signal.SIGKILL or os.listdir(temporary) == []


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--interruptions", "0", "train.py"],
        ["--interruptions", "2", "--at", "3", "train.py"],
        ["--at", "0", "train.py"],
        ["--at", "soon", "train.py"],
        ["--timeout", "-1", "train.py"],
        ["--timeout", "nan", "train.py"],
        ["--nope", "train.py"],
    ],
    ids=" ".join,
)
def test_wrong_usage_exits_2_with_the_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["verify-resume", *arguments])
    assert stop.value.code == 2
    assert "usage: torchtrainer verify-resume" in capsys.readouterr().err


def test_missing_script_exits_2(capsys):
    assert cli.main(["verify-resume", "nowhere.py"]) == 2
    assert "there is no script nowhere.py" in capsys.readouterr().err


def write_log(directory, batches, *, rank=0, data="same", call="train()", weight="w", held=lambda batch: {}):
    """A log with one boundary per batch count; values that depend on the batch, but for those that are given."""
    directory.mkdir(exist_ok=True)
    writer = DigestWriter(directory, 1, rank, {"operator": "Any", "own_hooks": []})
    for batch in batches:
        state = {"models[0].weight": f"{weight}{batch}", "rng.cpu": "r"}
        writer.add(
            Place(call=0, batch=batch),
            step=batch,
            whole=str(state),
            data=data,
            held=str(held(batch)),
            call=call,
            details=Details(state=state, held=held(batch)),
        )


def test_same_logs_are_equal_also_where_a_step_was_taken_twice(tmp_path):
    write_log(tmp_path / "reference", range(9))
    write_log(tmp_path / "one", range(6))
    write_log(tmp_path / "two", range(4, 9))
    assert first_difference(tmp_path / "reference", [tmp_path / "one", tmp_path / "two"]) is None


def test_step_that_was_taken_twice_has_to_be_equal_both_times(tmp_path):
    write_log(tmp_path / "reference", range(9))
    write_log(tmp_path / "one", range(9))
    write_log(tmp_path / "two", range(4, 9), weight="v")
    found = first_difference(tmp_path / "reference", [tmp_path / "one", tmp_path / "two"])
    assert (found.kind, found.start, found.step, found.names) == ("state", 1, 4, ["models[0].weight"])


def forgotten(value_of):
    """What a start from batch 4 holds, of what the reference holds by ``value_of``: as if it had begun there."""
    return lambda batch: {"self.average": value_of(batch - 4), "self.latest": f"l{batch}" if batch > 4 else "none"}


def known(value_of):
    return lambda batch: {"self.average": value_of(batch), "self.latest": f"l{batch}"}


@pytest.mark.parametrize(
    ("value_of", "step"),
    [
        (str, 5),  # it changes in each step; the latest output does too, and is made anew
        (lambda batch: str(batch // 3), 5),  # in some steps
        (lambda batch: "built", None),  # never
    ],
)
def test_what_is_held_is_compared_once_a_start_has_done_what_changes_it(value_of, step, tmp_path):
    write_log(tmp_path / "reference", range(9), held=known(value_of))
    write_log(tmp_path / "one", range(6), held=known(value_of))
    write_log(tmp_path / "two", range(4, 9), held=forgotten(value_of))
    found = first_difference(tmp_path / "reference", [tmp_path / "one", tmp_path / "two"])
    if step is None:
        assert found is None
    else:
        assert (found.kind, found.start, found.step, found.names) == ("held", 1, step, ["self.average"])
        logs = [tmp_path / "one", tmp_path / "two"]
        assert first_difference(tmp_path / "reference", logs, ignored={"self.average"}) is None


def test_what_differs_between_undisturbed_runs_is_known_by_name(tmp_path):
    write_log(
        tmp_path / "reference", range(5), held=lambda batch: {"self.time": f"t{batch}", "self.average": f"a{batch}"}
    )
    write_log(
        tmp_path / "control", range(5), held=lambda batch: {"self.time": f"u{batch}", "self.average": f"a{batch}"}
    )
    assert changing_anyway(tmp_path / "reference", tmp_path / "control") == {"self.time"}


class Counting(torch.nn.Linear):
    """A model with a number that is no buffer."""

    def __init__(self):
        super().__init__(2, 1)
        self.seen = 0


class Box:
    def __init__(self, value):
        self.value, self.text, self.path = value, "text", Path("somewhere")


class Holding(TrainingOperator):
    def setup(self, config):
        model = Counting()
        self.model, self.optimizer = self.register(models=model, optimizers=torch.optim.SGD(model.parameters(), lr=1.0))
        self.again = model
        self.average = torch.optim.swa_utils.AveragedModel(torch.nn.Linear(1, 1, bias=False))
        self.count, self.nothing, self.name, self.function = 3, None, "name", lambda: 1
        self.nested = {"queue": deque([torch.zeros(2)]), 7: (Box(torch.ones(1)), Box(2.5), self)}
        self.generator = torch.Generator()
        self.bar = argparse.Namespace(of="an installed package", count=3)
        self.log, self.handler, self.library = logging.getLogger("held"), logging.NullHandler(), sys.modules[__name__]
        self.data = TensorDataset(torch.zeros(3))


def test_what_an_operator_holds_is_found_wherever_it_is(request):
    neighbour = logging.getLogger("a neighbour")  # all loggers know each other: none of them is the operator's
    neighbour.addFilter(counting := Box(1))
    request.addfinalizer(lambda: neighbour.removeFilter(counting))
    runtime = build_rank(
        BuildSpec(config={}, settings=TrainSettings(), training_operator_cls=Holding),
        collective=SingleCollective(),
        device=torch.device("cpu"),
        local_rank=0,
        progress=Progress(),
    )
    assert set(held_values(runtime)) == {
        "self.count",
        "self.model.in_features",
        "self.model.out_features",
        "self.model.seen",
        "self.average.n_averaged",
        "self.average.module.weight",
        "self.nested.queue[0]",
        "self.nested[7][0].value",
        "self.nested[7][1].value",
        "self.generator",
    }


@pytest.mark.parametrize(
    ("changed", "kind", "step"),
    [
        ({"batches": range(7)}, "more steps", 5),
        ({"batches": range(3)}, "fewer steps", 3),
        ({"batches": range(5), "data": "other"}, "batch", 0),
        ({"batches": range(5), "call": "validate()"}, "call", 0),
    ],
)
def test_first_difference_says_what_kind_it_is(changed, kind, step, tmp_path):
    write_log(tmp_path / "reference", range(5))
    write_log(tmp_path / "one", **changed)
    found = first_difference(tmp_path / "reference", [tmp_path / "one"])
    assert (found.kind, found.step, found.where.split(",")[0]) == (kind, step, f"step {step}")


def test_lowest_rank_is_named_where_several_differ(tmp_path):
    for rank in (0, 1):
        write_log(tmp_path / "reference", range(5), rank=rank)
        write_log(tmp_path / "one", range(5), rank=rank, weight="v")
    assert first_difference(tmp_path / "reference", [tmp_path / "one"]).rank == 0


def test_trainer_that_differs_first_is_named_where_they_take_turns(tmp_path):
    for directory, weight in (("reference", "w"), ("one", "v")):
        (tmp_path / directory).mkdir()
        facts = {"operator": "Any", "own_hooks": []}
        first, second = (DigestWriter(tmp_path / directory, trainer, 0, facts) for trainer in (1, 2))
        for writer in (second, first):
            state = {"models[0].weight": weight}
            place = Place(call=0, batch=1)
            writer.add(place, step=1, whole=weight, data="", call="train()", details=Details(state=state))
    assert first_difference(tmp_path / "reference", [tmp_path / "one"]).where == "trainer 2, step 1, rank 0"


def test_run_that_has_not_ended_may_lack_steps(tmp_path):
    write_log(tmp_path / "reference", range(5))
    write_log(tmp_path / "one", range(3))
    assert first_difference(tmp_path / "reference", [tmp_path / "one"], ended=False) is None


def test_torn_last_line_is_left_out(tmp_path):
    write_log(tmp_path / "reference", range(3))
    path = log_path(tmp_path / "reference", 1, 0)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    assert [entry.step for entry in DigestFile(path).entries] == [0, 1]


def test_choice_of_steps_depends_on_the_seed_only(tmp_path):
    write_log(tmp_path / "reference", range(100))
    chosen = choose(tmp_path / "reference", at=None, count=4, seed=7)
    assert chosen == choose(tmp_path / "reference", at=None, count=4, seed=7)
    assert chosen != choose(tmp_path / "reference", at=None, count=4, seed=8)
    assert [one.signal for one in chosen] == ["SIGTERM", "SIGKILL"] * 2
    assert [one.step for one in chosen] == sorted({one.step for one in chosen})


def test_steps_that_are_not_there_are_refused(tmp_path):
    write_log(tmp_path / "reference", range(5))
    assert [one.step for one in choose(tmp_path / "reference", at=[3, 1], count=1, seed=0)] == [1, 3]
    with pytest.raises(UsageError, match="--at 9: there is no boundary after that step; the last is 4"):
        choose(tmp_path / "reference", at=[2, 9], count=1, seed=0)


def test_run_without_any_step_is_refused(tmp_path):
    write_log(tmp_path / "reference", range(1))
    with pytest.raises(UsageError, match="no steps"):
        choose(tmp_path / "reference", at=None, count=3, seed=0)


def test_leaves_are_named_as_one_would_reach_them():
    state = {"models": [{"0.weight": 1.0}], "optimizers": [{"state": {3: {"exp_avg": torch.ones(2)}}}], "none": None}
    assert [name for name, _ in leaves(state)] == ["models[0].0.weight", "optimizers[0].state[3].exp_avg"]


def test_digest_changes_with_one_bit_with_shape_and_with_type():
    tensor = torch.arange(6.0)
    changed = tensor.clone()
    changed.view(torch.uint8)[0] ^= 1
    others = [changed, tensor.reshape(2, 3), tensor.double(), tensor[::2], torch.empty(0), 1, 1.0, True, "1", [1], (1,)]
    assert len({digest(one) for one in [tensor, *others]}) == len(others) + 1
    assert digest(tensor.reshape(2, 3).T) == digest(tensor.reshape(2, 3).T.contiguous())


def test_digest_of_a_batch_looks_into_objects():
    class Pair:
        def __init__(self, first):
            self.first = first

    assert digest_of_all([Pair(torch.zeros(2))]) == digest_of_all([Pair(torch.zeros(2))])
    assert digest_of_all([Pair(torch.zeros(2))]) != digest_of_all([Pair(torch.ones(2))])


def test_run_that_is_not_verified_uses_the_plain_iterator():
    assert step_iterator(operator=None, checkpointer=None) is StepIterator
