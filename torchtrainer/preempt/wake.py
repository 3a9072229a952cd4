"""An event that a thread can wait for together with a socket."""

from __future__ import annotations

import contextlib
import selectors
import socket

# Not epoll: it would cost a descriptor for each wait.
_Selector = getattr(selectors, "PollSelector", selectors.SelectSelector)
_CHUNK_BYTES = 4096


class Wake:
    """An event with a descriptor that is readable while it is set. Sockets, because Windows can wait for nothing else."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.settimeout(0.0)
        self._far.settimeout(0.0)

    def fileno(self) -> int:
        """The descriptor to wait for; -1 once closed."""
        return self._near.fileno()

    def set(self) -> None:
        """Sets the event: from any thread, and from a signal handler."""
        with contextlib.suppress(OSError):  # so full that it is readable anyway, or closed
            self._far.send(b"\0")

    def clear(self) -> None:
        """Takes the event back."""
        with contextlib.suppress(OSError):  # empty, or closed
            while self._near.recv(_CHUNK_BYTES):
                pass

    def wait(self, timeout_s: float, *, readable: socket.socket | None = None) -> bool:
        """Waits until the event is set, the time is up, or the socket can be read.

        Returns:
            Whether the event is set.
        """
        with _Selector() as selector:
            selector.register(self._near, selectors.EVENT_READ)
            if readable is not None:
                selector.register(readable, selectors.EVENT_READ)
            ready = selector.select(max(0.0, timeout_s))
        return any(key.fileobj is self._near for key, _events in ready)

    def close(self) -> None:
        """Closes the descriptors; idempotent."""
        self._near.close()
        self._far.close()
