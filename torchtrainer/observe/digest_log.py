"""What a rank's state was after every step, as digests in a file: written by ranks, read by ``torchtrainer verify-resume``.

One directory holds the logs of one start of a script: a file for each rank of each of its trainers. Ranks write them if an
environment variable names the directory; else nothing of this costs anything.

    facts, as JSON
    call | batch | end | step | time | digests of the state, of the batch, of what is held | text of the call | the rest, as JSON
    ...
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ORDERS = "orders.json"
HELD = "held"
"""File that a rank makes in the directory of the logs when it holds."""
TAIL_BYTES = 1 << 20
"""Where the last lines of a file are looked for."""
_COLUMNS = 10


@dataclass(frozen=True, kw_only=True, order=True)
class Place:
    """A step boundary of a trainer, the same in every start of the script.

    Attributes:
        call: of the trainer, counted from 0.
        batch: batches of the call that were completed.
        end: the call is over; there is a boundary with as many batches before it.
    """

    call: int
    batch: int
    end: bool = False


@dataclass(frozen=True, kw_only=True)
class Spot:
    """A place of one trainer.

    Attributes:
        trainer: of the script, counted from 1.
        place: where.
    """

    trainer: int
    place: Place


@dataclass(frozen=True, kw_only=True)
class DigestOrders:
    """What ranks do besides writing their logs.

    Attributes:
        reference: directory of the logs of another start; the first value that differs from it is kept.
        hold: wait there, until the process is ended or stopped, or the orders are withdrawn.
        keep: keep this value there.
        keep_name: name of the value.
    """

    reference: str | None = None
    hold: Spot | None = None
    keep: Spot | None = None
    keep_name: str = ""

    def write(self, directory: Path) -> None:
        """Gives the orders to a start that is to come."""
        (directory / ORDERS).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, directory: Path) -> DigestOrders:
        """The orders for this start; none, if they were withdrawn."""
        try:
            told = json.loads((directory / ORDERS).read_text())
        except FileNotFoundError:
            return cls()
        spots = {name: told[name] and _spot(told[name]) for name in ("hold", "keep")}
        return cls(reference=told["reference"], keep_name=told["keep_name"], **spots)


def _spot(told: Mapping[str, Any]) -> Spot:
    return Spot(trainer=told["trainer"], place=Place(**told["place"]))


def log_path(directory: Path, trainer: int, rank: int) -> Path:
    """The log of a rank of a trainer."""
    return directory / f"trainer-{trainer}-rank-{rank}.log"


def value_path(directory: Path, trainer: int, rank: int) -> Path:
    """The value that a rank kept."""
    return directory / f"trainer-{trainer}-rank-{rank}.value.pt"


def next_trainer(directory: Path) -> int:
    """The number of the trainer that is being made: as many as have a rank 0 were made before. Rank 0 asks."""
    return len(list(directory.glob("trainer-*-rank-0.log"))) + 1


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One line of a log.

    Attributes:
        place: in the calls of the trainer.
        step: optimizer steps that were completed.
        at_ns: monotonic; the same clock in all processes of a machine.
        whole: digest of the complete state.
        data: digest of the last batch; empty: this start has not read it.
        held: digest of what the operator holds besides.
        call: as the script made it.
        offset: of the line, in bytes.
    """

    place: Place
    step: int
    at_ns: int
    whole: str
    data: str
    held: str
    call: str
    offset: int


@dataclass(frozen=True, kw_only=True)
class Details:
    """The rest of a line.

    Attributes:
        state: digest by name.
        held: digest by name of what the operator holds besides.
        attributes: plain attributes of the operator and of the data sets, as text, by name; not all belong to the state.
    """

    state: dict[str, str]
    held: dict[str, str] = field(default_factory=dict)
    attributes: dict[str, str] = field(default_factory=dict)


class DigestWriter:
    """Appends to the log of a rank. Used by the thread that trains.

    Args:
        directory: of the logs.
        trainer, rank: whose log; it must not be there.
        facts: JSON data for the first line.
    """

    def __init__(self, directory: Path, trainer: int, rank: int, facts: Mapping[str, Any]) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(log_path(directory, trainer, rank), flags, 0o600)
        os.write(self._fd, json.dumps(facts).encode() + b"\n")

    def add(
        self, place: Place, *, step: int, whole: str, data: str, call: str, details: Details, held: str = ""
    ) -> None:
        """Appends a line, at once: whoever is killed leaves whole lines."""
        numbers = (place.call, place.batch, int(place.end), step, time.monotonic_ns())
        columns = (*map(str, numbers), whole, data, held, json.dumps(call), _packed(details))
        os.write(self._fd, ("\t".join(columns) + "\n").encode())


def _packed(details: Details) -> str:
    return json.dumps([details.state, details.held, details.attributes], separators=(",", ":"))


class DigestFile:
    """The log of a rank, as it is when this is made; a last line that was torn is left out.

    Args:
        path: of the log.

    Attributes:
        facts: of its first line.
        entries: its lines, in order.
        at: its lines, by place.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.facts: dict[str, Any] = {}
        self.entries: list[Entry] = []
        offset = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                if not line.endswith(b"\n"):
                    break
                if number == 0:
                    self.facts = json.loads(line)
                else:
                    self.entries.append(_entry(line, offset))
                offset += len(line)
        self.at = {entry.place: entry for entry in self.entries}

    def details(self, entry: Entry) -> Details:
        """The rest of a line."""
        with self._path.open("rb") as file:
            file.seek(entry.offset)
            state, held, attributes = json.loads(file.readline().split(b"\t", _COLUMNS - 1)[-1])
        return Details(state=state, held=held, attributes=attributes)


def _entry(line: bytes, offset: int) -> Entry:
    call, batch, end, step, at_ns, whole, data, held, text, _ = line.decode().split("\t", _COLUMNS - 1)
    return Entry(
        place=Place(call=int(call), batch=int(batch), end=end == "1"),
        step=int(step),
        at_ns=int(at_ns),
        whole=whole,
        data=data,
        held=held,
        call=json.loads(text),
        offset=offset,
    )


def tail(path: Path) -> str:
    """The last part of a file that may be long."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
        return file.read().decode(errors="replace")


def last_step(path: Path) -> int | None:
    """Optimizer steps by the last line of a log that is being written; None: there is no line, or it is too long."""
    whole = tail(path).rpartition("\n")[0].splitlines()
    columns = whole[-1].split("\t") if len(whole) > 1 else []
    return int(columns[3]) if len(columns) == _COLUMNS else None


def logs_in(directory: Path) -> Iterator[tuple[int, int, DigestFile]]:
    """The logs of a start: number of the trainer, rank, log; by trainer and rank."""
    found = [(*_numbers(path), path) for path in directory.glob("trainer-*-rank-*.log")]
    for trainer, rank, path in sorted(found):
        yield trainer, rank, DigestFile(path)


def _numbers(path: Path) -> tuple[int, int]:
    _, trainer, _, rank = path.stem.split("-")
    return int(trainer), int(rank)


def differing(here: Mapping[str, str], there: Mapping[str, str]) -> list[str]:
    """Names of values that are not the same, or only in one of two states, in the order of the first."""
    names = [name for name, value in here.items() if there.get(name) != value]
    return [*names, *(name for name in there if name not in here)]
