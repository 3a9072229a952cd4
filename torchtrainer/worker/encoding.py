"""Encodes the result of a call: as data if it is data, as an object only if the user's call returns one.

The driver reads results with `torchtrainer.driver.decoding`; the forms are named in `torchtrainer.control.messages.Reply`.
"""

from __future__ import annotations

import io
import json
from typing import Any

import cloudpickle
import torch

from torchtrainer.errors import NotSerializableError
from torchtrainer.train.metrics import PassResult
from torchtrainer.worker.models import pickled

JSON_TYPES = (str, int, float, bool, type(None))


def encode_result(method: str, value: Any) -> tuple[str, bytes]:
    """Writes a result; returns its form and the bytes.

    Args:
        method: the called method of the runtime.
        value: what it returned.

    Raises:
        NotSerializableError: the value does not pickle.
    """
    if method == "state_dict" and value is not None:
        return "state", _encode_state(value)
    if isinstance(value, PassResult):
        plain = _plain_pass(value)
        if plain is not None:
            return "pass", json.dumps(plain).encode()
    elif value is None or isinstance(value, JSON_TYPES):
        return "json", json.dumps(value).encode()
    if method == "get_model":
        return "pickle", pickled(value)
    try:
        return "pickle", bytes(cloudpickle.dumps(value))
    except Exception as error:
        call = {
            "apply_worker": "the function of apply_all_workers",
            "apply_operator": "the function of apply_all_operators",
        }
        raise NotSerializableError(
            f"what {call.get(method, method)} returned, a {type(value).__name__}, cannot be sent to the driver: {error}. "
            "Return numbers, text, tensors, or other objects that pickle"
        ) from error


def _plain_pass(result: PassResult) -> dict[str, Any] | None:
    """A pass result as JSON data; None if the user's hook returned something that is not data."""
    if not isinstance(result.metrics, dict):
        return None
    metrics = {name: _number(value) for name, value in result.metrics.items()}
    for name, value in metrics.items():
        if isinstance(value, dict):
            continue
        if not isinstance(name, str) or type(value) not in JSON_TYPES:
            return None
    try:
        json.dumps(metrics)
    except TypeError:
        return None
    return {"metrics": metrics, "weights": result.weights}


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value


def _encode_state(state: dict[str, Any]) -> bytes:
    """A state as a torch file that needs no pickle beyond tensors and containers, except for the user's own extras."""
    buffer = io.BytesIO()
    extras = state.get("operator")
    packed = None if extras is None else torch.frombuffer(bytearray(cloudpickle.dumps(extras)), dtype=torch.uint8)
    torch.save({**state, "operator": packed}, buffer)
    return buffer.getvalue()
