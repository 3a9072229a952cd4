"""What ``load`` and ``load_state_dict`` take: a trainer's state, or the weights of a model that another tool saved."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchtrainer.errors import InvalidArgumentError

WEIGHTS = "weights"
"""Key of a state that holds only the weights of models: a list, by model."""
KEYS_OF_WEIGHTS = ("state_dict", "model_state_dict", "model_state", "model", "net", "network", "module")
"""Where checkpoints of other tools keep a model's weights, in this order; ``state_dict`` is Lightning's."""
WRAPPERS = ("module.", "_orig_mod.")
"""What ``DistributedDataParallel`` and ``torch.compile`` put in front of names."""
EXTRA_STATE = "_extra_state"
SHOWN_KEYS = 5
_REFUSED_CLASS = re.compile(r"GLOBAL (\S+) was not an allowed")


def read_file(path: str | os.PathLike[str]) -> Any:
    """What is in a file, for `as_state`. Nothing in it is run: it is read with ``weights_only=True``.

    Args:
        path: of a file that ``torch.save`` wrote; ``~`` is the home directory.

    Raises:
        FileNotFoundError: there is none.
        InvalidArgumentError: it is a directory, or holds something else than data.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        inside = next((f"; it has {one.name}" for one in sorted(file.glob("*.pt"))), "")
        raise InvalidArgumentError(f"load takes a file, and {file} is a directory{inside}")
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InvalidArgumentError(f"{file} cannot be loaded: {_reason(file, error)}") from None


def _reason(file: Path, error: Exception) -> str:
    """What is wrong with a file, without the advice of torch to unpickle it."""
    if (found := _REFUSED_CLASS.search(str(error))) is not None:
        return (
            f"it holds an object of the class {found[1]}, and objects are not unpickled, since a pickle can run any code. Save "
            "model.state_dict() instead of the model (and let the operator's state_dict() return tensors, numbers, text and "
            "containers of them), and load that file. What you read from a file of your own goes to load_state_dict"
        )
    if file.suffix == ".safetensors":
        return (
            "it was not written by torch.save: pass what safetensors.torch.load_file(path) returns to load_state_dict"
        )
    return f"it is not a file of tensors written by torch.save, or it is damaged ({_first_words(error)})"


def _first_words(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:120]


def as_state(given: Any, what: str) -> dict[str, Any]:
    """A state of a trainer as it is, and weights of one model, or of several in a list, under `WEIGHTS`.

    Args:
        given: by the user, or read from a file.
        what: where it is from, for errors: "the file x.pt holds".

    Raises:
        InvalidArgumentError: it is neither.
    """
    if isinstance(given, Mapping):
        if "models" in given and "optimizers" in given:
            return dict(given)
        if isinstance(given.get("models"), list | tuple) and all(map(_are_weights, given["models"])):
            return {WEIGHTS: list(given["models"])}
        if isinstance(given.get("shared"), Mapping) and "ranks" in given:  # of a checkpoint
            return as_state(given["shared"], what)
        found = _weights_in(given)
        if found is not None:
            return {WEIGHTS: [found]}
    shown = (
        f"a dict with {some(map(str, given))}"
        if isinstance(given, Mapping)
        else f"{type(given).__module__}.{type(given).__qualname__}"
    )
    raise InvalidArgumentError(
        f"{what} {shown}, which is not a state: load and load_state_dict take what state_dict() of a trainer returned, "
        "the "
        "state_dict() of a model, or a dict that has one under "
        f"{', '.join(KEYS_OF_WEIGHTS)}. For other forms pass the weights themselves: load_state_dict(checkpoint[...])"
    )


def _weights_in(given: Mapping[Any, Any]) -> Mapping[str, Any] | None:
    """The weights of one model: the dict itself, or what it has under a key of `KEYS_OF_WEIGHTS`."""
    if _are_weights(given):
        return given
    return next((given[key] for key in KEYS_OF_WEIGHTS if _are_weights(given.get(key))), None)


def _are_weights(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) > 0
        and all(isinstance(key, str) for key in value)
        and all(isinstance(one, torch.Tensor) or key.endswith(EXTRA_STATE) for key, one in value.items())
    )


def fit(here: Collection[str], weights: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[str]]:
    """The weights under the names that a model has, and the names of those that belong to something else.

    Names may have the prefixes of `WRAPPERS` anywhere, and the name of an attribute in front, as those of a Lightning module
    that holds the model. They are taken away only where the names fit then.

    Args:
        here: names in the state of the model.
        weights: of the same model, under the names of another tool.
    """
    names = set(here)
    if weights.keys() == names:
        return weights, []
    bare = {_without_wrappers(key): value for key, value in weights.items()}
    if len(bare) < len(weights):  # two names became one
        return weights, []
    if bare.keys() == names:
        return bare, []
    for prefix in dict.fromkeys(key.split(".")[0] + "." for key in bare):
        part = {key.removeprefix(prefix): value for key, value in bare.items() if key.startswith(prefix)}
        if part.keys() == names:
            return part, [key for key in bare if not key.startswith(prefix)]
    return weights, []


def _without_wrappers(key: str) -> str:
    parts = key.split(".")
    kept = [part for part in parts[:-1] if f"{part}." not in WRAPPERS]
    return ".".join([*kept, parts[-1]])


def some(names: Iterable[str]) -> str:
    """The first of several names, and how many more there are."""
    found = list(names)
    more = f" and {len(found) - SHOWN_KEYS} more" if len(found) > SHOWN_KEYS else ""
    return f"{', '.join(found[:SHOWN_KEYS])}{more}"
