"""Runs a command in a terminal of its own; once its ranks are ready, presses Ctrl-C or closes the terminal. Exits as the command does."""

from __future__ import annotations

import contextlib
import os
import pty
import sys

RANKS = 2
how, *command = sys.argv[1:]
pid, terminal = pty.fork()
if pid == 0:
    os.execv(command[0], command)
shown = b""
while shown.count(b"ready") < RANKS:
    shown += os.read(terminal, 1 << 16)
if how == "close":
    os.close(terminal)
else:
    os.write(terminal, b"\x03")
    with contextlib.suppress(OSError):  # how the end of a terminal reads
        while more := os.read(terminal, 1 << 16):
            shown += more
_, status = os.waitpid(pid, 0)
sys.stderr.write(shown.decode())
sys.exit(os.waitstatus_to_exitcode(status))
