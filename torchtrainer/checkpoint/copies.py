"""Copies of the state that a script asked for: how many a run keeps, and what stands in for the others."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtrainer.process.paths import private_directory
from torchtrainer.process.whole_file import replace_file

DIRECTORY = "calls"
"""Subdirectory of a run directory for results that are not JSON."""
_ENDING = ".copy.pt"
_DIGEST_BYTES = 16


class Copies:
    """Files with states that ``state_dict()`` and ``get_model()`` returned, named by their content: what is equal is there once.

    The newest ones stay, and those that the script still holds: it may have remembered its best model.

    Args:
        root: directory of the run.
        keep: how many stay, apart from those that are held.
    """

    def __init__(self, root: Path, keep: int) -> None:
        self._root = root
        self.keep = keep
        self._known: dict[
            str, list[Any]
        ] = {}  # digest -> references to the memory of what was handed out, oldest first

    @property
    def rule(self) -> str:
        """Which copies are kept, for messages."""
        return (
            f"no copy is kept: only the newest {self.keep} (CheckpointConfig.keep) and those that the script holds are"
        )

    def write(self, content: bytes) -> str:
        """Writes a state, unless it is there; returns its digest.

        Raises:
            OSError: it could not be written.
        """
        digest = hashlib.blake2b(content, digest_size=_DIGEST_BYTES).hexdigest()
        path = self.path(digest)
        if not path.exists():
            private_directory(path.parent)
            replace_file(path, content)
        return digest

    def path(self, digest: str) -> Path:
        """Path of the copy of a state, if it is kept."""
        return self._root / DIRECTORY / f"{digest}{_ENDING}"

    def handed_out(self, digest: str, state: Any) -> None:
        """The script has got a state; as long as it holds any memory of it, the copy stays."""
        before = self._known.pop(digest, [])
        self._known[digest] = [*before, *_memory_of(state)]

    def prune(self) -> None:
        """Removes copies that are neither new nor held."""
        for digest in list(self._known)[: -self.keep]:
            if all(reference.expired() for reference in self._known[digest]):
                del self._known[digest]
                self.path(digest).unlink(missing_ok=True)


def is_digest(text: str) -> bool:
    """Whether a state can have this name, which is made a path of."""
    return re.fullmatch(rf"[0-9a-f]{{{2 * _DIGEST_BYTES}}}", text) is not None


def models_of(model: Any) -> list[dict[str, Any]]:
    """State dicts of a model, or of a list of models."""
    return [one.state_dict() for one in (model if isinstance(model, list) else [model])]


def load_models(model: Any, states: list[dict[str, Any]]) -> None:
    """Loads what `models_of` gave."""
    for one, state in zip(model if isinstance(model, list) else [model], states, strict=True):
        one.load_state_dict(state)


def remove_copies(root: Path) -> None:
    """Removes all copies of a run that has come to its end; a disk that does not let go of them is left alone."""
    for path in (root / DIRECTORY).glob(f"*{_ENDING}"):
        with suppress(OSError):
            path.unlink()
    with suppress(OSError):
        (root / DIRECTORY).rmdir()  # which other results may be in


def _memory_of(state: Any) -> Iterator[Any]:
    """A weak reference to the memory of each tensor, which outlives the tensor in views of it."""
    import torch
    from torch.multiprocessing.reductions import StorageWeakRef

    if isinstance(state, torch.Tensor):
        with suppress(NotImplementedError, RuntimeError):  # of a kind that has no memory of its own
            yield StorageWeakRef(state.untyped_storage())  # type: ignore[no-untyped-call]  # torch has no types here
    elif isinstance(state, Mapping):
        for one in state.values():
            yield from _memory_of(one)
    elif isinstance(state, list | tuple):
        for one in state:
            yield from _memory_of(one)


class Remade:
    """Stands for a result that is not kept: it is made again when somebody looks at it, and then behaves as the result.

    Args:
        make: makes it.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        object.__setattr__(self, "_make", make)

    def __deepcopy__(self, memo: dict[int, Any]) -> Remade:
        return Remade(lambda: copy.deepcopy(_made(self)))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _made(self).__reduce_ex__(protocol)

    def __getattribute__(self, name: str) -> Any:
        if name in ("__deepcopy__", "__reduce_ex__"):
            return object.__getattribute__(self, name)
        return getattr(_made(self), name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(_made(self), name, value)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        """Calls the result, such as a model."""
        return _made(self)(*arguments, **keywords)

    def __getitem__(self, key: Any) -> Any:
        return _made(self)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        _made(self)[key] = value

    def __iter__(self) -> Iterator[Any]:
        return iter(_made(self))

    def __len__(self) -> int:
        return len(_made(self))

    def __contains__(self, key: object) -> bool:
        return key in _made(self)

    def __eq__(self, other: object) -> bool:
        return bool(_made(self) == other)

    __hash__ = None  # type: ignore[assignment]  # as of a dict

    def __repr__(self) -> str:
        return repr(_made(self))


def made(value: Any) -> Any:
    """The result itself, if this stands for one."""
    return _made(value) if type(value) is Remade else value


def _made(stand_in: Remade) -> Any:
    known = object.__getattribute__(stand_in, "__dict__")
    if "made" not in known:
        known["made"] = known["_make"]()
    return known["made"]
