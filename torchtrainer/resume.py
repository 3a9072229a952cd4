"""Opens the directory of a run: a fresh one, or that of a run to resume, with all that is known about it."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torchtrainer.checkpoint.copies import remove_copies
from torchtrainer.checkpoint.journal import Journal, put_call_files
from torchtrainer.checkpoint.remote import RemoteStore
from torchtrainer.checkpoint.store import CheckpointStore, newest_in, next_generation
from torchtrainer.checkpoint.verified import Checkpoint, verify
from torchtrainer.config import CheckpointConfig, Timeouts
from torchtrainer.driver.fingerprint import differences
from torchtrainer.driver.run_dir import (
    RUNS,
    BorrowedRunDirectory,
    RunDirectory,
    automatic_root,
    check_run_dir,
    is_live,
    open_run_dir,
    program_name,
    telling_unusable,
)
from torchtrainer.driver.run_record import (
    RECORD,
    RESUMABLE,
    RunRecord,
    RunState,
    find_beside,
    find_previous,
    how_it_ends,
    others_unfinished,
    this_script_run,
    wanted_run,
)
from torchtrainer.engines.snapshots import CheckpointOrders
from torchtrainer.errors import CheckpointDamagedError, CheckpointError, ResumeError
from torchtrainer.observe.failures import counted, spell_age, taken_again
from torchtrainer.observe.notices import notice, notice_once, warn
from torchtrainer.process.own_files import RECORD_BYTES, printable, read_own
from torchtrainer.run_places import beside, checkpoints_of, kept_below, remote_url

FRESH = "pass resume=False to start anew"


_opened: list[OpenRun] = []


@atexit.register
def _remove_copies() -> None:
    """At the end of the script, when nobody will ask any more for the states that its runs returned."""
    for run in _opened:
        if run.record is not None and run.record.state in ("finished", "running") and how_it_ends() == "finished":
            remove_copies(run.directory.root)


@dataclass(kw_only=True)
class OpenRun:
    """A run whose directory is open.

    Attributes:
        directory: its files.
        record: what the directory says of it; None: nothing is kept, or another process keeps it.
        records: the calls that were made before.
        checkpoint: the state to continue from.
        checkpoints: where they are kept; None: nowhere.
        generation: of this life of the run.
        remote: where copies of the checkpoints are; None: nowhere.
        in_trouble: the user was told that the directory does not take what is to be kept.
    """

    directory: RunDirectory | BorrowedRunDirectory
    record: RunRecord | None = None
    records: list[dict[str, Any]]
    checkpoint: Checkpoint | None = None
    checkpoints: Path | None = None
    generation: int = 1
    remote: RemoteStore | None = None
    in_trouble: bool = False

    @property
    def keeps(self) -> bool:
        """Whether this process writes what is kept of the run."""
        return self.record is not None

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; None: there is none."""
        return None if self.checkpoints is None else newest_in(self.checkpoints, self.generation, warn)

    def orders(self, config: CheckpointConfig, timeouts: Timeouts, signals: Sequence[str]) -> CheckpointOrders | None:
        """Where and how the states of the run are kept."""
        if self.checkpoints is None:
            return None
        return CheckpointOrders(
            root=str(self.checkpoints),
            keep=config.keep,
            generation=self.generation,
            every_steps=config.every_steps,
            asynchronous=config.asynchronous,
            write_s=timeouts.write_s,
            run_dir=str(self.directory.root),
            remote=remote_url(config, self.directory.root),
            signals=list(signals),
        )

    def tell_trouble(self, text: str) -> None:
        """Tells of a run directory that does not take what is to be kept; once, as the rest follows from it."""
        if not self.in_trouble:
            self.in_trouble = True
            warn(text)

    def write_record(self) -> None:
        """Writes what the directory says of the run, here and where copies are.

        Raises:
            OSError, CheckpointWriteError: it could not be written.
        """
        if self.record is None:
            return
        self.record.write(self.directory.root)
        if self.remote is not None:
            self.remote.put_note(RECORD, read_own(self.directory.root / RECORD, RECORD_BYTES))

    def note_end(self) -> None:
        """The run is over; if nobody said how, it came to its end."""
        if self.record is not None and self.record.state == "running":
            self.note(how_it_ends(), step=self.record.step, epoch=self.record.epoch)

    def note(self, state: RunState, *, step: int, epoch: int) -> None:
        """Writes how the run stands. A disk that does not take it does not end the run."""
        if self.record is None or self.record.state == state == "running":
            return
        self.record = self.record.noted(state, step=step, epoch=epoch)
        try:
            self.write_record()
        except (OSError, CheckpointError) as error:
            self.tell_trouble(
                f"{self.directory.root} cannot be written to ({error}): resume may not find the run again"
            )


