"""What a run has measured: in memory as a `History`, on disk as one JSON line per result."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtrainer.errors import RunDirectoryError
from torchtrainer.observe.devices import DeviceUse
from torchtrainer.observe.failures import FailureRecord
from torchtrainer.observe.plot import plot_history
from torchtrainer.observe.table import html_table
from torchtrainer.process.own_files import LINES_BYTES, parse_json, read_own
from torchtrainer.process.whole_file import append_line, whole_lines

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

HTML_ROWS = 20
"""A notebook shows at most this many rows: the first and the last ones."""

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Strict JSON has no such numbers: they are written as these texts and read back as numbers."""

FAILURE = "failure"
"""Kind of a line that reports a failure and has no metrics."""


class History(list[dict[str, Any]]):
    """The metrics of each epoch, as a list of dicts that also draws itself.

    Attributes:
        failures: what the run went through meanwhile, oldest first.
    """

    failures: tuple[FailureRecord, ...] = ()

    def to_pandas(self) -> DataFrame:
        """Makes a ``pandas.DataFrame``: one row per epoch, one column per metric.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(f"History.to_pandas() needs pandas ({error}); run: pip install pandas") from error
        return pandas.DataFrame(list(self))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draws the curves of training and validation: losses on the left scale, other metrics on the right one.

        A dotted line stands in every pass in which something failed.

        Args:
            ax: matplotlib axes to draw on; None: a new figure, which a notebook shows below the cell.

        Returns:
            The axes with the left scale; ``.figure`` is the figure, with ``savefig``.

        Raises:
            ImportError: matplotlib is not installed.
        """
        return plot_history(self, ax, self.failures)

    def _repr_html_(self) -> str:
        columns = _columns(self)
        rows = [[_cell(entry.get(column, "")) for column in columns] for entry in self]
        if len(rows) > HTML_ROWS:
            half = HTML_ROWS // 2
            rows = [*rows[:half], ["…"] * len(columns), *rows[-half:]]
        count = f"<p>{len(self)} epoch{'' if len(self) == 1 else 's'}</p>"
        return count + (html_table(columns, rows) if columns else "")


class HistoryFile:
    """Appends each result of ``train()`` and ``validate()``, and each failure, to a file, one JSON object per line.

    The file is opened for each line and is readable by its owner alone. What a crash left of a last line is removed
    before the next one is written. One writer at a time.

    Args:
        path: the file; made with the first line. Its directory must exist.
        clock: wall clock, seconds since 1970.
    """

    def __init__(self, path: str | os.PathLike[str], *, clock: Callable[[], float] | None = None) -> None:
        self.path = Path(path)
        self._clock = clock or (lambda: datetime.now(timezone.utc).timestamp())

    def append(
        self,
        kind: str,
        *,
        epoch: int,
        step: int,
        metrics: Any,
        devices: Iterable[DeviceUse] = (),
        phases: Mapping[str, float] | None = None,
    ) -> None:
        """Writes one line, whole or not at all.

        Args:
            kind: ``train`` or ``validate``.
            epoch: passes over the training data that were started.
            step: optimizer steps of the run so far.
            metrics: what the call returned. Scalars of numpy and torch become numbers, other objects their repr.
            devices: use of the devices at the end of the call.
            phases: seconds spent per phase.

        Raises:
            OSError: the line could not be written (disk full, no permission); the file is as it was before.
        """
        record = {
            "time": _iso(self._clock()),
            "kind": kind,
            "epoch": epoch,
            "step": step,
            "metrics": _to_json(metrics),
            "devices": [_to_json(asdict(device)) for device in devices],
            "phases": _to_json(phases or {}),
        }
        self._append(record)

    def append_failure(self, failure: FailureRecord) -> None:
        """Writes the line of a failure: like that of a result, with no metrics, and with the fields of the record.

        Raises:
            OSError: as for `append`.
        """
        first = {
            "time": _iso(failure.time),
            "kind": FAILURE,
            "epoch": failure.epoch,
            "step": failure.step,
            "metrics": {},
        }
        self._append({**first, **{name: value for name, value in asdict(failure).items() if name not in first}})

    def _append(self, record: Mapping[str, Any]) -> None:
        append_line(self.path, json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def read_history(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Reads what a `HistoryFile` wrote, oldest first. A last line that a crash tore is left out.

    Raises:
        FileNotFoundError: there is no such file.
        RunDirectoryError: a line other than the last is not what was written.
    """
    records = []
    for number, line in enumerate(whole_lines(read_own(Path(path), LINES_BYTES)), start=1):
        try:
            record = parse_json(line)
            if type(record) is not dict:
                raise ValueError("it is no object")
        except ValueError as error:
            raise RunDirectoryError(
                f"{os.fspath(path)}, line {number}, is not JSON ({error}); repair or remove the line: {line[:80]!r}"
            ) from error
        records.append({key: _from_json(value) for key, value in record.items()})
    return records


def _iso(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, timezone.utc).isoformat(timespec="milliseconds")


def _to_json(value: Any) -> Any:
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _non_finite(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(item) for item in value]
    try:
        return _to_json(value.item())  # a scalar of numpy or torch
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return repr(value)


def _non_finite(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    return "Infinity" if value > 0 else "-Infinity"


def _from_json(value: Any) -> Any:
    if isinstance(value, str):
        return NON_FINITE.get(value, value)
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    return value


def _columns(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Every key, where it was first seen; the profile is left out, since it is a table itself."""
    return list(dict.fromkeys(key for entry in entries for key in entry if key != "profile"))


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
