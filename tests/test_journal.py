"""The record of calls: what was done is not done again, and a script that asks for something else is told."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from torchtrainer import CallMismatchError, RunDirectoryError
from torchtrainer.checkpoint.journal import Journal, is_json
from torchtrainer.driver.fingerprint import fingerprint
from torchtrainer.driver.run_record import (
    RunRecord,
    RunState,
    ScriptRun,
    find_previous,
    others_unfinished,
)


def again(root: Path) -> Journal:
    return Journal(root, Journal.read(root), writes=True)


def test_results_come_back_bit_for_bit(tmp_path) -> None:
    journal = Journal(tmp_path, [], writes=True)
    results = [{"loss": 0.1 + 0.2, "nan": math.nan, "inf": -math.inf, "n": 3, "ok": True, "list": [1, None, "x"]}, None]
    for number, result in enumerate(results):
        assert journal.expect(f"call({number})") is None
        assert journal.add(f"call({number})", result, step=number, epoch=0) is None
    replayed = again(tmp_path)
    for number, result in enumerate(results):
        found = replayed.expect(f"call({number})")
        assert found is not None
        assert repr(found.result) == repr(result)
        assert found.step == number
    assert not replayed.replaying
    assert replayed.expect("more()") is None


def test_tensors_come_back_from_a_file(tmp_path) -> None:
    state = {"models": [{"w": torch.randn(3)}], 5: (1, 2)}
    Journal(tmp_path, [], writes=True).add("state_dict()", state, step=1, epoch=1)
    found = again(tmp_path).expect("state_dict()")
    assert found is not None
    assert torch.equal(found.result["models"][0]["w"], state["models"][0]["w"])  # type: ignore[index, call-overload]
    assert found.result[5] == (1, 2)


def test_what_cannot_be_recorded_is_said_at_once_and_when_it_is_needed(tmp_path) -> None:
    lost = Journal(tmp_path, [], writes=True).add("validate()", Path("here"), step=0, epoch=0)
    assert lost is not None
    assert "Path" in lost
    with pytest.raises(RunDirectoryError, match=r"validate\(\) returned a .*Path .*could not be recorded"):
        again(tmp_path).expect("validate()")


def test_another_call_is_an_error_that_names_both(tmp_path) -> None:
    Journal(tmp_path, [], writes=True).add("train()", {}, step=0, epoch=0)
    with pytest.raises(CallMismatchError) as caught:
        again(tmp_path).expect("validate()")
    assert "asks for validate() as call 1" in str(caught.value)
    assert "had train()" in str(caught.value)
    assert "resume=False" in str(caught.value)
    journal = again(tmp_path)
    journal.expect("train()")
    with pytest.raises(CallMismatchError, match=r"asks for validate\(\) as call 2 .* had train\(num_steps=3\)"):
        journal.expect("validate()", "train(num_steps=3)")


def test_a_torn_last_line_is_left_out_and_overwritten(tmp_path) -> None:
    Journal(tmp_path, [], writes=True).add("train()", {"a": 1}, step=1, epoch=1)
    with (tmp_path / "calls.jsonl").open("a") as file:
        file.write('{"call": "vali')
    journal = again(tmp_path)
    journal.expect("train()")
    assert journal.expect("validate()") is None
    journal.add("validate()", {"b": 2}, step=1, epoch=1)
    assert [line["call"] for line in Journal.read(tmp_path)] == ["train()", "validate()"]


def test_a_line_that_is_no_record_is_an_error(tmp_path) -> None:
    (tmp_path / "calls.jsonl").write_text("what is this\n")
    with pytest.raises(RunDirectoryError, match="is corrupt"):
        Journal.read(tmp_path)


def test_a_process_that_only_follows_writes_nothing(tmp_path) -> None:
    journal = Journal(tmp_path, [], writes=False)
    journal.add("train()", {}, step=1, epoch=1)
    assert journal.index == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", [(1, 2), {1: 2}, torch.ones(1), {"a": {1}}, 1 + 2j, b"x"])
def test_what_json_would_change_is_not_json(value) -> None:
    assert not is_json(value)


# What a run directory says of its run


def record(
    run: str = "a", ordinal: int = 1, state: RunState = "running", started_s: float = 0.0, **config
) -> RunRecord:
    return RunRecord(
        script_run=run,
        ordinal=ordinal,
        state=state,
        pid=1,
        started_s=started_s,
        notebook=False,
        parts=fingerprint({"config": config, "model_creator": lambda config: config}),
        world_size=2,
    )


def write(runs: Path, name: str, one: RunRecord) -> Path:
    path = runs / name
    path.mkdir(parents=True)
    one.write(path)
    return path


def never(path: Path) -> bool:  # stands for a question about a path
    return False


def unexpected(problem: str) -> None:
    pytest.fail(problem)


def test_a_record_comes_back(tmp_path) -> None:
    one = record(lr=0.1, layers=[1, 2])
    one.write(tmp_path)
    assert RunRecord.read(tmp_path) == one
    assert RunRecord.read(tmp_path / "nothing") is None


def test_the_latest_start_of_the_script_counts(tmp_path) -> None:
    assert find_previous(tmp_path, record("b"), live=never, on_problem=unexpected) is None
    old = write(tmp_path, "old", record("old", state="preempted", started_s=1.0))
    new = write(tmp_path, "new", record("new", state="finished", started_s=2.0))
    found = find_previous(tmp_path, record("b"), live=never, on_problem=unexpected)
    assert found is not None
    assert found[0] == new
    assert not others_unfinished(old, record("old", state="preempted"), unexpected)


def test_the_trainers_of_a_script_are_gone_on_with_together(tmp_path) -> None:
    first = write(tmp_path, "1", record("a", 1, "finished", 1.0))
    second = write(tmp_path, "2", record("a", 2, "preempted", 2.0))
    found = [find_previous(tmp_path, record("b", ordinal), live=never, on_problem=unexpected) for ordinal in (1, 2, 3)]
    assert [pair and pair[0] for pair in found] == [first, second, None]
    assert others_unfinished(first, record("a", 1, "finished"), unexpected)
    assert not others_unfinished(second, record("a", 2, "preempted"), unexpected)


def test_a_live_run_is_left_alone(tmp_path) -> None:
    write(tmp_path, "one", record())
    another = replace(record("b"), pid=2)
    assert find_previous(tmp_path, another, live=lambda _: True, on_problem=unexpected) is None


def test_a_trainer_of_this_process_is_not_a_live_run_of_another(tmp_path) -> None:
    write(tmp_path, "1", record("a", 1))
    write(tmp_path, "2", record("a", 2, "preempted"))
    assert (
        find_previous(tmp_path, record("a", 2), live=lambda path: path.name == "1", on_problem=unexpected) is not None
    )


def test_a_record_of_a_newer_version_is_named(tmp_path) -> None:
    one = record()
    one.write(tmp_path)
    text = (tmp_path / "run.json").read_text().replace('"format": 2', '"format": 3')
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunDirectoryError, match=r"format 3.*up to 2"):
        RunRecord.read(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": 1}'])
def test_a_record_that_is_none_is_an_error(tmp_path, text) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(RunDirectoryError, match="is corrupt"):
        RunRecord.read(tmp_path)


def test_a_difference_is_named_with_both_values() -> None:
    assert record(lr=0.1).difference(record(lr=0.1)) is None
    assert record(lr=0.1).difference(record(lr=0.2)) == "config['lr'] was 0.1 and is 0.2"
    assert record(lr=0.1).difference(record()) == "config['lr'] was 0.1 and is not there"


def test_trainers_are_counted() -> None:
    run = ScriptRun.new()
    assert [run.next_ordinal(), run.next_ordinal()] == [1, 2]
    assert run.name != ScriptRun.new().name
