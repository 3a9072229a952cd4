"""Writes what a worker sees of itself."""

from __future__ import annotations

import faulthandler
import gc
import json
import locale
import logging
import multiprocessing
import os
import random
import resource
import signal
import stat
import sys
import threading
import warnings
from pathlib import Path


def main_module() -> dict[str, object]:
    module = sys.modules["__main__"]
    spec = module.__spec__
    return {
        "name": module.__name__,
        "file": module.__file__,
        "package": module.__package__,
        "doc": module.__doc__,
        "cached": getattr(module, "__cached__", "absent"),
        "loader": getattr(module.__loader__, "__name__", type(module.__loader__).__name__),
        "spec": spec and [spec.name, spec.origin, spec.parent],
        "builtins": type(module.__builtins__).__name__,
        "names": sorted(n for n in vars(module) if n.startswith("__")),
        "is this module": vars(module) is globals(),
    }


def interpreter() -> dict[str, object]:
    return {
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "executable": sys.executable,
        "prefix": sys.prefix,
        "flags": repr(sys.flags),
        "warnoptions": sys.warnoptions,
        "xoptions": {k: str(v) for k, v in sys._xoptions.items()},
        "warnings": [[str(getattr(part, "pattern", part)) for part in entry] for entry in warnings.filters],
        "dont_write_bytecode": sys.dont_write_bytecode,
        "recursion limit": sys.getrecursionlimit(),
        "switch interval": sys.getswitchinterval(),
        "hooks": [
            sys.excepthook is sys.__excepthook__,
            sys.displayhook is sys.__displayhook__,
            threading.excepthook is threading.__excepthook__,
            sys.gettrace() is None,
            sys.getprofile() is None,
        ],
        "encodings": [sys.getdefaultencoding(), sys.getfilesystemencoding(), locale.setlocale(locale.LC_CTYPE)],
        "gc": [gc.isenabled(), gc.get_threshold()],
        "faulthandler": faulthandler.is_enabled(),
        "logging": [len(logging.root.handlers), logging.root.level],
        "thread": threading.current_thread().name,
        "start method": multiprocessing.get_start_method(allow_none=True),
        "process": [multiprocessing.current_process().name, multiprocessing.parent_process() is None],
    }


def streams() -> dict[str, object]:
    wanted = ("name", "mode", "encoding", "errors", "newlines", "line_buffering", "write_through")
    found = (sys.stdin, sys.stdout, sys.stderr)
    return {
        s.name: [str(getattr(s, w)) for w in wanted] + [s.fileno(), s.isatty(), type(s.buffer).__name__] for s in found
    }


def process() -> dict[str, object]:
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    umask = os.umask(0)
    os.umask(umask)
    return {
        "cwd": str(Path.cwd()),
        "leads": [os.getpid() == os.getsid(0), os.getpid() == os.getpgid(0)],
        "descriptors": descriptors(),
        "threads": status["Threads"],
        "signals": {k: status[k] for k in ("SigBlk", "SigIgn", "SigCgt")},
        "dispositions": {s.name: str(signal.getsignal(s)) for s in signal.Signals},
        "limits": {n: resource.getrlimit(getattr(resource, n)) for n in dir(resource) if n.startswith("RLIMIT_")},
        "umask": umask,
        "nice": os.nice(0),
        "oom": Path("/proc/self/oom_score_adj").read_text(),
        "affinity": sorted(os.sched_getaffinity(0)),
    }


def descriptors() -> dict[str, str]:
    found = {}
    for number in range(256):
        try:
            mode = os.fstat(number).st_mode
        except OSError:
            continue
        kind = stat.filemode(mode)[0]
        found[str(number)] = kind if kind == "p" else f"{kind} {Path(f'/proc/self/fd/{number}').readlink()}"
    return found


def write() -> None:
    facts = {
        "environ": dict(os.environ),
        "main": main_module(),
        "interpreter": interpreter(),
        "streams": streams(),
        "process": process(),
        "random": random.random(),
    }
    name = f"{os.environ['RANK']}.{os.environ['TORCHELASTIC_RESTART_COUNT']}.json"
    Path(os.environ["PARITY_REPORTS"], name).write_text(json.dumps(facts))


if __name__ == "__main__":
    write()
