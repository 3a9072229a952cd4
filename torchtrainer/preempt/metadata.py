"""Asking a cloud's metadata service: plain HTTP to one address, bounded in time and size, and given up when told to stop."""

from __future__ import annotations

import io
import json
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from typing import Any
from urllib.parse import urlsplit

from torchtrainer.preempt.wake import Wake

CONNECT_TIMEOUT_S = 2.0
"""Time limit of a connection attempt, which nothing can end early; the service is on the same host."""
MAX_BODY_BYTES = 65536
"""Longest answer that is read; notices are a few hundred bytes."""


class MetadataError(Exception):
    """The service gave no usable answer. Stays inside this package."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """An answer of the service.

    Attributes:
        status: of HTTP.
        body: text of the answer.
        etag: names the version of the value; empty: not given.
    """

    status: int
    body: str
    etag: str

    def json_object(self) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            MetadataError: it is something else.
        """
        try:
            value = json.loads(self.body)
        except (ValueError, RecursionError) as error:
            raise MetadataError(f"answered something that is not JSON: {self.body[:60]!r}") from error
        if not isinstance(value, dict):
            raise MetadataError(f"answered something that is not a JSON object: {self.body[:60]!r}")
        return value


class MetadataServer:
    """Where to ask, how long to wait, and what ends the wait. Goes through no proxy and follows no redirect.

    Args:
        base_url: ``http://host[:port]``, an address rather than a name.
        timeout_s: for connecting, up to `CONNECT_TIMEOUT_S`, and again for the whole answer.
        stop: ends a wait for an answer at once when it is set.
    """

    def __init__(self, base_url: str, *, timeout_s: float, stop: Wake) -> None:
        address = urlsplit(base_url)
        self._host = address.hostname or ""
        self._port = address.port or 80
        self._timeout_s = timeout_s
        self._stop = stop

    def ask(
        self,
        path: str,
        *,
        method: str = "GET",
        headers: Mapping[str, str] | None = None,
        body: str | None = None,
        wait_s: float = 0.0,
    ) -> Reply:
        """Sends one request and reads the answer.

        Args:
            path: with the query.
            method: of HTTP.
            headers: of the request.
            body: of the request; None: none.
            wait_s: how long the service was asked to hold the answer back; comes on top of the time-out.

        Raises:
            MetadataError: no connection, no answer in time, too long an answer, a status other than 200, 401 and 404, or the stop.
        """
        connect_timeout_s = min(self._timeout_s, CONNECT_TIMEOUT_S)
        try:
            with socket.create_connection((self._host, self._port), connect_timeout_s) as connected:
                reply = self._exchange(connected, method, path, dict(headers or {}), body, wait_s)
        except TimeoutError as error:
            limit = f"PreemptionConfig.metadata_timeout_s={self._timeout_s:g}"
            raise MetadataError(f"no whole answer to {method} {path} within {limit}") from error
        except (OSError, HTTPException, ValueError) as error:
            raise MetadataError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__) from error
        if reply.status not in (200, 401, 404):
            raise MetadataError(f"answered with status {reply.status} to {method} {path}")
        return reply

    def _exchange(
        self,
        connected: socket.socket,
        method: str,
        path: str,
        headers: dict[str, str],
        body: str | None,
        wait_s: float,
    ) -> Reply:
        deadline = time.monotonic() + self._timeout_s + wait_s
        connection = HTTPConnection(self._host, self._port)
        connection.sock = _BoundedSocket(connected, stop=self._stop, deadline=deadline)
        connection.request(method, path, body=body, headers={"Connection": "close", **headers})
        with connection.getresponse() as response:
            content = response.read(MAX_BODY_BYTES + 1)
            if len(content) > MAX_BODY_BYTES:
                raise MetadataError(f"answered more than {MAX_BODY_BYTES} bytes to {method} {path}")
            return Reply(status=response.status, body=content.decode(), etag=response.getheader("ETag", ""))


class _BoundedSocket:
    """What `HTTPConnection` uses of a socket, with one deadline for all reads, which the stop ends at once."""

    def __init__(self, connected: socket.socket, *, stop: Wake, deadline: float) -> None:
        self._connected = connected
        self._stop = stop
        self._deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._connected.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_BoundedReader(self._connected, stop=self._stop, deadline=self._deadline))

    def close(self) -> None:
        """Nothing: the answer is read after `HTTPConnection` has closed its side; who connected closes the connection."""


class _BoundedReader(io.RawIOBase):
    def __init__(self, connected: socket.socket, *, stop: Wake, deadline: float) -> None:
        self._connected = connected
        self._stop = stop
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._stop.wait(self._deadline - time.monotonic(), readable=self._connected):
            raise ConnectionAbortedError("stopped while waiting for an answer")
        if time.monotonic() >= self._deadline:
            raise TimeoutError
        return self._connected.recv_into(buffer)
