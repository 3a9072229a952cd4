"""Runs commands in forks of one process that has imported torch: what they do is theirs, the two seconds are paid once.

One JSON object a line. In: ``program``, ``arguments``, ``form``, ``directory``, ``environ``, ``stdin``, ``stdout``, ``stderr`` (paths).
Out: ``pid`` at once and, when it has ended, ``pid`` and ``exit_code``. The process ends with its standard input.

A program is one of

- a module, run as ``python -m`` would, or ``module:function``, called with the arguments and ``form``;
- ``torchtrainer``: our launcher, from where it has imported torch on;
- ``command``: ``python`` with the arguments: a script or our launcher, which find all as in an interpreter that has just started.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import socket
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

FRESH_MODULES = frozenset(sys.modules)
OWN_PATH = tuple(entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry)
SEARCH_PATH = tuple(sys.path[1:])
FILTERS = tuple(warnings.filters)
PRELOADED = (
    "torch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
)
THREADS = "OMP_NUM_THREADS"
MARK = "TORCHTRAINER_TEST_MARK"


def main(also: list[str]) -> None:
    environ = dict(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads would not survive the fork
    for module in (*PRELOADED, *also):
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == threading.active_count() == 1, "torch started a thread"
    del os.environ["OPENBLAS_NUM_THREADS"]
    gc.freeze()  # a collection in a fork would copy every page
    set_by_torch = {k: v for k, v in os.environ.items() if environ.get(k) != v}
    request = serve()
    if request is None:
        return
    if request["program"] == "command":
        become_command(request, set_by_torch)
    if request["program"] == "torchtrainer":
        prepare(request, set_by_torch)
        from torchtrainer.launcher.program import go_on

        warnings.filters[:] = FILTERS  # as it finds them before it imports torch
        # Its workers leave through here too, as from a program: nothing may catch what they end with.
        go_on([request["form"], *request["arguments"]], SEARCH_PATH, FRESH_MODULES)
    try:
        become(request, set_by_torch)
        end(0)
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            sys.stderr.write(f"{error.code}\n")
        end(error.code if isinstance(error.code, int) else error.code is not None)
    except BaseException:
        traceback.print_exc()
        end(1)


def serve() -> dict[str, Any] | None:
    """Starts and reaps commands; returns a request in the process that is to be its command, and None at the end."""
    requests = os.fdopen(os.dup(0), "rb", buffering=0)
    running: dict[int, int] = {}
    while True:
        ready, _, _ = select.select([requests, *running], [], [])
        for descriptor in [r for r in ready if r in running]:
            pid = running.pop(descriptor)
            os.close(descriptor)
            say({"pid": pid, "exit_code": os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])})
        if requests in ready:
            line = requests.readline()
            if not line:
                return None
            pid = os.fork()
            if pid == 0:
                return json.loads(line)  # type: ignore[no-any-return]  # the caller wrote an object
            running[os.pidfd_open(pid)] = pid
            say({"pid": pid})


def say(message: dict[str, int]) -> None:
    os.write(1, json.dumps(message).encode() + b"\n")


def prepare(request: dict[str, Any], set_by_torch: dict[str, str], *, session: bool = True) -> None:
    """Gives this process the directory, environment and streams of the command."""
    if session:
        os.setsid()
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update({**set_by_torch, **request["environ"]})
    append = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    opened = (os.open(request["stdin"], os.O_RDONLY), *(os.open(request[s], append) for s in ("stdout", "stderr")))
    for target, descriptor in enumerate(opened):
        os.dup2(descriptor, target)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    sys.path[0] = request["directory"]


def become_command(request: dict[str, Any], set_by_torch: dict[str, str]) -> NoReturn:
    """Turns this process into an interpreter with a script, or with our launcher, and ends as it does."""
    from torchtrainer.launcher import program
    from torchtrainer.launcher.script import _renew_randomness, _run
    from torchtrainer.process.fresh import Fresh

    put_mark(request["environ"][MARK])
    prepare(request, set_by_torch, session=request["session"])
    os.write(1, b"\n")  # whoever reads may close its ends for writing
    words: list[str] = request["arguments"]
    own = [entry for entry in request["environ"].get("PYTHONPATH", "").split(os.pathsep) if entry]
    search_path = [*own, *SEARCH_PATH[len(OWN_PATH) :]]
    threads = request["environ"].get(THREADS)
    if threads is not None:
        sys.modules["torch"].set_num_threads(int(threads))
    warnings.filters[:] = FILTERS
    # Our own modules stay: what is handed over when it is imported would come without those that it has imported itself.
    modules = FRESH_MODULES | {name for name in sys.modules if name.partition(".")[0] == "torchtrainer"}
    sys.orig_argv[:] = [sys.executable, *words]
    if words[0] == "-m":
        gc.enable()
        # What it would replace this process by goes on in it: all that is before and after is its own.
        program.os = With(os, execv=lambda _, argv: program.go_on(argv[3:], search_path, modules))
        sys.exit(program.main(words[3:], program.Form.RUN))
    fresh = Fresh.taken_now(search_path, modules)
    if fresh.shadowed_in(request["directory"]):
        os.execvpe(sys.executable, [sys.executable, *words], request["environ"])
    sys.path[:] = [os.path.dirname(os.path.realpath(words[0])), *fresh.path]
    Reserve.fork(request["read_at_start"])
    gc.enable()
    _renew_randomness()
    sys.path[:] = fresh.path
    sys.path_importer_cache.clear()
    fresh.restore(refuse)
    sys.exit(
        _run(
            {
                "kind": "script",
                "command": [sys.executable, "", words[0]],
                "arguments": words[1:],
                "error_path": os.devnull,
            }
        )
    )


class Reserve:
    """A process that stands ready to be the host of a script's trainers, whose spawner is a fork of it, with torch imported."""

    @classmethod
    def fork(cls, read_at_start: Sequence[str]) -> None:
        """Forks it, before the script has any thread; the driver's connection starts its host with it.

        Args:
            read_at_start: beginnings of names of variables; if the script changed such a one, its host is an interpreter.
        """
        from torchtrainer.driver import connection

        ours, theirs = socket.socketpair()
        driver = os.getpid()
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.setsid()  # as a host has it, and so that it is not one of the script's own
            os._exit(cls._be_host(theirs, driver))
        theirs.close()
        environ, executable = dict(os.environ), sys.executable

        class Popen(subprocess.Popen[bytes]):
            def _execute_child(self, args: Any, *rest: Any) -> None:
                if (
                    ours.fileno() < 0
                    or os.getpid() != driver
                    or args[0] != executable
                    or not alike(environ, os.environ, read_at_start)
                ):
                    super()._execute_child(args, *rest)
                    return
                message = {"arguments": args[4:], "environ": dict(os.environ), "directory": os.getcwd()}
                stdin = rest[9]
                with ours:
                    socket.send_fds(ours, [json.dumps(message).encode()], [stdin, 1, 2])
                os.close(stdin)
                self.pid, self._child_created = pid, True

        connection.subprocess = With(subprocess, Popen=Popen)

    @classmethod
    def _be_host(cls, link: socket.socket, driver: int) -> int:
        message, descriptors, _, _ = socket.recv_fds(link, 1 << 20, 3)
        link.close()
        if not message:
            return 0  # the script has ended, or has found another host
        from torchtrainer.engines import host
        from torchtrainer.process import spawner, starters

        started = json.loads(message)
        for target, descriptor in enumerate(descriptors):
            os.dup2(descriptor, target)
            os.close(descriptor)
        os.chdir(started["directory"])
        os.environ.clear()
        os.environ.update(started["environ"])

        class Popen(subprocess.Popen[bytes]):
            def _execute_child(self, args: Any, *rest: Any) -> None:
                if (
                    args[0] != sys.executable
                    or args[4] != "torchtrainer.process.spawner"
                    or len(os.listdir("/proc/self/task")) > 1
                ):
                    super()._execute_child(args, *rest)
                    return
                pass_fds, environ, stdin = rest[3], rest[5], rest[9]
                self.pid, self._child_created = os.fork(), True
                if self.pid == 0:
                    os.dup2(stdin, 0)
                    for descriptor in map(int, os.listdir("/proc/self/fd")):
                        if descriptor > 2 and descriptor not in pass_fds:
                            with contextlib.suppress(OSError):
                                os.close(descriptor)
                    os.environ.clear()
                    os.environ.update(environ)
                    os._exit(spawner.main(args[5:]))

        starters.subprocess = With(subprocess, Popen=Popen)
        sys.argv[:] = [started["arguments"][0]]
        host.main(started["arguments"][1:])
        return 0


