"""ZeroMQ sockets of the control plane: the host binds one router, driver and workers connect to it.

Where that is says an endpoint, such as ``ipc:///run/user/1000/torchtrainer-x/control.ipc``; whoever starts the processes hands it
to them. On one machine it is a file in a fresh directory that only its owner can enter, and libzmq checks the peer's user id
where it was built to. So whoever can send a message is the user.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Sequence

import zmq

from torchtrainer.control.wire import Message, decode, encode

RECONNECT_MS = 5
"""Milliseconds between two connection attempts of a peer that starts before the host."""


class Router:
    """The host's end: receives from everybody, sends to a named peer. Used by one thread."""

    def __init__(self, endpoint: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.set_hwm(0)
        filter_uid = getattr(zmq, "IPC_FILTER_UID", None)
        if filter_uid is not None and hasattr(os, "getuid"):
            with contextlib.suppress(zmq.ZMQError):  # libzmq built without it: the directory's mode is the protection
                self._socket.setsockopt(filter_uid, os.getuid())
        self._socket.bind(endpoint)

    def wait(self, fds: Iterable[int], timeout_s: float) -> set[int]:
        """Waits until a message or one of the descriptors is ready; returns the ready descriptors."""
        return _wait(self._socket, fds, timeout_s)

    def receive(self) -> tuple[bytes, Message] | None:
        """Takes one message, with the name of its sender; None if there is none."""
        try:
            sender, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return sender, decode(frames)

    def send(self, peer: bytes, message: Message) -> None:
        """Sends to a peer; a peer that is gone loses the message, as its end of the socket is gone too."""
        self._socket.send_multipart([peer, *encode(message)])

    def close(self) -> None:
        """Closes the socket. Idempotent."""
        self._socket.close(0)
        self._context.term()


class Dealer:
    """The driver's and a worker's end. Used by the thread that made it."""

    def __init__(self, endpoint: str, name: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.set_hwm(0)
        self._socket.setsockopt(zmq.IDENTITY, name.encode())
        self._socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        self._socket.connect(endpoint)

    def wait(self, fds: Iterable[int], timeout_s: float) -> set[int]:
        """Waits until a message or one of the descriptors is ready; returns the ready descriptors."""
        return _wait(self._socket, fds, timeout_s)

    def receive(self) -> Message | None:
        """Takes one message; None if there is none."""
        try:
            frames: Sequence[bytes] = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return decode(list(frames))

    def send(self, message: Message) -> None:
        """Queues a message for the host."""
        self._socket.send_multipart(encode(message))

    def close(self, flush_s: float = 0.0) -> None:
        """Closes the socket; what was queued gets ``flush_s`` seconds to leave. Idempotent."""
        self._socket.close(int(flush_s * 1000))
        self._context.term()


def _wait(socket: zmq.Socket[bytes], fds: Iterable[int], timeout_s: float) -> set[int]:
    poller = zmq.Poller()
    poller.register(socket, zmq.POLLIN)
    for fd in fds:
        poller.register(fd, zmq.POLLIN)
    ready = poller.poll(max(0, int(timeout_s * 1000)))
    return {item for item, _ in ready if isinstance(item, int)}
