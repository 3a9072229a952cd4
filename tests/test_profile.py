"""Where the time of a step goes: what is measured, the sentence on the bottleneck, and traces of steps."""

from __future__ import annotations

import json
import os
import secrets
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from programs import CREATORS
from test_spmd import launch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from torchtrainer import CheckpointConfig, InvalidArgumentError, TrainingOperator
from torchtrainer.observe.bottleneck import PHASES, RankTimes, TrainingFacts, bottleneck, slowest
from torchtrainer.observe.history import History, read_history
from torchtrainer.observe.plot import curves_of
from torchtrainer.train.timers import TimerCollection

STEPS = 8
"""Steps of a pass for each of two ranks."""

# The sentence


def times(rank: int = 0, *, pid: int | None = None, steps: int = 10, **milliseconds: float) -> RankTimes:
    """A rank whose step has these parts, in ms."""
    seconds = {f"{phase}_s": milliseconds.get(phase, 0.0) / 1e3 for phase in PHASES}
    at = {"rank": rank, "pid": 100 + rank if pid is None else pid, "host": "a", "device": "cpu", "steps": steps}
    return RankTimes(**at, wall_s=sum(seconds.values()), **seconds)


def alike(ranks: int = 2, **milliseconds: float) -> list[RankTimes]:
    return [times(rank, **milliseconds) for rank in range(ranks)]


COMPUTING = {"forward": 10, "backward": 20}
SLOW_DATA = {"data": 78, "forward": 10, "backward": 10, "exchange": 1, "other": 1}
BIG = TrainingFacts(gradient_bytes=180_000_000)

