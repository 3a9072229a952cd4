"""Results of calls as they arrive from workers, turned into what the trainer returns.

Replies come from processes of the user's own, over a channel that only the user can reach. Data is read as data; only what a
user's call returns as an object (a model, the result of a function, an exception) is unpickled.
"""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

from torchtrainer.control.messages import Reply
from torchtrainer.train.metrics import PassResult


def decode_reply(reply: Reply) -> Any:
    """Reads the result of a call on one rank."""
    if reply.form == "json":
        return json.loads(reply.blob)
    if reply.form == "pass":
        return PassResult(**json.loads(reply.blob))
    if reply.form == "state":
        return _decode_state(reply.blob)
    if reply.form == "pickle":
        return pickle.loads(reply.blob)
    raise ValueError(f"rank {reply.rank} replied in the unknown form {reply.form!r}")


def _decode_state(blob: bytes) -> dict[str, Any]:
    import torch  # the driver has torch only when the user's script does; a state is made of its tensors

    state: dict[str, Any] = torch.load(io.BytesIO(blob), weights_only=True)
    packed = state["operator"]
    state["operator"] = None if packed is None else pickle.loads(packed.numpy().tobytes())
    return state
