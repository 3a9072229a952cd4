"""Profiles of calls: what the ranks have measured, put together for the user."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchtrainer.observe.bottleneck import RankTimes, TrainingFacts, bottleneck, slowest
from torchtrainer.train.metrics import PassResult

PROFILE = "profile"
MEASURED = ("times", "facts", "samples")
"""Measurements of a rank for the profile of the whole call."""


@dataclass(frozen=True, kw_only=True)
class StepTraces:
    """Traces of some training steps.

    Attributes:
        paths: of one file per process, by its lowest rank: JSON in Chrome's trace format, each on the machine of its process.
        metrics: what ``train`` would have returned for these steps.
    """

    paths: tuple[str, ...]
    metrics: dict[str, Any]


def with_whole_profiles(results: Sequence[PassResult]) -> list[PassResult]:
    """The results of the ranks, each with the profile of the whole call; those of other calls are as they were.

    Args:
        results: one per rank; in the profile of each, ``times`` and ``facts`` are what that rank has measured.
    """
    measured = [one.metrics[PROFILE] for one in results if _has_times(one)]
    if not measured:
        return list(results)
    whole = _whole(measured)
    return [replace(one, metrics=_with(one.metrics, whole)) if _has_times(one) else one for one in results]


def _has_times(result: PassResult) -> bool:
    profile = result.metrics.get(PROFILE) if isinstance(result.metrics, dict) else None
    return isinstance(profile, dict) and "times" in profile


def _with(metrics: dict[str, Any], whole: dict[str, Any]) -> dict[str, Any]:
    means = {name: value for name, value in metrics[PROFILE].items() if name not in MEASURED}
    return {**metrics, PROFILE: {**means, **whole}}


def _whole(measured: Sequence[dict[str, Any]]) -> dict[str, Any]:
    times, first = [RankTimes(**one["times"]) for one in measured], measured[0]
    facts = TrainingFacts(**{**first["facts"], "own_hooks": tuple(first["facts"]["own_hooks"])})
    seconds = max(one.wall_s * one.steps for one in times)
    last = slowest(times)
    return {
        "ranks": [dict(one["times"]) for one in measured],
        "wall_s": max(one.wall_s for one in times),
        "samples_per_s": first["samples"] / seconds if seconds > 0 else 0.0,
        "slowest": {"rank": last.rank, "pid": last.pid, "host": last.host, "work_s": last.work_s},
        "bottleneck": bottleneck(times, facts),
    }
