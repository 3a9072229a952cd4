"""Means of metrics: over the batches of a rank, and over the ranks. Both weighted by samples.

No torch here, so that the driver can use it: tensors are known by what they can do. A tensor on a device is added up
there and read once, at the end of the pass, so that metrics do not make the host wait for the device in every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torchtrainer.config import BATCH_COUNT, NUM_SAMPLES

LAST = "last_"


@dataclass(frozen=True)
class PassResult:
    """What one rank's ``train`` or ``validate`` call came to.

    Attributes:
        metrics: what the hook returned; a dict also holds ``num_samples``, ``batch_count``, ``epoch`` (training) and
            ``profile`` (if asked). Anything else that ``validate`` returned is here as it is.
        weights: samples behind each metric on this rank.
    """

    metrics: Any
    weights: dict[str, float] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """A value without its graph or device: one-element scalars as Python numbers, other tensors on the CPU."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach()
        return value.item() if value.dim() == 0 else value.cpu()
    if hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    return value


def _on_device(value: Any) -> bool:
    return hasattr(value, "detach") and str(getattr(value, "device", "cpu")) != "cpu"


def _summable(value: Any) -> bool:
    """Numbers, tensors and arrays can be averaged; text, containers and None cannot."""
    if isinstance(value, bool | int | float | complex):
        return True
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__mul__")


