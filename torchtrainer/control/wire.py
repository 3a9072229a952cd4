"""Message transport: what messages have in common, and their conversion to frames and back.

A message is a frozen dataclass. On the wire it is one JSON frame, ``{"message": class name, fields...}``, and at most one binary
frame, the field ``blob``. Nothing here unpickles anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cache
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Message:
    """Base of all messages."""


@dataclass(frozen=True, kw_only=True)
class ForWorker(Message):
    """A message that the host hands on to workers.

    Attributes:
        group: worker group.
        worker: addressee; None: every worker.
    """

    group: str
    worker: int | None = None


@dataclass(frozen=True, kw_only=True)
class FromWorker(Message):
    """A message that the host hands on to the driver.

    Attributes:
        group: worker group.
        worker: number of the sender in its group, never used again for another process.
    """

    group: str
    worker: int


@cache
def _kinds() -> dict[str, type[Message]]:
    """Every message by its name; asked for when the first one arrives, so that all are defined."""
    return {kind.__name__: kind for kind in _below(Message)}


def _below(kind: type[Message]) -> Iterator[type[Message]]:
    for one in kind.__subclasses__():
        yield one
        yield from _below(one)


def encode(message: Message) -> list[bytes]:
    """Writes a message as frames."""
    header: dict[str, Any] = {"message": type(message).__name__}
    frames: list[bytes] = []
    for item in fields(message):
        value = getattr(message, item.name)
        if item.name == "blob":
            frames.append(value)
        else:
            header[item.name] = value
    return [json.dumps(header).encode(), *frames]


def decode(frames: list[bytes]) -> Message:
    """Reads a message from its frames.

    Raises:
        ValueError: the frames are not one of our messages.
    """
    header = json.loads(frames[0])
    cls = _kinds().get(header.pop("message", None))
    if cls is None:
        raise ValueError(f"unknown message {frames[0][:80]!r}")
    if len(frames) > 1:
        header["blob"] = frames[1]
    return cls(**header)
