"""Where the logs of two runs of a script part, and why that is likely so. Torch is imported only to compare two values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from torchtrainer.observe.digest_log import DigestFile, Entry, Place, Spot, differing, log_path, logs_in, value_path

Kind = Literal["state", "held", "batch", "call", "more steps", "fewer steps"]
MAX_NAMED_ATTRIBUTES = 3
"""Maximum number of attributes that an explanation names."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first place where two runs part.

    Attributes:
        kind: ``batch``: the samples are others, and with them the state; ``state``: only the state; ``held``: only what the
            operator holds besides.
        start: of the interrupted run, from 0.
        spot: where.
        rank: the lowest that differs there.
        step: optimizer steps that were completed.
        names: values that differ, in the order of the state.
        call, reference_call: what the script asked for.
        here: the entry; None for ``fewer steps``.
    """

    kind: Kind
    start: int
    spot: Spot
    rank: int
    step: int
    names: list[str]
    call: str
    reference_call: str
    here: Entry | None

    @property
    def where(self) -> str:
        """The place, for people."""
        trainer = f"trainer {self.spot.trainer}, " if self.spot.trainer > 1 else ""
        passing = "" if self.call.startswith("train") else f", batch {self.spot.place.batch} of {self.call}"
        return f"{trainer}step {self.step}, rank {self.rank}{passing}"


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The logs that are compared.

    Attributes:
        reference: directory with those of the undisturbed run.
        starts: directories with those of each start of the interrupted run, in order.
        control: directory with those of another undisturbed run.
    """

    reference: Path
    starts: Sequence[Path]
    control: Path | None = None


def first_difference(
    reference: Path, starts: Sequence[Path], *, ended: bool = True, ignored: Collection[str] = ()
) -> Difference | None:
    """The first place, in the order of training, where a run is not the reference; None: it is the same bits.

    Args:
        reference: directory with the logs of an undisturbed run.
        starts: directories with the logs of the run, one for each start. A step that was taken twice counts twice.
        ended: the run came to its end, so that no step may be missing.
        ignored: names of what operators hold that do not count.
    """
    known = {(trainer, rank): log for trainer, rank, log in logs_in(reference)}
    found: list[Difference] = []
    seen: dict[tuple[int, int], set[Place]] = {key: set() for key in known}
    for start, directory in enumerate(starts):
        for trainer, rank, log in logs_in(directory):
            seen.setdefault((trainer, rank), set()).update(log.at)
            difference = _first_in(log, known.get((trainer, rank)), start, trainer, rank, ignored)
            if difference is not None:
                found.append(difference)
    for (trainer, rank), log in known.items() if ended else ():
        missing = next((entry for entry in log.entries if entry.place not in seen[trainer, rank]), None)
        if missing is not None:
            found.append(_difference("fewer steps", len(starts) - 1, trainer, rank, missing, missing, here=None))
    times = _times(known)
    return min(found, key=lambda one: (times(one.spot), one.spot.place, one.start, one.rank), default=None)


def _times(known: Mapping[tuple[int, int], DigestFile]) -> Callable[[Spot], int]:
    """When the undisturbed run was at a place: trainers may take turns, and what differs in one spreads to the others."""

    def time_of(spot: Spot) -> int:
        log = known.get((spot.trainer, 0))
        before = [entry.at_ns for entry in log.entries if entry.place <= spot.place] if log is not None else []
        return max(before, default=0)

    return time_of


def _first_in(
    log: DigestFile, reference: DigestFile | None, start: int, trainer: int, rank: int, ignored: Collection[str]
) -> Difference | None:
    place = (start, trainer, rank)
    held = _Held(log, reference, ignored) if reference is not None else None
    for entry in log.entries:
        there = reference.at.get(entry.place) if reference is not None else None
        if reference is None or held is None or there is None:
            return _difference("more steps", *place, entry, entry, here=entry)
        if entry.call != there.call:
            return _difference("call", *place, entry, there, here=entry)
        other_data = bool(entry.data and there.data) and entry.data != there.data
        if entry.whole != there.whole or other_data:
            names = differing(log.details(entry).state, reference.details(there).state)
            kind: Kind = "batch" if other_data else "state"
            return _difference(kind, *place, entry, there, here=entry, names=names or ["the batch"])
        if names := held.differing(entry, there):
            return _difference("held", *place, entry, there, here=entry, names=names)
    return None


