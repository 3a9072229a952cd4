"""The pictures of docs/benchmarks.md; matplotlib is imported when the first one is drawn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from figures import Row, curve_of
from peers import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OWN_COLOUR, OTHER_COLOUR = "#0072B2", "#9A9A9A"
COLOURS = ("#9A9A9A", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
"""Told apart by colour-blind readers too."""
INCH = (8.0, 3.4)
MIB = 1 << 20


@contextmanager
def figure(file: Path, columns: int = 1) -> Iterator[Sequence[Axes]]:
    """Axes side by side, written to a file as SVG whose bytes depend on what is drawn only.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"plots need matplotlib ({error}); run: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({"svg.hashsalt": file.stem, "font.size": 9}):
        drawn, axes = pyplot.subplots(1, columns, figsize=INCH, layout="constrained", squeeze=False)
        for one in axes[0]:
            one.grid(visible=True, alpha=0.3)
            one.spines[["top", "right"]].set_visible(False)
        yield list(axes[0])
        drawn.savefig(file, metadata={"Date": None})
        pyplot.close(drawn)
    # matplotlib ends lines with blanks, which reviewers' tools complain about.
    file.write_text("\n".join(line.rstrip() for line in file.read_text().splitlines()) + "\n")


def draw_works(works: Mapping[str, Sequence[Row]], file: Path) -> None:
    """Bars of ms per step, as multiples of the plain loop's, with the spread of the repetitions."""
    with figure(file, len(works)) as axes:
        for one, (work, rows) in zip(axes, works.items(), strict=True):
            base = next((row.ms_per_step.median / row.ratio for row in rows if row.ratio), 1.0)
            for place, row in enumerate(reversed(rows)):
                spread = row.ms_per_step
                error = [[(spread.median - spread.smallest) / base], [(spread.largest - spread.median) / base]]
                colour = OWN_COLOUR if row.name.startswith(OURS) else OTHER_COLOUR
                one.barh(place, spread.median / base, xerr=error, color=colour, ecolor="#333333")
            one.set_yticks(range(len(rows)), [_folded(row.name) for row in reversed(rows)], fontsize=7)
            one.set_xlabel("ratio to plain DDP")
            one.set_title(work)


def _folded(name: str) -> str:
    return name.replace(", ", ",\n").replace(" under ", "\nunder ")


def draw_accuracy(work: Mapping[str, Sequence[Mapping[str, Any]]], wanted: float, file: Path) -> None:
    """Validation accuracy over the seconds since the command began; the first repetition of each peer."""
    with figure(file) as (axes,):
        others = iter(COLOURS)
        for name, samples in work.items():
            curve = curve_of(samples[0])
            if curve:
                own = name == OURS
                axes.plot(
                    *zip(*curve, strict=True),
                    label=name,
                    color=OWN_COLOUR if own else next(others),
                    lw=2 if own else 1.2,
                )
        axes.axhline(wanted, color="#333333", ls=":", lw=1, label="what is waited for")
        axes.set_xlabel("seconds since the command began")
        axes.set_ylabel("validation accuracy")
        axes.legend(frameon=False, fontsize=7)


def draw_start(samples: Mapping[str, Sequence[float]], file: Path) -> None:
    """Seconds to the first optimizer step."""
    import statistics

    with figure(file) as (axes,):
        names = list(reversed(samples))
        medians = [statistics.median(samples[name]) for name in names]
        axes.barh(names, medians, color=[OWN_COLOUR if name.startswith(OURS) else OTHER_COLOUR for name in names])
        axes.bar_label(axes.containers[0], fmt="%.2f s", padding=3)
        axes.set_xlabel("seconds from the start of the command to the first optimizer step")


def draw_scale(found: Sequence[Mapping[str, float]], file: Path) -> None:
    """What worker processes on one machine cost beside their own work."""
    workers = [one["workers"] for one in found]
    with figure(file, 3) as (share, start, memory):
        share.plot(workers, [100 * one["driver_share"] for one in found], "o-", color=OWN_COLOUR, label="driver")
        supervision = [100 * one["supervision_share"] for one in found]
        share.plot(workers, supervision, "s--", color=COLOURS[4], label="with host and spawner")
        share.set_ylabel("% of one core")
        share.legend(frameon=False, fontsize=7)
        start.plot(workers, [one["start_s"] for one in found], "o-", color=OWN_COLOUR)
        start.set_ylabel("start, seconds")
        memory.plot(workers, [one["worker_bytes"] / MIB for one in found], "o-", color=OWN_COLOUR)
        memory.set_ylabel("MiB per worker (PSS)")
        for one in (share, start, memory):
            one.set_xscale("log", base=2)
            one.set_xticks(workers, [f"{count:.0f}" for count in workers])
            one.set_ylim(bottom=0)
            one.set_xlabel("worker processes")


def draw_control_plane(costs: Sequence[Mapping[str, float]], file: Path) -> None:
    """Driver time per rank over the number of ranks."""
    shown = {"start_s": "start", "call_s": "call to its results", "beat_s": "heartbeat", "failure_s": "failure"}
    ranks = [cost["ranks"] for cost in costs]
    with figure(file) as (axes,):
        for colour, (name, label) in zip((OWN_COLOUR, *COLOURS[1:]), shown.items(), strict=False):
            axes.plot(ranks, [cost[name] / cost["ranks"] * 1e6 for cost in costs], "o-", color=colour, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xticks(ranks, [f"{count:,.0f}" for count in ranks])
        axes.minorticks_off()
        axes.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
        axes.set_xlabel("ranks")
        axes.set_ylabel("driver time per rank, µs")
        axes.legend(frameon=False, fontsize=7)
