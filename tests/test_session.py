"""Scripts with a loop of their own: they stop together, save, and go on with the same bits."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from programs import Program, run_program, start_program
from test_spmd import TORCHRUN, assert_nothing_left, free_port, variables

RUN = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
ENVIRON = {"OMP_NUM_THREADS": "1"}
EXIT_PREEMPTED = 75

SCRIPT = """
import hashlib, os, select, signal, sys, time
import torch
import torch.distributed as dist
from torchtrainer import session

asked, ask = os.pipe()
signal.signal(signal.SIGTERM, lambda number, frame: os.write(ask, b"!"))

def say(*words):  # one write, which lines of other ranks do not get into
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def disturb(step):
    HOW = os.environ.get("HOW", "")  # not a setting, which would be compared
    if HOW and os.path.exists("disturbed"):
        time.sleep(0.1)  # steps as long as those of a large model
    if not HOW or step != 21 or os.path.exists("disturbed"):
        return
    if HOW == "launcher" and session.rank() == 0:
        open("disturbed", "w").close()
        say("here")
        assert select.select([asked], [], [], 30)[0]
    if HOW in ("one rank", "kill") and session.rank() == session.world_size() - 1:
        open("disturbed", "w").close()
        os.kill(os.getpid(), signal.SIGKILL if HOW == "kill" else signal.SIGTERM)

if "RANK" in os.environ:
    dist.init_process_group("gloo")
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Dropout(0.3), torch.nn.ReLU(), torch.nn.Linear(16, 2))
wrapped = torch.nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
x = torch.randn(125, 8, generator=torch.Generator().manual_seed(0))
data = torch.utils.data.TensorDataset(x, (x.sum(1) > 0).long(), torch.arange(125))
loader = session.loader(torch.utils.data.DataLoader(data, batch_size=4, shuffle=True))
step, seen = 0, []
state = session.latest_checkpoint()
if state is not None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step, seen = state["step"], state["seen"]
while loader.epoch < 3:
    for features, target, numbers in loader:
        disturb(step)
        optimizer.zero_grad()
        (torch.nn.functional.cross_entropy(wrapped(features), target) * loader.weight).backward()
        optimizer.step()
        step += 1
        seen += numbers.tolist() if loader.weight else []
        stop = session.should_stop()
        if stop or step % 6 == 0:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seen": seen}
            session.save_checkpoint(state, step)
        if stop:
            say("stopped", step)
            sys.exit(session.EXIT_PREEMPTED)
digest = hashlib.sha256(b"".join(one.numpy().tobytes() for one in model.state_dict().values())).hexdigest()
say("result", session.rank(), step, digest, hashlib.sha256(str(seen).encode()).hexdigest())
say("seen", session.rank(), *seen)
if dist.is_initialized():
    dist.destroy_process_group()
"""


def lines(text: str, start: str) -> list[str]:
    return sorted(line for line in text.splitlines() if line.startswith(start))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> str:
    """What the script prints under our launcher when nothing happens; the long tests compare it with torchrun's."""
    program = run_program(tmp_path_factory.mktemp("alone"), SCRIPT, python=RUN, **ENVIRON)
    assert program.ended_well(), program.errors
    return program.output