class _Held:
    """Compares what the operator of a run holds with that of the reference, entry by entry.

    A checkpoint need not have all of it: much is made anew before it is used, such as the output of the latest batch. So a
    value is compared from when the run has done again what changes it in the reference, be it a training step, a step of a
    validation, or what happens where calls begin and end. One that never changes is no state.

    Args:
        log, reference: of the same rank.
        ignored: names that do not count.
    """

    def __init__(self, log: DigestFile, reference: DigestFile, ignored: Collection[str]) -> None:
        self._log = log
        self._reference = reference
        self._ignored = ignored
        self._before: Entry | None = None
        self._done: set[str] = set()

    def differing(self, entry: Entry, there: Entry) -> list[str]:
        """Names of what differs and counts, at the next entry of the log."""
        if self._before is not None:
            self._done.add(_doing(self._before, entry))
        self._before = entry
        if entry.held == there.held or not self._done:
            return []
        names = differing(self._reference.details(there).held, self._log.details(entry).held)
        return [name for name in names if name not in self._ignored and self._changed_by.get(name, set()) & self._done]

    @cached_property
    def _changed_by(self) -> dict[str, set[str]]:
        """What changes which value in the reference."""
        found: dict[str, set[str]] = {}
        entries = self._reference.entries
        before = self._reference.details(entries[0]).held
        for last, entry in pairwise(entries):
            if entry.held != last.held:
                held = self._reference.details(entry).held
                for name in differing(held, before):
                    found.setdefault(name, set()).add(_doing(last, entry))
                before = held
        return found


def _doing(last: Entry, entry: Entry) -> str:
    """What lies between two entries that follow each other: one of a few kinds of things that a run does."""
    method = entry.call.partition("(")[0]
    if entry.place.call != last.place.call:
        return f"begin {method}"
    return f"end {method}" if entry.place.end else method


def changing_anyway(reference: Path, control: Path) -> set[str]:
    """Names of what operators hold that is not the same in two undisturbed runs, such as times."""
    found: set[str] = set()
    known = {(trainer, rank): log for trainer, rank, log in logs_in(reference)}
    for trainer, rank, log in logs_in(control):
        there = known.get((trainer, rank))
        for entry in log.entries if there is not None else ():
            other = there.at.get(entry.place) if there is not None else None
            if there is not None and other is not None and other.held != entry.held:
                found.update(differing(log.details(entry).held, there.details(other).held))
    return found


def _difference(
    kind: Kind,
    start: int,
    trainer: int,
    rank: int,
    entry: Entry,
    there: Entry,
    *,
    here: Entry | None,
    names: list[str] | None = None,
) -> Difference:
    return Difference(
        kind=kind,
        start=start,
        spot=Spot(trainer=trainer, place=entry.place),
        rank=rank,
        step=entry.step,
        names=names or [],
        call=entry.call,
        reference_call=there.call,
        here=here,
    )


def describe(difference: Difference, runs: Runs) -> str:
    """The place and what differs there, in a line."""
    if difference.kind == "call":
        return f"{difference.where}: {difference.call} where the undisturbed run had {difference.reference_call}"
    if difference.kind == "more steps":
        return f"{difference.where}: a step that the undisturbed run did not take"
    if difference.kind == "fewer steps":
        return f"{difference.where}: a step that only the undisturbed run took"
    name, *others = difference.names
    more = f" and {len(others)} more" if others else ""
    return f"{difference.where}: {name}{more}{_largest(difference, runs)}"


def explain(difference: Difference, control: Difference | None, runs: Runs) -> str:
    """The likely reason.

    Args:
        difference: of the interrupted run from the undisturbed one.
        control: of another undisturbed run from it; None: there is none.
        runs: their logs.
    """
    if control is not None:
        batch = ", where the batch has other data," if control.kind == "batch" else ""
        return (
            f"an unseeded source of randomness: two undisturbed runs differ as well, first at {control.where}{batch} in "
            f"{control.names[0] if control.names else 'the number of steps'}. Look for seeds from the time or the system, "
            "unseeded generators of your own, the order of sets, and threads"
        )
    if difference.kind == "call":
        return "the script made other calls when it was started again"
    if difference.kind in ("more steps", "fewer steps"):
        return "a different number of steps: the script or an epoch hook ends differently after an interruption"
    if difference.kind == "held":
        return _explain_held(difference, runs)
    if difference.start == 0:
        return (
            "arithmetic that is not reproducible: it differs before the first interruption, though another "
            "undisturbed run did not; look for threads, time-outs and operations that torch.use_deterministic_algorithms names"
        )
    return _explain_state(difference, runs)


