"""The launcher as a program: from the command line to the exit code.

`main` checks the command line, without torch, and replaces its own process by a fresh interpreter (`entry`), which goes on
in `go_on`: it imports torch, forks the spawner, and runs torch's elastic agent until the workers are done. `run_here` is the
same inside a program that called us; its spawner is an interpreter of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from torchtrainer.errors import EngineError
from torchtrainer.launcher.failure import EXIT_SIGNALLED, exit_code_of
from torchtrainer.launcher.fork_safety import Program, program_of
from torchtrainer.launcher.options import Form, checked, parse
from torchtrainer.launcher.script import become_program
from torchtrainer.launcher.summary import Summary, process_start_s, say
from torchtrainer.process.child import flush_output, leave
from torchtrainer.process.frames import FrameSocket
from torchtrainer.process.fresh import Fresh
from torchtrainer.process.guard import restore_signals, settle_signals, stop_signals_blocked, thread_count
from torchtrainer.process.paths import LaunchPaths
from torchtrainer.process.signals import EXIT_PREEMPTED
from torchtrainer.process.spawner import import_first, import_quickly, serve
from torchtrainer.process.starters import ForkStarter, SpawnerStarter, Starter
from torchtrainer.process.streams import open_standard_descriptors

if TYPE_CHECKING:
    from torchtrainer.elastic.launch import Launch, Outcome

EXIT_FAILED = 1
ENTRY = str(Path(__file__).with_name("entry.py"))
"""The file that our interpreters run."""
SPAWNER = "spawner"
"""Stands in place of a form where `entry` is to be a spawner."""
ASSUMED_THREADS = 1
"""OpenMP threads per worker if nobody chose a number and there are several workers, as torchrun has it."""


def main(argv: Sequence[str], form: Form) -> int:
    """Runs a launcher; returns only where the process cannot be replaced.

    Args:
        argv: arguments after the command's name.
        form: how it was called.

    Returns:
        The exit code.

    Raises:
        SystemExit: with 2 for wrong usage.
    """
    args = parse(argv, form)
    complaint = _unreadable(args)
    if complaint is not None:
        say(form.value, complaint)
        return EXIT_FAILED
    replaceable = os.name == "posix" and threading.active_count() == 1 and sys.gettrace() is None
    if replaceable:
        flush_output()
        open_standard_descriptors()
        os.execv(sys.executable, [sys.executable, "-u", ENTRY, form.name, *argv])
    return _launch_elsewhere(args, form)


def go_on(argv: Sequence[str], search_path: Sequence[str], modules: frozenset[str]) -> NoReturn:
    """Goes on in the fresh interpreter: as a launcher, or as the spawner of one.

    Args:
        argv: form and arguments; for a spawner its socket, private directory and modules.
        search_path: ``sys.path`` of workers without the program's directory.
        modules: names that a fresh interpreter has loaded.
    """
    fresh = Fresh.taken_now(search_path, modules)
    if argv[0] == SPAWNER:
        _be_spawner(*argv[1:], fresh=fresh)
    form = Form[argv[0]]
    args = parse(argv[1:], form)
    program = program_of(args, os.environ, fresh.path)
    try:
        threads_assumed = _import_torch(args, program)
        paths = LaunchPaths.create()
    except OSError as error:
        say(form.value, str(error))
        sys.exit(EXIT_FAILED)
    except ImportError as error:
        say(form.value, f"torch cannot be imported by {sys.executable}: {error}")
        sys.exit(EXIT_FAILED)
    # Outside of any block that cleans up: forked workers leave this program through the same frames.
    link = _fork_spawner(fresh, paths)
    if thread_count() > 1:  # what a fork stops for its time, as OpenBLAS does with its threads, is not counted
        program = dataclasses.replace(program, exec_reason="threads were started when torch was imported")
    leave(_launch(args, form, program, link, paths, threads_assumed=threads_assumed))


def run_here(args: argparse.Namespace) -> dict[int, object]:
    """Launches from within a program that has a life of its own, and returns what torch's launcher would.

    Args:
        args: as `options.parse_unchecked` returns them, or torch's own.

    Returns:
        None for each global rank of this machine.

    Raises:
        ChildFailedError: workers failed.
        SignalException: a signal ended it, and its workers are gone.
        SystemExit: with 75, if workers stopped for a preemption with their state saved.
        ValueError: a value is wrong, or options exclude each other.
    """
    args = checked(args)
    program, starter, paths, threads_assumed = _prepared_elsewhere(args)
    try:
        from torchtrainer.elastic.launch import Launch

        launch = Launch(args, program, paths, threads_assumed=threads_assumed)
        summary = Summary(Form.RUN.value, process_start_s(), launch.device)
        outcome = launch.run(starter, summary)
    finally:
        starter.close()
        paths.remove()
    if outcome.preempted:
        sys.exit(EXIT_PREEMPTED)
    if outcome.failure is not None:
        raise outcome.failure
    return outcome.return_values


def _launch_elsewhere(args: argparse.Namespace, form: Form) -> int:
    """The same where this process cannot be replaced: the spawner is an interpreter of its own, or there is none."""
    program, starter, paths, threads_assumed = _prepared_elsewhere(args)
    return _launch(args, form, program, starter, paths, threads_assumed=threads_assumed)


def _launch(
    args: argparse.Namespace,
    form: Form,
    program: Program,
    starter: Starter,
    paths: LaunchPaths,
    *,
    threads_assumed: bool,
) -> int:
    began_s = process_start_s()
    launch: Launch | None = None
    try:
        if program.exec_reason is None:
            starter.preload(program.preload)
        import torchtrainer.elastic.launch as elastic

        launch = elastic.Launch(args, program, paths, threads_assumed=threads_assumed)
        summary = Summary(form.value, began_s, launch.device)
        outcome = launch.run(starter, summary)
        return _exit_code(outcome, summary, keep=args.keep_exit_code)
    except KeyboardInterrupt:
        say(form.value, "interrupted")
        return EXIT_SIGNALLED + signal.SIGINT if args.keep_exit_code else EXIT_FAILED
    except Exception as error:
        from torchtrainer.elastic.launch import record_failure

        record_failure(error, ())
        say(form.value, _explained(error, launch, args))
        return EXIT_FAILED
    finally:
        starter.close()
        paths.remove()


def _exit_code(outcome: Outcome, summary: Summary, *, keep: bool) -> int:
    if outcome.preempted:
        summary.ended("stopped for a preemption, state saved: start it again to continue;")
        return EXIT_PREEMPTED
    if outcome.failure is None:
        summary.ended("done")
        return 0
    from torchtrainer.elastic.launch import record_failure

    record_failure(outcome.failure, outcome.ends)
    received = getattr(outcome.failure, "sigval", None)
    if received is not None:
        summary.ended(f"stopped by {signal.Signals(received).name}")
        return EXIT_SIGNALLED + received if keep or not outcome.connected else EXIT_FAILED
    summary.ended("failed")
    return exit_code_of(outcome.ends[0]) if keep and outcome.ends else EXIT_FAILED


def _explained(error: Exception, launch: Launch | None, args: argparse.Namespace) -> str:
    """One line for what a user can mend; the traceback too for what nobody expected."""
    from torchtrainer.elastic.diagnosis import explain

    text = explain(error, launch.handler if launch is not None else None, args)
    if text is not None:
        return text
    if isinstance(error, ValueError | AssertionError | OSError | EngineError | RuntimeError):
        return str(error) or type(error).__name__
    return f"{type(error).__name__}: {error}\n{traceback.format_exc()}"


def _unreadable(args: argparse.Namespace) -> str | None:
    """Says what is wrong with the script's file, before anything is started."""
    if args.module or (args.no_python and not args.run_path):
        return None
    path = args.training_script
    if not os.path.exists(path):
        return f"script {path!r} does not exist (looked in {os.getcwd()})"
    if not os.access(path, os.R_OK):
        return f"script {path!r} cannot be read: check its permissions"
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "__main__.py")):
        return f"{path!r} is a directory without __main__.py: give the script in it"
    return None


