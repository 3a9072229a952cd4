"""A run under a launcher that is told to go, or loses a rank: it goes on with the same bits, whoever started its processes."""

from __future__ import annotations

import json
import re
import shutil
import signal
import struct
import sys
from pathlib import Path

import pytest
from programs import CREATORS, Program, start_program
from test_spmd import TORCHRUN, assert_nothing_left, free_port, variables

from torchtrainer.driver.states import TO_THE_END
from torchtrainer.elastic.environment import LAUNCH_DIR as LAUNCHERS_DIR
from torchtrainer.engines.spmd_gate import LAUNCH_DIR, StepCounter
from torchtrainer.engines.stop_coordinator import StopCoordinator
from torchtrainer.launcher.activity import STEP_COUNTER, read_step

RUN = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
ENVIRON = {"OMP_NUM_THREADS": "1"}
EXIT_PREEMPTED = 75

SCRIPT = (
    CREATORS
    + """
import hashlib, select, signal
from torchtrainer import CheckpointConfig, session

asked, ask = os.pipe()
signal.signal(signal.SIGTERM, lambda number, frame: os.write(ask, b"!"))

def disturb(where, count):
    HOW, WHERE, AT = os.environ.get("HOW", ""), os.environ.get("WHERE", ""), int(os.environ.get("AT", "-1"))
    if not HOW or where != WHERE or count != AT or os.path.exists("disturbed"):
        return
    if HOW == "launcher" and session.rank() == 0:
        open("disturbed", "w").close()
        print("here", flush=True)
        assert select.select([asked], [], [], 30)[0]
    if HOW in ("one rank", "kill") and session.rank() == session.world_size() - 1:
        open("disturbed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL if HOW == "kill" else signal.SIGTERM)

class Disturbed(TrainingOperator):
    def setup(self, config):
        self.average = torch.optim.swa_utils.AveragedModel(getattr(self.model, "module", self.model))

    def after_step(self, batch_info):
        self.average.update_parameters(getattr(self.model, "module", self.model))

    def state_dict(self):
        return self.average.state_dict()

    def load_state_dict(self, state):
        self.average.load_state_dict(state)

    def train_batch(self, batch, batch_info):
        disturb("train", self.global_step)
        if os.environ.get("HOW") and os.path.exists("disturbed"):
            time.sleep(0.1)  # steps as long as those of a large model: the pass does not end before the ranks agree
        return super().train_batch(batch, batch_info)

    def validate_batch(self, batch, batch_info):
        disturb("validate", self.global_step * 100 + batch_info["batch_idx"])
        self.average.eval()
        averaged = {"averaged": self.criterion(self.average(batch[0]), batch[1]).item()}
        return {**super().validate_batch(batch, batch_info), **averaged}

def model_creator(config):
    return torch.nn.Sequential(torch.nn.Linear(20, 16), torch.nn.BatchNorm1d(16), torch.nn.Dropout(0.4), torch.nn.Linear(16, 5))

def data_creator(config):
    return DataLoader(dataset(126, 0), batch_size=4, shuffle=True), DataLoader(dataset(43, 1), batch_size=4)

CREATORS.update(model_creator=model_creator, data_creator=data_creator, training_operator_cls=Disturbed)
local = dict(use_local=True, num_workers=1) if sys.argv[1:] == ["local"] else {}
trainer = TorchTrainer(**{**CREATORS, **local}, checkpoint=CheckpointConfig(every_steps=6))
for _ in range(3):
    print("result", trainer.train(), trainer.validate())
models = trainer.state_dict()["models"][0].values()
print("result", hashlib.sha256(b"".join(one.numpy().tobytes() for one in models)).hexdigest(), trainer.status().step)
trainer.shutdown()
"""
)
"""16 steps per pass on 2 ranks, 6 steps per validation."""


def results(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("result")]


def undisturbed(tmp_path_factory, *arguments: str) -> list[str]:
    program = start_program(tmp_path_factory.mktemp("alone"), SCRIPT, *arguments, **ENVIRON)
    assert program.finish() == 0, program.errors
    return results(program.output)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[str]:
    """What the script prints when it starts two workers itself and nothing happens."""
    return undisturbed(tmp_path_factory)


