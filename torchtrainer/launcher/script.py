"""What a process forked by a launcher's spawner does: it becomes the user's program, as if that had been exec'd.

Runs in the only thread of the new process. A plain script or module goes on in this interpreter, which has torch loaded
already; anything else replaces it.
"""

from __future__ import annotations

import builtins
import contextlib
import faulthandler
import gc
import importlib.machinery
import io
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import types
from typing import Any, NoReturn, TypedDict

from torchtrainer.process.child import keep_sockets_in
from torchtrainer.process.error_file import write_error_file
from torchtrainer.process.fresh import MAIN_ALIAS, Fresh
from torchtrainer.process.guard import die_with_parent, unblock_signals
from torchtrainer.process.signals import STACK_DUMP_SIGNAL
from torchtrainer.process.streams import redirect

COMMAND_NOT_FOUND = 127
COMMAND_NOT_EXECUTABLE = 126
"""Exit codes of a process whose program could not be executed, as shells use them."""
STACKS_FD = 200
"""Lowest descriptor of the file for stacks: a program finds the low numbers free, as after an exec."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


class ProgramSpec(TypedDict):
    """The specification of a launcher's worker; JSON.

    Attributes:
        key: name by which the starter reports the process.
        kind: ``script``, ``module`` or ``run_path``, to go on in the forked interpreter; ``command``: to execute.
        command: what an exec'd worker would be: program and arguments.
        path: source file of the script or module; unused for commands.
        arguments: of the user's program.
        environ: complete environment.
        stdout, stderr: files to write to; empty: those of the launcher.
        default_signals: signals that the launcher handles, and whose default action its workers start with.
        error_path, stacks_path, multiprocessing_dir: private files, not there for commands.
    """

    key: str
    kind: str
    command: list[str]
    path: str
    arguments: list[str]
    environ: dict[str, str]
    stdout: str
    stderr: str
    default_signals: list[int]
    error_path: str
    stacks_path: str
    multiprocessing_dir: str


def become_program(spec: ProgramSpec, parent: int, fresh: Fresh) -> NoReturn:
    """Turns this process into the program; leaves as the program does.

    Args:
        spec: what to become.
        parent: pid of the spawner.
        fresh: what an interpreter has when it starts.
    """
    fresh.close_descriptors()
    os.setsid()  # a process group of its own, which keeps the terminal's Ctrl-C away
    die_with_parent(parent)
    _reset_signals(spec["default_signals"])
    unblock_signals()
    for fd, path in ((1, spec["stdout"]), (2, spec["stderr"])):
        if path:
            redirect(fd, path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    fresh.block_signals()
    directory = _own_directory(spec)
    if spec["kind"] == "command" or (directory is not None and fresh.shadowed_in(directory)):
        _execute(spec["command"], spec["environ"])
    os.environ.clear()
    os.environ.update(spec["environ"])
    _renew_randomness()
    tempfile.tempdir = None  # the program may choose another one
    keep_sockets_in(spec["multiprocessing_dir"])
    _answer_stack_dumps(spec["stacks_path"])
    sys.orig_argv[:] = spec["command"]
    sys.path[:] = fresh.path
    sys.path_importer_cache.clear()
    fresh.restore(_apply_late_changes)
    gc.enable()
    sys.exit(_run(spec))


def _run(spec: ProgramSpec) -> int:
    """Runs the program to its end and returns the exit code that the interpreter would give."""
    run = {"script": _run_script, "module": _run_module, "run_path": _run_path}[spec["kind"]]
    error: BaseException | None = None
    try:
        run(spec)
    except SystemExit:
        raise
    except BaseException as raised:  # shown outside of this block: the program's hook is not to be in the middle of it
        error = raised
    if error is None:
        return 0
    ours = {__file__}
    shown = _without_frames(error.__traceback__, ours)
    _record(spec["error_path"], error, _without_frames(shown, {runpy.__file__, "<frozen runpy>"}))
    _show(error, shown, ours)
    if isinstance(error, KeyboardInterrupt):
        sys.excepthook = lambda *_: None
        raise error  # the interpreter then ends by the signal itself, so that whoever waits can tell
    return 1


def _show(error: BaseException, trace: types.TracebackType | None, ours: set[str]) -> None:
    """Prints an uncaught exception as the interpreter does: by the program's hook, or in spite of it."""
    sys.last_type, sys.last_value, sys.last_traceback = type(error), error.with_traceback(trace), trace
    second: BaseException | None = None
    try:
        sys.excepthook(type(error), error, trace)
    except SystemExit:
        raise
    except BaseException as raised:
        second = raised
    if second is not None:
        second.__traceback__ = _without_frames(second.__traceback__, ours)
        print("Error in sys.excepthook:", file=sys.stderr)
        sys.__excepthook__(type(second), second, second.__traceback__)
        print("\nOriginal exception was:", file=sys.stderr)
        sys.__excepthook__(type(error), error, trace)


