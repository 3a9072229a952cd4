"""A run is resumed only by the script that made it: whatever a training depends on is compared, and a difference is named."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest
from programs import CREATORS, Program, run_program
from test_spmd import TORCHRUN

RUN = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
ENVIRON = {"OMP_NUM_THREADS": "1"}
SCRIPT = (
    CREATORS
    + """
import argparse, dataclasses, signal, threading, uuid
import settings
from torchtrainer import CheckpointConfig

parser = argparse.ArgumentParser()
parser.add_argument("--lr", type=float, default=0.1)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--name", default=f"run-{time.time_ns()}")
args = parser.parse_args()

AT = 11
GLOBAL = 0.1
DICTIONARY = {"model": {"lr": 0.1}, "started": time.time()}
BY_ENVIRONMENT = float(os.environ.get("MY_LR", "0.1"))
UNSEEDED = torch.randn(4)
SEEN = {"a", "b", "c", "d"}
LOCK = threading.Lock()
LOG = open(os.devnull)
LAYER = torch.nn.Linear(20, 5)

@dataclasses.dataclass
class Parameters:
    lr: float
    started: float = dataclasses.field(default_factory=time.time)

dataclass_lr = 0.1
PARAMETERS = Parameters(dataclass_lr)

class Base(TrainingOperator):
    rate = 0.1

class Operator(Base):
    def train_batch(self, batch, batch_info):
        how = os.environ.get("HOW")  # read here, it is not compared
        if how and not os.path.exists("again") and self.global_step >= AT:
            if how == "crash":
                raise OSError("the disk went away")
            if self.global_step > AT:
                time.sleep(0.05)  # a step that the driver has time to look during
            else:
                os.kill(int(os.environ["DRIVER"]), getattr(signal, how))
        return super().train_batch(batch, batch_info)

def helper(value):
    return value * 1.0

def unrelated():
    return 1

def make(closure):
    run_id = uuid.uuid4().hex
    def optimizer_creator(model, config, default=0.1):
        product = (GLOBAL * DICTIONARY["model"]["lr"] * PARAMETERS.lr * args.lr * BY_ENVIRONMENT * closure * default
                   * Operator.rate * settings.LR)
        print("rate", helper(product), args.name, UNSEEDED.shape, run_id, SEEN, len(vars(LAYER)), file=sys.stderr)
        return torch.optim.SGD(model.parameters(), lr=0.1)
    return optimizer_creator

class Callback:
    def __init__(self, started, patience):
        self.started, self.patience, self.lock, self.log = started, patience, LOCK, LOG
    def on_epoch_end(self, event):
        print("epoch", event.epoch, len(SEEN))

os.environ["DRIVER"] = str(os.getpid())
CREATORS.update(optimizer_creator=make(0.1), training_operator_cls=Operator, num_workers=1)
trainer = TorchTrainer(**CREATORS, callbacks=[Callback(time.time(), 3)], checkpoint=CheckpointConfig(every_steps=3),
                       resume={"True": True}.get(os.environ.get("RESUME"), "auto"), may_change=os.environ.get("MAY", "").split())
print("directory", trainer.status().run_dir)
for _ in range(args.epochs):
    print(trainer.train()["epoch"])
trainer.shutdown()
"""
)
"""Its values are reached by the optimizer's creator, the operator or the callback, in each of the ways that scripts have."""