def disturbed(tmp_path, how: str, python: tuple[str, ...]) -> Program:
    program = start_program(tmp_path, SCRIPT, python=python, HOW=how, **ENVIRON)
    if how == "launcher":
        program.wait_for("here")
        program.process.send_signal(signal.SIGTERM)
    program.finish()
    assert (tmp_path / "disturbed").exists(), "the test did what it is about"
    assert_nothing_left([program])
    return program


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.soak
def test_every_sample_is_seen_once_in_every_pass(alone) -> None:
    first, second = (line.split()[2:] for line in lines(alone, "seen"))
    passes = 3
    assert sorted(map(int, first + second)) == sorted([*range(125)] * passes)


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(
    ("python", "how"),
    [
        pytest.param(RUN, "launcher", id="ours"),
        pytest.param(TORCHRUN, "one rank", id="torchrun", marks=pytest.mark.soak),
    ],
)
def test_ranks_stop_at_one_step_and_the_same_command_goes_on_with_the_same_bits(tmp_path, alone, python, how) -> None:
    first = disturbed(tmp_path, how, python)
    assert first.process.returncode == (EXIT_PREEMPTED if python == RUN else 1), first.errors
    stopped = lines(first.output, "stopped")
    assert len(stopped) == 2
    assert len(set(stopped)) == 1, "at the same step"
    second = run_program(tmp_path, SCRIPT, python=python, **ENVIRON)
    assert second.ended_well(), second.errors
    assert second.errors.count("torchtrainer: resuming ") == 1
    assert lines(second.output, "result") == lines(alone, "result"), second.errors


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_killed_worker_is_restarted_and_goes_on_with_the_same_bits(tmp_path, alone) -> None:
    program = disturbed(tmp_path, "kill", (*RUN, "--max-restarts", "1"))
    assert program.process.returncode == 0, program.errors
    assert "state of step 18, saved" in program.errors
    # A set: where torch aborts at the end (see TORCH_ABORT), the last state is taken up once more, and gives the same lines.
    assert set(lines(program.output, "result")) == set(lines(alone, "result")), program.errors


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.soak
def test_a_single_process_stops_and_goes_on_with_the_same_bits(tmp_path, tmp_path_factory) -> None:
    expected = run_program(tmp_path_factory.mktemp("alone"), SCRIPT, **ENVIRON)
    first = disturbed(tmp_path, "one rank", ())
    assert first.process.returncode == EXIT_PREEMPTED, first.errors
    second = run_program(tmp_path, SCRIPT, **ENVIRON)
    assert second.process.returncode == 0, second.errors
    assert second.output == expected.output


ENDS = """
import os, signal, sys, time
import torch
from torchtrainer import session

if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
LR = 0.1
DEVICES = {"started": time.time(), "lr": float(os.environ.get("MY_LR", "0.1"))}
session.configure(may_change=os.environ.get("MAY", "").split(), resume={"True": True}.get(os.environ.get("RESUME"), "auto"))
state = session.latest_checkpoint() or {"step": 0}
print(f"from {state['step']}", flush=True)
for step in range(state["step"] + 1, 5):
    session.save_checkpoint({"step": step}, step)
    if os.environ.get("END") == "kill" and step == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if os.environ.get("END") == "crash" and step == 2:
        raise OSError("the disk went away")
if os.environ.get("END") == "finish":
    session.finish()
    raise OSError("later")
"""


def ends(place: Path, *arguments: str, script: str = ENDS, **environ: str) -> Program:
    return run_program(place, script, *arguments, **ENVIRON, **environ)


def test_a_session_that_has_ended_is_not_gone_on_with(tmp_path) -> None:
    assert "from 0" in ends(tmp_path, "--lr", "0.1").output
    for number, end in ((2, "finish"), (3, "")):
        again = ends(tmp_path, "--lr", "0.1", END=end)
        assert "from 0" in again.output
        assert f"is left as it is, because it has finished; this run goes to runs/program-{number} " in again.errors, (
            again.errors
        )
    asked = ends(tmp_path, "--lr", "0.1", RESUME="True")
    assert "from 4" in asked.output, asked.errors


@pytest.mark.parametrize("end", ["kill", pytest.param("crash", marks=pytest.mark.soak)])
def test_a_session_that_was_cut_off_is_gone_on_with_by_the_same_arguments_and_settings(tmp_path, end) -> None:
    assert ends(tmp_path, "--lr", "0.1", END=end).process.returncode != 0
    refused = ends(tmp_path, "--lr", "0.9", script=ENDS.replace("LR = 0.1", "LR = 0.9"), MY_LR="0.9", RESUME="True")
    said = "--lr was '0.1' and is '0.9', LR was 0.1 and is 0.9, DEVICES['lr'] was 0.1 and is 0.9"
    assert said in refused.errors, refused.errors
    assert "from 2" in ends(tmp_path, "--lr", "0.1", script=f"# a comment\n{ENDS}", END=end).output
    changed = ends(tmp_path, "--lr", "0.9", END=end)
    assert "from 0" in changed.output
    assert "because --lr was '0.1' and is '0.9'; this run goes to runs/program-2" in changed.errors
    allowed = ends(tmp_path, "--lr", "0.5", MAY="lr")
    assert "from 2" in allowed.output
    assert "--lr was '0.9' and is '0.5', as may_change allows" in allowed.errors


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("python", [RUN, pytest.param(TORCHRUN, marks=pytest.mark.soak)])
def test_ranks_of_a_launch_end_a_session_together(tmp_path, python) -> None:
    script = ENDS.replace("os.kill(os.getpid()", "os._exit(7) if 'RANK' in os.environ else os.kill(os.getpid()")
    cut = run_program(tmp_path, script, python=python, END="kill", **ENVIRON)
    assert cut.process.returncode != 0
    changed = run_program(tmp_path, script, "--lr", "0.9", python=python, **ENVIRON)
    assert changed.output.count("from 0") == 2, changed.errors
    done = run_program(tmp_path, script, "--lr", "0.9", python=python, **ENVIRON)
    assert done.output.count("from 0") == 2
    assert done.errors.count("because it has finished") == 1


