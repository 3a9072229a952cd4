"""Whole programs with a mistake in them: how they end, what they print, how soon, and that nothing is left."""

from __future__ import annotations

import os
import signal
import socket

import pytest
from programs import CREATORS, run_program, start_program

AT_ONCE_S = 5.0
"""From the mistake to the end of the program, with a warm engine."""

WARM = (
    CREATORS
    + """
import ctypes
TorchTrainer(run_dir=None, **CREATORS).shutdown()

class MyError(Exception):
    pass

class At(TrainingOperator):
    def train_batch(self, batch, batch_info):
        if batch_info["global_step"] == 5 and self.world_rank == 1:
            self.config["do"]()
        return super().train_batch(batch, batch_info)

def fail():
    raise MyError("mine")

class Callback:
    def on_epoch_end(self, event):
        fail()

def train(**arguments):
    with TorchTrainer(run_dir="run", **{**CREATORS, **arguments}) as trainer:
        trainer.train()

print("warm")
"""
)

MISTAKES = [
    ("train(training_operator_cls=At, config={'do': fail})", "MyError: mine", 'raise MyError("mine")'),
    ("train(training_operator_cls=At, config={'do': lambda: ctypes.string_at(0)})", "SIGSEGV", "in train_batch"),
    ("train(model_creator=lambda config: fail())", "MyError: mine", "phase setup"),
    ("train(callbacks=[Callback()])", "MyError: mine", "in on_epoch_end"),
]


@pytest.mark.parametrize(("mistake", "kind", "text"), MISTAKES)
def test_a_program_with_a_mistake_ends_at_once(tmp_path, mistake, kind, text) -> None:
    program = start_program(tmp_path, WARM + mistake)
    program.wait_for("warm")
    assert program.finish(AT_ONCE_S) == 1
    assert kind in program.errors
    assert text in program.errors
    program.assert_nothing_left()


def test_a_class_of_the_script_can_be_caught(tmp_path) -> None:
    program = run_program(
        tmp_path,
        WARM
        + """
try:
    train(training_operator_cls=At, config={"do": fail})
except MyError as error:
    print("caught", error, type(error.__cause__).__name__)
    print(error.__cause__)
train()
print("went on")
""",
    )
    assert "caught mine RemoteTraceback" in program.output, program.errors
    assert 'program.py", line ' in program.output
    assert "in train(), phase train, at step 5 (5 optimizer steps were completed)" in program.output
    assert program.output.endswith("went on\n")
    program.assert_nothing_left()


def test_objects_of_the_script_come_out_of_loader_workers(tmp_path) -> None:
    """Loader workers pickle by name: the script's classes have to be found in the worker."""
    program = start_program(
        tmp_path,
        WARM
        + """
class Batch(tuple):
    def to(self, device, **options):
        return self

class Data(torch.utils.data.Dataset):
    def __init__(self, broken):
        self.broken = broken
    def __len__(self):
        return 16
    def __getitem__(self, index):
        if self.broken and index == 9:
            raise MyError(f"sample {index}")
        return torch.randn(20), torch.tensor(1)

def collate(samples):
    return Batch(torch.utils.data.default_collate(samples))

def loader(broken):
    return lambda config: DataLoader(Data(broken), batch_size=4, num_workers=1, collate_fn=collate)

train(data_creator=loader(False))
print("came out")
try:
    train(data_creator=loader(True))
except MyError as error:
    print("caught", "sample 9" in str(error))
""",
    )
    program.wait_for("warm")
    assert program.finish(2 * AT_ONCE_S) == 0, program.errors
    assert program.output.endswith("came out\ncaught True\n")
    program.assert_nothing_left()


ENDLESS = """
class Endless(TrainingOperator):
    def train_epoch(self, iterator, info):
        if self.world_rank == 0:
            print("training", flush=True)
        while True:
            torch.distributed.all_reduce(torch.ones(1))

with TorchTrainer(run_dir="run", training_operator_cls=Endless, failure=FailureConfig(max_failures=0), **CREATORS) as trainer:
    print("pids", *(process.pid for process in trainer.status().processes))
    trainer.train()
"""


def test_a_worker_that_is_killed_from_outside(tmp_path) -> None:
    program = start_program(tmp_path, CREATORS + ENDLESS)
    pid = int(program.wait_for("pids").split()[2])
    program.wait_for("training")
    os.kill(pid, signal.SIGKILL)
    assert program.finish(AT_ONCE_S) == 1
    assert f"WorkerDiedError: rank 1 (pid {pid}, " in program.errors
    assert "was killed by SIGKILL in train(), phase train, at step 0 or later" in program.errors
    assert "out-of-memory killer" in program.errors
    assert f"Log: {tmp_path / 'run' / 'logs' / 'rank_1' / 'stderr.log'}" in program.errors
    program.assert_nothing_left()


def test_a_port_that_is_taken(tmp_path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = run_program(
            tmp_path,
            CREATORS + "TorchTrainer(engine='spmd', **CREATORS)",
            RANK="0",
            WORLD_SIZE="2",
            LOCAL_RANK="0",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    assert program.process.returncode == 1
    assert f"EngineError: rank 0 cannot listen on port {port} of 127.0.0.1: " in program.errors
    assert f"set the environment variable MASTER_PORT (now {port}) to a free port" in program.errors
    program.assert_nothing_left()


def test_a_trainer_made_inside_a_worker_says_so(tmp_path):
    (tmp_path / "careless.py").write_text(
        "import torch\nfrom torchtrainer import TorchTrainer\n"
        "def model_creator(config):\n    return torch.nn.Linear(20, 5)\n"
        "def make(**arguments):\n    return TorchTrainer(model_creator=model_creator, **arguments)\n"
        "import os\n"
        "if 'TORCHTRAINER_WORKER' in os.environ:\n    make()\n"
    )
    program = run_program(
        tmp_path,
        CREATORS + "import careless\nCREATORS.pop('model_creator')\ncareless.make(**CREATORS)\n",
        PYTHONPATH=str(tmp_path),
    )
    assert program.process.returncode == 1
    assert "inside a worker process" in program.errors
    assert "__main__" in program.errors
    program.assert_nothing_left()
