"""A run whose machine is gone goes on elsewhere, from the copies of its checkpoints."""

from __future__ import annotations

import hashlib
import re
import shutil
import signal
from pathlib import Path

import pytest
from programs import CREATORS, Program, start_program

from torchtrainer.process.signals import EXIT_PREEMPTED

SCRIPT = (
    CREATORS
    + """
import hashlib
from torchtrainer import CheckpointConfig

class Slow(TrainingOperator):
    def train_batch(self, batch, batch_info):
        time.sleep(0.005)
        return super().train_batch(batch, batch_info)

trainer = TorchTrainer(
    training_operator_cls=Slow,
    run_dir="machine/run",
    checkpoint=CheckpointConfig(every_steps=3, path=f"file://{os.getcwd()}/store"),
    **CREATORS,
)
for epoch in range(2):
    print("result", trainer.train(), flush=True)
state = trainer.state_dict()["models"][0]
print("digest", hashlib.sha256(b"".join(one.numpy().tobytes() for one in state.values())).hexdigest())
trainer.shutdown()
"""
)


def digest(program: Program) -> str:
    assert program.finish() == 0, program.errors
    program.assert_nothing_left()
    return re.findall(r"^digest (\w+)$", program.output, re.MULTILINE)[0]


@pytest.fixture
def preempted(tmp_path) -> Path:
    program = start_program(tmp_path, SCRIPT)
    program.wait_for("result")
    program.process.send_signal(signal.SIGTERM)
    assert program.finish() == EXIT_PREEMPTED, program.errors
    shutil.rmtree(tmp_path / "machine")
    return tmp_path


def test_a_run_goes_on_from_the_copies_where_its_disk_is_gone(preempted, tmp_path_factory) -> None:
    resumed = start_program(preempted, SCRIPT)
    found = digest(resumed)
    assert len(re.findall("torchtrainer: resuming ", resumed.errors)) == 1
    assert found == digest(start_program(tmp_path_factory.mktemp("undisturbed"), SCRIPT))


@pytest.mark.soak
def test_a_damaged_copy_is_told_and_an_older_one_used(preempted) -> None:
    newest = max((preempted / "store" / "machine" / "run").glob("step-*"))
    state = bytearray((newest / "state.pt").read_bytes())
    state[len(state) // 2] ^= 1
    (newest / "state.pt").write_bytes(state)
    resumed = start_program(preempted, SCRIPT)
    assert digest(resumed)
    assert "was not written correctly" in resumed.errors


@pytest.mark.soak
def test_a_finished_run_is_not_gone_on_with_from_its_copies(tmp_path) -> None:
    assert digest(start_program(tmp_path, SCRIPT))
    before = {
        path: hashlib.sha256(path.read_bytes()).digest() for path in (tmp_path / "store").rglob("*.*") if path.is_file()
    }
    shutil.rmtree(tmp_path / "machine")
    program = start_program(tmp_path, SCRIPT)
    assert program.finish() == 1
    assert "holds another run, and it has finished: pass resume=False" in program.errors
    after = {path: hashlib.sha256(path.read_bytes()).digest() for path in before}
    assert after == before
