"""A clean interpreter that imports torch once and forks workers from then on.

It has one thread and never touches a GPU, so that a fork of it is safe; it says how many threads it has after every import,
and the host starts workers in another way if that is ever more than one. It speaks JSON with its owner, the host of a
trainer or a launcher, over one socket:

    owner --> spawner    {"fork": spec with a "key"}, {"preload": [module names]}
    spawner --> owner    {"ready": {"pid", "threads"}}, {"started": {"key", "pid"}},
                         {"exited": {"pid", "exit_code", "max_rss_bytes"}}, {"unforked": {"key", "text"}}, {"failed": text}

A forked process goes on only when the owner was told of it. Whatever a worker leaves running in its process group goes with it. When
the owner is gone, so are all workers; when the spawner is gone, so are those of a launcher, and those of a trainer's host go on.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from torchtrainer.process.child import leave, run_child
from torchtrainer.process.frames import FrameSocket
from torchtrainer.process.guard import die_with_parent, kill_process_group, kill_session, settle_signals, thread_count
from torchtrainer.process.oom import SPAWNER_MORE, be_killed_first
from torchtrainer.process.starters import RSS_UNIT_BYTES


def main(arguments: list[str]) -> int:
    """Serves the host of a trainer until it closes the socket.

    Args:
        arguments: descriptor of the socket, pid of the host, modules to import first (comma separated), descriptor of a pipe by
            which workers end with the host, or nothing: they end with this process.
    """
    fd, parent, modules, lifeline = arguments
    die_with_parent(int(parent))
    settle_signals()
    be_killed_first(SPAWNER_MORE)
    link = FrameSocket(socket.socket(fileno=int(fd)))
    if not import_first(link, modules.split(",")):
        return 1
    me = os.getpid()
    spec = serve(link)
    if spec is not None:
        leave(run_child(spec, parent=me, lifeline=int(lifeline) if lifeline else None))
    return 0


def import_first(link: FrameSocket, modules: Sequence[str]) -> bool:
    """Imports what workers will need and reports to the owner that forks can be asked for; False if an import failed."""
    try:
        import_quickly(modules)
    except BaseException:  # whatever it is, the user must see it
        link.send({"failed": traceback.format_exc()})
        return False
    report_ready(link)
    return True


def import_quickly(modules: Sequence[str]) -> None:
    """Imports modules for good: looking for garbage, of which imports make none, takes a third of the time of `import torch`.

    Collection stays off, for a process that forks: its children then share these pages with it instead of copying them at
    their first collection.
    """
    gc.disable()
    for name in modules:
        importlib.import_module(name)
    gc.freeze()


def report_ready(link: FrameSocket) -> None:
    """Tells the owner that forks can be asked for, and how many threads stand in their way."""
    link.send({"ready": {"pid": os.getpid(), "threads": thread_count()}})


def serve(link: FrameSocket) -> Any:
    """Forks on request. Returns None in the spawner when the owner is gone, and in each child the spec that it was asked with."""
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    living: set[int] = set()
    while not link.closed_by_peer:
        ready, _, _ = select.select([link.fileno(), woken], [], [])
        if woken in ready:
            os.read(woken, 4096)
            _report_exits(link, living)
        for request in link.receive_available():
            if "preload" in request:
                _preload(link, request["preload"])
                continue
            pid = _fork(link, request["fork"]["key"])
            if pid == 0:
                os.close(woken)
                os.close(wake)
                link.close()
                return request["fork"]
            if pid is not None:
                living.add(pid)
    _kill(living)
    return None


def _fork(link: FrameSocket, key: str) -> int | None:
    """Forks, and tells the owner, before the new process goes on. Returns as `os.fork`; None if there is no memory or no process.

    In the new process signals are blocked, until it has said what they do.
    """
    go, say_go = os.pipe()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        pid = os.fork()
    except OSError as error:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        os.close(go)
        os.close(say_go)
        link.send({"unforked": {"key": key, "text": f"a process cannot be forked: {error}"}})
        return None
    if pid == 0:
        os.close(say_go)
        if not os.read(go, 1):  # the spawner was killed: whether it had told of this process, nobody knows here
            try:
                _tell_started(link, key, os.getpid())
            except OSError:  # the owner is gone as well
                os._exit(1)
        os.close(go)
        return 0
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    os.close(go)
    with contextlib.suppress(BrokenPipeError):  # the owner is gone: the loop ends
        _tell_started(link, key, pid)
        os.write(say_go, b"g")
    os.close(say_go)
    return pid


def _tell_started(link: FrameSocket, key: str, pid: int) -> None:
    link.send({"started": {"key": key, "pid": pid}})


def _kill(living: set[int]) -> None:
    for pid in living:
        kill_session(pid)


def _report_exits(link: FrameSocket, living: set[int]) -> None:
    while living:
        ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if ended is None:
            return
        kill_process_group(ended.si_pid)  # before the process is reaped: its id cannot be anybody else's yet
        pid, status, usage = os.wait4(ended.si_pid, 0)
        living.discard(pid)
        exited: dict[str, Any] = {"pid": pid, "exit_code": os.waitstatus_to_exitcode(status)}
        exited["max_rss_bytes"] = usage.ru_maxrss * RSS_UNIT_BYTES
        with contextlib.suppress(BrokenPipeError):  # the owner is gone: the loop ends
            link.send({"exited": exited})


def _preload(link: FrameSocket, modules: list[str]) -> None:
    """Imports what workers were seen to import, so that the next ones have it. A module that fails there is left to them."""
    for name in modules:
        try:
            importlib.import_module(name)
        except Exception as error:
            link.send({"unloaded": {"text": f"cannot preload {name}: {error}"}})
    gc.freeze()
    report_ready(link)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
