"""``torchtrainer doctor``: checks everything that training needs on this machine, and says how to fix the rest.

Each check runs in an interpreter of its own with a deadline, so that one that hangs or crashes is a finding as well:

    doctor ── exec ──> python ... torchtrainer.launcher.doctor FUNCTION  one at a time
                          └─ fork ──> processes of the check                 killed with it
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import NoReturn

from torchtrainer.launcher import doctor_checks, doctor_torch
from torchtrainer.launcher.doctor_checks import Finding, Level
from torchtrainer.observe.progress_bar import StartBar
from torchtrainer.process.guard import die_with_parent, kill_session, signal_process, unblock_signals
from torchtrainer.process.signals import describe_exit
from torchtrainer.process.starters import interpreter

QUICK_DEADLINE_S = 15.0
"""Time limit of a check that only reads from the system; a directory on a dead network mount takes forever."""
LOOKUP_DEADLINE_S = 30.0
"""Time limit of the lookup of the host name; resolvers give up after 5 to 20 s."""
TORCH_DEADLINE_S = 180.0
"""Longest import of torch and what is done with it; an import from a cold network file system takes minutes."""
STOP_GRACE_S = 1.0
"""How long a check that is stopped may take to remove its files before it is killed."""
TICK_S = 0.1
"""How often the progress bar moves."""
BAR_AFTER_S = 0.5
"""The progress bar shows up after this time."""

EXIT_FAILED = 1
EXIT_INTERRUPTED = 128 + signal.SIGINT
RESULT_MARK = "torchtrainer-doctor-result "
"""Starts the line with a check's findings on the standard output of its process; libraries may print there too."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One group of findings and how long it may take.

    Attributes:
        name: in the progress bar and where there is no finding.
        look: makes the findings; a function of a module, since another process finds it by its name.
        deadline_s: after this time the check is stopped.
        advice: what to do if it hangs or crashes.
        environ: variables that its process has beside those of the command.
    """

    name: str
    look: Callable[[], list[Finding]]
    deadline_s: float = QUICK_DEADLINE_S
    advice: str = (
        "run torchtrainer doctor again; if that does not help, report it with the output of torchtrainer doctor --json"
    )
    environ: Mapping[str, str] = field(default_factory=dict)


CHECKS = (
    Check(name="versions", look=doctor_checks.check_versions),
    Check(name="processors", look=doctor_checks.check_processors),
    Check(name="memory", look=doctor_checks.check_memory),
    Check(
        name="gpus",
        look=doctor_torch.check_gpus,
        deadline_s=LOOKUP_DEADLINE_S,
        advice="the driver does not answer: run nvidia-smi, reload the driver, or reboot",
    ),
    Check(name="threads", look=doctor_torch.check_library_threads, deadline_s=LOOKUP_DEADLINE_S),
    Check(
        name="torch",
        look=doctor_torch.check_torch,
        deadline_s=TORCH_DEADLINE_S,
        advice="try: python -c 'import torch'; if that does not work either, install torch anew",
        environ={"OPENBLAS_NUM_THREADS": "1"},  # as the process has it that forks workers
    ),
    Check(
        name="gloo",
        look=doctor_torch.check_gloo,
        deadline_s=TORCH_DEADLINE_S,
        advice="set GLOO_SOCKET_IFNAME to an interface that is up (lo on one machine), and look for firewall rules",
        environ={"OPENBLAS_NUM_THREADS": "1"},
    ),
    Check(name="shared memory", look=doctor_checks.check_shared_memory),
    Check(name="limits", look=doctor_checks.check_limits),
    Check(name="loopback", look=doctor_checks.check_loopback),
    Check(
        name="host name",
        look=doctor_checks.check_host_name,
        deadline_s=LOOKUP_DEADLINE_S,
        advice=doctor_checks.LOOKUP_ADVICE,
    ),
    Check(
        name="temporary directory",
        look=doctor_checks.check_temporary_directory,
        advice="set TMPDIR to a directory that answers",
    ),
    Check(name="environment", look=doctor_checks.check_environment),
    Check(name="time-outs", look=doctor_checks.check_timeouts),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of ``torchtrainer doctor``."""
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def main(args: argparse.Namespace) -> int:
    """Runs every check and prints what was found.

    Args:
        args: as `add_arguments` describes them.

    Returns:
        0 if nothing failed, 1 if something did, 130 after Ctrl-C.
    """
    started = time.monotonic()
    findings: list[Finding] = []
    done = 0
    interrupted = False
    try:
        with StartBar("", enabled=sys.stderr.isatty(), after_s=BAR_AFTER_S) as bar:
            for number, check in enumerate(CHECKS, start=1):
                label = f"check {number} of {len(CHECKS)}: {check.name}"
                findings += run_check(check, tick=partial(bar.tick, label))
                done = number
    except KeyboardInterrupt:
        interrupted = True
    print(as_json(findings) if args.json else as_text(findings, took_s=time.monotonic() - started))
    if interrupted:
        print(f"torchtrainer doctor: stopped by Ctrl-C after {done} of {len(CHECKS)} checks", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_FAILED if any(finding.level == "fail" for finding in findings) else 0


def run_check(check: Check, *, tick: Callable[[], None] = lambda: None) -> list[Finding]:
    """Runs a check in a process of its own, which is gone afterwards with all that it started.

    Args:
        check: what to run.
        tick: called while waiting.

    Returns:
        Its findings; one finding that fails if it hung, crashed or raised.
    """
    process = subprocess.Popen(
        interpreter(__name__, str(os.getpid()), check.look.__module__, check.look.__name__),
        env={**os.environ, **check.environ},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, errors = _wait(process, check.deadline_s, tick)
    except subprocess.TimeoutExpired:
        return [_lost(check, f"no answer within {check.deadline_s:g} s")]
    finally:
        _stop(process)
    findings = read_findings(output)
    if findings is not None:
        return findings
    said = (errors.strip().splitlines() or ["nothing was printed"])[-1]
    return [_lost(check, f"its process {describe_exit(process.returncode)}: {said}")]


def _wait(process: subprocess.Popen[str], deadline_s: float, tick: Callable[[], None]) -> tuple[str, str]:
    until = time.monotonic() + deadline_s
    while True:
        tick()
        try:
            return process.communicate(timeout=TICK_S)
        except subprocess.TimeoutExpired:
            if time.monotonic() > until:
                raise


def _stop(process: subprocess.Popen[str]) -> None:
    """Ends the process if it still runs, and whatever it left in its session."""
    if process.poll() is None:
        signal_process(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_GRACE_S)
    if process.poll() is None:
        kill_session(process.pid)
    process.communicate()


def _lost(check: Check, value: str) -> Finding:
    return Finding(name=check.name, level="fail", value=value, advice=check.advice)


def read_findings(output: str) -> list[Finding] | None:
    """The findings in what a check's process printed; None if they are not there."""
    for line in reversed(output.splitlines()):
        _, mark, rest = line.partition(RESULT_MARK)
        if mark:
            return [Finding(**values) for values in json.loads(rest)]
    return None


def as_text(findings: Iterable[Finding], *, took_s: float) -> str:
    """The findings as lines for people, and a summary."""
    findings = list(findings)
    width = max((len(finding.name) for finding in findings), default=0)
    lines = []
    for finding in findings:
        lines.append(f"{finding.level:<4}  {finding.name:<{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"      {'':<{width}}  -> {finding.advice}")
    counts = Counter(finding.level for finding in findings)
    levels: tuple[Level, ...] = ("ok", "warn", "fail")
    return "\n".join([*lines, ", ".join(f"{counts[level]} {level}" for level in levels) + f" ({took_s:.1f} s)"])


def as_json(findings: Iterable[Finding]) -> str:
    """The same findings as one JSON array."""
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def check_here(arguments: Sequence[str]) -> int:
    """Runs one check in this process, which `run_check` started for it.

    Args:
        arguments: pid of the command; module and name of the function that looks.
    """
    parent, module, function = arguments
    die_with_parent(int(parent))
    unblock_signals()
    signal.signal(signal.SIGTERM, _end)  # so that the check removes its files
    findings: list[Finding] = getattr(importlib.import_module(module), function)()
    print("\n" + RESULT_MARK + json.dumps([asdict(finding) for finding in findings]), flush=True)
    # Not through the interpreter's dismantling, in which torch now and then aborts.
    os._exit(0)


def _end(*_: object) -> NoReturn:
    raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(check_here(sys.argv[1:]))
