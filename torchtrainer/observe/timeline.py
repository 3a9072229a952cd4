"""Draws the failures of a run over its time: who was lost, when, and for how long it held training up."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from torchtrainer.observe.history import FAILURE, read_history
from torchtrainer.observe.plot import new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HOW_COLOURS = {
    "carried": "#009E73",
    "replaced": "#0072B2",
    "refetched": "#56B4E9",
    "restarted": "#E69F00",
    "": "#D55E00",
}
"""One colour per outcome; they are told apart by colour-blind readers too."""
HOW_NAMES = {
    "carried": "taken over by others",
    "replaced": "taken over by a replacement",
    "refetched": "fetched again by new loader processes",
    "restarted": "all ranks restarted",
    "": "not recovered",
}
NO_RANK = "all"
LABELS_UP_TO = 24
"""With more failures than these their seconds are not written beside them."""


def plot_failures(history: str | os.PathLike[str], ax: Axes | None = None) -> Axes:
    """Draws the failures in a run's ``history.jsonl``: a row per rank, a bar from each failure to its recovery.

    Thin grey lines are the ends of passes over the training data. Runs in the caller's process and thread.

    Args:
        history: the file, in the run directory.
        ax: matplotlib axes to draw on; None: a new figure, which a notebook shows below the cell.

    Returns:
        The axes; ``.figure`` is the figure, with ``savefig``.

    Raises:
        FileNotFoundError: there is no such file.
        RunDirectoryError: it is damaged.
        ImportError: matplotlib is not installed.
    """
    lines = read_history(history)
    ax = new_axes("plot_failures()") if ax is None else ax
    failures = [line for line in lines if line["kind"] == FAILURE]
    began_s = min(map(_time_s, lines), default=0.0)
    for line in lines:
        if line["kind"] == "train":
            ax.axvline(_time_s(line) - began_s, color="#D0D0D0", linewidth=0.8, zorder=0)
    rows = _rows(failures)
    for failure in failures:
        _draw(ax, failure, _time_s(failure) - began_s, rows, labelled=len(failures) <= LABELS_UP_TO)
    ax.set_yticks(range(len(rows)), list(rows))
    ax.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    ax.set_xlabel("seconds since the first line of the history")
    ax.set_ylabel("rank")
    ax.set_title(f"{len(failures)} failure{'' if len(failures) == 1 else 's'}")
    ax.margins(x=0.1)
    handles, labels = ax.get_legend_handles_labels()
    if handles:
        named = dict(zip(labels, handles, strict=True))
        ax.legend(
            named.values(),
            named.keys(),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.14),
            ncols=len(named),
            frameon=False,
        )
    return ax


def _rows(failures: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The place of each rank that failed; of failures without a rank, the last one."""
    ranks = sorted({rank for failure in failures for rank in failure["ranks"]})
    names = [str(rank) for rank in ranks] + [NO_RANK] * any(not failure["ranks"] for failure in failures)
    return {name: place for place, name in enumerate(names)}


def _draw(ax: Axes, failure: Mapping[str, Any], at_s: float, rows: Mapping[str, int], *, labelled: bool) -> None:
    how, lost_s = failure["how"], failure["seconds"]
    for name in [str(rank) for rank in failure["ranks"]] or [NO_RANK]:
        ax.barh(rows[name], lost_s or 0.0, left=at_s, height=0.5, color=HOW_COLOURS[how], alpha=0.5)
        # A recovery is short beside the run: the mark shows it at any scale.
        marker = "o" if lost_s is not None else "X"
        ax.plot([at_s], [rows[name]], marker=marker, linestyle="", color=HOW_COLOURS[how], label=HOW_NAMES[how])
        if labelled:
            text = failure["cause"] if lost_s is None else f"{failure['cause']}\n{lost_s:.2f} s"
            ax.annotate(text, (at_s, rows[name]), (6, 0), textcoords="offset points", va="center", fontsize="x-small")


def _time_s(line: Mapping[str, Any]) -> float:
    return datetime.fromisoformat(line["time"]).timestamp()
