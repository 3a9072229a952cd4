"""``torchtrainer verify-resume``: runs a script undisturbed and interrupted, and says whether all bits are the same."""

from __future__ import annotations

import argparse
import math
import random
import shutil
import signal
import sys
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import NoReturn

from torchtrainer.launcher.failure import EXIT_SIGNALLED
from torchtrainer.launcher.summary import say
from torchtrainer.launcher.verify_compare import (
    Difference,
    Runs,
    changing_anyway,
    describe,
    explain,
    first_difference,
)
from torchtrainer.launcher.verify_start import (
    Ended,
    Interruption,
    NothingKeptError,
    Script,
    Signal,
    StartTimeoutError,
)
from torchtrainer.observe.digest_log import DigestFile, DigestOrders, Spot, log_path, logs_in
from torchtrainer.process.signals import EXIT_PREEMPTED

COMMAND = "torchtrainer verify-resume"
EXIT_EQUAL, EXIT_DIFFERENT, EXIT_USAGE = 0, 1, 2
EXIT_INTERRUPTED = 130
"""Ended with Ctrl-C."""
INTERRUPTIONS = 3
TIMEOUT_S = 3600.0
"""Default time limit of one start."""
SIGNALS: tuple[Signal, ...] = ("SIGTERM", "SIGKILL")
SHOWN_LINES = 20
"""How much of the output of a start that failed is shown."""


class UsageError(Exception):
    """The script cannot be verified, or not with these options."""


class VerificationError(Exception):
    """The run could not be brought to its end; the message says which start failed, and shows its output."""


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        usage=f"{COMMAND} [--interruptions N | --at STEP,...] [--seed N] [--timeout SECONDS] SCRIPT ...",
        description="Runs a script undisturbed, then interrupted at several steps and continued by the same command, and "
        "compares the state after every step, bit by bit. Exits with 0 if all are equal, with 1 if not.",
        epilog="Run directories and checkpoints of the script go to a private place; files that it writes by itself do not.",
        allow_abbrev=False,
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--interruptions",
        metavar="N",
        type=_count,
        default=INTERRUPTIONS,
        help="number of interruptions, SIGTERM and SIGKILL in turn (%(default)s)",
    )
    where.add_argument("--at", metavar="STEP,...", type=_steps, help="interrupt after these steps")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="seed for choosing the steps (%(default)s)")
    parser.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, default=TIMEOUT_S, help="time limit of one start (%(default)g)"
    )
    parser.add_argument("script", metavar="SCRIPT", help="Python script that makes a TorchTrainer")
    parser.add_argument("arguments", metavar="...", nargs=argparse.REMAINDER, help="its arguments")
    return parser


def main(argv: Sequence[str]) -> int:
    """Runs the command.

    Args:
        argv: the arguments after ``verify-resume``.

    Returns:
        0: equal; 1: different, or the script failed; 2: the script cannot be verified.
    """
    args = make_parser().parse_args(argv)
    if not Path(args.script).is_file():
        print(f"{COMMAND}: there is no script {args.script}", file=sys.stderr)
        return EXIT_USAGE
    work = Path(tempfile.mkdtemp(prefix="torchtrainer-verify-"))
    command = [args.script, *args.arguments]
    verification = Verification(
        script=Script(command=command, timeout_s=args.timeout, say=partial(say, COMMAND)), work=work
    )
    kept = False
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        difference = verification.run(at=args.at, count=args.interruptions, seed=args.seed)
        kept = difference is not None
        print(verification.summary() if difference is None else verification.report(difference))
    except (UsageError, NothingKeptError) as error:
        print(f"{COMMAND}: nothing to verify: {error}", file=sys.stderr)
        return EXIT_USAGE
    except (VerificationError, StartTimeoutError) as error:
        kept = bool(verification.starts)
        print(f"failed: {error}" + (f"\nlogs: {work}" if kept else ""))
        return EXIT_DIFFERENT
    except KeyboardInterrupt:
        print(f"{COMMAND}: ended with Ctrl-C", file=sys.stderr)
        return EXIT_INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, before)
        if not kept:
            shutil.rmtree(work, ignore_errors=True)
    return EXIT_DIFFERENT if kept else EXIT_EQUAL