def open_run(
    run_dir: str | os.PathLike[str] | None,
    *,
    resume: bool | str,
    config: CheckpointConfig,
    reached: Mapping[str, Any],
    world_size: int,
    may_change: Sequence[str] = (),
) -> OpenRun:
    """Finds or makes the directory of a run, and reads what is there to continue with.

    Args:
        run_dir, resume, config: as `TorchTrainer` takes them.
        reached, world_size, may_change: as `wanted_run` takes them.

    Raises:
        RunDirectoryError: the directory cannot be used.
        ResumeError: ``resume=True``, and there is nothing to continue with, or something else.
    """
    check_run_dir(run_dir)
    if run_dir is None:
        if resume is True:
            raise ResumeError("resume=True needs a run_dir, got run_dir=None")
        return OpenRun(directory=open_run_dir(None), records=[])
    wanted = wanted_run(reached, world_size=world_size, may_change=may_change)
    path, previous = choose(run_dir, resume, wanted)
    if previous is None and resume is not False:
        path, previous = _choose_remote(config, run_dir, path, wanted)
    directory = open_run_dir(path)
    assert isinstance(directory, RunDirectory)
    try:
        opened = OpenRun(
            directory=directory,
            record=replace(wanted, asked="" if run_dir == "auto" else Path(run_dir).name),
            records=[],
            checkpoints=checkpoints_of(config, directory.root),
        )
        _find_generation(opened, config)
        if previous is not None:
            _take_over(opened, previous, config)
        with telling_unusable(path):
            opened.write_record()
    except BaseException:
        directory.close()
        raise
    _opened.append(opened)
    return opened


def choose(run_dir: str | os.PathLike[str], resume: bool | str, wanted: RunRecord) -> tuple[Path, RunRecord | None]:
    """Where the run lives, and the record of the run that it continues with.

    Raises:
        ResumeError: ``resume=True``, and there is nothing to continue with, or something else.
        RunDirectoryError: what is there was made by a newer version, or is no record.
    """
    if run_dir == "auto":
        found = None
        if resume is not False and not (wanted.notebook and resume == "auto"):
            runs = kept_below(Path(RUNS) / program_name())
            found = find_previous(runs, wanted, live=is_live, on_problem=notice_once)
        fresh = kept_below(automatic_root(datetime.now()))  # which looked for a free name in ./runs only
        return _judge(found, resume, wanted, beside(fresh) if os.path.lexists(fresh) else fresh)
    path = kept_below(Path(run_dir))
    if path.is_symlink():  # opening it refuses it, and nothing behind it is read
        return path, None
    RunRecord.read(path)
    found = find_beside(path, wanted, notice_once)
    live = path if is_live(path) else found[0] if found is not None and is_live(found[0]) else None
    if live is not None:  # opening it says by whom
        return live, None
    return _judge(found, resume, wanted, path if RunRecord.read(path) is None else beside(path))


def _judge(
    found: tuple[Path, RunRecord] | None, resume: bool | str, wanted: RunRecord, fresh: Path
) -> tuple[Path, RunRecord | None]:
    if found is None:
        if resume is True:
            raise ResumeError(f"resume=True, but there is no run to resume in {fresh.parent}: {FRESH}")
        return fresh, None
    path, record = found
    if resume is False:
        return fresh, None
    difference = record.difference(wanted)
    if resume is True:
        if difference is not None:
            raise ResumeError(
                f"the run in {printable(str(path))} cannot be resumed: {difference}. Restore it, name it in "
                f"may_change, or {FRESH}"
            )
        return path, record
    why = _why_not(path, record, wanted, difference)
    if why is None:
        return path, record
    how = (
        "resume=True resumes the old one"
        if difference is None
        else "to resume the old one, restore that, or name it in may_change"
    )
    notice(f"{path} is left as it is, because {why}; this run goes to {fresh} ({how})")
    return fresh, None


def _why_not(path: Path, record: RunRecord, wanted: RunRecord, difference: str | None) -> str | None:
    """Why ``resume="auto"`` does not continue with a run, or None."""
    if record.notebook or wanted.notebook:
        return "runs of notebooks are resumed only if you say so"
    if difference is not None:
        return difference
    if record.state not in RESUMABLE and not others_unfinished(path, record, notice_once):
        return f"it {_ENDED[record.state]}"
    return None


_ENDED = {"finished": "has finished", "interrupted": "was ended with Ctrl-C"}


def _choose_remote(
    config: CheckpointConfig, run_dir: str | os.PathLike[str], fresh: Path, wanted: RunRecord
) -> tuple[Path, RunRecord | None]:
    """A run that was cut off on another machine, whose disk is gone, if its checkpoints were copied."""
    if config.path is None or remote_url(config, fresh) is None or wanted.notebook:
        return fresh, None
    roots = [fresh]
    if run_dir == "auto":
        below = RemoteStore(
            f"{config.path.rstrip('/')}/{fresh.absolute().parent.name}", keep=config.keep, on_problem=warn
        )
        roots = [fresh.with_name(name) for name in reversed(below.children())]
    for root in roots:
        url = remote_url(config, root)
        told = RemoteStore(url, keep=config.keep, on_problem=warn).read_note(RECORD) if url is not None else None
        if told is None:
            continue
        record = RunRecord.parse(told, str(url))
        if record.ordinal != wanted.ordinal or root.exists():
            continue
        difference = record.difference(wanted)
        if difference is None and record.state in RESUMABLE:
            return root, record
        why = difference or f"it {_ENDED.get(record.state, 'goes on')}"
        if run_dir == "auto":
            return fresh, None
        raise ResumeError(f"{url} holds another run, and {why}: {FRESH} there, or give another run_dir")
    return fresh, None


