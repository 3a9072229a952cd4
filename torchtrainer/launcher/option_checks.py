"""Every option of the launcher, and what its value must be; nothing here imports torch.

torch finds most wrong values only after it has been imported, and says them with a traceback. Here each is one line,
said before anything is started.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Check = Callable[[Any], str | None]
"""Says what a value, already of its option's type, must be and is; None if nothing is wrong with it."""

OWN_GROUP = "beyond torchrun"
"""The heading in ``--help`` of the options that torchrun does not have."""

LARGEST_PORT = 65535
"""The largest TCP port number."""

NAMED_WORKER_COUNTS = ("auto", "cpu", "gpu", "xpu")
"""What ``--nproc-per-node`` takes besides numbers and the name of a private back end."""

UNHANDLED_SIGNALS = ("SIGKILL", "SIGSTOP")
"""Signals for which the operating system accepts no signal function."""

_STREAMS_OF_ALL_RANKS = re.compile(r"[0-3]")
_STREAMS_BY_RANK = re.compile(r"[0-9]:[0-3](,[0-9]:[0-3])*")


def read_flag(text: str) -> bool:
    """Reads a flag from the environment, where it is an integer: anything but 0 sets it."""
    return bool(int(text))


def read_list(text: str) -> list[str]:
    """Splits at commas; two commas in a row are one comma inside an item."""
    items = [""]
    for position, part in enumerate(text.split(",,")):
        first, *others = part.split(",")
        items[-1] += f",{first}" if position else first
        items.extend(others)
    return items


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option.

    Attributes:
        name: as typed, without the two dashes before it.
        meaning: its line of ``--help``.
        metavar: what stands for the value in ``--help``; empty: the choices, or nothing for a flag.
        short: its one-letter spelling with the dash, if it has one.
        reads: makes the value from text and raises ValueError where it cannot; `read_flag` makes the option a flag.
        default: the value if neither the command line nor the environment gives one; a tuple stands for a new list.
        choices: the only values it can have.
        environment: whether ``PET_<NAME>`` gives its default.
        dest: the name of its value in the namespace; empty: made from `name`.
        check: says what is wrong with a value, to be shown after the option's name; None if nothing is.
    """

    name: str
    meaning: str
    metavar: str = ""
    short: str = ""
    reads: Callable[[str], Any] = str
    default: Any = None
    choices: tuple[str, ...] | None = None
    environment: bool = True
    dest: str = ""
    check: Check | None = None

    @property
    def spellings(self) -> tuple[str, ...]:
        """Everything that may be typed for it, in torchrun's order."""
        dashed, underscored = f"--{self.name}", f"--{self.name.replace('-', '_')}"
        return tuple(dict.fromkeys(filter(None, (self.short, dashed, underscored))))

    @property
    def value_name(self) -> str:
        """The name of its value in the namespace."""
        return self.dest or self.name.replace("-", "_")

    @property
    def variable(self) -> str:
        """The environment variable that gives its default."""
        return f"PET_{self.name.replace('-', '_').upper()}"


def _worker_count(text: str) -> str | None:
    try:
        fits = int(text) > 0
    except ValueError:
        fits = text.isidentifier()  # the name of a private back end is known to torch only
    if fits:
        return None
    return f"must be a number of workers above 0 or one of {', '.join(NAMED_WORKER_COUNTS)}, not {text!r}"


def _node_range(text: str) -> str | None:
    parts = text.split(":")
    try:
        smallest, largest = int(parts[0]), int(parts[-1])
    except ValueError:
        smallest = largest = 0
    if len(parts) <= 2 and 0 < smallest <= largest:
        return None
    return f"must be N or MIN:MAX with 0 < MIN <= MAX, not {text!r}"


def _rendezvous_settings(text: str) -> str | None:
    if not text.strip():
        return None
    for setting in text.split(","):
        name, _, value = setting.partition("=")
        if not name.strip() or not value.strip():
            return f"must be NAME=VALUE,NAME=VALUE,..., not {text!r}: {setting!r} has no {'value' if name.strip() else 'name'}"
    return None


