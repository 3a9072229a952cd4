"""What the samples of the works come to: medians, ratios, time to accuracy. Values in, values out."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ACCURACY_SHARE = 0.9
"""Part of the plain loop's final accuracy that is waited for."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Some samples of one thing."""

    median: float
    smallest: float
    largest: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one sample."""
        return cls(median=statistics.median(values), smallest=min(values), largest=max(values), count=len(values))

    def shown(self, digits: int = 2) -> str:
        """The median, and from where to where the samples go."""
        if self.count == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ({self.smallest:,.{digits}f} to {self.largest:,.{digits}f})"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One peer on one work.

    Attributes:
        name: of the peer.
        ms_per_step, samples_per_s: over the repetitions.
        ratio: of ``ms_per_step`` to the plain loop's; None: that was not measured.
        same_weights: whether they end with the plain loop's bits; None: not known.
    """

    name: str
    ms_per_step: Spread
    samples_per_s: Spread
    ratio: float | None
    same_weights: bool | None


@dataclass(frozen=True, kw_only=True)
class Arrival:
    """How long one peer takes to know something.

    Attributes:
        seconds: from the start of the command until the accuracy is reached; None: it never was.
        final: the accuracy at the end.
        total_s: from the start of the command to the last validation.
    """

    name: str
    seconds: Spread | None
    final: Spread
    total_s: Spread


Samples = Sequence[Mapping[str, Any]]
"""One entry per repetition: what a program printed, by label; each is a list of lines."""


def numbers(samples: Samples, label: str) -> list[float]:
    """The first value of the first line with a label, over the repetitions that have it."""
    return [float(sample[label][0][0]) for sample in samples if label in sample]


def rows_of(work: Mapping[str, Samples], plain: str) -> list[Row]:
    """The table of one work.

    Args:
        work: samples by peer.
        plain: the peer that the others are compared with.
    """
    base = numbers(work.get(plain, ()), "MS_PER_STEP")
    weights = _weights(work.get(plain, ()))
    rows = []
    for name, samples in work.items():
        found = numbers(samples, "MS_PER_STEP")
        if found:
            ratio = statistics.median(found) / statistics.median(base) if base else None
            own = _weights(samples)
            same = own == weights if own and weights else None
            paces = Spread.of(numbers(samples, "SAMPLES_PER_S"))
            row = Row(name=name, ms_per_step=Spread.of(found), samples_per_s=paces, ratio=ratio, same_weights=same)
            rows.append(row)
    return rows


def _weights(samples: Samples) -> set[str]:
    return {sample["WEIGHTS"][0][0] for sample in samples if "WEIGHTS" in sample}


def wanted_accuracy(work: Mapping[str, Samples], plain: str) -> float | None:
    """The accuracy that all are to reach; None: the plain loop did not run."""
    finals = [curve_of(sample)[-1][1] for sample in work.get(plain, ()) if curve_of(sample)]
    return ACCURACY_SHARE * statistics.median(finals) if finals else None


def curve_of(sample: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Seconds since the command began, and the accuracy then."""
    return [(float(seconds), float(accuracy)) for seconds, accuracy in sample.get("ACCURACY", ())]


def arrivals_of(work: Mapping[str, Samples], wanted: float) -> list[Arrival]:
    """When each peer first had this accuracy."""
    found = []
    for name, samples in work.items():
        curves = [curve_of(sample) for sample in samples if curve_of(sample)]
        if not curves:
            continue
        firsts = [next((s for s, accuracy in curve if accuracy >= wanted), None) for curve in curves]
        reached = [first for first in firsts if first is not None]
        found.append(
            Arrival(
                name=name,
                seconds=Spread.of(reached) if len(reached) == len(curves) else None,
                final=Spread.of([curve[-1][1] for curve in curves]),
                total_s=Spread.of([curve[-1][0] for curve in curves]),
            )
        )
    return found