@dataclass(kw_only=True)
class Verification:
    """One verification of a script.

    Attributes:
        script: what is verified.
        work: a directory for everything that is written; to be removed by whoever made it.
        starts: of the interrupted run, so far.
        interruptions: that took place.
        ignored: names of what operators hold that differ from run to run.
    """

    script: Script
    work: Path
    starts: list[Ended] = field(default_factory=list)
    interruptions: list[Interruption] = field(default_factory=list)
    ignored: Collection[str] = ()

    def run(self, *, at: Sequence[int] | None, count: int, seed: int) -> Difference | None:
        """Runs the script undisturbed and interrupted; returns where they part.

        Args:
            at: steps after which to interrupt; None: chosen.
            count: how many to choose.
            seed: of the choice.

        Raises:
            UsageError, NothingKeptError: the script cannot be verified.
            VerificationError, StartTimeoutError: it did not come to its end.
        """
        undisturbed = self._undisturbed("undisturbed run", "reference", DigestOrders())
        if not any((self.work / "reference-runs").rglob("run.json")):
            made = any(self.reference.glob("trainer-*.log"))
            raise NothingKeptError("its trainer has run_dir=None" if made else "it makes no TorchTrainer")
        wanted = choose(self.reference, at=at, count=count, seed=seed)
        self.script.say(f"undisturbed run: {self._steps()} steps in {undisturbed.seconds:.1f} s")
        for interruption in (*wanted, None):
            again = self._start(interruption)
            difference = self._first_difference(ended=not again)
            if difference is not None or not again:
                return difference
        raise AssertionError("the last start is not interrupted")

    def _first_difference(self, *, ended: bool) -> Difference | None:
        """Where the interrupted run diverges from the undisturbed one, except where undisturbed runs differ too."""
        logs = [one.logs for one in self.starts]
        found = first_difference(self.reference, logs, ended=ended, ignored=self.ignored)
        if found is not None and found.kind == "held" and not self.control.exists():
            self.script.say(f"differs at {found.where}; running undisturbed once more to see what is reproducible")
            self._undisturbed("second undisturbed run", self.control.name, DigestOrders())
            self.ignored = changing_anyway(self.reference, self.control)
            found = first_difference(self.reference, logs, ended=ended, ignored=self.ignored)
        return found

    @property
    def control(self) -> Path:
        """Logs of another undisturbed run, if there was one."""
        return self.work / "control"

    @property
    def reference(self) -> Path:
        """Logs of the undisturbed run."""
        return self.work / "reference"

    def summary(self) -> str:
        """The text when nothing differs."""
        logs = [log for _, _, log in logs_in(self.reference)]
        states = sum(len(log.entries) for log in logs)
        ranks = len({rank for _, rank, _ in logs_in(self.reference)})
        where = ", ".join(map(str, self.interruptions))
        return (
            f"equal: {self._steps()} steps on {ranks} rank{'s' if ranks > 1 else ''}, {states} states compared, interrupted by "
            f"{where}"
        )

    def report(self, difference: Difference) -> str:
        """The text about a difference; runs the script undisturbed once more for it."""
        if not self.control.exists():
            self.script.say(f"differs at {difference.where}; running undisturbed once more to find out why")
            keep = DigestOrders(keep=difference.spot, keep_name=difference.names[0] if difference.names else "")
            self._undisturbed("second undisturbed run", self.control.name, keep)
        runs = Runs(reference=self.reference, starts=[one.logs for one in self.starts], control=self.control)
        unlike = changing_anyway(self.reference, self.control)
        reason = explain(difference, first_difference(self.reference, [self.control], ignored=unlike), runs)
        lines = [f"different: {describe(difference, runs)}"]
        if difference.start > 0:
            lines.append(f"after: {', '.join(map(str, self.interruptions[: difference.start]))}")
        return "\n".join([*lines, f"likely reason: {reason}", f"logs: {self.work}"])

    def _undisturbed(self, name: str, place: str, orders: DigestOrders) -> Ended:
        ended = self.script.start(self.work / place, self.work / f"{place}-runs", name, orders)
        if ended.exit_code != 0:
            raise VerificationError(f"the {name} of the script itself ended with exit code {_shown(ended)}")
        return ended

    def _start(self, interruption: Interruption | None) -> bool:
        """Starts the script once more; returns whether it has to be started again."""
        number = len(self.starts) + 1
        orders = DigestOrders(reference=str(self.reference), hold=None if interruption is None else interruption.spot)
        logs = self.work / f"start-{number}"
        ended = self.script.start(logs, self.work / "interrupted-runs", f"start {number}", orders, interruption)
        self.starts.append(ended)
        self._check_resumed(number, ended)
        if interruption is not None and ended.interrupted:
            self.interruptions.append(interruption)
            self.script.say(f"start {number}: {self._from(ended)}, {interruption}")
            if interruption.signal == "SIGTERM" and ended.exit_code not in (0, EXIT_PREEMPTED):
                raise VerificationError(
                    f"SIGTERM at step {interruption.step} ended the script without a saved state, with exit code "
                    f"{_shown(ended)}"
                )
            return ended.exit_code != 0
        if ended.exit_code != 0:
            raise VerificationError(f"start {number}, {self._after()}, ended with exit code {_shown(ended)}")
        self.script.say(f"start {number}: {self._from(ended)}, finished in {ended.seconds:.1f} s")
        return False

    def _check_resumed(self, number: int, ended: Ended) -> None:
        """A saved state has to be continued."""
        last = self.interruptions[-1] if self.interruptions else None
        if last is None or last.signal != "SIGTERM":
            return
        here = log_path(ended.logs, last.spot.trainer, 0)
        entries = DigestFile(here).entries if here.exists() else []
        beginning = DigestFile(log_path(self.reference, last.spot.trainer, 0)).entries[0].place
        if entries and entries[0].place == beginning != last.spot.place:
            raise VerificationError(
                f"start {number} began at the beginning, though the state after step {last.step} was saved: nothing is "
                "resumed. Does the script pass resume=False, or another run_dir at each start?"
            )

    def _from(self, ended: Ended) -> str:
        entries = [log.entries[0] for _, rank, log in logs_in(ended.logs) if rank == 0 and log.entries]
        first = entries[0].step if entries else self._steps()
        return f"from step {first}" if self.starts[0] is not ended else "from the beginning"

    def _after(self) -> str:
        return f"after {', '.join(map(str, self.interruptions))}" if self.interruptions else "not yet interrupted"

    def _steps(self) -> int:
        return max((log.entries[-1].step for _, _, log in logs_in(self.reference) if log.entries), default=0)