SENTENCES = {
    "slow loader": (
        alike(**SLOW_DATA),
        {},
        "78 % of the step is waiting for data: raise the loader's num_workers, now 0",
    ),
    "slow loader with workers": (alike(**SLOW_DATA), {"num_workers": 2}, "raise the loader's num_workers, now 2"),
    "one rank alone": (alike(1, **SLOW_DATA), {}, "78 % of the step is waiting for data"),
    "slow stream": (alike(**SLOW_DATA), {"num_workers": None, "loader": "Shards"}, "the loader is a Shards"),
    "slow rank": (
        [times(0, **COMPUTING, exchange=21), times(1, forward=21, backward=20, exchange=1)],
        {},
        "rank 0 waits 39 % of the step for rank 1 (pid 101, host a): its forward takes 2.1 x the median of the others",
    ),
    "slow rank of four": (
        [*(times(rank, **COMPUTING, exchange=41) for rank in range(3)), times(3, forward=10, backward=60, exchange=1)],
        {},
        "the other ranks wait 56 % of the step for rank 3 (pid 103, host a): its backward takes 3.0 x the median",
    ),
    "two slow ranks of four": (
        [
            *(times(rank, **COMPUTING, exchange=41) for rank in range(2)),
            *(times(rank, forward=50, backward=20, exchange=1) for rank in (2, 3)),
        ],
        {},
        "wait 56 % of the step for rank 2 (pid 102, host a) and 1 more process: its forward takes 5.0 x",
    ),
    "slow loader of one rank": (
        [times(0, data=1, **COMPUTING, exchange=80), times(1, data=80, **COMPUTING, exchange=1)],
        {},
        "for rank 1 (pid 101, host a), which waits 80 ms for its data, the others 1 ms: raise the loader's num_workers",
    ),
    "slow in a part that the others hardly have": (
        [times(0, forward=0.1, exchange=50), times(1, forward=50, exchange=0.1)],
        {},
        "its forward takes 50 ms, that of the others 0.1 ms",
    ),
    "slow code of the operator's own": (
        [times(0, other=10, exchange=30), times(1, other=40)],
        {"own_hooks": ("train_batch",)},
        "its own train_batch takes 4.0 x the median of the others",
    ),
    "process with more ranks than others": (
        [
            times(0, pid=7, forward=10, exchange=11),
            times(1, pid=8, forward=20, exchange=1),
            times(2, pid=8, forward=20, exchange=1),
        ],
        {},
        "rank 0 waits 48 % of the step for ranks 1 and 2 (pid 8, host a): it carries 2 ranks",
    ),
    "slow loader everywhere and a little slower in one": (
        [times(0, data=70, exchange=11, **COMPUTING), times(1, data=80, exchange=1, **COMPUTING)],
        {},
        "63 % of the step is waiting for data",
    ),
    "big exchange": (
        alike(**COMPUTING, exchange=30),
        {"gradient_bytes": 180_000_000},
        "50 % of the step is the exchange of 180 MB of gradients: accumulate=2, larger batches or comm_hook=",
    ),
    "big exchange through memory": (
        alike(**COMPUTING, exchange=30),
        {"gradient_bytes": 180_000_000, "through_memory": True},
        "50 % of the step is the exchange of 180 MB of gradients: accumulate=2 or larger batches would reduce it",
    ),
    "big exchange that is compressed": (
        alike(**COMPUTING, exchange=30),
        {"gradient_bytes": 180_000_000, "comm_hook": "bf16", "accumulate": 4},
        "gradients: accumulate=8 or larger batches would reduce it",
    ),
    "exchange that waits in turn": (
        alike(**COMPUTING, exchange=30),
        {"gradient_bytes": 10_000},
        "exchanging only 10 kB of gradients: the ranks wait for each other in turn",
    ),
    "optimizer": (
        alike(**COMPUTING, optimizer=30),
        {},
        "50 % of the step is the optimizer: fused=True or larger batches",
    ),
    "optimizer that is fused": (alike(**COMPUTING, optimizer=30), {"fused": True}, "the optimizer: larger batches"),
    "small optimizer": (alike(**COMPUTING, optimizer=8), {}, "79 % of the step is computing"),
    "checkpoints": (alike(**COMPUTING, snapshot=30), {}, "50 % of the step is copying state for checkpoints"),
    "copies": (alike(**COMPUTING, copy=30), {}, "copying batches to the device: pin_memory=True"),
    "copies from pinned memory": (alike(**COMPUTING, copy=30), {"pinned": True}, "to the device: smaller types"),
    "unmeasured code": (
        alike(data=1, other=30),
        {"own_hooks": ("train_batch",)},
        "97 % of the step is in parts of the operator's own train_batch that are not measured",
    ),
    "tiny model": (alike(forward=1, backward=1, other=3), {}, "60 % of the step is the loop around a model"),
    "computing": (
        alike(forward=30, backward=61, other=9),
        {},
        '91 % of the step is computing, which is what the hardware is for; precision="bf16" or compile=True may make it',
    ),
    "computing as fast as it can": (alike(**COMPUTING), {"precision": "bf16", "compiled": True}, "the hardware is for"),
    "no step": (alike(steps=0), {}, "no step was taken"),
    "nobody": ([], {}, "no step was taken"),
}


@pytest.mark.parametrize(("ranks", "facts", "expected"), SENTENCES.values(), ids=SENTENCES)
def test_the_sentence_names_the_bottleneck(ranks, facts, expected) -> None:
    sentence = bottleneck(ranks, TrainingFacts(**facts))
    assert expected in sentence
    assert "\n" not in sentence
    assert not sentence.endswith(".")


def test_the_slowest_rank_has_most_to_do_besides_the_exchange() -> None:
    assert slowest([times(0, forward=1, exchange=90), times(1, data=80, exchange=1)]).rank == 1


# Timers


def test_timers_that_are_off_share_one_block_that_does_nothing() -> None:
    timers = TimerCollection()
    assert timers.record("fwd") is timers.record("grad")
    with timers.record("fwd"):
        timers.push("sync", 1.0)
    assert timers.stats() == {}


def test_a_phase_inside_another_counts_once() -> None:
    timers = TimerCollection()
    timers.enable()
    with timers.record("grad"):
        timers.push("sync", 100.0)  # more than the block around it takes
        with timers.record("of the user's own"):
            pass
    phases = timers.phases()
    assert phases["exchange"] == 100.0
    total = timers.total("grad")
    assert total is not None
    assert phases["backward"] == total - 100.0
    assert timers.total("fwd") is None


