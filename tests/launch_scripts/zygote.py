"""Runs commands in forks of one process that has imported torch: what they do is theirs, the two seconds are paid once.

One JSON object a line. In: ``program`` (a module, run as ``python -m`` would, or ``module:function``, called with the arguments and
``form``; or ``torchtrainer``: our launcher, from where it has imported torch on), ``arguments``, ``form``, ``directory``, ``environ``, ``stdin``, ``stdout``, ``stderr`` (paths). Out: ``pid`` at once and, when
it has ended, ``pid`` and ``exit_code``. The process ends with its standard input.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import select
import sys
import threading
import traceback
import warnings
from typing import Any, NoReturn

FRESH_MODULES = frozenset(sys.modules)
SEARCH_PATH = tuple(sys.path[1:])
FILTERS = tuple(warnings.filters)
PRELOADED = (
    "torch",
    "torch.distributed.run",
    "torch.distributed.launch",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend",
)


def main() -> None:
    environ = dict(os.environ)
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads would not survive the fork
    for module in PRELOADED:
        importlib.import_module(module)
    assert len(os.listdir("/proc/self/task")) == threading.active_count() == 1, "torch started a thread"
    del os.environ["OPENBLAS_NUM_THREADS"]
    gc.freeze()  # a collection in a fork would copy every page
    set_by_torch = {k: v for k, v in os.environ.items() if environ.get(k) != v}
    request = serve()
    if request is None:
        return
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


def prepare(request: dict[str, Any], set_by_torch: dict[str, str]) -> None:
    """Gives this process the directory, environment and streams of the command."""
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
    main()