DISTURBANCES = {
    "the launcher, in training": {"HOW": "launcher", "WHERE": "train", "AT": "21"},
    "the launcher, in validation": {"HOW": "launcher", "WHERE": "validate", "AT": "1602"},
    "one rank, in training": {"HOW": "one rank", "WHERE": "train", "AT": "21"},
    "one rank, in validation": {"HOW": "one rank", "WHERE": "validate", "AT": "3203"},
}


def disturbed(tmp_path: Path, python: tuple[str, ...], disturbance: dict[str, str], *arguments: str) -> Program:
    program = start_program(tmp_path, SCRIPT, *arguments, python=python, **ENVIRON, **disturbance)
    if disturbance["HOW"] == "launcher":
        program.wait_for("here")
        program.process.send_signal(signal.SIGTERM)
    program.finish()
    assert (tmp_path / "disturbed").exists(), "the test did what it is about"
    assert_nothing_left([program])
    return program


def state_of_run(tmp_path: Path) -> str:
    (run,) = (tmp_path / "runs" / "program").iterdir()
    state: str = json.loads((run / "run.json").read_text())["state"]
    return state


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("launcher", "what"),
    [
        pytest.param("torchrun", "the launcher, in training", marks=pytest.mark.soak),
        pytest.param("torchrun", "one rank, in validation", marks=pytest.mark.soak),
        pytest.param("torchtrainer run", "the launcher, in validation", marks=pytest.mark.soak),
        ("torchtrainer run", "one rank, in training"),
    ],
)
def test_a_stop_saves_and_the_same_command_goes_on_with_the_same_bits(tmp_path, alone, launcher, what) -> None:
    python = TORCHRUN if launcher == "torchrun" else RUN
    first = disturbed(tmp_path, python, DISTURBANCES[what])
    if launcher == "torchrun":  # whose own code this is
        assert first.process.returncode == 1
    else:
        assert first.process.returncode == EXIT_PREEMPTED, first.errors
    assert first.errors.count("is saved: start the same command again to continue") == 1, first.errors
    assert state_of_run(tmp_path) == "preempted"
    second = start_program(tmp_path, SCRIPT, python=python, **ENVIRON)
    second.finish()
    assert second.ended_well(), second.errors
    assert "torchtrainer: resuming " in second.errors
    assert results(second.output) == alone
    assert state_of_run(tmp_path) == "finished"
    assert_nothing_left([first, second])


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_every_rank_ends_with_75_whichever_was_told(tmp_path) -> None:
    job = free_port()
    environ = {**ENVIRON, **DISTURBANCES["one rank, in training"]}
    programs = [start_program(tmp_path, SCRIPT, **environ, **variables("by hand", rank, job)) for rank in (0, 1)]
    assert [program.finish() for program in programs] == [EXIT_PREEMPTED, EXIT_PREEMPTED], programs[0].errors
    assert re.search(r"got SIGTERM; the state after step 2\d is saved", programs[0].errors), programs[0].errors
    assert "is saved" not in programs[1].errors, "only rank 0 speaks"
    assert_nothing_left(programs)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_killed_worker_is_restarted_and_goes_on_with_the_same_bits(tmp_path, alone) -> None:
    python = (*RUN, "--max-restarts", "2")
    program = disturbed(tmp_path, python, {"HOW": "kill", "WHERE": "train", "AT": "21"})
    assert program.process.returncode == 0, program.errors
    assert "was killed by SIGKILL" in program.errors
    assert "state after step 18 saved" in program.errors
    assert results(program.output)[-1:] == alone[-1:]


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.soak
def test_a_rank_in_the_users_process_stops_and_goes_on(tmp_path, tmp_path_factory) -> None:
    expected = undisturbed(tmp_path_factory, "local")
    first = disturbed(tmp_path, (), DISTURBANCES["one rank, in training"], "local")
    assert first.process.returncode == EXIT_PREEMPTED, first.errors
    second = start_program(tmp_path, SCRIPT, "local", **ENVIRON)
    assert second.finish() == 0, second.errors
    assert results(second.output) == expected