def test_an_error_in_a_phase_leaves_the_timers_usable() -> None:
    timers = TimerCollection()
    timers.enable()
    with pytest.raises(ValueError, match="inside"), timers.record("grad"), timers.record("sync"):
        raise ValueError("inside")
    with timers.record("fwd"):
        pass
    assert set(timers.stats()) == {"mean_fwd_s"}


# Trainings


def model_creator(config):
    return torch.nn.Linear(config.get("width", 20), config.get("width", 5))


def data_creator(config):
    if "width" in config:
        x = torch.randn(2 * STEPS, config["width"])
        return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=1)
    samples = (
        SlowSamples() if config.get("slow_data") else TensorDataset(torch.randn(64, 20), torch.randint(0, 5, (64,)))
    )
    return DataLoader(samples, batch_size=4), DataLoader(TensorDataset(torch.randn(8, 20), torch.zeros(8).long()))


def optimizer_creator(model, config):
    return torch.optim.SGD(model.parameters(), lr=0.01)


class SlowSamples(Dataset):
    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, index):
        time.sleep(0.003)
        return torch.full((20,), float(index)), index % 5


class SlowOnRankOne(TrainingOperator):
    """Its model takes long on rank 1."""

    def setup(self, config):
        if self.world_rank == 1:
            self.model.register_forward_pre_hook(lambda module, inputs: burn(0.02))


class OwnStep(TrainingOperator):
    """Measures nothing of its step, which takes long on rank 1."""

    def train_batch(self, batch, batch_info):
        x, y = batch
        if self.world_rank == 1:
            burn(0.02)
        self.optimizer.zero_grad()
        loss = self.criterion(self.model(x), y)
        loss.backward()
        self.optimizer.step()
        return {"train_loss": loss.item(), "num_samples": len(y)}


class FailsInStepTwo(TrainingOperator):
    def train_batch(self, batch, batch_info):
        if self.world_rank == 1 and self.global_step == 1:
            raise ValueError("the second step")
        return super().train_batch(batch, batch_info)


