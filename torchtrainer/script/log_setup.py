"""Carries a script's setup of `logging` and `warnings` to its workers."""

from __future__ import annotations

import contextlib
import io
import logging
import logging.handlers
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle

from torchtrainer.process.fresh import set_filters
from torchtrainer.script.modules import is_installed
from torchtrainer.script.pickler import dumps

_STREAMS = ("stdout", "stderr")
_OF_THIS_PROCESS = ("lock", "stream", "_closed")
"""Attributes of a handler that another process makes for itself."""


@dataclass(frozen=True, kw_only=True)
class LoggerSetup:
    """What a script has set on one logger.

    Attributes:
        level, propagate, disabled: as the logger has them.
        handlers, filters: pickled one by one, so that one which a worker cannot load leaves the others alone.
    """

    level: int
    propagate: bool
    disabled: bool
    handlers: tuple[bytes, ...] = ()
    filters: tuple[bytes, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LogSetup:
    """What a script has set up.

    Attributes:
        loggers: by name; the root logger's is empty.
        disabled_up_to: level up to which nothing is logged at all.
        captures_warnings: warnings are logged.
        warning_filters: in their order, those of packages that the script has loaded included.
        left_out: what cannot be carried, as sentences for the user.
    """

    loggers: dict[str, LoggerSetup]
    disabled_up_to: int
    captures_warnings: bool
    warning_filters: tuple[tuple[Any, ...], ...]
    left_out: list[str] = field(default_factory=list)

    @classmethod
    def taken_now(cls) -> LogSetup:
        """The present setup of this process."""
        left_out: list[str] = []
        manager = logging.root.manager
        names = {name: one for name, one in list(manager.loggerDict.items()) if isinstance(one, logging.Logger)}
        tops = {name.partition(".")[0] for name in names}
        installed = {
            top for top in tops if is_installed(top)
        }  # those packages add their handlers wherever they are loaded
        loggers = {"": _whole_setup("", logging.root, left_out)}
        for name, one in names.items():
            of_package = name.partition(".")[0] in installed
            loggers[name] = _setup(one) if of_package else _whole_setup(name, one, left_out)
        return cls(
            loggers={name: one for name, one in loggers.items() if one != _UNTOUCHED},
            disabled_up_to=manager.disable,
            captures_warnings=getattr(logging, "_warnings_showwarning", None) is not None,
            warning_filters=tuple(_filter_by_name(entry) for entry in warnings.filters),
            left_out=left_out,
        )

    def set_up(self) -> list[str]:
        """Sets this process up alike; to be called when the modules that the workers share with the script are loaded.

        Returns:
            What could not be set up, as sentences for the user.
        """
        failed = [_set_up(logging.getLogger(name or None), setup) for name, setup in self.loggers.items()]
        logging.disable(self.disabled_up_to)
        if self.captures_warnings:
            logging.captureWarnings(capture=True)
        _set_up_filters(self.warning_filters)
        return [text for text in failed if text]


_UNTOUCHED = LoggerSetup(level=logging.NOTSET, propagate=True, disabled=False)


def _setup(logger: logging.Logger) -> LoggerSetup:
    return LoggerSetup(level=logger.level, propagate=logger.propagate, disabled=logger.disabled)


def _whole_setup(name: str, logger: logging.Logger, left_out: list[str]) -> LoggerSetup:
    return replace(
        _setup(logger),
        handlers=tuple(_pickled(name, _handler_state, logger.handlers, left_out)),
        filters=tuple(_pickled(name, _as_it_is, logger.filters, left_out)),
    )


def _pickled(name: str, state_of: Any, parts: Sequence[Any], left_out: list[str]) -> list[bytes]:
    """The handlers or filters of a logger, each pickled by itself; what does not pickle is told of."""
    found = []
    for part in parts:
        try:
            state = state_of(part)
            if state is not None:
                found.append(dumps(state))
        except Exception as error:
            reason = " ".join(str(error).split())
            left_out.append(
                f"{type(part).__name__} of the logger {name or 'root'!r} does not reach the workers ({reason}); add it there in "
                "initialization_hook if you want it"
            )
    return found


def _as_it_is(part: Any) -> Any:
    return part


def _handler_state(handler: logging.Handler) -> tuple[type[logging.Handler], dict[str, Any], str] | None:
    """What another process makes the handler of: its class, attributes and stream; None: there is nothing to make.

    Raises:
        ValueError: it cannot be made there.
    """
    if isinstance(handler, logging.NullHandler):
        return None
    state = {name: value for name, value in vars(handler).items() if name not in _OF_THIS_PROCESS}
    if isinstance(handler, logging.handlers.BaseRotatingHandler):
        raise ValueError("several processes cannot rotate one file")
    if isinstance(handler, logging.FileHandler):
        return type(handler), {**state, "mode": "a"}, ""
    stream = getattr(handler, "stream", None)
    if stream is None:
        return type(handler), state, ""
    if isinstance(stream, io.StringIO | io.BytesIO):
        return None  # in the memory of the script's process, where it is read
    name = next((one for one in _STREAMS if _is_stream(stream, one)), "")
    if not name:
        raise ValueError(f"it writes to {getattr(stream, 'name', type(stream).__name__)}")
    return type(handler), state, name


def _is_stream(stream: Any, name: str) -> bool:
    own = (getattr(sys, name), getattr(sys, f"__{name}__"))
    return stream in own or getattr(stream, "name", None) in (name, f"<{name}>")


def _set_up(logger: logging.Logger, setup: LoggerSetup) -> str:
    """Sets a logger up; returns what could not be."""
    logger.setLevel(setup.level)
    logger.propagate, logger.disabled = setup.propagate, setup.disabled
    if logger.handlers or logger.filters:
        return ""  # a module of the script's that has been loaded here has set it up
    try:
        for blob in setup.handlers:
            logger.addHandler(_made_handler(*cloudpickle.loads(blob)))
        for blob in setup.filters:
            logger.addFilter(cloudpickle.loads(blob))
    except Exception as error:  # of a class that only the script's process has: no reason not to train
        return f"logger {logger.name!r} is not set up as in the script: {error}"
    return ""


def _made_handler(kind: type[logging.Handler], state: dict[str, Any], stream: str) -> logging.Handler:
    handler = kind.__new__(kind)
    logging.Handler.__init__(handler)
    vars(handler).update(state)
    if stream:
        handler.stream = getattr(sys, stream)  # type: ignore[attr-defined]
    elif isinstance(handler, logging.FileHandler):
        vars(handler).update(stream=None, _closed=False)  # it opens its file, to append, with the first record
    return handler


def _filter_by_name(entry: tuple[Any, ...]) -> tuple[Any, ...]:
    """A warning filter with the names of its category in place of the class: a worker need not import that for it."""
    action, message, category, module, line = entry
    return action, message, (category.__module__, category.__qualname__), module, line


def _set_up_filters(wanted: Sequence[tuple[Any, ...]]) -> None:
    """Puts the script's filters after those that only this process has; a category that is not loaded here matches nothing."""
    found = []
    for action, message, (module, name), text, line in wanted:
        with contextlib.suppress(KeyError, AttributeError):
            category: Any = sys.modules[module]
            for part in name.split("."):
                category = getattr(category, part)
            found.append((action, message, category, text, line))
    set_filters([*(entry for entry in warnings.filters if entry not in found and _is_specific(entry)), *found])


def _is_specific(entry: tuple[Any, ...]) -> bool:
    """Whether a filter is of a package: those of the interpreter name nothing but a built-in category."""
    _, message, category, module, _ = entry
    return bool(message or module or category.__module__ != "builtins")
