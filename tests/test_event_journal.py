"""The journal of the driver's machine: written by a run, replayed to the same orders, and told to be damaged where it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import test_driver_simulation as simulation

from torchtrainer.config import Timeouts
from torchtrainer.control.messages import Failure, WorkerReady, WorkerStarted
from torchtrainer.driver.event_journal import FILE_NAME, MAX_RECENT, OLDER_NAME, EventJournal
from torchtrainer.driver.events import CallRequested
from torchtrainer.driver.replay import UnreadableJournalError, replay
from torchtrainer.driver.states import Machine
from torchtrainer.errors import EngineError
from torchtrainer.launcher.cli import main

JOURNALS = sorted(Path(__file__).with_name("journals").glob("*.jsonl"))
SECRET = "hunter2"


@pytest.mark.parametrize("path", JOURNALS, ids=lambda path: path.stem)
def test_a_run_of_the_past_is_decided_as_it_was(path: Path) -> None:
    replayed = replay(path)
    assert replayed.events
    assert replayed.difference is None


@pytest.mark.parametrize("seed", range(30))
def test_whatever_is_lost_its_journal_leads_to_the_same_orders(seed: int, tmp_path, monkeypatch) -> None:
    journal = EventJournal(tmp_path)
    monkeypatch.setattr(simulation, "handle", journal.handle)
    fleet = simulation.play(seed)
    assert journal.flush() == ""
    replayed = replay(tmp_path / FILE_NAME)
    assert replayed.difference is None
    assert replayed.events >= fleet.world_size


def started(journal: EventJournal) -> Machine:
    """A group of one worker, built."""
    machine = Machine.start(group="g", world_size=1, timeouts=Timeouts(), hang_timeout_s=9.0, now=1.0)
    ready = WorkerReady(group="g", worker=0, device="cpu", facts={"key": SECRET}, modules=[SECRET], record=[SECRET])
    for event in (WorkerStarted(group="g", worker=0, pid=7), ready):
        machine, _ = journal.handle(machine, event, 2.0)
    return machine


def test_nothing_of_the_user_is_written_and_the_file_is_theirs_alone(tmp_path) -> None:
    journal = EventJournal(tmp_path)
    machine = started(journal)
    machine, _ = journal.handle(machine, CallRequested(method="apply", blob=SECRET.encode()), 3.0)
    failure = Failure(
        group="g", worker=0, rank=0, call=1, kind="error", type_name="E", text=SECRET, traceback=SECRET, phase="p",
        step=0, blob=SECRET.encode(),
    )  # fmt: skip
    journal.handle(machine, failure, 4.0)
    journal.flush()
    path = tmp_path / FILE_NAME
    assert SECRET not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert replay(path).events == 4


def test_a_long_journal_goes_on_in_a_new_file_which_can_be_replayed(tmp_path) -> None:
    journal = EventJournal(tmp_path, limit_bytes=1)
    machine = started(journal)
    journal.flush()
    journal.handle(machine, CallRequested(method="train", blob=b""), 3.0)
    journal.flush()
    assert not (tmp_path / FILE_NAME).exists()
    assert replay(tmp_path / OLDER_NAME).events == 1


def test_a_journal_that_cannot_be_written_is_told_once(tmp_path) -> None:
    journal = EventJournal(tmp_path / "missing")
    machine = started(journal)
    assert "cannot be written" in journal.flush()
    journal.handle(machine, CallRequested(method="train", blob=b""), 3.0)
    assert journal.flush() == ""


def test_a_broken_invariant_is_told_with_the_events_that_led_to_it(tmp_path) -> None:
    journal = EventJournal(tmp_path)
    machine = started(journal)
    request = CallRequested(method="train", blob=b"")
    machine, _ = journal.handle(machine, request, 3.0)
    with pytest.raises(EngineError, match="invariant of the driver is broken") as raised:
        journal.handle(machine, request, 4.0)
    text = str(raised.value)
    assert str(tmp_path / FILE_NAME) in text
    assert text.index("WorkerReady") < text.rindex("CallRequested")
    assert text.count("\n") <= MAX_RECENT + 1
    assert replay(tmp_path / FILE_NAME).difference is None


def test_the_command_says_the_same_or_where_the_first_difference_is(tmp_path, capsys) -> None:
    journal = EventJournal(tmp_path)
    machine = started(journal)
    journal.handle(machine, CallRequested(method="train", blob=b""), 3.0)
    journal.flush()
    path = tmp_path / FILE_NAME
    assert main(["replay-driver", str(path)]) == 0
    assert "the same orders" in capsys.readouterr().out
    lines = path.read_text().splitlines()
    changed = {**json.loads(lines[-1]), "orders": []}
    path.write_text("\n".join([*lines[:-1], json.dumps(changed), ""]))
    assert main(["replay-driver", str(path)]) == 1
    assert f"line {len(lines)}, at 3.000 s" in capsys.readouterr().out


HEAD = '{"journal": 1, "machine": %s}\n'
DAMAGED = {
    "empty": ("", "is empty"),
    "cut": ('{"journal": 1, "mach', "cut off"),
    "no JSON": ("hello\n", "line 1"),
    "no object": ("[1]\n", "expected an object"),
    "nested": ("[" * 100_000 + "\n", "line 1"),
    "another form": ('{"journal": 9, "version": "9.9"}\n', "form 9"),
    "no beginning": ('{"at_s": 1.0, "event": {"is": "Tick"}, "orders": []}\n', "no line before it"),
    "no machine": (HEAD % "{}", "expected Machine"),
    "another class": (HEAD % '{"is": "StartGroup"}', "expected Machine"),
    "an unknown field": (HEAD % '{"is": "Machine", "open": 1}', "no field"),
    "a wrong type": (HEAD % '{"is": "Machine", "group": 3}', "Machine.group"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_journal_is_refused_with_the_line(name: str, tmp_path, capsys) -> None:
    content, told = DAMAGED[name]
    path = tmp_path / "sent.jsonl"
    path.write_text(content)
    with pytest.raises(UnreadableJournalError, match=told):
        replay(path)
    assert main(["replay-driver", str(path)]) == 2
    assert told in capsys.readouterr().err


def test_a_file_that_is_no_regular_one_or_not_there_is_refused(tmp_path) -> None:
    (tmp_path / "link").symlink_to("/etc/hostname")
    for path in (tmp_path / "link", tmp_path, tmp_path / "none"):
        assert main(["replay-driver", str(path)]) == 2
