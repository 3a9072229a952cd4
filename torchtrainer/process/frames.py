"""JSON values over a stream socket, each with its length in front: how host and spawner talk."""

from __future__ import annotations

import json
import socket
import struct
from typing import Any

_LENGTH = struct.Struct("!I")
_CHUNK = 65536


class FrameSocket:
    """A stream socket that carries JSON values. Used by one thread."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = b""
        self.closed_by_peer = False

    def fileno(self) -> int:
        """Descriptor, for polling."""
        return self._socket.fileno()

    def send(self, value: Any) -> None:
        """Sends a value; blocks until the kernel has taken it."""
        data = json.dumps(value).encode()
        self._socket.sendall(_LENGTH.pack(len(data)) + data)

    def receive_available(self) -> list[Any]:
        """Reads what has arrived without blocking, and returns the complete values."""
        while not self.closed_by_peer:
            try:
                data = self._socket.recv(_CHUNK, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            except ConnectionError:
                data = b""
            if not data:
                self.closed_by_peer = True
            self._buffer += data
        values = []
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if len(self._buffer) < _LENGTH.size + size:
                break
            values.append(json.loads(self._buffer[_LENGTH.size : _LENGTH.size + size]))
            self._buffer = self._buffer[_LENGTH.size + size :]
        return values

    def close(self) -> None:
        """Closes the socket. Idempotent."""
        self._socket.close()