def burn(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


@pytest.fixture
def make(trainers):
    """Makes trainers that are shut down at the end of the test."""
    return partial(
        trainers,
        model_creator=model_creator,
        data_creator=data_creator,
        optimizer_creator=optimizer_creator,
        loss_creator=torch.nn.CrossEntropyLoss,
        num_workers=2,
        run_dir=None,
    )


PLANTED = {
    "slow loader": ({"config": {"slow_data": True}}, ["waiting for data: raise the loader's num_workers, now 0"]),
    "slow rank": ({"training_operator_cls": SlowOnRankOne}, ["rank 0 waits", "for rank 1 (pid", "its forward takes"]),
    "slow rank in code of its own": (
        {"training_operator_cls": OwnStep},
        ["for rank 1 (pid", "its own train_batch takes"],
    ),
    "big exchange": ({"config": {"width": 3000}}, ["the exchange of 36 MB of gradients"]),
}


@pytest.mark.parametrize(("arguments", "expected"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bottleneck_is_named(make, arguments, expected) -> None:
    profile = make(**arguments).train(profile=True)["profile"]
    assert [part for part in expected if part not in profile["bottleneck"]] == [], profile


KINDS = {
    "through memory": {},
    "with a step of its own": {"training_operator_cls": OwnStep},
    "without an exchange of ours": {"wrap_ddp": False},
    "several in this process": {"use_local": True},
    "one": {"num_workers": 1},
}


@pytest.mark.parametrize("arguments", KINDS.values(), ids=KINDS)
def test_a_profile_says_for_each_rank_where_its_steps_went(make, arguments) -> None:
    trainer = make(**arguments)
    ranks = arguments.get("num_workers", 2)
    profile = trainer.train(profile=True)["profile"]
    assert [row["rank"] for row in profile["ranks"]] == list(range(ranks))
    for row in profile["ranks"]:
        assert row["steps"] == 16 // ranks
        assert (row["device"], row["host"]) == ("cpu", os.uname().nodename)
        assert all(row[f"{phase}_s"] >= 0 for phase in PHASES)
        assert sum(row[f"{phase}_s"] for phase in PHASES) == pytest.approx(row["wall_s"])
    pids = [process.pid for process in trainer.status().processes]
    assert {row["pid"] for row in profile["ranks"]} == set(pids)
    assert profile["samples_per_s"] > 0
    assert profile["wall_s"] == max(row["wall_s"] for row in profile["ranks"])
    assert profile["slowest"]["pid"] == profile["ranks"][profile["slowest"]["rank"]]["pid"]
    assert profile["mean_train_epoch_s"] > 0
    assert json.loads(json.dumps(profile)) == profile
    assert "profile" not in trainer.train()
    assert all(name.startswith("mean_") for name in trainer.validate(profile=True)["profile"])


def test_results_of_single_ranks_have_the_whole_profile(make) -> None:
    first, second = (one["profile"] for one in make().train(profile=True, reduce_results=False))
    assert first["ranks"] == second["ranks"]
    assert first["bottleneck"] == second["bottleneck"]
    assert first["mean_fwd_s"] != second["mean_fwd_s"]


def test_a_call_without_steps_has_a_profile(make) -> None:
    profile = make().train(num_steps=0, profile=True)["profile"]
    assert (profile["bottleneck"], profile["samples_per_s"]) == ("no step was taken", 0.0)


def test_checkpoints_show_in_the_profile(make, tmp_path) -> None:
    trainer = make(run_dir=tmp_path / "run", checkpoint=CheckpointConfig(every_steps=2, asynchronous=False))
    assert all(row["snapshot_s"] > 0 for row in trainer.train(profile=True)["profile"]["ranks"])


def test_the_history_has_the_profile_beside_the_metrics(make, tmp_path) -> None:
    history = make(run_dir=tmp_path / "run").fit(2, profile=True)
    assert isinstance(history, History)
    assert all(entry["profile"]["bottleneck"] for entry in history)
    assert "profile" not in history._repr_html_()
    assert {f"{curve.side}_{curve.metric}" for curve in curves_of(history)} == {
        "train_loss",
        "val_loss",
        "val_accuracy",
    }
    assert len(history.to_pandas()) == 2
    lines = [line for line in read_history(tmp_path / "run" / "history.jsonl") if line["kind"] == "train"]
    assert [line["metrics"]["profile"] for line in lines] == [entry["profile"] for entry in history]
    assert all(type(seconds) is float for line in lines for seconds in line["phases"].values())


LAUNCHED = (
    CREATORS
    + """
    import json
    trainer = TorchTrainer(**CREATORS, run_dir=None)
    profile = trainer.train(profile=True)["profile"]
    traces = trainer.profile_steps(2, path="traces")
    if os.environ["RANK"] == "0":
        print(json.dumps([[row["rank"] for row in profile["ranks"]], len({row["pid"] for row in profile["ranks"]}),
                          profile["bottleneck"], len(traces.paths)]))
    """.replace("\n    ", "\n")
)


@pytest.mark.slow
def test_ranks_of_a_launcher_have_the_same_profile(tmp_path) -> None:
    programs = launch("by hand", tmp_path, LAUNCHED)
    assert all(program.ended_well() for program in programs), [program.errors for program in programs]
    ranks, pids, sentence, traces = json.loads(programs[0].output)
    assert (ranks, pids, traces) == ([0, 1], 2, 2)
    assert "of the step" in sentence
    assert [program.errors.count("2 traces are in") for program in programs] == [1, 0]
    assert len(list((tmp_path / "traces").iterdir())) == 2


# Traces


def spans_of(path: str) -> Counter[str]:
    """How often each named range is in a trace."""
    events = json.loads(Path(path).read_text())["traceEvents"]
    return Counter(event["name"] for event in events if event.get("cat") == "user_annotation")


def weights(trainer) -> list[torch.Tensor]:
    return list(trainer.get_model().state_dict().values())


def test_every_process_writes_a_trace_of_its_steps(make, tmp_path, capsys) -> None:
    trainer = make(run_dir=tmp_path / "run")
    trainer.train(num_steps=1)
    found = trainer.profile_steps(3)
    folder = tmp_path / "run" / "traces"
    assert found.paths == tuple(str(folder / f"step_1_rank_{rank}.json") for rank in (0, 1))
    assert sorted(folder.iterdir()) == [Path(path) for path in found.paths]
    for path in found.paths:
        spans = spans_of(path)
        assert {name for name in spans if name.startswith("step ")} == {"step 2", "step 3", "step 4"}
        assert {spans[name] for name in ("data", "forward", "backward", "optimizer")} == {3}
        assert spans["exchange"] > 0
    assert (found.metrics["batch_count"], found.metrics["num_samples"]) == (3, 24)
    assert "profile" not in found.metrics
    assert f"2 traces are in {folder}: open them at https://ui.perfetto.dev" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["through memory", "with a step of its own", "several in this process"])
def test_traced_steps_train_as_others_do(make, tmp_path, kind) -> None:
    traced, plain = make(**KINDS[kind]), make(**KINDS[kind])
    found = traced.profile_steps(5, path=tmp_path / "deep" / "traces")
    assert found.metrics == plain.train(num_steps=5)
    assert traced.train() == plain.train()
    assert all(torch.equal(a, b) for a, b in zip(weights(traced), weights(plain), strict=True))
    assert "exchange" in spans_of(found.paths[0])
    assert Path(found.paths[0]).name == "step_0_rank_0.json"


def test_a_process_with_several_ranks_writes_one_trace(make, tmp_path) -> None:
    (path,) = make(use_local=True).profile_steps(2, path=tmp_path).paths
    assert spans_of(path)["forward"] == 4


@pytest.mark.parametrize("n", [0, -1, 2.0, True, None, "3"])
def test_profile_steps_wants_a_number_of_steps(make, tmp_path, n) -> None:
    with pytest.raises(InvalidArgumentError, match="at least 1"):
        make(use_local=True).profile_steps(n, path=tmp_path)


def test_profile_steps_wants_a_place_for_the_traces(make, tmp_path) -> None:
    trainer = make(use_local=True)
    with pytest.raises(InvalidArgumentError, match="run_dir is None: pass path="):
        trainer.profile_steps(1)
    (tmp_path / "file").touch()
    with pytest.raises(InvalidArgumentError, match="cannot write to path="):
        trainer.profile_steps(1, path=tmp_path / "file")
    assert trainer.train(num_steps=1)["batch_count"] == 1


def test_a_trace_that_cannot_be_written_does_not_undo_the_steps(make, tmp_path, capsys) -> None:
    trainer = make(num_workers=1)
    (tmp_path / "step_0_rank_0.json").mkdir()  # in its place
    found = trainer.profile_steps(2, path=tmp_path)
    assert (found.paths, found.metrics["batch_count"]) == ((), 2)
    assert f"a trace could not be written to {tmp_path}" in capsys.readouterr().err
    assert trainer.profile_steps(1, path=tmp_path).paths == (str(tmp_path / "step_2_rank_0.json"),)


def test_an_error_in_a_traced_step_comes_back(make, tmp_path) -> None:
    trainer = make(training_operator_cls=FailsInStepTwo)
    with pytest.raises(ValueError, match="the second step"):
        trainer.profile_steps(3, path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_script_that_is_started_again_gets_the_recorded_traces(make, tmp_path) -> None:
    run_dir = tmp_path / secrets.token_hex(4)
    first = make(run_dir=run_dir)
    expected, trained = first.profile_steps(3), first.train(num_steps=2)
    end = weights(first)
    first.shutdown()
    again = make(run_dir=run_dir, resume=True)
    assert again.profile_steps(3) == expected
    assert again.train(num_steps=2) == trained
    assert again.status().step == 5
    assert all(torch.equal(a, b) for a, b in zip(weights(again), end, strict=True))
