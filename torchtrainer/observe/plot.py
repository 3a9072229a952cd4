"""Draws a run's metrics over its epochs with matplotlib, which is imported when the first plot is asked for."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchtrainer.observe.failures import FailureRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOT_A_METRIC = frozenset({"epoch", "num_samples", "batch_count"})
COLOURS = {"train": "#0072B2", "val": "#D55E00", "": "#009E73"}
"""One colour per side; these three are told apart by colour-blind readers too."""

FAILURE_COLOUR = "#6B6B6B"
SIDE_NAMES = {"train": "training", "val": "validation"}
LINE_STYLES = ("-", "--", ":", "-.")
MARKERS_UP_TO_EPOCHS = 40


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One metric over the epochs.

    Attributes:
        side: ``train``, ``val``, or empty if the name does not say.
        metric: the name without the side, such as ``loss``.
        epochs: where there is a value.
        values: the values, as many.
    """

    side: str
    metric: str
    epochs: tuple[int, ...]
    values: tuple[float, ...]

    @property
    def label(self) -> str:
        """How the legend calls it, such as ``validation accuracy``."""
        return f"{SIDE_NAMES.get(self.side, '')} {self.metric.replace('_', ' ')}".strip()


def curves_of(entries: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Picks the numbers worth drawing: not counts, not profiles, and not ``last_...``, which shadows a mean.

    Args:
        entries: one per epoch; where one has no ``epoch``, its position counts.

    Returns:
        Curves in the order in which their keys first appear; NaN stays, as a gap.
    """
    points: dict[str, list[tuple[int, float]]] = {}
    for position, entry in enumerate(entries, start=1):
        epoch = entry.get("epoch", position)
        for key, value in entry.items():
            if key in NOT_A_METRIC or key.startswith("last_") or isinstance(value, bool):
                continue
            if isinstance(value, int | float):
                points.setdefault(key, []).append((epoch, float(value)))
    curves = []
    for key, found in points.items():
        side, _, metric = key.partition("_")
        if side not in SIDE_NAMES or not metric:
            side, metric = "", key
        epochs, values = zip(*found, strict=True)
        curves.append(Curve(side=side, metric=metric, epochs=epochs, values=values))
    return curves


def plot_history(entries: Sequence[Mapping[str, Any]], ax: Axes | None, failures: Sequence[FailureRecord] = ()) -> Axes:
    """Draws losses on the left scale and other metrics on the right one; colour tells training from validation.

    Args:
        entries: one per epoch.
        ax: axes to draw on; None: a new figure. The legend is below them: ``layout="constrained"`` makes room for it.
        failures: of the same epochs; marked in the middle of the pass in which they happened.

    Returns:
        The axes with the left scale.

    Raises:
        ImportError: matplotlib is not installed.
    """
    columns = 2
    if ax is None:
        ax, columns = new_axes("History.plot()"), 4
    from matplotlib.ticker import MaxNLocator

    curves = curves_of(entries)
    losses = [curve for curve in curves if "loss" in curve.metric]
    others = [curve for curve in curves if curve not in losses]
    # Without losses the other metrics get the left scale, and there is no right one.
    lines = _draw(ax, losses or others, first_style=0)
    if losses and others:
        lines += _draw(ax.twinx(), others, first_style=len({curve.metric for curve in losses}))
    lines += _mark(ax, failures)
    ax.set_xlabel("epoch")
    ax.set_title("Training and validation" if curves else "No epochs yet")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(visible=True, alpha=0.3)
    epochs = {epoch for curve in curves for epoch in curve.epochs}
    if len(epochs) == 1:
        ax.set_xlim(min(epochs) - 1, max(epochs) + 1)
    if lines:  # below the plot, where it covers no curve
        place = (0.5, -0.14)
        ax.legend(handles=lines, loc="upper center", bbox_to_anchor=place, ncols=columns, frameon=False)
    return ax


def new_axes(caller: str) -> Axes:
    """The axes of a new figure.

    Args:
        caller: what the user called, for the error.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            f"{caller} needs matplotlib ({error}); run: pip install matplotlib, or pip install 'torchtrainer[notebook]'"
        ) from error
    return pyplot.subplots(figsize=(8, 4.5), layout="constrained")[1]


def _mark(ax: Axes, failures: Sequence[FailureRecord]) -> list[Any]:
    """A line in each pass in which something failed; the first one is for the legend."""
    passes = sorted({failure.epoch for failure in failures})
    lines = [ax.axvline(epoch - 0.5, color=FAILURE_COLOUR, linestyle=":", linewidth=1) for epoch in passes]
    if lines:
        lines[0].set_label("1 failure" if len(failures) == 1 else f"{len(failures)} failures")
    return lines[:1]


def _draw(scale: Axes, curves: Sequence[Curve], *, first_style: int) -> list[Any]:
    styles: dict[str, str] = {}
    lines: list[Any] = []
    for curve in curves:
        style = styles.setdefault(curve.metric, LINE_STYLES[(first_style + len(styles)) % len(LINE_STYLES)])
        marker = "o" if len(curve.epochs) <= MARKERS_UP_TO_EPOCHS else ""
        lines += scale.plot(
            curve.epochs,
            curve.values,
            color=COLOURS[curve.side],
            linestyle=style,
            marker=marker,
            markersize=4,
            label=curve.label,
        )
    scale.set_ylabel(_scale_label(curves))
    finite = [value for curve in curves for value in curve.values if math.isfinite(value)]
    if finite and all(0 <= value <= 1 for value in finite) and not any("loss" in curve.metric for curve in curves):
        low = min(finite)
        scale.set_ylim(max(0.0, low - 0.1 * (1 - low) - 0.01), 1.01)
    return lines


def _scale_label(curves: Sequence[Curve]) -> str:
    metrics = list(dict.fromkeys(curve.metric.replace("_", " ") for curve in curves))
    return ", ".join(metrics[:3]) + (", …" if len(metrics) > 3 else "")
