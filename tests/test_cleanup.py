"""Nothing is left behind, however a driver ends; and nothing grows, however often a trainer is made."""

from __future__ import annotations

import os
import signal

import pytest
from programs import CREATORS, MARK, Program, marked_processes, run_program, start_program

from torchtrainer.process.signals import EXIT_PREEMPTED

LOADER_WORKERS = """
def data_creator(config):
    return DataLoader(dataset(64, 0), batch_size=4, num_workers=2, persistent_workers=True)
CREATORS["data_creator"] = data_creator
"""

FOREVER = (
    CREATORS
    + LOADER_WORKERS
    + """
class Forever(TrainingOperator):
    def train_epoch(self, iterator, info):
        for step in range(10**9):
            next(iterator)
            if self.world_rank == 0 and step == 1:
                print("in the pass")
            time.sleep(0.01)

# Batches without end, so that the pass is never over when the test acts.
class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        while True:
            yield torch.randn(20), torch.tensor(1)

def endless(config):
    return DataLoader(Endless(), batch_size=4, num_workers=1)

CREATORS["data_creator"] = endless
trainer = TorchTrainer(training_operator_cls=Forever, **CREATORS)
"""
)


def in_the_pass(tmp_path, ending: str = "trainer.train()") -> Program:
    program = start_program(tmp_path, FOREVER + ending, whole=True)
    program.wait_for("in the pass")
    assert len(marked_processes(program.mark)) >= 7, "driver, host, spawner, 2 workers, 2 loader workers"
    return program


@pytest.mark.parametrize(
    "signum", [signal.SIGKILL, *(pytest.param(one, marks=pytest.mark.soak) for one in (signal.SIGTERM, signal.SIGHUP))]
)
def test_a_driver_that_is_killed_takes_everything_with_it(tmp_path, signum) -> None:
    program = in_the_pass(tmp_path)
    program.process.send_signal(signum)
    saved = signum == signal.SIGTERM  # a warning: the state is saved first
    assert program.finish() == (EXIT_PREEMPTED if saved else -signum), program.errors
    program.assert_nothing_left()


def test_ctrl_c_ends_a_script_with_everything_in_it(tmp_path) -> None:
    program = in_the_pass(tmp_path)
    program.process.send_signal(signal.SIGINT)
    assert program.finish() == -signal.SIGINT
    assert "KeyboardInterrupt" in program.errors
    program.assert_nothing_left()


@pytest.mark.soak
def test_losing_the_host_ends_the_call_with_an_error(tmp_path) -> None:
    program = in_the_pass(tmp_path)
    pid = min(int(line.split()[0]) for line in marked_processes(program.mark) if ".host " in line)
    os.kill(pid, signal.SIGKILL)
    assert program.finish() == 1
    assert "EngineError" in program.errors
    assert "Create a new TorchTrainer" in program.errors
    program.assert_nothing_left()


@pytest.mark.parametrize(
    ("ending", "code"),
    [
        ("trainer.train(num_steps=2)", 0),
        pytest.param("trainer.train(num_steps=2); trainer.shutdown()", 0, marks=pytest.mark.soak),
        pytest.param("trainer.train(num_steps=2); sys.exit(3)", 3, marks=pytest.mark.soak),
        ("trainer.train(num_steps=2); os._exit(4)", 4),
        pytest.param("trainer.train(num_steps=2); raise ValueError('mine')", 1, marks=pytest.mark.soak),
        pytest.param("del trainer", 0, marks=pytest.mark.soak),
    ],
)
def test_nothing_is_left_after_the_script(tmp_path, ending, code) -> None:
    program = run_program(tmp_path, CREATORS + LOADER_WORKERS + "trainer = TorchTrainer(**CREATORS)\n" + ending)
    assert program.process.returncode == code, program.errors
    program.assert_nothing_left()


def test_shutdown_returns_when_the_workers_are_gone(tmp_path) -> None:
    program = run_program(
        tmp_path,
        CREATORS
        + LOADER_WORKERS
        + f"""
from pathlib import Path
def mine():
    mark = ("{MARK}=" + os.environ["{MARK}"]).encode()
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                found.append((entry / "cmdline").read_bytes())
        except OSError:
            pass
    return found
with TorchTrainer(**CREATORS) as trainer:
    trainer.train()
    print("during", len(mine()))
print("after", len(mine()))
""",
    )
    lines = dict(line.split() for line in program.output.splitlines())
    assert int(lines["during"]) >= 7, program.output
    assert int(lines["after"]) == 3, "driver, host and spawner stay for the next trainer"
    program.assert_nothing_left()


GROWTH = (
    CREATORS
    + """
import gc, threading
from pathlib import Path

def held():
    gc.collect()
    host = [p for p in Path("/proc/self/task").iterdir()]
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    grandchildren = [Path(f"/proc/{c}/task/{c}/children").read_text().split() for c in children]
    return dict(
        threads=len(host),
        descriptors=len(os.listdir("/proc/self/fd")),
        host_descriptors=[len(os.listdir(f"/proc/{c}/fd")) for c in children],
        spawner_descriptors=[len(os.listdir(f"/proc/{g}/fd")) for gs in grandchildren for g in gs],
        children=len(children),
        grandchildren=sum(map(len, grandchildren)),
        shared_memory=sorted(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else [],
        temporary=sorted(p.name for p in Path(os.environ["TMPDIR"]).rglob("*")),
    )

def cycle():
    trainer = TorchTrainer(run_dir=None, **CREATORS)
    trainer.train(num_steps=2)
    trainer.shutdown()

for _ in range(2):
    cycle()
before = held()
for _ in range(int(sys.argv[1])):
    cycle()
after = held()
before.pop("shared_memory"), after.pop("shared_memory")  # of the whole machine: other programs use it too
print("same" if before == after else f"before {before}\\nafter  {after}")
"""
)


@pytest.mark.slow
@pytest.mark.soak
def test_fifty_trainers_in_a_row_leave_nothing(tmp_path) -> None:
    program = run_program(tmp_path, GROWTH, "50", whole=True)
    assert program.output.strip().endswith("same"), program.output + program.errors
    program.assert_nothing_left()