class AverageMeter:
    """Weighted mean of one metric over batches. NaN is not hidden.

    Attributes:
        last: the latest value as it was given.
        weight: samples behind the mean.
        last_weight: samples behind ``last``.
    """

    def __init__(self) -> None:
        self.last: Any = None
        self.weight: float = 0
        self.last_weight: float = 0
        self._sum: Any = 0
        self._averaged = True

    def update(self, value: Any, n: float = 1) -> None:
        """Adds the value of a batch.

        Args:
            value: a number, 0-d tensor or array; other things are kept, not averaged: the latest one counts.
            n: samples behind it; with 0 it is the latest value, but does not enter the mean.
        """
        if _on_device(value):
            value = value.detach()
            term = value.double() if value.device.type != "mps" else value.float()
        else:
            term = value = plain(value)
        self.last, self.last_weight = value, n
        self._averaged = _summable(value)
        if self._averaged and n:
            self._sum = self._sum + term * n
            self.weight += n

    def state_dict(self) -> dict[str, Any]:
        """Everything the meter knows, as data."""
        return {
            "last": plain(self.last),
            "weight": self.weight,
            "last_weight": self.last_weight,
            "sum": plain(self._sum),
            "averaged": self._averaged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what another meter knew."""
        self.last, self.weight, self.last_weight = state["last"], state["weight"], state["last_weight"]
        self._sum, self._averaged = state["sum"], state["averaged"]

    @property
    def mean(self) -> Any:
        """The weighted mean as a Python number where that is possible; the latest value if nothing could be averaged."""
        if not self._averaged or not self.weight:
            return plain(self.last)
        return plain(self._sum / self.weight)


class AverageMeterCollection:
    """Weighted means of the metrics that a batch hook returns, over the batches of one pass on one rank."""

    def __init__(self) -> None:
        self.batch_count = 0
        self.num_samples: float = 0
        self._meters: dict[str, AverageMeter] = {}

    def update(self, metrics: Mapping[str, Any], n: float = 1) -> None:
        """Adds what the hook returned for a batch of ``n`` samples."""
        self.batch_count += 1
        self.num_samples += n
        for name, value in metrics.items():
            self._meters.setdefault(name, AverageMeter()).update(value, n)

    def skip(self) -> None:
        """Notes a batch in which this rank had no samples of its own: its latest values are not the pass's latest."""
        self.batch_count += 1
        for meter in self._meters.values():
            meter.last_weight = 0

    def state_dict(self) -> dict[str, Any]:
        """Everything the meters know, as data."""
        return {
            BATCH_COUNT: self.batch_count,
            NUM_SAMPLES: self.num_samples,
            "meters": {name: meter.state_dict() for name, meter in self._meters.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what other meters knew."""
        self.batch_count, self.num_samples = state[BATCH_COUNT], state[NUM_SAMPLES]
        for name, known in state["meters"].items():
            self._meters.setdefault(name, AverageMeter()).load_state_dict(known)

    def summary(self) -> dict[str, Any]:
        """``batch_count``, ``num_samples``, then each metric's mean and ``last_<metric>``. Reads the device."""
        found: dict[str, Any] = {BATCH_COUNT: self.batch_count, NUM_SAMPLES: self.num_samples}
        for name, meter in self._meters.items():
            found[name] = meter.mean
            found[LAST + name] = plain(meter.last)
        return found

    def weights(self) -> dict[str, float]:
        """Samples behind each entry of `summary`."""
        found: dict[str, float] = {}
        for name, meter in self._meters.items():
            found[name] = float(meter.weight)
            found[LAST + name] = float(meter.last_weight)
        return found


def merge_meters(states: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The state of meters that saw what several saw: sums and weights added, the latest values those of the first."""
    if not states:
        return None
    meters: dict[str, Any] = {}
    for state in states:
        for name, known in state["meters"].items():
            if name not in meters:
                meters[name] = dict(known)
            elif known["averaged"]:
                meters[name]["sum"] = meters[name]["sum"] + known["sum"]
                meters[name]["weight"] += known["weight"]
    samples = sum(state[NUM_SAMPLES] for state in states)
    return {BATCH_COUNT: max(state[BATCH_COUNT] for state in states), NUM_SAMPLES: samples, "meters": meters}


def reduce_results(results: Sequence[PassResult]) -> dict[str, Any]:
    """Makes one dict out of the ranks' results.

    ``num_samples`` is the sum, ``epoch`` and ``batch_count`` are whole numbers, numbers in ``profile`` are means over the ranks,
    every other number is the mean over the ranks that have it, weighted by the samples behind it there. A NaN on any of
    them shows. What is not a number comes from the first rank that has it.

    Args:
        results: one per rank, in rank order; each with a dict of metrics.

    Raises:
        TypeError: a rank's hook returned something else than a dict.
    """
    for rank, result in enumerate(results):
        if not isinstance(result.metrics, Mapping):
            raise TypeError(
                f"the results of the ranks can be reduced only if every rank returns a dict; rank {rank} returned "
                f"{type(result.metrics).__name__}. Return a dict, or pass reduce_results=False"
            )
    names = dict.fromkeys(name for result in results for name in result.metrics)
    reduced: dict[str, Any] = {}
    for name in names:
        having = [result for result in results if result.metrics.get(name) is not None]
        values = [plain(result.metrics[name]) for result in having]
        reduced[name] = _reduce(name, values, [result.weights.get(name, 1.0) for result in having])
    return reduced


def _reduce(name: str, values: list[Any], weights: list[float]) -> Any:
    if not values:
        return None
    if name == "profile" and all(isinstance(value, Mapping) for value in values):
        return _mean_of_dicts(values)
    numbers = [(value, weight) for value, weight in zip(values, weights, strict=True) if isinstance(value, int | float)]
    if not numbers or not isinstance(values[0], int | float):
        return values[0]
    if name == NUM_SAMPLES:
        return _whole(sum(value for value, _ in numbers))
    if name in ("epoch", BATCH_COUNT):
        return _whole(max(value for value, _ in numbers))
    return _weighted_mean(numbers)


def _weighted_mean(numbers: list[tuple[float, float]]) -> float:
    counted = [(value, weight) for value, weight in numbers if weight > 0] or [(value, 1.0) for value, _ in numbers]
    if len(counted) == 1:
        return float(counted[0][0])  # v * w / w need not be v
    return sum(value * weight for value, weight in counted) / sum(weight for _, weight in counted)


def _mean_of_dicts(dicts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    gathered: dict[str, list[Any]] = {}
    for one in dicts:
        for key, value in one.items():
            gathered.setdefault(key, []).append(value)
    return {
        key: sum(values) / len(values) if isinstance(values[0], int | float) else values[0]
        for key, values in gathered.items()
    }


def _whole(value: float) -> float:
    """An int where the number is whole."""
    return int(value) if math.isfinite(value) and value == int(value) else value