@pytest.mark.soak
@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_checkpoint_that_another_machine_does_not_see_is_an_error_on_all_ranks(tmp_path) -> None:
    """Two directories stand for the disks of two machines."""
    first = disturbed(tmp_path, RUN, DISTURBANCES["one rank, in training"])
    assert first.process.returncode == EXIT_PREEMPTED, first.errors
    elsewhere = tmp_path / "elsewhere"
    text = "from torchtrainer import resume\n"
    text += "if __import__('os').environ['RANK'] == '1':\n    resume.Path = lambda path: __import__('pathlib').Path('/nowhere') / path[1:]\n"
    elsewhere.mkdir()
    shutil.copytree(tmp_path / "runs", elsewhere / "runs")
    job = free_port()
    programs = [
        start_program(elsewhere, text + SCRIPT, **ENVIRON, **variables("by hand", rank, job)) for rank in (0, 1)
    ]
    assert [program.finish() for program in programs] == [1, 1]
    for program in programs:
        assert "run_dir must be on a file system that all machines share" in program.errors, program.errors


# The agreement, without processes


def answers(rounds: StopCoordinator, kind: str, number: int, **boundaries: int) -> list[dict[str, object]]:
    given = []
    for rank in (0, 1):
        more = {"boundary": boundaries[f"rank_{rank}"]} if boundaries else {}
        given += rounds.hear({"kind": kind, "rank": rank, "round": number, **more})
    return given


def wish(call: int, *, stop: bool = True) -> dict[str, object]:
    return {"kind": "wish", "rank": 1, "call": call, "stop": stop}


def test_ranks_stop_at_the_highest_boundary_once_all_are_in_the_call() -> None:
    rounds = StopCoordinator(2)
    assert rounds.hear(wish(3)) == [{"kind": "ask", "call": 3, "round": 1}]
    assert rounds.hear(wish(3)) == [], "it is being decided"
    assert answers(rounds, "in", 1) == [{"kind": "prepare", "call": 3, "round": 1}]
    order = {"kind": "stop_at", "call": 3, "round": 1, "boundary": 8, "stop": True}
    assert answers(rounds, "at", 1, rank_0=8, rank_1=7) == [order]
    assert rounds.hear(wish(3)) == [], "it is decided"
    assert not rounds.open


def test_nobody_holds_for_a_rank_that_has_left_the_call() -> None:
    rounds = StopCoordinator(2)
    rounds.hear(wish(3))
    rounds.hear({"kind": "in", "rank": 0, "round": 1})
    assert rounds.hear({"kind": "ended", "rank": 1, "round": 1}) == []
    assert not rounds.open
    assert rounds.hear(wish(4)) == [{"kind": "ask", "call": 4, "round": 2}]


def test_a_rank_that_ends_while_others_hold_has_them_go_on_to_the_end() -> None:
    rounds = StopCoordinator(2)
    rounds.hear(wish(3))
    answers(rounds, "in", 1)
    rounds.hear({"kind": "at", "rank": 0, "round": 1, "boundary": 5})
    (order,) = rounds.hear({"kind": "ended", "rank": 1, "round": 1})
    assert (order["kind"], order["boundary"]) == ("stop_at", TO_THE_END)


def test_a_stop_that_is_wanted_while_a_save_is_decided_goes_with_it_and_one_of_the_next_call_comes_after() -> None:
    rounds = StopCoordinator(2)
    rounds.hear(wish(3, stop=False))
    rounds.hear(wish(4))
    answers(rounds, "in", 1)
    rounds.hear(wish(3))
    stop, ask = answers(rounds, "at", 1, rank_0=5, rank_1=5)
    assert stop["stop"]
    assert ask == {"kind": "ask", "call": 4, "round": 2}


def test_the_launcher_reads_the_steps_that_a_worker_counts(tmp_path) -> None:
    assert LAUNCH_DIR == LAUNCHERS_DIR
    counter = StepCounter.of_launch({LAUNCH_DIR: str(tmp_path), "LOCAL_RANK": "1"})
    assert counter is not None
    assert read_step(tmp_path / "progress.1") == 0
    counter.show(4711)
    assert read_step(tmp_path / "progress.1") == 4711
    assert struct.calcsize("<q") == STEP_COUNTER.size
    assert StepCounter.of_launch({}) is None
    assert StepCounter.of_launch({LAUNCH_DIR: str(tmp_path / "gone"), "LOCAL_RANK": "0"}) is None
