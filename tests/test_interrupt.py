"""Ctrl-C in a script that goes on afterwards: the call ends, the workers stay, and no sample is lost or seen twice."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from programs import CREATORS, MARK, run_program, start_program

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

RECORDING = (
    CREATORS
    + """
N, STEPS = 1203, 151  # 150 steps of 2 x 4 samples, and 3 samples: rank 1 has one fewer than rank 0

def numbered(n, seed):
    x, y = dataset(n, seed).tensors
    return TensorDataset(x, torch.arange(n), y)

def data_creator(config):
    return DataLoader(numbered(N, 0), batch_size=4, shuffle=True), DataLoader(numbered(N, 1), batch_size=4)
CREATORS["data_creator"] = data_creator

class Recording(TrainingOperator):
    \"\"\"Remembers the samples of its steps; while it is slow, a pass takes long enough to be interrupted.\"\"\"
    def setup(self, config):
        super().setup(config)
        self.reset(slow=False)
    def reset(self, slow, say_at=None):
        self.seen, self.steps, self.slow, self.say_at = [], 0, slow, say_at
    def train_batch(self, batch, batch_info):
        return self.record(batch, batch_info, super().train_batch)
    def validate_batch(self, batch, batch_info):
        return self.record(batch, batch_info, super().validate_batch)
    def record(self, batch, batch_info, hook):
        x, numbers, y = batch
        if self.slow:
            time.sleep(0.02)
        stats = hook((x, y), batch_info)
        self.steps += 1
        self.seen += numbers.tolist()
        if self.world_rank == 0 and batch_info["batch_idx"] == self.say_at:
            print("at the step")
        return stats

trainer = TorchTrainer(training_operator_cls=Recording, **CREATORS)
pids = trainer.apply_all_workers(os.getpid)

def samples():
    # The last step of a pass may give a rank that has no sample left one that another rank counts; not with this N.
    return sorted(sum(trainer.apply_all_operators(lambda operator: operator.seen), []))

def begin(say_at):
    trainer.apply_all_operators(lambda operator: operator.reset(slow=True, say_at=say_at))

def hurry():
    trainer.apply_all_operators(lambda operator: setattr(operator, "slow", False))
"""
)


@pytest.mark.parametrize("call", ["train", pytest.param("validate", marks=pytest.mark.soak)])
def test_the_next_call_finishes_an_interrupted_pass(tmp_path, call) -> None:
    moments = [0, 1, 5, 20, 60]
    program = start_program(
        tmp_path,
        RECORDING
        + f"""
for number, moment in enumerate({moments}, start=1):
    begin(moment)
    try:
        trainer.{call}()
        print("not interrupted")
    except KeyboardInterrupt:
        steps = trainer.apply_all_operators(lambda operator: operator.steps)
        print("interrupted", "on one boundary" if steps[0] == steps[1] else steps, moment < steps[0] < STEPS)
    status = trainer.status()
    hurry()
    rest = trainer.{call}()
    print("finished", rest["batch_count"] == STEPS - steps[0], rest.get("epoch", number) == number, samples() == list(range(N)))
    print("the same workers", trainer.apply_all_workers(os.getpid) == pids, status.epoch in (number, 0))
trainer.apply_all_operators(lambda operator: operator.reset(slow=False))
print("whole", trainer.{call}()["num_samples"] == N, samples() == list(range(N)))
""",
    )
    for _ in moments:
        program.wait_for("at the step")
        program.process.send_signal(signal.SIGINT)
        boundary = "interrupted on one boundary True" if call == "train" else "interrupted"
        assert program.wait_for("interrupted").startswith(boundary)
        assert program.wait_for("finished") == "finished True True True\n"
        assert program.wait_for("the same workers") == "the same workers True True\n"
    assert program.finish() == 0, program.errors
    assert "whole True True\n" in program.output
    program.assert_nothing_left()


@pytest.mark.soak
def test_two_quick_interrupts_lose_nothing_either(tmp_path) -> None:
    program = start_program(
        tmp_path,
        RECORDING
        + """
begin(3)
caught = 0
while trainer.apply_all_operators(lambda operator: operator.steps)[0] < STEPS:
    try:
        while True:
            try:
                trainer.train()
                break
            except KeyboardInterrupt:
                caught += 1
    except KeyboardInterrupt:
        caught += 1
print("caught", 1 <= caught <= 2, samples() == list(range(N)))
print("the same workers", trainer.apply_all_workers(os.getpid) == pids)
print("whole", trainer.train()["num_samples"] == N)
""",
    )
    program.wait_for("at the step")
    program.process.send_signal(signal.SIGINT)
    program.process.send_signal(signal.SIGINT)
    assert program.finish() == 0, program.errors
    lines = [line for line in program.output.splitlines() if "at the step" not in line]
    assert lines == ["caught True True", "the same workers True", "whole True"]
    program.assert_nothing_left()


def test_two_quick_interrupts_end_a_script_that_does_not_catch_them(tmp_path) -> None:
    program = start_program(tmp_path, RECORDING + "begin(3)\ntrainer.train()")
    program.wait_for("at the step")
    program.process.send_signal(signal.SIGINT)
    program.process.send_signal(signal.SIGINT)
    assert program.finish() == -signal.SIGINT
    program.assert_nothing_left()


@pytest.mark.parametrize(
    "sleepers", ["rank >= 0", *(pytest.param(one, marks=pytest.mark.soak) for one in ("rank == 1", "rank == 0"))]
)
def test_a_function_on_the_workers_is_interrupted_where_it_runs(tmp_path, sleepers) -> None:
    """A rank that has returned already is left alone."""
    program = start_program(
        tmp_path,
        CREATORS
        + f"""
