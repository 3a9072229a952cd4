"""The placeholder for a trainer in the workers, where user code may refer to the one that its object keeps."""

from __future__ import annotations

from typing import Any, NoReturn

from torchtrainer.errors import OperatorUseError


class AbsentTrainer:
    """A trainer that is in another process.

    An object whose methods are creators may keep its trainer in an attribute, and travels to the workers with it. They get this,
    which can be held and compared, but says where the trainer is when it is used.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what Python itself looks for, to copy it for instance
            raise AttributeError(name)
        _refuse(name)

    def __setattr__(self, name: str, value: Any) -> None:
        _refuse(name)


def _refuse(name: str) -> NoReturn:
    raise OperatorUseError(
        f"trainer.{name} was used in a worker process: the trainer exists only in the script's own process, and this "
        "is a placeholder. "
        "Creators, hooks and functions for apply_all_workers get what they need from their arguments, config and the operator"
    )
