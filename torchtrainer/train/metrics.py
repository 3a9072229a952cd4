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
from torchtrainer.errors import InvalidArgumentTypeError

LAST = "last_"
_NUMBERS = (int, float, complex)  # a tuple, which isinstance goes through faster than a union
SINGLE_BYTES = 4
"""Size of a single-precision number."""
SHOWN_RANKS = 4
SHOWN_CHARACTERS = 80
"""How much an error shows: of how many ranks, and of each one's value."""


def weight_key(name: str) -> str:
    """The key under which a batch hook says what one metric alone stands for, where that is not ``num_samples``."""
    return f"{name}_{NUM_SAMPLES}"


@dataclass(frozen=True)
class PassResult:
    """The result of one rank's ``train`` or ``validate`` call.

    Attributes:
        metrics: what the hook returned; a dict also holds ``num_samples``, ``batch_count``, ``epoch`` (training) and
            ``profile`` (if asked). Anything else that ``validate`` returned is here as it is.
        weights: samples behind each metric on this rank.
    """

    metrics: Any
    weights: dict[str, float] = field(default_factory=dict)


def plain(value: Any) -> Any:
    """A value without its graph or device: what holds one number as a Python number, other tensors on the CPU."""
    if hasattr(value, "detach") and hasattr(value, "cpu"):
        value = value.detach()
        return value.item() if value.numel() == 1 else value.cpu()
    if hasattr(value, "item") and getattr(value, "size", None) == 1:  # of NumPy: an array, or a scalar
        return value.item()
    return value


def _on_device(value: Any) -> bool:
    return hasattr(value, "detach") and str(getattr(value, "device", "cpu")) != "cpu"


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS)


def _is_array(value: Any) -> bool:
    """Whether a value is a tensor, or an array of numbers of NumPy; by what it can do, as neither is imported here."""
    if hasattr(value, "detach"):
        return True
    return hasattr(value, "__array_interface__") and value.dtype.kind in "biufc"


def is_one_number(value: Any) -> bool:
    """Whether a value can be shown as a number; does not read a device."""
    return _is_number(value) or (_is_array(value) and math.prod(value.shape) == 1)


def _wide(array: Any) -> Any:
    """An array in which sums are exact enough: half precision is made single; a NumPy array becomes a tensor."""
    if not hasattr(array, "detach"):
        import torch  # who measures has it; what a checkpoint keeps of the means has to be tensors

        array = torch.as_tensor(array)
    return array.float() if array.is_floating_point() and array.element_size() < SINGLE_BYTES else array


