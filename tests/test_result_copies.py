"""Copies of the state that a script asked for: how many a run keeps, and what a resumed script finds of the others."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from programs import CREATORS, Program, run_program
from test_spmd import TORCHRUN

from torchtrainer.checkpoint.copies import Copies, Remade, made, remove_copies
from torchtrainer.checkpoint.journal import Journal

ENVIRON = {"OMP_NUM_THREADS": "1"}
SCRIPT = (
    CREATORS
    + """
import copy, hashlib, signal
from torchtrainer import CheckpointConfig

def digest(state):
    return hashlib.sha256(b"".join(one.detach().numpy().tobytes() for one in state.values())).hexdigest()[:12]

CREATORS.update(num_workers=int(os.environ.get("RANKS", "1")))
trainer = TorchTrainer(**CREATORS, checkpoint=CheckpointConfig(every_steps=4, keep=2))
calls = os.path.join(trainer.status().run_dir, "calls")
kind, best, counts = sys.argv[1], None, []
for epoch in range(6):
    trainer.train(num_steps=3)
    if kind == "every":
        state = trainer.get_model().state_dict()
        print("epoch", epoch, digest(state))
    elif kind == "best":
        state = trainer.state_dict()
        best = state if epoch < 2 else best
    elif kind == "deep":
        state = copy.deepcopy(trainer.get_model())
        best = state if epoch < 2 else best
    counts.append(len(os.listdir(calls)) if os.environ.get("RANK", "0") == "0" else 0)
    if epoch == 4 and not os.path.exists("killed"):
        if kind != "ends" and os.environ.get("RANK", "0") == "0":
            open("killed", "w").close()
        if os.environ.get("KILL"):
            print("counts", max(counts), flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
print("counts", max(counts))
if kind == "best":
    trainer.load_state_dict(best)
if best is not None:
    print("best", digest(best["models"][0] if kind == "best" else best.state_dict()))
trainer.train()
print("last", digest(trainer.get_model().state_dict()))
trainer.shutdown()
"""
)


def start(place: Path, kind: str, **environ: str) -> Program:
    place.mkdir(exist_ok=True)
    return run_program(place, SCRIPT, kind, **ENVIRON, **environ)


def lines(program: Program) -> list[str]:
    return [line for line in program.output.splitlines() if not line.startswith("counts")]


def counted(program: Program) -> int:
    (line,) = [line for line in program.output.splitlines() if line.startswith("counts")]
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("kind", "ranks", "again"),
    [
        pytest.param("best", "2", False, marks=pytest.mark.soak),
        ("deep", "1", True),
        pytest.param("every", "1", True, marks=pytest.mark.soak),
        pytest.param("every", "3", True, marks=pytest.mark.soak),
    ],
)
def test_a_killed_script_finds_the_states_that_it_had_and_only_a_few_are_kept(tmp_path, kind, ranks, again) -> None:
    undisturbed = start(tmp_path / "undisturbed", kind, RANKS=ranks)
    assert undisturbed.process.returncode == 0, undisturbed.errors
    killed = start(tmp_path, kind, KILL="1", RANKS=ranks)
    assert killed.process.returncode == -9, killed.errors
    kept = 3 if kind == "best" else 2  # keep, and the best one
    assert counted(killed) == counted(undisturbed) == kept
    resumed = start(tmp_path, kind, RANKS=ranks)
    assert resumed.process.returncode == 0, resumed.errors
    assert lines(resumed) == lines(undisturbed)
    assert resumed.errors.count("training is repeated up to that call") == again, resumed.errors
    assert list((tmp_path / "runs").rglob("*.pt")) == list((tmp_path / "runs").rglob("checkpoints/*/state.pt")), (
        "it is done"
    )


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.soak
def test_under_a_launcher_a_state_that_is_not_kept_is_an_error_that_says_what_to_do(tmp_path) -> None:
    killed = run_program(tmp_path, SCRIPT, "every", python=TORCHRUN, KILL="1", **ENVIRON)
    assert killed.process.returncode != 0
    resumed = run_program(tmp_path, SCRIPT, "every", python=TORCHRUN, **ENVIRON)
    assert "ResumeError: the script looks at what get_model() returned as call 2" in resumed.errors
    assert "trainer.save(path) needs no copy" in resumed.errors


# The files, without processes


def state(value: float) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((3,), value)}


def add(journal: Journal, value: dict[str, torch.Tensor]) -> None:
    assert journal.add("state_dict()", value, step=1, epoch=1, is_state=True) is None


def test_the_newest_stay_and_those_that_are_held(tmp_path) -> None:
    journal = Journal(tmp_path, [], writes=True, keep=2)
    held, dropped = state(0.0), state(1.0)
    view = dropped["weight"][1:]
    for one in (held, dropped):
        add(journal, one)
    del dropped, one
    for number in range(2, 6):
        add(journal, state(number))
    assert len(list((tmp_path / "calls").iterdir())) == 4, "two are new, one is held, and of one a view is"
    del view, held
    add(journal, state(6.0))
    assert len(list((tmp_path / "calls").iterdir())) == 2
    again = Journal(tmp_path, Journal.read(tmp_path), writes=True, keep=2)
    found = [again.expect("state_dict()") for _ in range(7)]
    assert [one is not None and one.gone for one in found] == [True] * 5 + [False] * 2
    assert found[-1] is not None
    assert torch.equal(found[-1].result["weight"], state(6.0)["weight"])


def test_equal_states_are_kept_once_and_all_go_when_the_run_is_done(tmp_path) -> None:
    journal = Journal(tmp_path, [], writes=True, keep=2)
    for _ in range(3):
        add(journal, state(1.0))
    journal.add("apply_all_operators(f)", [torch.ones(2)], step=1, epoch=1)
    assert len(list((tmp_path / "calls").iterdir())) == 2
    remove_copies(tmp_path)
    assert [path.name for path in (tmp_path / "calls").iterdir()] == ["3.pt"], (
        "what is no state is needed to go on later"
    )


def test_what_stands_for_a_result_is_made_when_it_is_looked_at() -> None:
    asked: list[int] = []

    def make() -> dict[str, torch.Tensor]:
        asked.append(1)
        return state(3.0)

    stand_in = Remade(make)
    kept = copy.deepcopy(stand_in)
    assert asked == []
    assert torch.equal(kept["weight"], state(3.0)["weight"])
    assert list(stand_in) == ["weight"] == list(stand_in.keys())
    assert isinstance(stand_in, dict)
    assert len(pickle.loads(pickle.dumps(stand_in))) == 1
    assert made(stand_in) is made(stand_in)
    assert made(7) == 7
    assert len(asked) == 1
    model = Remade(lambda: torch.nn.Linear(3, 2))
    assert model(torch.ones(1, 3)).shape == (1, 2)
    assert isinstance(model, torch.nn.Module)


def test_copies_of_another_life_that_nobody_asked_for_again_stay(tmp_path) -> None:
    copies = Copies(tmp_path, keep=1)
    digest = copies.write(b"state")
    Copies(tmp_path, keep=1).prune()
    assert copies.path(digest).exists()
