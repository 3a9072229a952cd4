"""What a run directory says of its run: which script and arguments made it, how it ended, and so whether to go on with it.

A script may make several trainers. Those of one start of the script belong together: the first trainer of a later start goes
on with the first of theirs, and so forth. The record is JSON, replaced as a whole.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torchtrainer.errors import RunDirectoryError
from torchtrainer.process.whole_file import replace_file

FORMAT = 1
"""Of the record; a run with a higher one was made by a newer version."""
RECORD = "run.json"

RunState = Literal["running", "finished", "interrupted", "failed", "preempted"]
RESUMABLE: tuple[RunState, ...] = ("running", "failed", "preempted")
"""How a run was left that ``resume="auto"`` goes on with; ``running``: its process was killed."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What is known of a run.

    Attributes:
        script_run: the start of the script that the run belongs to.
        ordinal: place among the trainers of that start, from 1.
        state: how it stands.
        pid: of the driver.
        started_s: seconds since 1970.
        notebook: it was made in a notebook, whose cells run in any order.
        parts: digests of what defines the training, by argument.
        config: readable form of ``config``, by key.
        world_size: ranks.
        step, epoch: progress, when it was written.
        version: of torchtrainer.
        format: of this record.
        preemptions: how often in a row it was preempted without a new step between.
        preempted_at: step at the latest of them.
    """

    script_run: str
    ordinal: int
    state: RunState
    pid: int
    started_s: float
    notebook: bool
    parts: dict[str, str]
    config: dict[str, str]
    world_size: int
    step: int = 0
    epoch: int = 0
    version: str = ""
    format: int = FORMAT
    preemptions: int = 0
    preempted_at: int = -1

    def noted(self, state: RunState, *, step: int, epoch: int) -> RunRecord:
        """The record of the run as it stands now."""
        now = replace(self, state=state, step=step, epoch=epoch)
        if state != "preempted" or self.state == state:
            return now
        in_a_row = self.preemptions + 1 if step <= self.preempted_at else 1
        return replace(now, preemptions=in_a_row, preempted_at=step)

    def after(self, previous: RunRecord) -> RunRecord:
        """The record of a start that goes on with an earlier one."""
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
            RunDirectoryError: it is of a newer version, or not what was written.
        """
        try:
            text = (root / RECORD).read_text()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls.parse(text, str(root))

    @classmethod
    def parse(cls, text: str, root: str) -> RunRecord:
        """A record out of its text.

        Args:
            text: what `write` wrote.
            root: the run directory, for errors.

        Raises:
            RunDirectoryError: it is of a newer version, or not what was written.
        """
        try:
            told = json.loads(text)
            if told["format"] > FORMAT:
                raise RunDirectoryError(
                    f"run_dir {root} was made by torchtrainer {told.get('version')}, whose records (format {told['format']}) "
                    f"this version does not know (up to {FORMAT}): use that version, or pass another run_dir"
                )
            return cls(**{one.name: told[one.name] for one in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(
                f"{root}/{RECORD} is not what was written ({type(error).__name__}: {error}): remove the directory, or pass "
                "another run_dir"
            ) from error

    def difference(self, wanted: RunRecord) -> str | None:
        """The first thing in which the training that is wanted is not the one that was recorded; None: it is the same."""
        for key in sorted({*self.config, *wanted.config}):
            then, now = self.config.get(key, "not there"), wanted.config.get(key, "not there")
            if then != now:
                return f"config[{key!r}] was {then} and is {now}"
        for name in sorted({*self.parts, *wanted.parts}):
            if self.parts.get(name) != wanted.parts.get(name):
                return f"{name} has changed"
        return None


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
"""This start of the script, made when first needed: which of its trainers goes on with which is a matter of their order."""


def this_script_run() -> ScriptRun:
    """The start of the script that this process is."""
    if not _script_runs:
        _script_runs.append(ScriptRun.new())
    return _script_runs[0]


def digests(parts: Mapping[str, Any]) -> dict[str, str]:
    """What defines a training, each part as a short digest that a change of its code or value changes.

    Functions and classes count by what they do, not by where they stand: comments and line numbers do not matter. What they
    call in turn does not count either.
    """
    return {
        name: hashlib.blake2b(_described(one, 0).encode(), digest_size=8).hexdigest() for name, one in parts.items()
    }


_DEPTH = 6
"""How deep functions within functions and members of containers are looked into."""


def _described(value: Any, depth: int) -> str:  # noqa: PLR0911  # one return per kind of value
    if depth > _DEPTH:
        return type(value).__qualname__
    if isinstance(value, types.CodeType):
        constants = ",".join(_described(one, depth + 1) for one in value.co_consts)
        return f"{value.co_code.hex()} {value.co_names} {value.co_varnames} {constants}"
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_set(cell)]
        around = [_described(one, depth + 1) for one in (value.__defaults__, value.__kwdefaults__, cells)]
        return f"function {_described(value.__code__, depth + 1)} {around}"
    if isinstance(value, type):
        if value.__module__ == "builtins" or not _from_script(value):
            return f"{value.__module__}.{value.__qualname__}"
        members = {name: one for name, one in vars(value).items() if callable(one) or _is_plain(one)}
        return f"class {value.__qualname__} {_described(members, depth + 1)}"
    if isinstance(value, Mapping):
        return (
            "{" + ",".join(f"{key}:{_described(one, depth + 1)}" for key, one in sorted(value.items(), key=str)) + "}"
        )
    if isinstance(value, list | tuple | set | frozenset):
        members_text = [_described(one, depth + 1) for one in value]
        return str(sorted(members_text) if isinstance(value, set | frozenset) else members_text)
    if _is_plain(value):
        return repr(value)
    inner = getattr(value, "func", None) or getattr(value, "__func__", None)
    rest = [getattr(value, name, None) for name in ("args", "keywords")]
    return f"{type(value).__qualname__} {_described(inner, depth + 1) if inner else ''} {_described(rest, depth + 1)}"


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | complex | str | bytes)