def _run_script(spec: ProgramSpec) -> None:
    name = spec["command"][2]
    _search_own_directory(spec)
    sys.argv[:] = [name, *spec["arguments"]]
    path = os.path.join(os.getcwd(), name)  # not normalised: as the interpreter has it
    main = _fresh_main(importlib.machinery.SourceFileLoader("__main__", path), path)
    with io.open_code(path) as file:
        code = compile(file.read(), path, "exec", dont_inherit=True)
    exec(code, main.__dict__)  # noqa: S102  # this is what running a script means


def _run_module(spec: ProgramSpec) -> None:
    name = spec["command"][3]
    _search_own_directory(spec)
    sys.argv[:] = ["-m", *spec["arguments"]]
    _fresh_main(None, None)
    runpy._run_module_as_main(name)  # type: ignore[attr-defined]  # what `python -m` calls


def _run_path(spec: ProgramSpec) -> None:
    from torchtrainer.elastic.run_path import run_recorded

    run_recorded(spec["path"], spec["arguments"])


def _own_directory(spec: ProgramSpec) -> str | None:
    """What the interpreter puts in front of the module search path for this program."""
    if getattr(sys.flags, "safe_path", False):  # Python 3.11 and newer have it
        return None
    if spec["kind"] == "script":
        return os.path.dirname(os.path.realpath(spec["command"][2]))
    return os.getcwd() if spec["kind"] == "module" else None


def _search_own_directory(spec: ProgramSpec) -> None:
    directory = _own_directory(spec)
    if directory is not None:
        sys.path.insert(0, directory)


def _fresh_main(loader: Any, path: str | None) -> types.ModuleType:
    main = types.ModuleType("__main__")
    main.__loader__ = loader
    main.__dict__.update(__builtins__=builtins, __annotations__={})
    if path is not None:
        main.__dict__.update(__file__=path, __cached__=None)
    # The second name is multiprocessing's own: objects that a spawned child sends have classes of a module by that name.
    sys.modules["__main__"] = sys.modules["__mp_main__"] = main
    if MAIN_ALIAS in sys.modules:
        sys.modules[MAIN_ALIAS] = main
    return main


def _without_frames(trace: types.TracebackType | None, files: set[str]) -> types.TracebackType | None:
    while trace is not None and trace.tb_frame.f_code.co_filename in files:
        trace = trace.tb_next
    return trace


def _record(path: str, error: BaseException, trace: types.TracebackType | None) -> None:
    import traceback

    text = "".join(traceback.format_exception(type(error), error, trace))
    with contextlib.suppress(OSError):  # the launcher is gone, and with it whoever would read this
        write_error_file(path, type_name=type(error).__name__, text=str(error), traceback=text, when_ns=time.time_ns())


def _execute(command: list[str], environ: dict[str, str]) -> NoReturn:
    for name in ("SIGPIPE", "SIGXFSZ"):  # ignored by our interpreter, not by a program that it starts
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    try:
        os.execvpe(command[0], command, environ)
    except OSError as error:
        os.write(2, f"torchtrainer run: {command[0]} cannot be executed: {error.strerror}\n".encode())
        os._exit(COMMAND_NOT_FOUND if isinstance(error, FileNotFoundError) else COMMAND_NOT_EXECUTABLE)


def _reset_signals(defaults: list[int]) -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for signum in defaults:
        signal.signal(signum, signal.SIG_DFL)
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # an interpreter leaves it ignored, too
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _renew_randomness() -> None:
    """Gives this process the random state of its own that a new interpreter draws; `random` sees to itself after a fork."""
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.default_generator.seed()  # torch draws the seed of its CPU generator when it is imported
    process = sys.modules.get("multiprocessing.process")
    if process is not None:
        process.current_process().authkey = os.urandom(32)


def _answer_stack_dumps(path: str) -> None:
    if STACK_DUMP_SIGNAL is None or not hasattr(faulthandler, "register"):
        return
    import fcntl

    unready = path + ".unready"
    low = os.open(unready, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    # faulthandler writes to the descriptor from a signal handler: it stays open for the life of the process.
    high = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, STACKS_FD)
    os.close(low)
    faulthandler.register(STACK_DUMP_SIGNAL, file=high, all_threads=True)
    os.rename(unready, path)  # whoever finds the file may signal: before, the signal would have ended this process


def _set_threads(threads: int) -> None:
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _apply_late_changes(changed: dict[str, str | None]) -> None:
    """Does what importing torch would have done with variables that the program set before."""
    for name in THREAD_VARIABLES:
        value = changed.pop(name, None)
        if value is not None and value.isdecimal() and int(value) > 0:
            _set_threads(int(value))
    if changed and threading.current_thread() is threading.main_thread():
        names = ", ".join(sorted(changed))
        print(
            f"torchtrainer run: {names} changed before torch was imported, but torch was already loaded and did not "
            "see it: set it outside the program, or use --start-fresh",
            file=sys.stderr,
        )
