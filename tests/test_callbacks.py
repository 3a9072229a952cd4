"""What callbacks are told of a whole run: its start and its end, wherever the ranks are."""

from __future__ import annotations

import sys

import pytest
from programs import CREATORS, run_program

from torchtrainer import Callback
from torchtrainer.observe.events import CALLBACK_METHODS, Callbacks, EpochEvent

RUN = """
from torchtrainer import Callback, CheckpointConfig

class Log(Callback):
    def on_run_start(self, run):
        print("start", run.config, run.run_dir == os.path.abspath("run") or run.run_dir, run.resumed_step, run.world_size)
        if os.environ["MODE"] == "refuse":
            raise LookupError("no such experiment")

    def on_epoch_end(self, event):
        print("epoch", event.epoch, event.step)
        if os.environ["MODE"] == "fail":
            raise LookupError("the server is gone")

    def on_run_end(self, event):
        print("end", event.reason)

local = sys.argv[1] == "use_local"
CREATORS.update(num_workers=1 if local else 2, use_local=local, config={"lr": 0.1})
with TorchTrainer(
    callbacks=[Log()], run_dir=None if os.environ["MODE"] == "forget" else "run", checkpoint=CheckpointConfig(every_steps=2), **CREATORS
) as trainer:
    trainer.train()
    trainer.train()
"""
LAUNCHER = (sys.executable, "-m", "torchtrainer", "run", "--nproc-per-node", "2")
START = "start {{'lr': 0.1}} True {} {}"
STEPS = {"local": 8, "use_local": 16, "launched": 8}


@pytest.mark.parametrize("where", STEPS)
def test_the_start_says_what_the_run_is_and_from_where_it_goes_on(where, tmp_path) -> None:
    python = LAUNCHER if where == "launched" else ()
    ranks, steps = 1 if where == "use_local" else 2, STEPS[where]
    first = run_program(tmp_path, CREATORS + RUN, where, MODE="fail", python=python)
    assert first.process.returncode != 0
    assert "LookupError: the server is gone" in first.errors
    assert first.output.splitlines() == [START.format(None, ranks), f"epoch 1 {steps}", "end failed"]
    second = run_program(tmp_path, CREATORS + RUN, where, MODE="succeed", python=python)
    assert second.process.returncode == 0, second.errors
    told = second.output.splitlines()
    assert told[0] in [START.format(step, ranks) for step in range(2, steps + 1, 2)], "that of a checkpoint"
    assert told[-2:] == [f"epoch 2 {2 * steps}", "end finished"]


def test_a_run_that_keeps_nothing_starts_without_a_directory_and_one_that_is_refused_leaves_nothing(tmp_path) -> None:
    kept = run_program(tmp_path, CREATORS + RUN, "local", MODE="forget")
    assert kept.output.splitlines()[0] == "start {'lr': 0.1} None None 2"
    refused = run_program(tmp_path, CREATORS + RUN, "local", MODE="refuse")
    assert refused.process.returncode == 1
    assert "LookupError: no such experiment" in refused.errors
    assert refused.output.splitlines() == ["start {'lr': 0.1} True None 2", "end failed"]
    refused.assert_nothing_left()


def test_a_subclass_is_called_for_what_it_defines_alone() -> None:
    class One(Callback):
        def on_epoch_end(self, event):
            seen.append(event.epoch)

    seen: list[int] = []
    callbacks = Callbacks([One()])
    for name in CALLBACK_METHODS:
        getattr(callbacks, name)(EpochEvent(epoch=3, step=1, metrics={}))
    assert seen == [3]
    assert [name for name, calls in callbacks._methods.items() if calls] == ["on_epoch_end"]
