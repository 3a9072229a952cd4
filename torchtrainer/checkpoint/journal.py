"""The calls that a script made, with their results, so that the same script, started again, continues where it was.

Each completed call is appended, so that a script that runs again gets recorded results until it asks for something that was
not done yet. A line is JSON; a result that JSON cannot hold bit for bit is a file beside it, in the form of ``torch.save``.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from torchtrainer.checkpoint.copies import DIRECTORY, Copies, is_digest
from torchtrainer.checkpoint.verified import Checkpoint
from torchtrainer.errors import CallMismatchError, RunDirectoryError
from torchtrainer.process.own_files import LINES_BYTES, open_to_read, parse_json, printable, read_own
from torchtrainer.process.paths import private_directory
from torchtrainer.process.whole_file import append_line, replace_file, whole_lines

_MAX_SHOWN = 200
_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "call": lambda value: type(value) is str,
    "step": lambda value: type(value) is int,
    "epoch": lambda value: type(value) is int,
    "lost": lambda value: type(value) is str,
    "kept": lambda value: value is True,
    "copy": lambda value: type(value) is str and is_digest(value),
    "function": lambda value: type(value) is dict and all(type(one) is str for one in value.values()),
}
"""By name, whether a value of JSON is that of a field; a result may be anything."""


@dataclass(frozen=True, kw_only=True)
class Recorded:
    """A call that was completed.

    Attributes:
        index: its place among the calls of the trainer, from 0.
        call: as the user would write it, such as ``train(num_steps=3)``.
        result: what it returned.
        step, epoch: progress after it.
        copy: digest of the copy of the state that it returned; None: it returned something else.
        function: what the function depends on that it was given; None: it was given none, or that is not known.
    """

    index: int
    call: str
    result: Any
    step: int
    epoch: int
    copy: str | None = None
    function: dict[str, str] | None = None

    @property
    def gone(self) -> bool:
        """Whether the copy is not kept any more."""
        return self.copy is not None and self.result is None


class Journal:
    """The calls of one trainer. Used from the user's thread, by one process; the others of a launch hold copies.

    Args:
        root: directory of the run.
        records: what is known already, as `read` gives it.
        writes: this process keeps the journal; else it only follows it.
        keep: copies of the state that stay, apart from those that the script holds.
    """

    def __init__(self, root: Path, records: list[dict[str, Any]], *, writes: bool, keep: int = 3) -> None:
        self.copies = Copies(root, keep)
        self._root = root
        self._records = records
        self._writes = writes
        self._index = 0

    @staticmethod
    def read(root: Path) -> list[dict[str, Any]]:
        """The lines of a journal, oldest first; a last one that a crash tore is left out.

        Raises:
            RunDirectoryError: a line is not what was written.
        """
        try:
            content = read_own(_journal(root), LINES_BYTES)
        except FileNotFoundError:
            return []
        try:
            return [_line_of_call(parse_json(line)) for line in whole_lines(content)]
        except ValueError as error:
            why = printable(str(error), _MAX_SHOWN)
            raise RunDirectoryError(
                f"{_journal(root)} is corrupt ({why}): the run in {root} cannot be resumed; pass resume=False "
                "to start anew, or another run_dir"
            ) from error

    @property
    def index(self) -> int:
        """Place of the next call."""
        return self._index

    @property
    def replaying(self) -> bool:
        """Whether the next call was completed before."""
        return self._index < len(self._records)

    def expect(self, call: str, under_way: str | None = None) -> Recorded | None:
        """The record of the next call, if it was completed before.

        Args:
            call: what the script asks for.
            under_way: what was recorded as the call in progress at this place, if that is known.

        Raises:
            CallMismatchError: the script asks for something else than it did before.
        """
        if not self.replaying:
            self._compare(call, under_way)
            return None
        record = self._records[self._index]
        self._compare(call, record["call"])
        recorded = Recorded(
            index=self._index,
            call=call,
            result=self._result_of(record),
            step=record["step"],
            epoch=record["epoch"],
            copy=record.get("copy"),
            function=record.get("function"),
        )
        self._index += 1
        return recorded

    def handed_out(self, known: Recorded, state: Any) -> None:
        """The script has got a copy of the state that was recorded."""
        if known.copy is not None:
            self.copies.handed_out(known.copy, state)

    def add(
        self,
        call: str,
        result: Any,
        *,
        step: int,
        epoch: int,
        is_state: bool = False,
        function: dict[str, str] | None = None,
    ) -> str | None:
        """Appends a call that has just been completed; in a copy it only counts.

        Args:
            call, result, step, epoch: as in `Recorded`.
            is_state: the result is the state of the training, of which not every copy has to stay.
            function: as in `Recorded`.

        Returns:
            Why the result could not be kept, so that the script cannot be resumed beyond this call; None if it was.
        """
        index, self._index = self._index, self._index + 1
        record: dict[str, Any] = {"call": call, "step": step, "epoch": epoch}
        if function is not None:
            record["function"] = function
        reason: str | None = None
        if self._writes:
            try:
                reason = self._write(record, result, index, is_state)
            except OSError as error:
                self._writes = False  # calls after a gap would be taken for others
                reason = f"it could not be written to {self._root}: {error}"
        self._records.append(record)
        return reason

    def _write(self, record: dict[str, Any], result: Any, index: int, is_state: bool) -> str | None:
        content, lost = (None, None) if is_json(result) else _bytes_of(result)
        if lost is not None:
            record["lost"] = lost
        elif content is None:
            record["result"] = result
        elif is_state:
            record["copy"] = self.copies.write(content)
            self.copies.handed_out(record["copy"], result)
        else:
            record["kept"] = True
            path = _kept(self._root, index)
            private_directory(path.parent)
            replace_file(path, content)
        append_line(_journal(self._root), json.dumps(record).encode() + b"\n", durable=True)
        self.copies.prune()
        return None if lost is None else f"it is {lost}"

    def _compare(self, asked: str, recorded: str | None) -> None:
        if recorded is not None and asked != recorded:
            raise CallMismatchError(
                f"the script asks for {asked} as call {self._index + 1} of this trainer, but the run that it would "
                f"resume had {printable(recorded)}: restore the script, or pass resume=False to start anew (the run is "
                f"in {self._root})"
            )

    def _result_of(self, record: dict[str, Any]) -> Any:
        if "lost" in record:
            raise RunDirectoryError(
                f"the run cannot be resumed: {printable(record['call'])} returned {printable(record['lost'])}, which could not be "
                "recorded. Return numbers, text, tensors, or lists and dicts of them, and pass resume=False to start anew"
            )
        if "kept" not in record and "copy" not in record:
            return record.get("result")
        import torch

        path = self.copies.path(record["copy"]) if "copy" in record else _kept(self._root, self._index)
        if "copy" in record and not os.path.lexists(path):
            return None
        try:
            with open_to_read(path) as file:
                return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:
            why = printable(str(error).partition("\n")[0], _MAX_SHOWN)
            raise RunDirectoryError(
                f"the run cannot be resumed: {path} is corrupt ({why}). Nothing in it was run; pass resume=False "
                "to start anew"
            ) from error


def _line_of_call(record: Any) -> dict[str, Any]:
    """A line of the journal, if it is one.

    Raises:
        ValueError: it is not.
    """
    if type(record) is not dict:
        raise ValueError(f"a line is {record!r}")
    for key, value in record.items():
        if key in _FIELDS and not _FIELDS[key](value):
            raise ValueError(f"{key} of a call is {value!r}")
    if missing := {"call", "step", "epoch"} - set(record):
        raise ValueError(f"a line has no {min(missing)}")
    return record


def _bytes_of(result: Any) -> tuple[bytes | None, str | None]:
    """A result in the form of ``torch.save``, or why it has none that could be read again."""
    import torch

    buffer = io.BytesIO()
    try:
        torch.save(result, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except Exception as error:
        return None, f"a {type(result).__name__} ({str(error).splitlines()[0]})"
    return buffer.getvalue(), None


def is_json(value: Any) -> bool:
    """Whether JSON brings a value back as it is: floats keep their bits, NaN and infinities included."""
    if value is None or type(value) in (bool, int, float, str):
        return True
    if type(value) is list:
        return all(is_json(one) for one in value)
    return type(value) is dict and all(type(key) is str and is_json(one) for key, one in value.items())


def spell(method: str, **arguments: Any) -> str:
    """A call as the user would write it; arguments that are None are left out."""
    given = (f"{name}={value!r}" for name, value in arguments.items() if value is not None)
    return f"{method}({', '.join(given)})"


def spell_function(method: str, fn: Callable[..., Any]) -> str:
    """The same for a call that takes a function."""
    return f"{method}({getattr(fn, '__qualname__', type(fn).__name__)})"


def call_files(root: Path) -> dict[str, Callable[[BinaryIO], object]]:
    """The files of a journal by names without directories, each with what fills a file with a copy of it."""
    return {
        "-".join(path.relative_to(root).parts): partial(_copy, path)
        for path in (_journal(root), *sorted(_kept(root, 0).parent.glob("*.pt")))
        if path.exists()
    }


def put_call_files(root: Path, checkpoint: Checkpoint) -> None:
    """Puts a journal that came with a checkpoint where it belongs."""
    for name in checkpoint.manifest.files:
        head, dash, tail = name.partition("-")
        if name == _journal(root).name:
            replace_file(_journal(root), checkpoint.file(name).read_bytes())
        elif dash and head == DIRECTORY and checkpoint.file(name).stat().st_size:
            path = private_directory(root / head) / tail
            replace_file(path, checkpoint.file(name).read_bytes())


def _copy(path: Path, file: BinaryIO) -> None:
    with suppress(FileNotFoundError):  # removed meanwhile; then it is empty, and not put back
        file.write(read_own(path, None))


def _journal(root: Path) -> Path:
    return root / "calls.jsonl"


def _kept(root: Path, index: int) -> Path:
    return root / DIRECTORY / f"{index}.pt"
