"""Named places where a test makes the program die, fail or wait: each write, fsync and rename that durability needs.

``TORCHTRAINER_FAILPOINT=name:action@n`` arms one of `FAILPOINTS` in a process and in those that it starts. ``action`` is
``kill`` (SIGKILL to this process), ``error`` (OSError ENOSPC) or ``slow`` (`SLOW_S` seconds). ``@n`` means the n-th time in
that process only; without it, every time. Where the variable is not set, a failpoint costs one comparison.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from functools import cache
from typing import Final

from torchtrainer.errors import InvalidArgumentError

ENVIRONMENT: Final = "TORCHTRAINER_FAILPOINT"
SLOW_S: Final = 0.5
"""Duration of each wait of ``slow``."""
ACTIONS: Final = ("kill", "error", "slow")
FAILPOINTS: Final = (
    "checkpoint.claim",
    "checkpoint.claim.fsync",
    "checkpoint.sweep",
    "checkpoint.directory",
    "checkpoint.payload.write",
    "checkpoint.payload.fsync",
    "checkpoint.payload.close",
    "checkpoint.manifest.write",
    "checkpoint.manifest.fsync",
    "checkpoint.manifest.close",
    "checkpoint.directory.fsync",
    "checkpoint.publish",
    "checkpoint.publish.fsync",
    "checkpoint.verify",
    "checkpoint.retire",
    "checkpoint.delete",
    "checkpoint.set_aside",
    "remote.payload",
    "remote.verify",
    "remote.manifest",
    "remote.retire",
    "remote.delete",
)
"""Each is reached right before the operation that it is named after."""


def failpoint(name: str) -> None:
    """Dies, fails or waits here if the environment asks for it.

    Args:
        name: one of `FAILPOINTS`.

    Raises:
        OSError: the environment asks for an error.
        InvalidArgumentError: the environment asks for something that does not exist.
    """
    armed = _armed()
    if armed is not None:
        armed.reach(name)


class _Armed:
    """The failpoint that the environment names.

    Args:
        name: which one.
        action: one of `ACTIONS`.
        hit: the time that counts, from 1; None: every time.
    """

    def __init__(self, name: str, action: str, hit: int | None) -> None:
        self._name = name
        self._action = action
        self._hit = hit
        self._reached = 0

    def reach(self, name: str) -> None:
        if name not in FAILPOINTS:
            raise InvalidArgumentError(f"failpoint {name!r} is not in FAILPOINTS: add it there, so that tests reach it")
        if name != self._name:
            return
        self._reached += 1
        if self._hit in {None, self._reached}:
            self._act()

    def _act(self) -> None:
        if self._action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif self._action == "slow":
            time.sleep(SLOW_S)
        else:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (failpoint {self._name})")


@cache
def _armed() -> _Armed | None:
    """The failpoint that the environment named when this process reached its first one."""
    text = os.environ.get(ENVIRONMENT)
    if not text:
        return None
    name, _, rest = text.partition(":")
    action, at, hit = rest.partition("@")
    if name not in FAILPOINTS or action not in ACTIONS or (at and not (hit.isdecimal() and int(hit) > 0)):
        raise InvalidArgumentError(
            f"{ENVIRONMENT}={text!r} must be name:action or name:action@n with n from 1, an action of "
            f"{', '.join(ACTIONS)}, and a name of {', '.join(FAILPOINTS)}"
        )
    return _Armed(name, action, int(hit) if at else None)