GLOBALS = (
    ("GLOBAL = 0.1", "GLOBAL = 0.9", "GLOBAL was 0.1 and is 0.9"),
    ('{"model": {"lr": 0.1}', '{"model": {"lr": 0.9}', "DICTIONARY['model']['lr'] was 0.1 and is 0.9"),
    ("dataclass_lr = 0.1", "dataclass_lr = 0.9", "PARAMETERS.lr was 0.1 and is 0.9"),
)
OF_FUNCTIONS = (
    ("make(0.1)", "make(0.9)", "closure of optimizer_creator was 0.1 and is 0.9"),
    ("default=0.1):", "default=0.9):", "default of optimizer_creator was 0.1 and is 0.9"),
    ("rate = 0.1", "rate = 0.9", "Base.rate was 0.1 and is 0.9"),
)
CODE = (
    ("time.time(), 3)", "time.time(), 5)", "callbacks[0].patience was 3 and is 5"),
    ("value * 1.0", "value * 2.0", "helper has changed"),
    ('f"run-{time.time_ns()}"', 'f"test-{time.time_ns()}"', "args.name has changed"),
)
"""What is put in place of what, and what is said of it."""


def write_settings(place: Path, rate: float) -> None:
    shutil.rmtree(place / "__pycache__", ignore_errors=True)  # Python tells sources apart by their seconds and lengths
    (place / "settings.py").write_text(f'"""Of the user."""\nLR = {rate}\nOTHER = {rate}\n')


def start(place: Path, *arguments: str, script: str = SCRIPT, python: tuple[str, ...] = (), **environ: str) -> Program:
    return run_program(place, script, *arguments, python=python, **ENVIRON, PYTHONPATH=path_with(place), **environ)


def path_with(place: Path) -> str:
    return os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")])


def interrupted(place: Path, how: str, *arguments: str) -> Program:
    write_settings(place, 0.1)
    program = start(place, *arguments, HOW=how)
    (place / "again").touch()
    expected = {"SIGTERM": 75, "SIGKILL": -9, "crash": 1}[how]
    assert program.process.returncode == expected, program.output + program.errors
    return program


@pytest.fixture(scope="module")
def terminated(tmp_path_factory) -> Path:
    """The directory of a script that was told to go in its second pass."""
    place = tmp_path_factory.mktemp("terminated")
    interrupted(place, "SIGTERM")
    return place


@pytest.fixture
def place(terminated, tmp_path) -> Path:
    shutil.copytree(terminated, tmp_path, dirs_exist_ok=True)
    return tmp_path


def runs_of(place: Path) -> list[Path]:
    return sorted((place / "runs" / "program").iterdir())


def assert_goes_on(program: Program) -> None:
    assert program.process.returncode == 0, program.errors
    assert "torchtrainer: resuming" in program.errors, program.errors


def assert_starts_anew(program: Program, difference: str) -> None:
    assert program.process.returncode == 0, program.errors
    (line,) = [one for one in program.errors.splitlines() if "is left as it is" in one]
    assert difference in line
    assert "resuming" not in program.errors


@pytest.mark.parametrize("together", [GLOBALS, OF_FUNCTIONS, CODE], ids=["globals", "of functions", "code"])
def test_what_changed_is_named_wherever_it_stands(place, together) -> None:
    script = SCRIPT
    for old, new, _ in together:
        assert script.count(old) == 1, old
        script = script.replace(old, new)
    program = start(place, script=script, RESUME="True")
    assert program.process.returncode == 1
    for _, _, difference in together:
        assert difference in program.errors.splitlines()[-1], program.errors
    assert "more" not in program.errors.splitlines()[-1]
    assert len(runs_of(place)) == 1


def test_changed_arguments_variables_and_modules_are_named(place) -> None:
    write_settings(place, 0.9)
    said = start(place, MY_LR="0.9", RESUME="True").errors
    assert "BY_ENVIRONMENT was 0.1 and is 0.9, settings.LR was 0.1 and is 0.9." in said, said
    write_settings(place, 0.1)
    said = start(place, "--lr", "0.9", RESUME="True").errors
    assert "--lr was not there and is '0.9', args.lr was 0.1 and is 0.9." in said, said


def test_an_unchanged_script_goes_on_whatever_is_made_anew_at_each_start(place) -> None:
    edited = SCRIPT.replace("def helper(value):", '# a comment\n\n\ndef helper(value):\n    """A docstring."""')
    edited = edited.replace("def unrelated():\n    return 1", "def unrelated():\n    return GLOBAL + 2")
    (place / "settings.py").write_text("OTHER = 7\n# a comment\nLR = 0.1\n")
    assert_goes_on(start(place, script=edited, PYTHONHASHSEED="7"))
    assert len(runs_of(place)) == 1


