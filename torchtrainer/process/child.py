"""What a new worker process does first, whether it was forked or exec'd, before any user code runs."""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypedDict

from torchtrainer.process.crashes import crash_file
from torchtrainer.process.guard import die_with_holder, die_with_parent, unblock_signals
from torchtrainer.process.oom import WORKER_MORE, be_killed_first
from torchtrainer.process.own_files import open_own
from torchtrainer.process.paths import SOCKET_PATH_LIMIT, RankPaths
from torchtrainer.process.signals import STACK_DUMP_SIGNAL
from torchtrainer.process.streams import put_at, redirect

SOCKET_NAME_BYTES = 18
"""Length of ``/listener-xxxxxxxx``."""
_INHERITED_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGCHLD", "SIGUSR1", "SIGUSR2", "SIGPIPE")


class ChildSpec(TypedDict):
    """The specification of a worker process; JSON.

    Attributes:
        key: name by which the starter reports the process.
        entry: ``module:function``, called with ``arguments``; returns the exit code.
        arguments: for the entry.
        environ: complete environment.
        cwd: working directory.
        sys_path: module search path.
        log_dir, rank: where stdout, stderr and stacks go.
        multiprocessing_dir: where multiprocessing keeps its sockets; whoever started the process removes it.
        ignored_signals: names of those that do nothing to the process, from its first instruction on.
    """

    key: str
    entry: str
    arguments: dict[str, Any]
    environ: dict[str, str]
    cwd: str
    sys_path: list[str]
    log_dir: str
    rank: int
    multiprocessing_dir: str
    ignored_signals: list[str]


def run_child(spec: ChildSpec, parent: int, lifeline: int | None = None) -> int:
    """Turns this process into a worker and runs its entry.

    Runs in the only thread of the new process. Returns the exit code; never raises for what the entry does.

    Args:
        spec: what to become.
        parent: pid of the process that started this one.
        lifeline: a pipe by which this process ends with another one than ``parent``; see `die_with_holder`.
    """
    if os.getpid() != os.getsid(0):
        os.setsid()  # keeps the terminal's Ctrl-C away, and makes one process group of the worker and its children
    if lifeline is None:
        die_with_parent(parent)
    else:
        die_with_holder(lifeline)
    be_killed_first(WORKER_MORE)
    _reset_signals(spec["ignored_signals"])
    os.environ.clear()
    os.environ.update(spec["environ"])
    sys.path[:] = spec["sys_path"]
    os.chdir(spec["cwd"])
    _redirect_output(RankPaths.of(spec["log_dir"], spec["rank"]))
    keep_sockets_in(spec["multiprocessing_dir"])
    gc.enable()
    module, function = spec["entry"].split(":")
    entry: Callable[[dict[str, Any]], int] = getattr(importlib.import_module(module), function)
    return entry(spec["arguments"])


def leave(exit_code: int) -> NoReturn:
    """Ends a worker: exit functions and streams as usual, but without the interpreter's dismantling of every module.

    That takes long with torch loaded, and now and then torch aborts in it, when its threads meet what is already gone.
    """
    atexit._run_exitfuncs()
    flush_output()
    os._exit(exit_code)


def flush_output() -> None:
    """Writes out what was printed; a full disk or a closed stream must not hide what else there is to say."""
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # it was closed when the interpreter started
            continue
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


def _reset_signals(ignored: Sequence[str]) -> None:
    signal.set_wakeup_fd(-1)
    for name in _INHERITED_SIGNALS:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # as Python does at start: a broken pipe is an exception
    for name in ignored:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    unblock_signals()


def _redirect_output(paths: RankPaths) -> None:
    with contextlib.suppress(FileExistsError):
        os.mkdir(paths.root, 0o700)  # not its parents: if they are gone, so is whoever wanted this worker
    redirect(0, os.devnull, os.O_RDONLY)
    for fd, name in ((1, "stdout"), (2, "stderr")):
        put_at(fd, open_own(paths.stream(name), os.O_WRONLY | os.O_CREAT | os.O_APPEND))
    for stream, fd in (("stdout", 1), ("stderr", 2)):
        # Fresh objects: the inherited ones may hold text of the parent, or be something that the parent put there.
        setattr(sys, stream, open(fd, "w", buffering=1, closefd=False, errors="backslashreplace"))  # noqa: SIM115
    crash_file.write_to(paths.crash)
    if STACK_DUMP_SIGNAL is not None and hasattr(faulthandler, "register"):
        # The file stays open for the life of the process: faulthandler writes to its descriptor from a signal handler.
        stacks = open_own(paths.stacks, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        faulthandler.register(STACK_DUMP_SIGNAL, file=stacks, all_threads=True)


def keep_sockets_in(directory: str) -> None:
    """Has multiprocessing, and so loader workers, put its sockets where they are removed even after a kill.

    multiprocessing offers no public way to say where; without this, a killed loader leaves a ``pymp-`` directory.
    """
    if len(os.fsencode(directory)) + SOCKET_NAME_BYTES > SOCKET_PATH_LIMIT:
        return  # the socket's path would be too long: its own choice may be shorter
    config = getattr(multiprocessing.current_process(), "_config", None)
    if isinstance(config, dict):
        os.makedirs(directory, mode=0o700, exist_ok=True)
        config["tempdir"] = directory