class AverageMeter:
    """Weighted mean of one metric over batches. NaN is not hidden.

    Args:
        name: of the metric, for errors.

    Attributes:
        last: the latest value as it was given.
        weight: samples behind the mean.
        last_weight: samples behind ``last``.
    """

    def __init__(self, name: str = "metric") -> None:
        self.last: Any = None
        self.weight: Any = 0
        self.last_weight: Any = 0
        self._name = name
        self._sum: Any = None
        self._averaged = True

    def update(self, value: Any, n: float = 1) -> None:
        """Adds the value of a batch.

        Args:
            value: a number, or an array, which is averaged element by element; None: the batch has no value, and does not
                enter the mean; other things are kept, not averaged: the latest one counts.
            n: samples behind it; with 0 it is the latest value, but does not enter the mean. A tensor on a device is not read.

        Raises:
            InvalidArgumentTypeError: an array of another shape than those before.
        """
        if type(value) is float and type(n) is int:  # of most batches
            self.last, self.last_weight = value, n
            term: Any = value
            self._averaged = True
        else:
            term = self._note(value, n)
        if self._averaged and term is not None and (_on_device(n) or n):
            self._check_shape(term)
            weighed = (term * n).where(n > 0, term.new_zeros(())) if _on_device(n) and _is_array(term) else term * n
            self._sum = weighed if self._sum is None else self._sum + weighed
            self.weight = self.weight + n

    def _note(self, value: Any, n: Any) -> Any:
        """Keeps a value as the latest one, and makes it what is added up."""
        if _on_device(value):
            value = value.detach()
            if value.numel() == 1:
                value = value.reshape(())
            term = value.double() if value.device.type != "mps" and not value.is_complex() else value
        else:
            value = plain(value)
            term = value = _wide(value) if _is_array(value) else value
        self.last, self.last_weight = value, n
        if value is not None:
            self._averaged = _is_number(value) or _is_array(value)
        return term

    def _check_shape(self, term: Any) -> None:
        if self._sum is None or (type(term) is float and type(self._sum) is float):
            return
        before, now = (tuple(getattr(one, "shape", ())) for one in (self._sum, term))
        if before != now:
            raise InvalidArgumentTypeError(
                f"the metric {self._name!r} has shape {now} in this batch and {before} in those before it, so that it has no mean "
                "over the batches: return a number, or an array of one shape, for each batch"
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything the meter knows, as data."""
        return {
            "last": plain(self.last),
            "weight": plain(self.weight),
            "last_weight": plain(self.last_weight),
            "sum": 0 if self._sum is None else plain(self._sum),
            "averaged": self._averaged,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what another meter knew."""
        self.last, self.weight, self.last_weight = state["last"], state["weight"], state["last_weight"]
        self._sum, self._averaged = state["sum"] if state["weight"] else None, state["averaged"]

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
        """Adds what the hook returned for a batch of ``n`` samples, the weights of single metrics under `weight_key` included."""
        self.batch_count += 1
        self.num_samples += n
        weights = {}
        for name in metrics:
            if (key := weight_key(name)) in metrics:
                weights[key] = metrics[key] if _on_device(metrics[key]) else plain(metrics[key])
        for name, value in metrics.items():
            if name not in weights:
                self._meter(name).update(value, weights.get(weight_key(name), n) if weights else n)

    def _meter(self, name: str) -> AverageMeter:
        meter = self._meters.get(name)
        if meter is None:
            meter = self._meters[name] = AverageMeter(name)
        return meter

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
            self._meter(name).load_state_dict(known)

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
    every other number or array is the mean over the ranks that have it, weighted by the samples behind it there. A NaN on any
    of them shows. Anything else has to be the same on all ranks that have it.

    Args:
        results: one per rank, in rank order; each with a dict of metrics.

    Raises:
        InvalidArgumentTypeError: a rank's hook returned something else than a dict, or a metric differs between the ranks and
            has no mean.
    """
    for rank, result in enumerate(results):
        if not isinstance(result.metrics, Mapping):
            raise InvalidArgumentTypeError(
                f"the results of the ranks can be reduced only if every rank returns a dict; rank {rank} returned "
                f"{type(result.metrics).__name__}. Return a dict, or pass reduce_results=False"
            )
    names = dict.fromkeys(name for result in results for name in result.metrics)
    reduced: dict[str, Any] = {}
    for name in names:
        having = {rank: one for rank, one in enumerate(results) if one.metrics.get(name) is not None}
        values = {rank: plain(one.metrics[name]) for rank, one in having.items()}
        reduced[name] = _reduce(name, values, [one.weights.get(name, 1.0) for one in having.values()])
    return reduced


def _reduce(name: str, by_rank: Mapping[int, Any], weights: list[float]) -> Any:
    values = list(by_rank.values())
    if not values:
        return None
    if name == "profile" and all(isinstance(value, Mapping) for value in values):
        return _mean_of_dicts(values)
    if all(_is_number(value) for value in values):
        if name == NUM_SAMPLES:
            return _whole(sum(values))
        if name in ("epoch", BATCH_COUNT):
            return _whole(max(values))
        mean = _weighted_mean(values, weights)
        return mean if isinstance(mean, complex) else float(mean)
    if all(_is_array(value) for value in values) and len({tuple(value.shape) for value in values}) == 1:
        return _weighted_mean(values if len(values) == 1 else [_wide(value) for value in values], weights)
    if all(isinstance(value, str) for value in values) or all(_alike(value, values[0]) for value in values[1:]):
        return values[0]
    raise InvalidArgumentTypeError(_no_mean(name, by_rank))


def _weighted_mean(values: Sequence[Any], weights: Sequence[float]) -> Any:
    pairs = list(zip(values, weights, strict=True))
    counted = [(value, weight) for value, weight in pairs if weight > 0] or [(value, 1.0) for value in values]
    if len(counted) == 1:
        return counted[0][0]  # v * w / w need not be v
    return sum(value * weight for value, weight in counted) / sum(weight for _, weight in counted)


def _alike(one: Any, other: Any) -> bool:
    """Whether two values are equal, as far as that can be told."""
    if type(one) is not type(other):
        return False
    if _is_array(one):
        return bool(one.shape == other.shape and (one == other).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(_alike(*pair) for pair in zip(one, other, strict=True))
    try:
        return bool(one == other)
    except (TypeError, ValueError):  # tables and the like compare element by element
        return False


def _no_mean(name: str, by_rank: Mapping[int, Any]) -> str:
    shown = []
    for rank, value in by_rank.items():
        text = f"an array of shape {tuple(value.shape)}" if _is_array(value) else f"{type(value).__name__} {value!r}"
        shown.append(f"rank {rank} {text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + ' ...'}")
    return (
        f"the metric {name!r} differs between the ranks and has no mean over them: {'; '.join(shown[:SHOWN_RANKS])}. Return a "
        "number, an array of the same shape on all ranks, or a value that is equal on all of them; or pass "
        "reduce_results=False to get what each rank returned"
    )


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