def choose(reference: Path, *, at: Sequence[int] | None, count: int, seed: int) -> list[Interruption]:
    """Where to interrupt, in the order of training: boundaries of rank 0, those of validations included.

    Args:
        reference: logs of the undisturbed run.
        at: steps; None: a choice.
        count: how many to choose; as many as there are, if there are fewer.
        seed: of the choice.

    Raises:
        UsageError: there are no steps, or not these.
    """
    boundaries = [
        (entry.at_ns, Spot(trainer=trainer, place=entry.place), entry.step)
        for trainer, rank, log in logs_in(reference)
        if rank == 0
        for entry in log.entries
        if not entry.place.end
    ]
    places = [(spot, step) for _, spot, step in sorted(boundaries, key=lambda one: one[0])]
    if at is None:
        inner = range(1, len(places))
        chooser = random.Random(seed)  # noqa: S311  # a choice of steps, not a secret
        chosen = sorted(chooser.sample(inner, min(count, len(inner))))
        if not chosen:
            raise UsageError("it takes no steps between which it could be interrupted")
        found = [places[index] for index in chosen]
    else:
        first = {step: (spot, step) for spot, step in reversed(places)}
        unknown = [step for step in at if step not in first]
        if unknown:
            raise UsageError(
                f"--at {unknown[0]}: there is no boundary after that step; the last is {max(first, default=0)}"
            )
        found = [first[step] for step in sorted(set(at))]
    return [
        Interruption(spot=spot, step=step, signal=SIGNALS[number % len(SIGNALS)])
        for number, (spot, step) in enumerate(found)
    ]


def _leave(signum: int, frame: FrameType | None) -> NoReturn:  # noqa: ARG001  # Python passes both
    """Ends the command as the signal would, but with what it started ended and removed."""
    raise SystemExit(EXIT_SIGNALLED + signum)


def _shown(ended: Ended) -> str:
    """The exit code of a start, and the end of what it printed."""
    lines = ended.last_lines(SHOWN_LINES)
    return "\n".join([f"{ended.exit_code}{'; its output ends with:' if lines else ''}", *lines])


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def _steps(text: str) -> list[int]:
    try:
        steps = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be steps separated by commas, got {text!r}") from None
    if min(steps) < 1:
        raise argparse.ArgumentTypeError(f"steps are counted from 1, got {text!r}")
    return steps


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be more than 0 seconds, got {text}")
    return seconds