def _import_torch(args: argparse.Namespace, program: Program) -> bool:
    """Imports torch for all workers; returns whether it was told one thread, because the user had not said how many.

    OpenMP reads its number of threads once, when it is loaded. torchrun sets it to 1 if there are several workers, and
    says so, when torch is there already: the variable is only for the import.
    """
    if program.exec_reason is not None:
        return False
    assumed = _threads_unknown(args)
    if assumed:
        os.environ["OMP_NUM_THREADS"] = str(ASSUMED_THREADS)
    try:
        import_quickly(program.preload[:2])
    finally:
        if assumed:
            del os.environ["OMP_NUM_THREADS"]
    return assumed


def _threads_unknown(args: argparse.Namespace) -> bool:
    return "OMP_NUM_THREADS" not in os.environ and args.nproc_per_node.strip() != "1"


def _fork_spawner(fresh: Fresh, paths: LaunchPaths) -> SpawnerStarter:
    ours, theirs = socket.socketpair()
    with stop_signals_blocked():
        pid = os.fork()
        if pid == 0:
            ours.close()
            os.setsid()
            _serve(FrameSocket(theirs), fresh, paths)
    theirs.close()
    return SpawnerStarter(FrameSocket(ours), pid)


def _serve(link: FrameSocket, fresh: Fresh, paths: LaunchPaths) -> NoReturn:
    me = os.getpid()
    before = settle_signals()
    spec = serve(link)
    if spec is not None:
        restore_signals(before)
        become_program(spec, me, fresh)
    paths.remove()  # the launcher may have been killed
    os._exit(0)


def _prepared_elsewhere(args: argparse.Namespace) -> tuple[Program, Starter, LaunchPaths, bool]:
    """The program, what starts it, its private files, and whether a number of threads was assumed, in somebody's process."""
    program = program_of(args, os.environ, sys.path)
    paths = LaunchPaths.create()
    modules = ",".join(program.preload) if program.exec_reason is None else ""
    environ = dict(os.environ)
    threads_assumed = _threads_unknown(args)
    if threads_assumed:
        environ["OMP_NUM_THREADS"] = str(ASSUMED_THREADS)

    def command(fd: int) -> list[str]:
        return [sys.executable, "-u", ENTRY, SPAWNER, str(fd), str(paths.root), modules]

    return program, ForkStarter(command, environ, stdin=None), paths, threads_assumed


def _be_spawner(fd: str, launch_dir: str, modules: str, *, fresh: Fresh) -> NoReturn:
    os.setsid()
    link = FrameSocket(socket.socket(fileno=int(fd)))
    if not import_first(link, [name for name in modules.split(",") if name]):
        os._exit(EXIT_FAILED)
    _serve(link, fresh, LaunchPaths(Path(launch_dir)))