def _streams(text: str) -> str | None:
    if _STREAMS_OF_ALL_RANKS.fullmatch(text) or _STREAMS_BY_RANK.fullmatch(text):
        return None
    return (
        f"must be 0 (none), 1 (stdout), 2 (stderr), 3 (both), or one of these by local rank as in 0:1,1:2, not {text!r}"
    )


def _local_ranks(text: str) -> str | None:
    if not text:
        return None
    try:
        for part in text.split(","):
            int(part)
    except ValueError:
        return f"must be local ranks separated by commas, as in 0,1,2, not {text!r}"
    return None


def _signal_names(text: str) -> str | None:
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name in UNHANDLED_SIGNALS:
            return f"must name signals that a process can handle, not {name}"
        if name not in signal.Signals.__members__:
            return f"must be names of signals separated by commas, as in SIGTERM,SIGUSR1; there is no {name!r}"
    return None


def _zero_or_more(number: int) -> str | None:
    return None if number >= 0 else f"must be 0 or more, not {number}"


def _port(number: int) -> str | None:
    return None if 0 <= number <= LARGEST_PORT else f"must be a port from 0 to {LARGEST_PORT}, not {number}"


def _seconds(duration_s: float) -> str | None:
    fits = math.isfinite(duration_s) and duration_s > 0
    return None if fits else f"must be a number of seconds above 0, not {duration_s:g}"


def conflict_in(namespace: argparse.Namespace) -> str | None:
    """Says which options exclude each other; None if none do.

    Args:
        namespace: all the options; with ``use_env`` only in the form of ``torch.distributed.launch``.
    """
    if namespace.no_python and not getattr(namespace, "use_env", True):
        return "--no-python needs --use-env as well: a command that is not Python is not passed --local-rank"
    if namespace.no_python and namespace.module and not namespace.run_path:
        return "--no-python and --module exclude each other: a module is run by Python"
    return None


WORKER_OPTIONS = (
    Option(
        name="nnodes",
        metavar="N|MIN:MAX",
        default="1:1",
        check=_node_range,
        meaning="number of nodes, or the range that it may be in",
    ),
    Option(
        name="nproc-per-node",
        metavar="N",
        default="1",
        check=_worker_count,
        meaning="number of workers on this node: a number, or auto, cpu, gpu or xpu for one per device or processor",
    ),
    Option(name="role", metavar="NAME", default="default", meaning="name of the workers' role, shown in log prefixes"),
    Option(
        name="max-restarts",
        metavar="N",
        reads=int,
        default=0,
        check=_zero_or_more,
        meaning="maximum number of restarts of failed workers",
    ),
    Option(
        name="monitor-interval",
        metavar="SECONDS",
        reads=float,
        default=0.1,
        check=_seconds,
        meaning="seconds between two checks on the workers",
    ),
    Option(
        name="start-method",
        choices=("spawn", "fork", "forkserver"),
        default="spawn",
        meaning="how to start processes for --run-path",
    ),
    Option(
        name="shutdown-timeout",
        metavar="SECONDS",
        reads=int,
        check=_zero_or_more,
        meaning="seconds before workers are killed that do not end (default: TORCH_ELASTIC_SHUTDOWN_TIMEOUT or 30)",
    ),
    Option(
        name="signals-to-handle",
        metavar="NAMES",
        default="SIGTERM,SIGINT,SIGHUP,SIGQUIT",
        check=_signal_names,
        meaning="signals to pass on to the workers, separated by commas",
    ),
    Option(
        name="numa-binding",
        choices=("node", "socket", "exclusive", "core-complex"),
        environment=False,
        meaning="bind each worker to the processors near its GPU",
    ),
    Option(
        name="virtual-local-rank",
        reads=read_flag,
        default=False,
        meaning="give every worker one visible GPU and LOCAL_RANK 0",
    ),
    Option(name="event-log-handler", metavar="NAME", default="null", meaning="where to record torch's launch events"),
)