class With:
    """A module with some names of its own."""

    def __init__(self, module: Any, **names: Any) -> None:
        self.__dict__.update(names)
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def alike(first: Mapping[str, str], second: Mapping[str, str], prefixes: Sequence[str]) -> bool:
    """Whether variables whose names begin so are the same."""
    return all(first.get(name) == second.get(name) for name in {*first, *second} if name.startswith(tuple(prefixes)))


def refuse(changed: dict[str, str | None]) -> None:
    """A test must not believe that torch has seen what it has not."""
    raise RuntimeError(f"set for torch's import, which was before: start this program as a whole; {changed}")


def mark_in_memory() -> int:
    """The address of the mark in the environment that this process was started with, as the system shows it to others."""
    environ = ctypes.POINTER(ctypes.c_void_p).in_dll(ctypes.CDLL(None), "environ")
    begins = f"{MARK}=".encode()
    at = 0
    while environ[at]:
        if ctypes.string_at(environ[at]).startswith(begins):
            return environ[at] + len(begins)
        at += 1
    return 0


def put_mark(mark: str) -> None:
    """Lets others find this process, and its forks, by the mark of its program."""
    text = mark.encode()
    assert len(text) == len(os.environ[MARK]), "as long as the one that the zygote was started with"
    ctypes.memmove(MARK_ADDRESS, text, len(text))


MARK_ADDRESS = mark_in_memory()


def become(request: dict[str, Any], set_by_torch: dict[str, str]) -> None:
    """Turns this process into the command and runs it to its end."""
    prepare(request, set_by_torch)
    module, _, function = request["program"].partition(":")
    if function:
        sys.argv = [module, *request["arguments"]]
        sys.exit(getattr(importlib.import_module(module), function)(request["arguments"], request["form"]))
    sys.argv = [module, *request["arguments"]]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def end(exit_code: int) -> NoReturn:
    """Ends as the interpreter does, but for taking torch apart: that costs more than all the rest of a command."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