ERRORS = """
import os, sys
import torch
import torch.distributed as dist
from torchtrainer import TorchTrainerError, session

class Own:
    pass

def tells(name, call):
    try:
        print(name, call())
    except TorchTrainerError as error:
        print(name, type(error).__name__, error, file=sys.stderr if session.rank() else sys.stdout)

if session.world_size() > 1:
    tells("no group:", session.should_stop)
    dist.init_process_group("gloo")
tells("keep:", lambda: session.configure(keep=0))
session.configure(run_dir="mine")
print("stop:", session.should_stop(), "latest:", session.latest_checkpoint())
tells("late:", lambda: session.configure(run_dir="other"))
bad = {"x": torch.ones(2), "own": Own()} if session.rank() == session.world_size() - 1 else {"x": torch.ones(2)}
tells("own:", lambda: session.save_checkpoint(bad, 1))
tells("step:", lambda: session.save_checkpoint({}, -1))
path = session.save_checkpoint({"x": torch.ones(2), "rank": session.rank()}, 5)
print("saved:", os.path.relpath(path))
if dist.is_initialized():
    dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.timeout(120)
def test_what_cannot_work_is_said(tmp_path, ranks) -> None:
    if ranks == 1:
        programs = [start_program(tmp_path, ERRORS, **ENVIRON)]
    else:
        job = free_port()
        programs = [start_program(tmp_path, ERRORS, **ENVIRON, **variables("by hand", r, job)) for r in range(2)]
    for program in programs:
        program.finish()
        assert program.ended_well(), program.errors
    said = programs[0].output
    if ranks == 2:
        assert "no group: EngineError" in said
        assert "own: InvalidArgumentTypeError save_checkpoint, rank 1" in programs[1].errors
    assert "keep: InvalidArgumentError keep must be a whole number of at least 1, got 0" in said
    assert "stop: False latest: None" in said
    assert "late: InvalidArgumentError call session.configure first" in said
    assert f"own: InvalidArgumentTypeError save_checkpoint, rank {ranks - 1}: the state holds objects" in said
    assert "step: InvalidArgumentError step must be a whole number of at least 0, got -1" in said
    assert "saved: mine/checkpoints/step-000000000005-g0001-n000001" in said
    assert not (tmp_path / "other").exists()


READS = """
import os, sys
import torch.distributed as dist
from torchtrainer import session
if session.world_size() > 1:
    dist.init_process_group("gloo")
session.configure(run_dir=sys.argv[1])
print(session.rank(), session.latest_checkpoint(), flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.soak
def test_states_that_differ_between_ranks_belong_to_as_many_ranks(tmp_path) -> None:
    job = free_port()
    programs = [start_program(tmp_path, ERRORS, **ENVIRON, **variables("by hand", r, job)) for r in range(2)]
    assert all(program.finish() == 0 or program.ended_well() for program in programs), programs[0].errors
    job = free_port()
    programs = [start_program(tmp_path, READS, "mine", **ENVIRON, **variables("by hand", r, job)) for r in range(2)]
    for rank, program in enumerate(programs):
        program.finish()
        assert f"'rank': {rank}" in program.output, program.errors
    fewer = run_program(tmp_path, READS, "mine", **ENVIRON)
    assert fewer.process.returncode == 1
    assert (
        "ResumeError: the checkpoint is of 2 ranks with states that differ, which 1 ranks cannot take over"
        in fewer.errors
    )
