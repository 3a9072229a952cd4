"""Makes the user's module and data module: which entries of ``config`` their constructors get."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torchtrainer.config import BATCH_SIZE
from torchtrainer.errors import InvalidArgumentTypeError

LENGTHS = ("max_epochs", "max_steps")
"""Entries of ``config`` that say how long the user means to train; ``self.trainer`` has them."""
_WHOLE = ("config", "hparams")


class Builder:
    """Makes objects from entries of ``config``, and knows which entries nobody took.

    A parameter that has the name of an entry gets the entry. Otherwise one that is called ``config`` or ``hparams`` gets all of
    ``config``. ``**kwargs`` gets the entries that are left, unless ``config`` or ``hparams`` has them all.

    Args:
        config: of this rank.
    """

    def __init__(self, config: Any) -> None:
        self._config = config
        self._entries: dict[str, Any] = (
            {name: value for name, value in config.items() if isinstance(name, str) and name != BATCH_SIZE}
            if isinstance(config, Mapping)
            else {}
        )
        self._used: set[str] = set(LENGTHS)
        self._takers: list[str] = []

    def create(self, kind: Any) -> Any:
        """Makes an object of a class.

        Raises:
            InvalidArgumentTypeError: its ``__init__`` needs arguments that ``config`` does not have.
        """
        signature = inspect.signature(kind)
        positional, named = self._arguments(signature)
        try:
            signature.bind(*positional, **named)
        except TypeError as error:
            raise InvalidArgumentTypeError(
                f"{kind.__name__} is made with the entries of config that its parameters name, and {error}: config has "
                f"{', '.join(map(repr, self._entries)) or 'no entries'}. Put it into config, or give it a default; a parameter "
                "called config or hparams gets all of config"
            ) from None
        taken = ", ".join(signature.parameters) or "no arguments"
        self._takers.append(f"{kind.__name__} takes {taken}")
        return kind(*positional, **named)

    def unused(self) -> str:
        """One line about entries that nobody took; empty if there are none."""
        left = [repr(name) for name in self._entries if name not in self._used]
        if not left:
            return ""
        verb = "is" if len(left) == 1 else "are"
        return f"{', '.join(left)} of config {verb} not used: {'; '.join(self._takers)}"

    def _arguments(self, signature: inspect.Signature) -> tuple[list[Any], dict[str, Any]]:
        """Positional and named arguments."""
        positional: list[Any] = []
        named: dict[str, Any] = {}
        whole = False
        for one in signature.parameters.values():
            if one.kind in (one.VAR_POSITIONAL, one.VAR_KEYWORD):
                continue
            if one.name in self._entries:
                value = self._entries[one.name]
                self._used.add(one.name)
            elif one.name in _WHOLE:
                value, whole = self._config, True
                self._used.update(self._entries)
            else:
                continue
            if one.kind is one.POSITIONAL_ONLY:
                positional.append(value)
            else:
                named[one.name] = value
        if not whole and any(one.kind is one.VAR_KEYWORD for one in signature.parameters.values()):
            named.update({name: value for name, value in self._entries.items() if name not in signature.parameters})
            self._used.update(self._entries)
        return positional, named