def _is_set(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018  # raises if a name was never given a value
    except ValueError:
        return False
    return True


def _from_script(value: type) -> bool:
    """Whether a class is of the user's own code, not of an installed package."""
    import sys

    file = getattr(sys.modules.get(value.__module__), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def readable_config(config: Mapping[Any, Any]) -> dict[str, str]:
    """``config`` as text by key, short, and the same for the same values in another process."""
    return {str(key): _short(value) for key, value in config.items()}


def _short(value: Any) -> str:
    if _is_plain(value) or (isinstance(value, list | tuple) and all(_is_plain(one) for one in value)):
        return repr(value)[:_SHORT]
    return f"{type(value).__name__} {digests({'': value})['']}"


_SHORT = 200
"""Characters of a config value that are kept."""


def find_previous(runs: Path, wanted: RunRecord, *, live: Callable[[Path], bool]) -> tuple[Path, RunRecord] | None:
    """The run that a trainer would go on with, among those of its script: of the latest start, however it ended.

    Args:
        runs: directory with one directory per run.
        wanted: the trainer that is being made.
        live: whether a run directory is in use; other trainers of this process, which are gone on with too, do not count.

    Returns:
        None: there is none, or the latest start is still going on.
    """
    found = list(_records(runs))
    if not found:
        return None
    latest = max(found, key=lambda pair: pair[1].started_s)[1].script_run
    together = [pair for pair in found if pair[1].script_run == latest]
    if any(live(path) for path, record in together if record.pid != wanted.pid):
        return None
    mine = [pair for pair in together if pair[1].ordinal == wanted.ordinal]
    return max(mine, key=lambda pair: pair[1].started_s, default=None)


def others_unfinished(path: Path, record: RunRecord) -> bool:
    """Whether another trainer of the same start of the script, in a directory beside this one, was cut off."""
    return any(
        other.script_run == record.script_run and other.state in RESUMABLE
        for place, other in _records(path.parent)
        if place != path
    )


def _records(runs: Path) -> Iterator[tuple[Path, RunRecord]]:
    for path in runs.iterdir() if runs.is_dir() else ():
        try:
            record = RunRecord.read(path)
        except (RunDirectoryError, OSError):
            continue  # not for us to judge: whoever asks for it by name is told
        if record is not None and not path.is_symlink():
            yield path, record