@pytest.mark.parametrize("how", ["SIGKILL", "crash", pytest.param("SIGTERM", marks=pytest.mark.soak)])
def test_a_changed_argument_is_never_mixed_in(tmp_path, how) -> None:
    interrupted(tmp_path, how, "--lr", "0.1")
    changed = start(tmp_path, "--lr", "0.9")
    assert_starts_anew(changed, "--lr was '0.1' and is '0.9'")
    assert len(runs_of(tmp_path)) == 2
    assert_goes_on(start(tmp_path, "--lr", "0.1"))
    assert len(runs_of(tmp_path)) == 2


def test_a_function_that_a_call_was_given_is_compared_as_well(tmp_path) -> None:
    call = "def look(operator, factor=0.1):\n    return GLOBAL * factor\nprint(trainer.apply_all_operators(look))\n"
    first, loop, last = SCRIPT.partition("for _ in range(args.epochs)")
    script = f"{first}{call}{loop}{last}"
    write_settings(tmp_path, 0.1)
    assert start(tmp_path, script=script, HOW="SIGKILL").process.returncode == -9
    (tmp_path / "again").touch()
    changed = start(tmp_path, script=script.replace("factor=0.1", "factor=0.9"))
    assert "CallMismatchError: the script asks for apply_all_operators(look)" in changed.errors, changed.errors
    assert "factor of look was 0.1 and is 0.9" in changed.errors
    assert_goes_on(start(tmp_path, script=script))


def test_what_may_change_goes_on_and_is_told(place) -> None:
    program = start(place, "--epochs", "4", MAY="epochs")
    assert_goes_on(program)
    assert "--epochs was not there and is '4', args.epochs was 3 and is 4, as may_change allows" in program.errors
    assert program.output.split()[-1] == "4"


def test_the_learning_rate_can_be_set_for_the_passes_that_have_not_begun(place) -> None:
    lower = """
def lower(operator):
    for group in operator.optimizer.param_groups:
        group["lr"] /= 2
    return group["lr"]

for number in range(args.epochs):
    if number == 2:
        print("rates", trainer.apply_all_operators(lower))
"""
    program = start(place, script=SCRIPT.replace("\nfor _ in range(args.epochs):\n", lower))
    assert_goes_on(program)
    assert "rates [0.05]" in program.output


def test_a_directory_of_the_users_has_one_beside_it_for_each_that_differs(tmp_path) -> None:
    script = SCRIPT.replace("**CREATORS, callbacks", '**CREATORS, run_dir="mine", callbacks')
    write_settings(tmp_path, 0.1)
    assert start(tmp_path, script=script, HOW="SIGKILL").process.returncode == -9
    changed = start(tmp_path, "--lr", "0.9", script=script, HOW="SIGKILL")
    assert changed.process.returncode == -9
    assert "this run goes to mine-2" in changed.errors, changed.errors
    (tmp_path / "again").touch()
    assert_goes_on(start(tmp_path, "--lr", "0.9", script=script))
    assert not (tmp_path / "mine-3").exists()


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    "launcher", [pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.soak), pytest.param(RUN, id="ours")]
)
def test_under_a_launcher_the_same_holds(place, launcher) -> None:
    shutil.rmtree(place / "runs")
    (place / "again").unlink()
    script = SCRIPT.replace("AT = 11", "AT = 6")
    assert start(place, script=script, python=launcher, HOW="crash").process.returncode == 1
    (place / "again").touch()
    changed = start(place, "--lr", "0.9", script=script, python=launcher)
    assert_starts_anew(changed, "--lr was not there and is '0.9'")
    assert_goes_on(start(place, script=script, python=launcher))