RENDEZVOUS_OPTIONS = (
    Option(name="standalone", reads=read_flag, default=False, meaning="run on one node only, on a free port"),
    Option(
        name="rdzv-backend",
        metavar="NAME",
        default="static",
        meaning="how the nodes find each other: static, c10d, ...",
    ),
    Option(name="rdzv-endpoint", metavar="HOST:PORT", default="", meaning="where the nodes find each other"),
    Option(name="rdzv-id", metavar="NAME", default="none", meaning="name of the run, the same on every node"),
    Option(
        name="rdzv-conf",
        metavar="NAME=VALUE,...",
        default="",
        check=_rendezvous_settings,
        meaning="further settings of the rendezvous",
    ),
    Option(
        name="node-rank",
        metavar="N",
        reads=int,
        default=0,
        check=_zero_or_more,
        meaning="number of this node; static rendezvous only",
    ),
    Option(name="master-addr", metavar="HOST", default="127.0.0.1", meaning="host of node 0; static rendezvous only"),
    Option(
        name="master-port",
        metavar="PORT",
        reads=int,
        check=_port,
        meaning="port on node 0, 29500 if several nodes meet there; static rendezvous only",
    ),
    Option(name="local-addr", metavar="HOST", meaning="address of this node (default: looked up)"),
)

SCRIPT_OPTIONS = (
    Option(name="module", short="-m", reads=read_flag, default=False, meaning="SCRIPT is a module, as for python -m"),
    Option(name="no-python", reads=read_flag, default=False, meaning="SCRIPT is a command; it is run without Python"),
    Option(
        name="run-path",
        reads=read_flag,
        default=False,
        meaning="SCRIPT is an absolute path that is run inside the worker by runpy; goes before --no-python",
    ),
)

LOG_OPTIONS = (
    Option(name="log-dir", metavar="DIR", meaning="directory for log files; each run makes a new one in it"),
    Option(
        name="redirects",
        short="-r",
        metavar="STREAMS",
        default="0",
        check=_streams,
        meaning="streams that go to files only: 0 none, 1 stdout, 2 stderr, 3 both, or by local rank as in 0:1,1:2",
    ),
    Option(
        name="tee",
        short="-t",
        metavar="STREAMS",
        default="0",
        check=_streams,
        meaning="streams that go to files and to the console",
    ),
    Option(
        name="log-line-prefix-template",
        metavar="TEXT",
        default="",
        meaning="start of each line that --tee shows; ${role_name}, ${local_rank}, ${rank} and ${hostname} are filled in",
    ),
    Option(
        name="local-ranks-filter",
        metavar="RANKS",
        default="",
        check=_local_ranks,
        meaning="local ranks to show on the console, separated by commas",
    ),
    Option(
        name="duplicate-stdout-filters",
        metavar="TEXTS",
        reads=read_list,
        default=(),
        meaning="copy lines of stdout that contain one of these texts to one file; separated by commas, ,, for a comma",
    ),
    Option(
        name="duplicate-stderr-filters",
        metavar="TEXTS",
        reads=read_list,
        default=(),
        meaning="the same for stderr",
    ),
    Option(name="logs-specs", metavar="NAME", environment=False, meaning="entry point of torchrun.logs_specs to use"),
)

OWN_OPTIONS = (
    Option(
        name="start-fresh",
        reads=read_flag,
        default=False,
        meaning="start every worker in a new interpreter instead of forking it from one that has imported torch",
    ),
    Option(
        name="keep-exit-code",
        reads=read_flag,
        default=False,
        meaning="exit with the code of the worker that failed first, 128 + n if signal n ended it, instead of 1",
    ),
    Option(
        name="hang-timeout",
        metavar="SECONDS",
        reads=float,
        dest="hang_timeout_s",
        check=_seconds,
        meaning="show the stacks of all ranks when no worker makes progress for SECONDS (default: off)",
    ),
)

USE_ENV = Option(
    name="use-env",
    reads=read_flag,
    default=False,
    environment=False,
    meaning="give the local rank in LOCAL_RANK only, not as --local-rank as well",
)

OPTION_GROUPS = {
    "workers": WORKER_OPTIONS,
    "rendezvous": RENDEZVOUS_OPTIONS,
    "script": SCRIPT_OPTIONS,
    "output": LOG_OPTIONS,
    OWN_GROUP: OWN_OPTIONS,
}
"""The options by their heading in ``--help``; ``--use-env`` is in one form only."""
