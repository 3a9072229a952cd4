"""Azure: scheduled events that concern this machine, and their acknowledgement once Azure need not wait for us.

Described in the Azure documentation under "Scheduled Events for Linux VMs".
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from torchtrainer.preempt.metadata import MetadataError, MetadataServer, Reply
from torchtrainer.preempt.notice import Notice, monotonic_at

EVENTS_PATH = "/metadata/scheduledevents?api-version=2020-07-01"
NAME_PATH = "/metadata/instance/compute/name?api-version=2020-09-01&format=text"
STOP_LEAD_S = 120.0
"""A reboot is known a quarter of an hour ahead. Until this long before it, it is only a hint: a run that stopped at once would be
started again on the same machine meanwhile."""
FIRST_ANSWER_S = 120.0
"""How long the first answer may take: Azure prepares for this machine then."""
_HEADERS = {"Metadata": "true"}
_STOPPING = ("Preempt", "Terminate", "Reboot", "Redeploy")


@dataclass(frozen=True, kw_only=True)
class _Event:
    """One scheduled event; ``deadline`` in monotonic seconds, None: unknown."""

    event_id: str
    kind: str
    machines: tuple[str, ...]
    deadline: float | None


class AzureSource:
    """Asks every few seconds; the first question makes Azure announce events to this machine at all.

    Args:
        server: the metadata service.
        interval_s: seconds between two questions.
    """

    name = "Azure metadata"

    def __init__(self, server: MetadataServer, *, interval_s: float) -> None:
        self.interval_s = interval_s
        self._server = server
        self._machine = ""
        self._patience_s = FIRST_ANSWER_S
        self._given: set[tuple[str, bool]] = set()
        self._to_acknowledge: tuple[str, ...] = ()

    def poll(self) -> Iterator[Notice]:
        """Gives a notice for each new event of this machine, and another one when a hint becomes a stop.

        Raises:
            MetadataError: the service gave no usable answer.
        """
        events = [_read_event(item) for item in _items(self._ask(EVENTS_PATH, wait_s=self._patience_s))]
        self._patience_s = 0.0
        if not events:
            return
        if not self._machine:  # events of a whole availability set or scale set arrive here
            self._machine = self._ask(NAME_PATH).strip()
        for event in events:
            must_stop = _must_stop(event)
            if self._machine not in event.machines or (event.event_id, must_stop) in self._given:
                continue
            self._given.add((event.event_id, must_stop))
            if must_stop:
                self._to_acknowledge = (*self._to_acknowledge, event.event_id)
            yield Notice(source="Azure", deadline=event.deadline, must_stop=must_stop, text=_text(event))

    def acknowledge(self) -> str | None:
        """Lets Azure go ahead with the events that were given as a stop; only when the state is saved. In any thread.

        Returns:
            Why it did not work; None: it did, or there was nothing to say.
        """
        events = [{"EventId": event_id} for event_id in self._to_acknowledge]
        if not events:
            return None
        headers = {**_HEADERS, "Content-Type": "application/json"}
        body = json.dumps({"StartRequests": events})
        try:
            reply = self._server.ask(EVENTS_PATH, method="POST", headers=headers, body=body)
        except MetadataError as error:
            return str(error)
        if reply.status != 200:
            return f"answered with status {reply.status} to POST {EVENTS_PATH}"
        self._to_acknowledge = ()
        return None

    def _ask(self, path: str, *, wait_s: float = 0.0) -> str:
        reply = self._server.ask(path, headers=_HEADERS, wait_s=wait_s)
        if reply.status != 200:
            raise MetadataError(f"answered with status {reply.status} to GET {path}")
        return reply.body


def _items(body: str) -> list[Any]:
    items = Reply(status=200, body=body, etag="").json_object().get("Events")
    if not isinstance(items, list):
        raise MetadataError(f"lists no events: {body[:60]!r}")
    return items


def _read_event(item: Any) -> _Event:
    if not isinstance(item, dict) or not isinstance(item.get("Resources"), list):
        raise MetadataError(f"lists something that is not an event: {str(item)[:60]!r}")
    when = str(item.get("NotBefore") or "")
    if item.get("EventStatus") == "Started":
        deadline: float | None = time.monotonic()
    else:
        try:
            deadline = monotonic_at(parsedate_to_datetime(when).timestamp())
        except (TypeError, ValueError):  # the event counts even if its time cannot be read
            deadline = None
    return _Event(
        event_id=str(item.get("EventId")),
        kind=str(item.get("EventType")),
        machines=tuple(str(name) for name in item["Resources"]),
        deadline=deadline,
    )


def _must_stop(event: _Event) -> bool:
    if event.kind not in _STOPPING:
        return False
    return event.kind == "Preempt" or event.deadline is None or event.deadline - time.monotonic() <= STOP_LEAD_S


def _text(event: _Event) -> str:
    what = {
        "Preempt": "takes this spot machine back",
        "Terminate": "deletes this machine",
        "Reboot": "restarts this machine",
        "Redeploy": "moves this machine to another host, with a restart,",
        "Freeze": "pauses this machine for some seconds",
    }.get(event.kind, f"announces {event.kind[:30]!r} for this machine")
    left = "" if event.deadline is None else f" in {max(0.0, event.deadline - time.monotonic()):.0f} s"
    return f"Azure {what}{left}"