def _find_generation(opened: OpenRun, config: CheckpointConfig) -> None:
    """The run writes under a generation that nobody had before, here or where copies are."""
    assert opened.checkpoints is not None
    opened.generation = next_generation(opened.checkpoints)
    url = remote_url(config, opened.directory.root)
    if url is not None:
        opened.remote = RemoteStore(url, keep=config.keep, on_problem=warn)
        opened.generation = max(opened.generation, opened.remote.next_generation())


def _take_over(opened: OpenRun, previous: RunRecord, config: CheckpointConfig) -> None:
    """Reads the journal and the newest checkpoint that fits it; the run goes on under the next generation."""
    assert opened.checkpoints is not None
    assert opened.record is not None
    root = opened.directory.root
    opened.records = Journal.read(root)
    this_script_run().name = previous.script_run
    changed = differences(previous.parts, opened.record.parts)
    opened.record = opened.record.after(previous)
    if opened.checkpoints.is_dir() or opened.remote is not None:
        store = CheckpointStore(opened.checkpoints, keep=config.keep, generation=opened.generation, on_problem=warn)
        opened.checkpoint = store.newest()
        _take_copy(opened, store)
    if opened.checkpoint is not None and opened.checkpoint.meta["index"] > len(opened.records):
        raise ResumeError(
            f"the run in {root} has a checkpoint of call {opened.checkpoint.meta['index'] + 1}, but only "
            f"{len(opened.records)} recorded calls: calls.jsonl was cut or replaced; {FRESH}"
        )
    _tell(opened, changed, reached=max(previous.step, opened.directory.steps_reached()))


def _take_copy(opened: OpenRun, store: CheckpointStore) -> None:
    """Fetches the newest copy, with the calls that were recorded by then, if it is newer than what is here."""
    if opened.remote is None:
        return
    for copy in opened.remote.all():
        if opened.checkpoint is not None and copy.manifest.identity <= opened.checkpoint.manifest.identity:
            return
        try:
            opened.checkpoint = opened.remote.download(copy, store)
        except CheckpointDamagedError as error:
            warn(f"a copy in {opened.remote.url} is damaged and is not used: {error}")
            continue
        put_call_files(opened.directory.root, opened.checkpoint)
        opened.records = Journal.read(opened.directory.root)
        return


def _tell(opened: OpenRun, changed: Sequence[str], reached: int) -> None:
    checkpoint, calls = opened.checkpoint, len(opened.records)
    again = reached - (checkpoint.step if checkpoint is not None else 0)
    if checkpoint is None and not calls and not again:
        return
    where = f"{counted(calls, 'call')} done"
    if checkpoint is not None:
        age_s = time.time() - checkpoint.path.stat().st_mtime
        where += f", state after step {checkpoint.step} saved {spell_age(age_s)} ago"
    if again > 0:
        where += f", {taken_again(again)}"
    allowed = f"; {', '.join(changed)}, as may_change allows" if changed else ""
    notice(f"resuming {opened.directory.root} ({where}){allowed}; {FRESH}")


def known(opened: OpenRun) -> dict[str, Any]:
    """What the other ranks of a launch have to know of the run that rank 0 opened; JSON data."""
    return {
        "root": opened.directory.shown,
        "records": opened.records,
        "checkpoint": str(opened.checkpoint.path) if opened.checkpoint is not None else None,
        "checkpoints": str(opened.checkpoints) if opened.checkpoints is not None else None,
        "generation": opened.generation,
    }


def seen_here(path: str) -> Path:
    """Path of a checkpoint that rank 0 found, in the process of another rank, which is to read it too.

    Raises:
        CheckpointError: it is not there.
    """
    if not Path(path).is_dir():
        raise CheckpointError(
            f"rank 0 found the checkpoint {path}, which this machine does not see: run_dir must be on a file system that all "
            "machines share"
        )
    return Path(path)


def borrowed(told: Mapping[str, Any]) -> OpenRun:
    """The run that rank 0 opened, on another rank, which keeps nothing itself.

    Args:
        told: by `known`.
    """
    return OpenRun(
        directory=BorrowedRunDirectory(told["root"]),
        records=told["records"],
        checkpoint=verify(seen_here(told["checkpoint"])) if told["checkpoint"] else None,
        checkpoints=Path(told["checkpoints"]) if told["checkpoints"] else None,
        generation=told["generation"],
    )
