"""A clean interpreter that imports torch once and forks workers from then on.

It has one thread and never touches a GPU, so that a fork of it is safe; it says how many threads it has after every import,
and the host starts workers in another way if that is ever more than one. It speaks JSON with the host over one socket:

    host --> spawner    {"fork": ChildSpec}, {"preload": [module names]}
    spawner --> host    {"ready": {"pid", "import_s", "threads"}}, {"started": {"key", "pid"}},
                        {"exited": {"pid", "exit_code", "max_rss_bytes"}}, {"failed": text}
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import time
import traceback
from typing import Any

from torchtrainer.process.child import ChildSpec, leave, run_child
from torchtrainer.process.frames import FrameSocket
from torchtrainer.process.guard import die_with_parent, thread_count, unblock_signals

_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def main(arguments: list[str]) -> int:
    """Serves until the host closes the socket.

    Args:
        arguments: descriptor of the socket, pid of the host, modules to import first (comma separated).
    """
    fd, parent, modules = arguments
    die_with_parent(int(parent))
    unblock_signals()
    link = FrameSocket(socket.socket(fileno=int(fd)))
    started = time.monotonic()
    # Nothing that an import makes is garbage, and looking for it takes a third of the time of `import torch`.
    gc.disable()
    try:
        for name in modules.split(","):
            importlib.import_module(name)
    except BaseException:  # whatever it is, the user must see it
        link.send({"failed": traceback.format_exc()})
        return 1
    gc.freeze()  # and forked workers then share these pages with us instead of copying them at their first collection
    link.send({"ready": {"pid": os.getpid(), "import_s": time.monotonic() - started, "threads": thread_count()}})
    me = os.getpid()
    spec = _serve(link)
    if spec is not None:
        leave(run_child(spec, parent=me))
    return 0


def _serve(link: FrameSocket) -> ChildSpec | None:
    """Forks on request; returns in the parent with None at the end, in each child with its spec."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    while not link.closed_by_peer:
        ready, _, _ = select.select([link.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_exits(link)
        for request in link.receive_available():
            if "preload" in request:
                _preload(link, request["preload"])
                continue
            spec: ChildSpec = request["fork"]
            try:
                pid = os.fork()
            except OSError as error:  # out of memory or of processes
                link.send({"failed": f"a worker process cannot be forked: {error}"})
                return None
            if pid == 0:
                os.close(woken)
                os.close(wake)
                link.close()
                return spec
            link.send({"started": {"key": spec["key"], "pid": pid}})
    return None


def _report_exits(link: FrameSocket) -> None:
    while True:
        try:
            pid, status, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        exited: dict[str, Any] = {"pid": pid, "exit_code": os.waitstatus_to_exitcode(status)}
        exited["max_rss_bytes"] = usage.ru_maxrss * _RSS_UNIT_BYTES
        link.send({"exited": exited})


def _preload(link: FrameSocket, modules: list[str]) -> None:
    """Imports what workers were seen to import, so that the next ones have it. A module that fails there is left to them."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            print(f"preload of {name} left out: {error}", file=sys.stderr)
    gc.freeze()
    link.send({"ready": {"pid": os.getpid(), "import_s": 0.0, "threads": thread_count()}})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
