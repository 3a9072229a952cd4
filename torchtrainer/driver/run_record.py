"""The record of a run in its directory: its script and arguments, how it ended, and so whether to resume it.

A script may make several trainers. Those of one start of the script belong together: the first trainer of a later start goes
on with the first of theirs, and so forth. The record is JSON, replaced as a whole.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torchtrainer.driver.fingerprint import differences, fingerprint, script_arguments
from torchtrainer.driver.run_dir import check_compiled, check_run_files, telling_unusable
from torchtrainer.errors import CallMismatchError, RunDirectoryError
from torchtrainer.process.own_files import RECORD_BYTES, parse_json, printable, read_own
from torchtrainer.process.whole_file import replace_file
from torchtrainer.spec import BuildSpec
from torchtrainer.version import __version__

FORMAT = 2
"""Version of the record: a higher one is from a newer torchtrainer, a lower one records fewer of the run's dependencies."""
RECORD = "run.json"
MAX_SHOWN = 200
"""Longest text from a record that an error shows, in characters."""

RunState = Literal["running", "finished", "interrupted", "failed", "preempted"]
RESUMABLE: tuple[RunState, ...] = ("running", "failed", "preempted")
"""Ends of a run that ``resume="auto"`` resumes; ``running``: its process was killed."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known about a run.

    Attributes:
        script_run: the start of the script that the run belongs to.
        ordinal: place among the trainers of that start, from 1.
        state: how it stands.
        pid: of the driver.
        started_s: seconds since 1970.
        notebook: it was made in a notebook, whose cells run in any order.
        parts: what the training depends on, by name; see `torchtrainer.driver.fingerprint`.
        world_size: ranks.
        step, epoch: progress, when it was written.
        version: of torchtrainer.
        format: of this record.
        preemptions: how often in a row it was preempted without a new step between.
        preempted_at: step at the latest of them.
        may_change: names of parts that may differ in a resumed run.
        asked: name of the directory that the user asked for; the run's own may be another, beside it.
    """

    script_run: str
    ordinal: int
    state: RunState
    pid: int
    started_s: float
    notebook: bool
    parts: dict[str, str]
    world_size: int
    step: int = 0
    epoch: int = 0
    version: str = ""
    format: int = FORMAT
    preemptions: int = 0
    preempted_at: int = -1
    may_change: list[str] = field(default_factory=list)
    asked: str = ""

    def noted(self, state: RunState, *, step: int, epoch: int) -> RunRecord:
        """The record of the run as it stands now."""
        now = replace(self, state=state, step=step, epoch=epoch)
        if state != "preempted" or self.state == state:
            return now
        in_a_row = self.preemptions + 1 if step <= self.preempted_at else 1
        return replace(now, preemptions=in_a_row, preempted_at=step)

    def after(self, previous: RunRecord) -> RunRecord:
        """The record of a start that continues with an earlier one."""
        return replace(
            self,
            script_run=previous.script_run,
            preemptions=previous.preemptions,
            preempted_at=previous.preempted_at,
        )

    def write(self, root: Path) -> None:
        """Replaces the record of a run directory.

        Raises:
            OSError: the directory cannot be written to.
        """
        replace_file(root / RECORD, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, root: Path) -> RunRecord | None:
        """The record of a run directory; None if it has none.

        Raises:
            RunDirectoryError: it is of a newer version, or not what was written; or the directory is not the user's alone, or has
                something else in it than a run puts there.
        """
        with telling_unusable(root):
            try:
                content = read_own(root / RECORD, RECORD_BYTES)
            except (FileNotFoundError, NotADirectoryError):
                return None
            check_run_files(root)
        return cls.parse(content, str(root))

    @classmethod
    def parse(cls, content: bytes, root: str) -> RunRecord:
        """A record out of its file.

        Args:
            content: what `write` wrote.
            root: the run directory, for errors.

        Raises:
            RunDirectoryError: it is of a newer version, or not what was written.
        """
        try:
            told = parse_json(content)
            if told["format"] > FORMAT:
                version = printable(str(told.get("version")), MAX_SHOWN)
                raise RunDirectoryError(
                    f"run_dir {root} was made by torchtrainer {version}, whose records (format {told['format']}) "
                    f"this version does not know (up to {FORMAT}): use that version, or pass another run_dir"
                )
            later = {} if told["format"] == FORMAT else {"may_change": [], "asked": ""}
            return cls(**{one.name: _typed({**later, **told}[one.name], one) for one in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            why = printable(f"{type(error).__name__}: {error}", MAX_SHOWN)
            raise RunDirectoryError(
                f"{root}/{RECORD} is corrupt ({why}): remove the directory, or pass another run_dir"
            ) from error

    def difference(self, wanted: RunRecord) -> str | None:
        """In what the training that is wanted is not the one that was recorded; None: it is the same."""
        if self.format != wanted.format:
            return f"torchtrainer {printable(self.version, MAX_SHOWN)} made it, which did not record enough to compare"
        found = differences(self.parts, wanted.parts, wanted.may_change)
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        return printable(", ".join(found[:_NAMED])) + more if found else None


_NAMED = 3
"""Number of differences that are named."""

_IS: Mapping[str, Callable[[Any], bool]] = {
    "str": lambda value: type(value) is str,
    "int": lambda value: type(value) is int,
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
    "dict[str, str]": lambda value: type(value) is dict and all(type(one) is str for one in value.values()),
    "list[str]": lambda value: type(value) is list and all(type(one) is str for one in value),
    "RunState": lambda value: value in get_args(RunState),
}
"""Check of a JSON value, by the annotation of its field."""


def _typed(value: Any, of: Field[Any]) -> Any:
    """The value of a field, if it is one.

    Raises:
        TypeError: it is not.
    """
    if not _IS[str(of.type)](value):
        raise TypeError(f"{of.name} is {value!r}, not {of.type}")
    return value


@dataclass
class ScriptRun:
    """One start of the user's script: its name, and how many trainers it has made. In memory of the driver only."""

    name: str
    trainers: int = 0

    @classmethod
    def new(cls) -> ScriptRun:
        """A start that no run directory knows yet."""
        return cls(secrets.token_hex(8))

    def next_ordinal(self) -> int:
        """Counts a trainer."""
        self.trainers += 1
        return self.trainers


_script_runs: list[ScriptRun] = []
"""This start of the script, made on first use: its trainers resume those of the earlier start in order."""


def this_script_run() -> ScriptRun:
    """The start of the script that this process is."""
    if not _script_runs:
        _script_runs.append(ScriptRun.new())
    return _script_runs[0]


def wanted_run(reached: Mapping[str, Any], *, world_size: int, may_change: Sequence[str]) -> RunRecord:
    """The record of a run that begins now.

    Args:
        reached: what the training depends on, by name: the user's functions, classes and values.
        world_size: ranks.
        may_change: names of what may differ in a resumed run.
    """
    run = this_script_run()
    notebook = in_notebook()
    return RunRecord(
        script_run=run.name,
        ordinal=run.next_ordinal(),
        state="running",
        pid=os.getpid(),
        started_s=time.time(),
        notebook=notebook,
        parts={**({} if notebook else script_arguments(sys.argv[1:])), **fingerprint(reached)},
        world_size=world_size,
        version=__version__,
        may_change=list(may_change),
    )


_REACHES = (
    *(
        "training_operator_cls",
        "model_creator",
        "data_creator",
        "optimizer_creator",
        "loss_creator",
        "scheduler_creator",
    ),
    "initialization_hook",
)
"""Fields of a `BuildSpec` that hold the user's code."""


def reached_by(spec: BuildSpec, callbacks: Sequence[object]) -> dict[str, Any]:
    """The dependencies of a training built from ``spec``, under the user's names for them."""
    code = {name: getattr(spec, name) for name in _REACHES if getattr(spec, name) is not None}
    told = {"callbacks": list(callbacks)} if callbacks else {}
    return {"config": spec.config, **spec.settings.deciding_bits(), **code, **told}


def function_of_call(keywords: Mapping[str, Any]) -> dict[str, str] | None:
    """The dependencies of the function passed to a call; None: there is none."""
    function = keywords.get("fn")
    return None if function is None else fingerprint({getattr(function, "__name__", "fn"): function})


def check_function(call: str, then: Mapping[str, str] | None, now: Mapping[str, str] | None) -> None:
    """Compares the function that a call was given with that of the call that was made before.

    Raises:
        CallMismatchError: it is another one; names what has changed.
    """
    found = differences(then, now) if then is not None and now is not None else []
    if found:
        raise CallMismatchError(
            f"the script asks for {call}, which it did before, but {', '.join(found[:_NAMED])}: restore that, or pass "
            "resume=False to start anew"
        )


def how_it_ends() -> RunState:
    """How a script ended that did not say: by an uncaught exception, or by reaching its end."""
    uncaught: type[BaseException] | None = getattr(sys, "last_type", None)
    if uncaught is None:
        return "finished"
    return "interrupted" if issubclass(uncaught, KeyboardInterrupt) else "failed"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    return "ipykernel" in sys.modules


def find_previous(
    runs: Path, wanted: RunRecord, *, live: Callable[[Path], bool], on_problem: Callable[[str], None]
) -> tuple[Path, RunRecord] | None:
    """The run of this script that a trainer would resume: the latest that fits, else the latest, however it ended.

    Args:
        runs: directory with one directory per run.
        wanted: the trainer that is being made.
        live: whether a run directory is in use; other trainers of this process, which are resumed too, do not count.
        on_problem: told in a sentence of a run that is left out, as its directory is not what a run leaves.

    Returns:
        None: there is none, or the latest start is still going on.
    """
    found = list(_records(runs, on_problem))
    if not found:
        return None
    latest = max(found, key=lambda pair: pair[1].started_s)[1].script_run
    if any(live(path) for path, record in found if record.script_run == latest and record.pid != wanted.pid):
        return None
    mine = [pair for pair in found if pair[1].ordinal == wanted.ordinal]
    together = [
        pair for pair in mine if pair[1].script_run == wanted.script_run
    ]  # an earlier trainer went on with that start
    return _sound(_best(together or mine, wanted), on_problem)


def find_beside(path: Path, wanted: RunRecord, on_problem: Callable[[str], None]) -> tuple[Path, RunRecord] | None:
    """The same among the runs that asked for a directory: those there, and beside it where something else was there already."""
    found = [
        (place, record)
        for place, record in _records(path.parent, on_problem, prefix=path.name)
        if place.name == path.name or (record.asked == path.name and place.name.startswith(f"{path.name}-"))
    ]
    return _best([pair for pair in found if pair[1].script_run == wanted.script_run] or found, wanted)


def _sound(best: tuple[Path, RunRecord] | None, on_problem: Callable[[str], None]) -> tuple[Path, RunRecord] | None:
    """The run, unless it has something of somebody else's that torch would run."""
    if best is None:
        return None
    try:
        check_compiled(best[0])
    except OSError as error:
        on_problem(f"{best[0]} cannot be resumed: {error}")
        return None
    return best


def _best(found: list[tuple[Path, RunRecord]], wanted: RunRecord) -> tuple[Path, RunRecord] | None:
    """The latest run that fits what is wanted, or else the latest."""
    fitting = [pair for pair in found if pair[1].difference(wanted) is None]
    return max(fitting or found, key=lambda pair: pair[1].started_s, default=None)


def others_unfinished(path: Path, record: RunRecord, on_problem: Callable[[str], None]) -> bool:
    """Whether another trainer of the same start of the script, in a directory beside this one, was cut off."""
    return any(
        other.script_run == record.script_run and other.state in RESUMABLE
        for place, other in _records(path.parent, on_problem)
        if place != path
    )


def _records(runs: Path, on_problem: Callable[[str], None], prefix: str = "") -> Iterator[tuple[Path, RunRecord]]:
    for path in runs.iterdir() if runs.is_dir() else ():
        if not path.name.startswith(prefix) or path.is_symlink():
            continue
        try:
            record = RunRecord.read(path)
        except (
            RunDirectoryError
        ) as error:  # it may be somebody else's to mend, and is no reason for others not to start
            on_problem(f"{path} is not a run that can be resumed, and is skipped: {error}")
            continue
        if record is not None:
            yield path, record
