"""Ends in the way that its first argument names, in as many attempts as the second says, or in all."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path


class Custom(BaseException):
    pass


def chained() -> None:
    try:
        raise KeyError("the cause")
    except KeyError as error:
        raise ValueError("the consequence") from error


def nested() -> None:
    def inner() -> None:
        sys.exit(9)

    try:
        inner()
    finally:
        sys.stdout.write("worker> finally\n")


def raises(error: BaseException) -> None:
    raise error


def kill(name: str) -> None:
    os.kill(os.getpid(), signal.Signals[name])
    signal.pause()


def reply() -> None:
    """Writes the error file as a decorated function would, and fails."""
    message = {"message": "RuntimeError: told", "extraInfo": {"py_callstack": "none", "timestamp": "1700000000"}}
    Path(os.environ["TORCHELASTIC_ERROR_FILE"]).write_text(json.dumps({"message": message}))
    sys.exit(5)


WAYS = {
    "exception": lambda: raises(RuntimeError("many\nlines")),
    "chained": chained,
    "base": lambda: raises(Custom("base")),
    "interrupt": lambda: raises(KeyboardInterrupt()),
    "nested": nested,
    "text": lambda: sys.exit("text"),
    "none": lambda: sys.exit(None),
    "true": lambda: sys.exit(True),
    "large": lambda: sys.exit(256 + 3),
    "negative": lambda: sys.exit(-1),
    "os": lambda: os._exit(7),
    "reply": reply,
    "import": lambda: __import__("no_such_module"),
}


def together() -> None:
    """Waits for every rank to get here: who fails first stops the others."""
    store = Path(os.environ["PARITY_REPORTS"], f"together.{os.environ['TORCHELASTIC_RESTART_COUNT']}")
    store.mkdir(exist_ok=True)
    (store / os.environ["RANK"]).touch()
    while len(list(store.iterdir())) < int(os.environ["WORLD_SIZE"]):
        os.sched_yield()


ARGUMENTS = [a for a in sys.argv[1:] if not a.startswith("--local-rank=")]  # the launch form puts it in front
how = ARGUMENTS[0]
attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
sys.stdout.write(f"worker> {os.environ['RANK']} attempt {attempt}\n")
together()
if len(ARGUMENTS) == 1 or attempt < int(ARGUMENTS[1]):
    if how in WAYS:
        WAYS[how]()
    elif how.startswith("SIG"):
        kill(how)
    else:
        sys.exit(int(how))