def _explain_held(difference: Difference, runs: Runs) -> str:
    log = DigestFile(log_path(runs.starts[difference.start], difference.spot.trainer, difference.rank))
    operator, names = log.facts["operator"], difference.names
    shown = ", ".join(names[:MAX_NAMED_ATTRIBUTES]) + (" and more" if len(names) > MAX_NAMED_ATTRIBUTES else "")
    return (
        f"a state that is not in the checkpoint: {operator} holds {shown}, which training changes and {operator}.state_dict does "
        f"not return. It differs {_steps_after(log, difference)} the run resumed at step {log.entries[0].step}. Return "
        "it from "
        f"{operator}.state_dict and put it back in {operator}.load_state_dict"
    )


def _explain_state(difference: Difference, runs: Runs) -> str:
    log = DigestFile(log_path(runs.starts[difference.start], difference.spot.trainer, difference.rank))
    first = log.entries[0]
    after = f"it differs {_steps_after(log, difference)} the run resumed at step {first.step}"
    lost = _lost_attributes(log, difference, runs)
    operator = log.facts["operator"]
    if difference.kind == "batch":
        seen = f" ({lost})" if lost else ""
        return (
            f"data order or sample content: {after}, and its batch has other data{seen}. A data set, transform or sampler has "
            "state of its own, such as a position in a file, a counter or a generator: make a sample depend on its index only"
        )
    if difference.here is not None and difference.here.place == first.place:
        return (
            f"a state that is saved but not put back: {difference.names[0]} differs right where the run resumed. See "
            "what "
            f"{operator}.load_state_dict does with what {operator}.state_dict returned"
        )
    if lost:
        return (
            f"a state that is not in the checkpoint: {after}, where {lost}. Return it from {operator}.state_dict and put it "
            f"back in {operator}.load_state_dict"
        )
    if "train_epoch" in log.facts["own_hooks"] and difference.call == first.call:
        return (
            f"{operator}.train_epoch has local variables, which start over when it is called again: {after}. Keep them "
            "in attributes that state_dict returns and load_state_dict puts back"
        )
    return (
        f"a state that is not in the checkpoint: {after}, first in {difference.names[0]}. Look for what its new value "
        "depends on besides models, optimizers, schedulers and random streams: global variables, caches, closures"
    )


def _steps_after(log: DigestFile, difference: Difference) -> str:
    distance = next(n for n, entry in enumerate(log.entries) if entry.place == difference.spot.place)
    return "right after" if distance <= 1 else f"{distance} steps after"


def _lost_attributes(log: DigestFile, difference: Difference, runs: Runs) -> str:
    """Attributes that were not what they had been when the run went on, unless they change from run to run anyway."""
    first = log.entries[0]
    trainer, rank = difference.spot.trainer, difference.rank
    then = _attributes(runs.reference, trainer, rank, first.place)
    now = log.details(first).attributes
    usual = _attributes(runs.control, trainer, rank, first.place) if runs.control is not None else then
    names = [name for name in then if now.get(name) != then[name] and usual.get(name) == then[name]]
    return ", ".join(
        f"{name} was {then[name]} and is {now.get(name, 'not there')}" for name in names[:MAX_NAMED_ATTRIBUTES]
    )


def _attributes(directory: Path, trainer: int, rank: int, place: Place) -> dict[str, str]:
    path = log_path(directory, trainer, rank)
    if not path.exists():
        return {}
    log = DigestFile(path)
    entry = log.at.get(place)
    return {} if entry is None else log.details(entry).attributes


def _largest(difference: Difference, runs: Runs) -> str:
    """The largest difference between the values that the ranks kept, if they kept them."""
    if runs.control is None or difference.kind == "held":
        return ""
    trainer, rank = difference.spot.trainer, difference.rank
    paths = [value_path(where, trainer, rank) for where in (runs.control, runs.starts[difference.start])]
    if difference.names[0].startswith("rng") or not all(path.exists() for path in paths):
        return ""
    import torch

    one, other = (torch.as_tensor(torch.load(path, map_location="cpu", weights_only=True)) for path in paths)
    if one.shape != other.shape:
        return f", shape {tuple(one.shape)} and {tuple(other.shape)}"
    return _shown((one.double() - other.double()).abs())


def _shown(distance: Any) -> str:
    largest = float(distance.max()) if distance.numel() else 0.0
    return ", largest difference nan" if math.isnan(largest) else f", largest difference {largest:.3g}"
