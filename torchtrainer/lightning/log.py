"""What a Lightning module logs in one ``train`` or ``validate`` call, and what it comes to over batches and ranks."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrainer.comm.group import Collective
from torchtrainer.errors import InvalidArgumentError, InvalidArgumentTypeError
from torchtrainer.lightning.module import RESULT_KEYS
from torchtrainer.train.metrics import LAST, AverageMeter, AverageMeterCollection, PassResult, plain, reduce_results
from torchtrainer.train.step import reading

_FOLDS: dict[str, Callable[[Any, Any], Any]] = {"sum": lambda one, other: one + other, "min": min, "max": max}


@dataclass(kw_only=True)
class _Entry:
    """One logged name.

    Attributes:
        reduction: ``mean``, ``sum``, ``min``, ``max``; ``metric`` for a torchmetrics object.
        meter: of a mean.
        folded: of a sum, minimum or maximum on this rank; None: nothing yet.
        attribute: where in the module the torchmetrics object is.
        over_ranks: the value over all ranks, when it was last asked for; not of a mean.
        both: logged ``on_step`` and ``on_epoch``.
    """

    reduction: str
    meter: AverageMeter = field(default_factory=AverageMeter)
    folded: Any = None
    attribute: str = ""
    over_ranks: Any = None
    both: bool = False


class LoggedMetrics:
    """Collects what ``self.log`` gets in one call on one rank.

    Args:
        module: the user's module, which holds the torchmetrics objects.
        collective: the ranks.
    """

    def __init__(self, module: nn.Module, collective: Collective) -> None:
        self._module = module
        self._collective = collective
        self._entries: dict[str, _Entry] = {}

    def add(self, name: str, value: Any, *, weight: float, reduce_fx: Any, both: bool) -> None:
        """Adds one value.

        Args:
            name: of the metric.
            value: a number, a tensor with one element, or a torchmetrics object that is an attribute of the module.
            weight: samples behind it; 0: samples that count on another rank.
            reduce_fx: ``mean``, ``sum``, ``min``, ``max``, or the function of torch or Python with that name.
            both: it was asked for per step and per epoch.

        Raises:
            InvalidArgumentTypeError: a value that cannot be logged.
            InvalidArgumentError: an unknown ``reduce_fx``, or a name that the results have for something else.
        """
        if name in RESULT_KEYS:
            raise InvalidArgumentError(
                f"self.log({name!r}, ...): the results have something else under this name; log it under another one"
            )
        if isinstance(value, nn.Module) and callable(getattr(value, "compute", None)):
            attribute = self._attribute(name, value)
            self._entries[name] = _Entry(reduction="metric", attribute=attribute, both=both)
            return
        number = _number(name, value)
        entry = self._entries.setdefault(name, _Entry(reduction=_reduction(name, reduce_fx), both=both))
        if entry.reduction == "mean":
            entry.meter.update(number, weight)
        elif entry.reduction in _FOLDS and weight:
            fold = _FOLDS[entry.reduction]
            entry.folded = number if entry.folded is None else fold(entry.folded, number)

    def state_dict(self) -> dict[str, Any]:
        """What was logged up to now on this rank, the counts of the module's torchmetrics objects included."""
        return {
            "entries": {
                name: {
                    "reduction": one.reduction,
                    "meter": one.meter.state_dict(),
                    "folded": plain(one.folded),
                    "attribute": one.attribute,
                    "both": one.both,
                }
                for name, one in self._entries.items()
            },
            "metrics": {
                path: {"count": metric.update_count, "state": dict(metric.metric_state)}
                for path, metric in self._metric_objects()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what `state_dict` returned."""
        self._entries.clear()
        for name, known in state["entries"].items():
            entry = self._entries[name] = _Entry(**{**known, "meter": AverageMeter()})
            entry.meter.load_state_dict(known["meter"])
        metrics = dict(self._metric_objects())
        for path, known in state["metrics"].items():
            metrics[path].reset()
            # there is no public way to set the count
            vars(metrics[path]).update({**known["state"], "_update_count": known["count"]})

    def _metric_objects(self) -> list[tuple[str, Any]]:
        return [(path, one) for path, one in self._module.named_modules() if hasattr(one, "metric_state")]

    def over_ranks(self, measured: AverageMeterCollection | None, *, reset: bool) -> dict[str, Any]:
        """What was logged, and the built-in loss, up to now and over all ranks. Every rank calls it; reads the device.

        Args:
            measured: the meters of the built-in loop.
            reset: torchmetrics objects start anew.
        """
        everyone = self._collective.all_gather(
            {
                "means": self._means(measured),
                "folds": {
                    name: [one.reduction, plain(one.folded)]
                    for name, one in self._entries.items()
                    if one.folded is not None
                },
                "metrics": {name: one.attribute for name, one in self._entries.items() if one.attribute},
                "both": [name for name, one in self._entries.items() if one.both],
            }
        )
        found = _means([one["means"] for one in everyone])
        fixed = {
            **_fold(one["folds"] for one in everyone),
            **self._compute([one["metrics"] for one in everyone], reset),
        }
        for name, value in fixed.items():
            self._entries.setdefault(name, _Entry(reduction="metric")).over_ranks = value
        found.update(fixed)
        for name in dict.fromkeys(name for one in everyone for name in one["both"] if name in found):
            found[f"{name}_epoch"] = found[name]
            if name in self._entries and self._entries[name].reduction == "mean":
                found[f"{name}_step"] = plain(self._entries[name].meter.last)
        return found

    def latest(self, metrics: Mapping[str, Any], weight: float) -> dict[str, Any]:
        """What was logged last, and the metrics of a batch, over all ranks. Every rank calls it; reads the device.

        Args:
            metrics: of the batch, on this rank.
            weight: samples behind them.
        """
        mine = {name: (plain(value), weight) for name, value in metrics.items()}
        for name, one in self._entries.items():
            if one.reduction == "mean":
                mine[name] = (plain(one.meter.last), float(one.meter.last_weight))
        everyone = self._collective.all_gather(mine)
        return _means(everyone)

    def summary(self) -> dict[str, Any]:
        """This rank's means, and the latest values as ``last_<name>``; the rest as `over_ranks` had it last."""
        found: dict[str, Any] = {}
        for name, one in self._entries.items():
            if one.reduction == "mean":
                found[name] = one.meter.mean
                found[LAST + name] = plain(one.meter.last)
            elif one.over_ranks is not None:
                found[name] = one.over_ranks
        return found

    def weights(self) -> dict[str, float]:
        """Samples behind each entry of `summary`; what is equal on all ranks weighs 1."""
        found: dict[str, float] = {}
        for name, one in self._entries.items():
            if one.reduction == "mean":
                found[name] = float(one.meter.weight)
                found[LAST + name] = float(one.meter.last_weight)
            else:
                found[name] = 1.0
        return found

    def _means(self, measured: AverageMeterCollection | None) -> dict[str, tuple[Any, float]]:
        """Mean and weight of each metric: of the built-in loop's and, before them, of the logged ones."""
        found: dict[str, tuple[Any, float]] = {}
        if measured is not None:
            summary = measured.summary()
            found = {
                name: (summary[name], weight)
                for name, weight in measured.weights().items()
                if not name.startswith(LAST) and isinstance(summary[name], int | float)
            }
        for name, one in self._entries.items():
            if one.reduction == "mean":
                found[name] = (one.meter.mean, float(one.meter.weight))
            else:
                found.pop(name, None)
        return found

    def _compute(self, attributes: list[dict[str, str]], reset: bool) -> dict[str, Any]:
        """Values of the torchmetrics objects that any rank logged: they exchange their counts when they are computed."""
        union = {name: attribute for one in attributes for name, attribute in one.items()}
        metrics: dict[str, Any] = {name: self._module.get_submodule(union[name]) for name in sorted(union)}
        found = {name: plain(metric.compute()) for name, metric in metrics.items()}
        if reset:
            for metric in metrics.values():
                metric.reset()
        return found

    def _attribute(self, name: str, metric: nn.Module) -> str:
        for path, module in self._module.named_modules():
            if module is metric:
                return str(path)
        raise InvalidArgumentError(
            f"self.log({name!r}, {type(metric).__name__}()): the metric is not an attribute of "
            f"{type(self._module).__name__}; "
            f"make it in __init__ as self.<name>, so that every rank finds it when the pass is over"
        )


class CallMeters(AverageMeterCollection):
    """The meters of a call in which something was logged: knows the samples behind both kinds of metrics."""

    def __init__(self, measured: AverageMeterCollection | None, logged: LoggedMetrics) -> None:
        super().__init__()
        self._measured = measured
        self._logged = logged

    def weights(self) -> dict[str, float]:
        """Samples behind each metric."""
        return {**(self._measured.weights() if self._measured is not None else {}), **self._logged.weights()}


def _means(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """The means over the ranks of what each has as value and weight by name."""
    return reduce_results(
        [
            PassResult(
                {name: value for name, (value, _) in one.items()}, {name: weight for name, (_, weight) in one.items()}
            )
            for one in ranks
        ]
    )


def _fold(ranks: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in ranks:
        for name, (reduction, value) in one.items():
            found[name] = value if name not in found else _FOLDS[reduction](found[name], value)
    return found


def _number(name: str, value: Any) -> Any:
    shape = ""
    if isinstance(value, torch.Tensor):
        if value.numel() == 1:
            return reading(value.reshape(()))
        shape = f" of shape {tuple(value.shape)}"
    elif isinstance(value, numbers.Real):
        return float(value)
    raise InvalidArgumentTypeError(
        f"self.log({name!r}, ...) takes a number, a tensor with one element or a torchmetrics object; got "
        f"{type(value).__name__}{shape}"
    )


def _reduction(name: str, reduce_fx: Any) -> str:
    reduction = reduce_fx if isinstance(reduce_fx, str) else getattr(reduce_fx, "__name__", repr(reduce_fx))
    if reduction in ("avg", "mean"):
        return "mean"
    if reduction in _FOLDS:
        return reduction
    raise InvalidArgumentError(
        f"self.log({name!r}, ..., reduce_fx={reduce_fx!r}): reduce_fx must be mean, sum, min or max; log a torchmetrics "
        f"object for anything else"
    )
