"""Makes a worker like the script that made the trainer: its command line, main module, settings and code.

Read settings and functions at the time that a trainer is made: what the script changes later reaches the workers of its next
trainer. The current directory, the environment and the module search path travel beside this, with the process that is started.
"""

from __future__ import annotations

import builtins
import pickle
import sys
import types
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from torchtrainer.process.fresh import MAIN_ALIAS
from torchtrainer.script.log_setup import LogSetup
from torchtrainer.script.modules import MAIN, FileModule, MisplacedModules, misplaced, module_dict, own_modules
from torchtrainer.script.pickler import loads_in_place
from torchtrainer.script.settings import left_out_settings, read_settings, write_settings

SCRIPT_FILE = "TORCHTRAINER_SCRIPT"
"""Environment variable of workers, and of what they start: where the script's state and code are."""
SPAWNED_MAIN = "torchtrainer.script.spawned_main"
"""What multiprocessing runs as the main module of a process that it spawns from a worker."""
MOST_NAMED = 8
"""Modules that are named in a hint."""
_OF_MAIN = ("__file__", "__package__", "__doc__")


@dataclass(frozen=True, kw_only=True)
class ScriptState:
    """The state that a worker takes over besides code.

    Attributes:
        argv: the command line.
        main: attributes of the main module that say where it comes from.
        modules: where modules are that the search path does not lead to.
        settings: of Python, torch and other packages; see `settings.SETTINGS`.
        logs: how `logging` and `warnings` are set up.
        imported: modules of the script's own that it has loaded.
    """

    argv: list[str]
    main: dict[str, Any]
    modules: dict[str, FileModule]
    settings: dict[str, Any]
    logs: LogSetup
    imported: tuple[str, ...]

    @classmethod
    def taken_now(cls) -> ScriptState:
        """The present state of this process."""
        main, own = module_dict(sys.modules[MAIN]), own_modules()
        return cls(
            argv=list(sys.argv),
            main={name: main[name] for name in _OF_MAIN if isinstance(main.get(name), str)},
            modules=misplaced(own),
            settings=read_settings(),
            logs=LogSetup.taken_now(),
            imported=tuple(own),
        )

    def dumps(self) -> bytes:
        """This state as `take_over` reads it, in front of the script's code."""
        return pickle.dumps(self)

    @property
    def left_out(self) -> list[str]:
        """What is set here and cannot be carried, as sentences for the user."""
        return [*left_out_settings(), *self.logs.left_out]

    def hint(self) -> str:
        """What may be missing in this process where user code fails while it is built; empty: nothing that is known of."""
        missing = [name for name in self.imported if name not in sys.modules]
        if not missing:
            return ""
        more = f" and {len(missing) - MOST_NAMED} more" if len(missing) > MOST_NAMED else ""
        return (
            f"The script has imported modules of its own that this worker has not: {', '.join(missing[:MOST_NAMED])}{more}. "
            "If one of them does something when it is imported, such as registering a class, import it in "
            "initialization_hook=..., which runs first in every worker."
        )


def take_over(path: str) -> tuple[ScriptState, Any, list[str]]:
    """Makes this process like the script, and loads the script's code.

    Args:
        path: of a file with `ScriptState.dumps` and, after it, `pickler.dumps_in_place`.

    Returns:
        The script's state, what was pickled as its code, and what of the script could not be taken over, as sentences.
    """
    with Path(path).open("rb") as file:
        state: ScriptState = pickle.load(file)
        code = file.read()
    sys.argv[:] = state.argv
    main = types.ModuleType(MAIN)
    module_dict(main).update(state.main, __builtins__=builtins, __spec__=ModuleSpec(SPAWNED_MAIN, None))
    sys.modules[MAIN] = sys.modules[MAIN_ALIAS] = main
    sys.meta_path.insert(0, MisplacedModules(state.modules))
    write_settings(state.settings)
    value = loads_in_place(code)
    return state, value, state.logs.set_up()
