"""Google Compute Engine: the preemption of a spot machine and maintenance of its host, each by a long poll.

Described in the Compute Engine documentation under "Query VM metadata" (waiting for change), "Preemptible VM instances" and
"Query metadata server for maintenance event notices".
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from urllib.parse import quote

from torchtrainer.preempt.metadata import MetadataError, MetadataServer
from torchtrainer.preempt.notice import Notice

HOLD_S = 60
"""How long the service is asked to delay an answer while a value does not change."""
PREEMPTION_LEAD_S = 30.0
"""Longest time from the preemption of a spot machine to its end."""
_ANY_VERSION = "0"


class GcpSource:
    """Waits for one value to change.

    Args:
        server: the metadata service.
        key: of the value, below ``instance/``.
        read: makes a notice, or None, of a value; raises `MetadataError` for one that cannot be.
        interval_s: pause between two questions, which matters if the service answers at once every time.
    """

    def __init__(
        self, server: MetadataServer, *, key: str, read: Callable[[str], Notice | None], interval_s: float
    ) -> None:
        self.name = f"GCP metadata ({key})"
        self.interval_s = interval_s
        self._server = server
        self._key = key
        self._read = read
        self._version = _ANY_VERSION
        self._given = ""

    def poll(self) -> Iterator[Notice]:
        """Waits until the value is another one than last time, or for `HOLD_S`; gives a notice if it says so.

        Raises:
            MetadataError: the service gave no usable answer.
        """
        query = f"wait_for_change=true&timeout_sec={HOLD_S}&last_etag={self._version}"
        path = f"/computeMetadata/v1/instance/{self._key}?{query}"
        reply = self._server.ask(path, headers={"Metadata-Flavor": "Google"}, wait_s=HOLD_S)
        if reply.status != 200:
            raise MetadataError(f"answered with status {reply.status} to GET {path}")
        value = reply.body.strip()
        notice = self._read(value)
        self._version = quote(reply.etag) or _ANY_VERSION
        if notice is not None and value != self._given:
            yield notice
        self._given = value


def read_preempted(value: str) -> Notice | None:
    """Makes a notice of ``instance/preempted``."""
    if value == "FALSE":
        return None
    if value != "TRUE":
        raise MetadataError(f"answered neither TRUE nor FALSE: {value[:60]!r}")
    return Notice(
        source="GCP",
        deadline=time.monotonic() + PREEMPTION_LEAD_S,
        must_stop=True,
        text=f"Google Cloud will reclaim this spot machine within {PREEMPTION_LEAD_S:.0f} s",
    )


def read_maintenance(value: str) -> Notice | None:
    """Makes a hint of ``instance/maintenance-event``.

    Even a termination is one: it can be an hour away, and a run that stopped for it would be started again here meanwhile.
    When it comes, the machine shuts down, which is a SIGTERM.
    """
    if value == "NONE":
        return None
    if value not in ("MIGRATE_ON_HOST_MAINTENANCE", "TERMINATE_ON_HOST_MAINTENANCE"):
        raise MetadataError(f"announces an unknown maintenance: {value[:60]!r}")
    what = "moves this machine to another host" if value.startswith("MIGRATE") else "will stop this machine"
    return Notice(
        source="GCP maintenance",
        deadline=None,
        must_stop=False,
        text=f"Google Cloud {what} for maintenance, in a minute or, with GPUs, up to an hour",
    )
