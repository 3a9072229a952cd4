"""Amazon EC2: the spot interruption notice and the rebalance recommendation, over IMDSv2.

Described in the EC2 user guide under "Spot Instance interruption notices", "EC2 instance rebalance recommendations" and
"Use the Instance Metadata Service".
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import datetime

from torchtrainer.preempt.metadata import MetadataError, MetadataServer, Reply
from torchtrainer.preempt.notice import Notice, monotonic_at

TOKEN_TTL_S = 21600
"""Requested lifetime of a session token: the longest that the service grants."""
TOKEN_SPARE_S = 60
"""A token is renewed this long before it expires."""
SPOT_ACTIONS = ("terminate", "stop", "hibernate")


class AwsSource:
    """Asks for both values every few seconds, as Amazon recommends; there is nothing that could be waited for.

    Args:
        server: the metadata service.
        interval_s: seconds between two questions.
    """

    name = "AWS metadata"

    def __init__(self, server: MetadataServer, *, interval_s: float) -> None:
        self.interval_s = interval_s
        self._server = server
        self._token = ""
        self._token_ends = 0.0
        self._given: set[str] = set()

    def poll(self) -> Iterator[Notice]:
        """Gives a notice for an interruption, and a hint for a recommendation, once for each.

        Raises:
            MetadataError: the service gave no usable answer.
        """
        spot = self._read("/latest/meta-data/spot/instance-action")
        if spot is not None and spot.body not in self._given:
            yield _spot_notice(spot)
            self._given.add(spot.body)
        rebalance = self._read("/latest/meta-data/events/recommendations/rebalance")
        if rebalance is not None and rebalance.body not in self._given:
            yield _rebalance_hint(rebalance)
            self._given.add(rebalance.body)

    def _read(self, path: str) -> Reply | None:
        """The value at a path, None if there is none; a token that the service no longer takes is renewed, once."""
        if time.monotonic() >= self._token_ends:
            self._renew_token()
        reply = self._server.ask(path, headers={"X-aws-ec2-metadata-token": self._token})
        if reply.status == 401:
            self._renew_token()
            reply = self._server.ask(path, headers={"X-aws-ec2-metadata-token": self._token})
        if reply.status == 401:
            raise MetadataError("refuses the token that it has just given")
        return None if reply.status == 404 else reply

    def _renew_token(self) -> None:
        self._token_ends = 0.0
        headers = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        reply = self._server.ask("/latest/api/token", method="PUT", headers=headers)
        if reply.status != 200 or not reply.body.isprintable():
            raise MetadataError(f"gives no token (status {reply.status})")
        self._token = reply.body
        self._token_ends = time.monotonic() + TOKEN_TTL_S - TOKEN_SPARE_S


def _spot_notice(reply: Reply) -> Notice:
    value = reply.json_object()
    action = value.get("action")
    if action not in SPOT_ACTIONS:
        raise MetadataError(f"announces an unknown action: {reply.body[:60]!r}")
    when = value.get("time")
    return Notice(
        source="AWS spot",
        deadline=_deadline(when),
        must_stop=True,
        text=f"AWS will reclaim this spot machine: {action} at {when}",
    )


def _rebalance_hint(reply: Reply) -> Notice:
    since = reply.json_object().get("noticeTime")
    return Notice(
        source="AWS rebalance",
        deadline=None,
        must_stop=False,
        text=f"AWS sees a higher risk of reclaiming this spot machine (since {since})",
    )


def _deadline(when: object) -> float | None:
    """The notice counts even if its time cannot be read."""
    try:
        return monotonic_at(datetime.fromisoformat(str(when).replace("Z", "+00:00")).timestamp())
    except ValueError:
        return None