trainer = TorchTrainer(**CREATORS)
pids = trainer.apply_all_workers(os.getpid)
def doze(operator):
    rank = operator.world_rank
    if {sleepers}:
        open(f"asleep_{{rank}}", "w").close()
        time.sleep(600)
for _ in range(5):
    try:
        trainer.apply_all_operators(doze)
    except KeyboardInterrupt:
        print("interrupted")
    print("the same workers", trainer.apply_all_workers(os.getpid) == pids)
print("trained", trainer.train()["num_samples"])
""",
    )
    ranks = {"rank >= 0": [0, 1], "rank == 1": [1], "rank == 0": [0]}[sleepers]
    for _ in range(5):
        for rank in ranks:
            _wait_for_file(program, tmp_path / f"asleep_{rank}")
            (tmp_path / f"asleep_{rank}").unlink()
        program.process.send_signal(signal.SIGINT)
        assert program.wait_for("interrupted")
        assert program.wait_for("the same workers") == "the same workers True\n"
    assert program.finish() == 0, program.errors
    assert program.output.endswith("trained 64\n")
    program.assert_nothing_left()


def _wait_for_file(program, path) -> None:
    while not path.exists():
        assert program.process.poll() is None, program.finish() or program.errors
        os.sched_yield()


def test_an_interrupt_while_workers_are_built_leaves_none(tmp_path) -> None:
    program = start_program(
        tmp_path,
        CREATORS
        + f"""
from pathlib import Path
def mine():
    mark = ("{MARK}=" + os.environ["{MARK}"]).encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append(entry.name)
        except OSError:
            pass
    return len(found)
class Slow(TrainingOperator):
    def setup(self, config):
        if self.world_rank == 0:
            print("building")
        time.sleep(600)
for _ in range(3):
    try:
        TorchTrainer(training_operator_cls=Slow, **CREATORS)
    except KeyboardInterrupt:
        print("interrupted", mine(), "left: driver, host and spawner")
with TorchTrainer(**CREATORS) as trainer:
    print("trained", trainer.train()["num_samples"])
""",
    )
    for _ in range(3):
        program.wait_for("building")
        program.process.send_signal(signal.SIGINT)
        assert program.wait_for("interrupted").startswith("interrupted 3 left")
    assert program.finish() == 0, program.errors
    assert program.output.endswith("trained 64\n")
    program.assert_nothing_left()


@pytest.mark.soak
def test_interrupts_at_any_moment_lose_no_sample(tmp_path) -> None:
    """A thread of the script interrupts it all the time, with the driver wherever it may be."""
    program = run_program(
        tmp_path,
        RECORDING
        + """
import random, signal, threading
calls_over, in_call = threading.Event(), threading.Event()
moments = random.Random(0)
def interrupt():
    while not calls_over.is_set():
        time.sleep(moments.uniform(0.001, 0.03))
        if in_call.is_set():
            os.kill(os.getpid(), signal.SIGINT)
            in_call.clear()
thread = threading.Thread(target=interrupt)
thread.start()
caught = 0
for _ in range(40):
    try:
        in_call.set()
        trainer.train(num_steps=5)
        while in_call.is_set():  # at the latest here
            pass
        while True:
            time.sleep(0.001)
    except KeyboardInterrupt:
        caught += 1
calls_over.set()
thread.join()
steps = trainer.apply_all_operators(lambda operator: operator.steps)
before = trainer.status().epoch
while trainer.apply_all_operators(lambda operator: operator.steps)[0] % STEPS:
    trainer.train()
passes = trainer.apply_all_operators(lambda operator: operator.steps)[0] // STEPS
print("caught", caught, steps[0] == steps[1], samples() == sorted(list(range(N)) * passes))
print("the same workers", trainer.apply_all_workers(os.getpid) == pids)
""",
    )
    assert program.process.returncode == 0, program.errors
    assert program.output.splitlines()[-2:] == ["caught 40 True True", "the same workers True"]
    program.assert_nothing_left()


@pytest.mark.soak
def test_a_driver_that_is_stopped_for_a_while_does_no_harm(tmp_path) -> None:
    program = start_program(
        tmp_path,
        RECORDING
        + """
begin(3)
print("trained", trainer.train()["num_samples"] == N, samples() == list(range(N)))
print("the same workers", trainer.apply_all_workers(os.getpid) == pids, trainer.status().failures)
""",
    )
    program.wait_for("at the step")
    program.process.send_signal(signal.SIGSTOP)
    threading.Event().wait(2.0)  # the time for which it is stopped
    program.process.send_signal(signal.SIGCONT)
    assert program.finish() == 0, program.errors
    assert program.output.splitlines()[-2:] == ["trained True True", "the same workers True ()"]
    program.assert_nothing_left()
