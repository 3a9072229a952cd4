"""How launches end: one table, which the tests run row by row and the manual shows."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
from launched import READY, SCRIPTS, launch, wait_for_ranks
from machines import faults_table
from programs import DEADLINE_S, Program

import torchtrainer

DOCS = Path(torchtrainer.__file__).parents[1] / "docs"
PAGE = DOCS / "launcher_endings.md"
SECTION = "How launches end"
"""Heading in the manual's page on the launcher; if there is a table below it, it is this one."""
HEADER = ("what happens", "what you see", "exit code", "with --keep-exit-code")
MEMORY_LIMIT_BYTES = 1 << 30
"""For a launcher and its two ranks: three times what they need."""
FOREVER_S = 1000
"""A time that no test waits for."""
TWO_MACHINES = "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint localhost:{port}"
STOP_FOREVER = f"--shutdown-timeout {FOREVER_S}"

Act = Callable[[Program], None]


def nothing(program: Program) -> None:
    """The ranks end by themselves."""


def send(name: str, program: Program) -> None:
    wait_for_ranks(program)
    program.process.send_signal(signal.Signals[name])


def send_twice(program: Program) -> None:
    send("SIGINT", program)
    wait_for_ranks(program, text="told")
    program.process.send_signal(signal.SIGINT)


def send_while_stopping(program: Program) -> None:
    """The last rank failed, and the other one ignores that it is to end."""
    program.wait_for("told")
    program.process.send_signal(signal.SIGTERM)


def kill_spawner(program: Program) -> None:
    wait_for_ranks(program)
    launcher = program.process.pid
    (spawner,) = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    os.kill(int(spawner), signal.SIGKILL)


def send_in_connection(program: Program) -> None:
    """Plays a rendezvous' host that takes the connection and says nothing."""
    arguments = list(program.process.args)
    port = int(arguments[arguments.index("--rdzv-endpoint") + 1].partition(":")[2])
    with socket.create_server(("localhost", port)) as host:
        host.settimeout(DEADLINE_S)
        connection, _ = host.accept()
        with connection:
            program.process.send_signal(signal.SIGTERM)
            program.process.wait(DEADLINE_S)


def send_in_rendezvous(program: Program) -> None:
    """The launcher has said in its log that it waits for other machines, of which none comes."""
    assert program.process.stderr is not None
    while "Rendezvous'ing" not in program.process.stderr.readline():
        assert program.process.poll() is None
    program.process.send_signal(signal.SIGTERM)


def send_in_import(program: Program) -> None:
    program.wait_for(READY)
    program.process.send_signal(signal.SIGTERM)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A way in which a launch ends: of two ranks, of which the last does what is special.

    Attributes:
        happens, says: what the table shows; each part of ``says`` is on standard error.
        code, kept: exit codes without and with ``--keep-exit-code``; negative: the launcher itself ends by that signal.
        ways: arguments of the script.
        options: of the launcher.
        act: what is done to it.
        prints: what is on standard output, so many times.
        script: below ``launch_scripts``.
        terminal: what `ends_terminal.py` does to the terminal; empty: there is none.
        environ: more variables.
        limited: in a control group with little memory.
        blocked: importing torch takes for ever.
    """

    happens: str
    says: tuple[str, ...]
    code: int
    kept: int
    ways: str = ""
    options: str = ""
    act: Act = nothing
    prints: tuple[tuple[str, int], ...] = ()
    script: str = "ends_worker.py"
    terminal: str = ""
    environ: dict[str, str] = field(default_factory=dict)
    limited: bool = False
    blocked: bool = False

    def __str__(self) -> str:
        return re.sub(r"\W+", " ", self.happens).strip()

    def row(self) -> str:
        seen = "; ".join(f"`{text}`" for text in self.says) or "nothing"
        return f"| {self.happens} | {seen} | {shown(self.code)} | {shown(self.kept)} |"


def shown(code: int) -> str:
    return str(code) if code >= 0 else f"{128 - code} ({signal.Signals(-code).name})"


def failed(how: str) -> tuple[str, ...]:
    return (f"rank 1 failed: {how}", "stopped because of it: rank 0")


OF_RANKS = (
    Case(happens="all ranks run to their end", says=("done after",), code=0, kept=0, ways="done"),
    Case(
        happens="ranks end, processes that they started run on",
        says=("done after",),
        code=0,
        kept=0,
        ways="process done",
    ),
    Case(happens="a rank calls `sys.exit(3)`", says=failed("exited with code 3"), code=1, kept=3, ways="arrive exit=3"),
    Case(
        happens="a rank calls `os._exit(7)`", says=failed("exited with code 7"), code=1, kept=7, ways="arrive os._exit"
    ),
    Case(
        happens='a rank calls `sys.exit("text")`',
        says=("no data in the folder", *failed("exited with code 1")),
        code=1,
        kept=1,
        ways="arrive text",
    ),
    Case(
        happens="a rank raises",
        says=failed("ValueError: boom (exited with code 1)"),
        code=1,
        kept=1,
        ways="arrive raise",
    ),
    Case(
        happens="a rank raises `KeyboardInterrupt`",
        says=failed("KeyboardInterrupt (was killed by SIGINT)"),
        code=1,
        kept=130,
        ways="arrive interrupt",
    ),
    Case(
        happens="a rank exits with 75: preempted, state saved",
        says=("stopped for a preemption, state saved: start it again to continue",),
        code=75,
        kept=75,
        ways="arrive exit=75",
    ),
    Case(
        happens="a rank crashes", says=failed("was killed by SIGSEGV"), code=1, kept=139, ways="process arrive segfault"
    ),
    Case(
        happens="a rank is killed by somebody else",
        says=("rank 1 failed: was killed by SIGKILL", "if nobody killed it by hand, it was likely out of memory"),
        code=1,
        kept=137,
        ways="arrive kill",
    ),
    Case(
        happens="a rank is killed because its control group is out of memory",
        says=("rank 1 failed: was killed by SIGKILL", "the system was out of memory and killed it; its peak was"),
        code=1,
        kept=137,
        ways="memory",
        limited=True,
    ),
    Case(
        happens="a rank is stopped, or hangs, with `--hang-timeout`",
        says=("no worker made progress for", "ranks 0, 1 had to be killed: no rank failed by itself"),
        code=1,
        kept=137,
        ways="arrive stop",
        options="--hang-timeout 1",
    ),
)

OF_LAUNCHER = (
    Case(
        happens="the launcher gets SIGTERM",
        says=("stopped by SIGTERM after",),
        code=1,
        kept=143,
        ways="process",
        act=partial(send, "SIGTERM"),
    ),
    Case(
        happens="the launcher gets SIGINT",
        says=("stopped by SIGINT after",),
        code=1,
        kept=130,
        act=partial(send, "SIGINT"),
    ),
    Case(
        happens="the launcher gets SIGINT twice while ranks take their time: they are killed",
        says=("stopped by SIGINT after",),
        code=1,
        kept=130,
        ways="ignore",
        options=STOP_FOREVER,
        act=send_twice,
    ),
    Case(
        happens="the launcher gets SIGHUP",
        says=("stopped by SIGHUP after",),
        code=1,
        kept=129,
        act=partial(send, "SIGHUP"),
    ),
    Case(
        happens="the launcher gets SIGQUIT",
        says=("stopped by SIGQUIT after",),
        code=1,
        kept=131,
        act=partial(send, "SIGQUIT"),
    ),
    Case(happens="Ctrl-C in its terminal", says=("stopped by SIGINT after",), code=1, kept=130, terminal="ctrl-c"),
    Case(happens="its terminal is closed", says=(), code=1, kept=129, terminal="close"),
    Case(
        happens="the launcher gets SIGKILL",
        says=(),
        code=-9,
        kept=-9,
        ways="process",
        act=partial(send, "SIGKILL"),
    ),
    Case(
        happens="the process that forks the ranks gets SIGKILL",
        says=("workers cannot be started or watched any more", "was killed by SIGKILL"),
        code=1,
        kept=1,
        ways="process",
        act=kill_spawner,
    ),
    Case(
        happens="SIGTERM, and ranks ignore it for longer than `--shutdown-timeout`: they are killed",
        says=("stopped by SIGTERM after",),
        code=1,
        kept=143,
        ways="ignore",
        options="--shutdown-timeout 1",
        act=partial(send, "SIGTERM"),
        prints=(("told", 2),),
    ),
    Case(
        happens="SIGTERM, and ranks save their state and exit with 0",
        says=("stopped by SIGTERM after",),
        code=1,
        kept=143,
        ways="save=0",
        act=partial(send, "SIGTERM"),
        prints=(("saved", 2),),
    ),
    Case(
        happens="SIGTERM, and ranks save their state and exit with 75",
        says=("stopped for a preemption, state saved: start it again to continue",),
        code=75,
        kept=75,
        ways="save=75",
        act=partial(send, "SIGTERM"),
        prints=(("saved", 2),),
    ),
    Case(
        happens="the same, with a loader whose processes they still need for it",
        says=("stopped for a preemption, state saved: start it again to continue",),
        code=75,
        kept=75,
        script="ends_loader.py",
        act=partial(send, "SIGTERM"),
        prints=(("saved after 64 samples", 2),),
    ),
    Case(
        happens="SIGTERM while torch is imported",
        says=(),
        code=-15,
        kept=-15,
        blocked=True,
        act=send_in_import,
    ),
    Case(
        happens="SIGTERM while the rendezvous is connected to",
        says=("stopped by SIGTERM after",),
        code=143,
        kept=143,
        options=f"{TWO_MACHINES} --rdzv-conf is_host=0",
        act=send_in_connection,
    ),
    Case(
        happens="SIGTERM while other machines are waited for",
        says=("stopped by SIGTERM after",),
        code=1,
        kept=143,
        options=TWO_MACHINES,
        environ={"LOGLEVEL": "INFO"},
        act=send_in_rendezvous,
    ),
    Case(
        happens="SIGTERM while ranks are stopped because one failed",
        says=("rank 1 failed: exited with code 3", "failed after"),
        code=1,
        kept=3,
        ways="ignore arrive exit=3",
        options=STOP_FOREVER,
        act=send_while_stopping,
    ),
    Case(
        happens="SIGTERM while ranks are stopped to start again",
        says=("rank 1 failed: exited with code 3", "stopped by SIGTERM after"),
        code=1,
        kept=143,
        ways="ignore arrive exit=3",
        options=f"{STOP_FOREVER} --max-restarts 1",
        act=send_while_stopping,
    ),
)

CASES = (*OF_RANKS, *OF_LAUNCHER)


@contextlib.contextmanager
def memory_group() -> Iterator[Path]:
    """A control group for memory below our own (the first version of them, whose files root can write)."""
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = [path for _, controllers, path in groups if "memory" in controllers.split(",")]
    group = Path(f"/sys/fs/cgroup/memory{own[0] if own else ''}") / f"torchtrainer-test-{secrets.token_hex(4)}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(MEMORY_LIMIT_BYTES))
    except OSError as error:
        pytest.skip(f"no control group for memory can be made here: {error}")
    try:
        yield group
    finally:
        group.rmdir()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def started(case: Case, tmp_path: Path, group: Path | None, *, keep: bool) -> Program:
    options = case.options.format(port=free_port()) + (" --keep-exit-code" if keep else "")
    before: tuple[str, ...] = ()
    if case.terminal:
        before = (sys.executable, str(SCRIPTS / "ends_terminal.py"), case.terminal)
    if group is not None:
        before = ("sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group / "cgroup.procs"))
    modules = [str(SCRIPTS / "ends_blocked")] * case.blocked + [os.environ.get("PYTHONPATH", "")]
    environ = {"PYTHONPATH": os.pathsep.join(modules), **case.environ}
    options = f"--nproc-per-node 2 {options}"
    return launch(
        tmp_path,
        case.script,
        *case.ways.split(),
        options=options,
        before=before,
        environ=environ,
        whole=case.blocked,
    )


@pytest.mark.parametrize(
    "keep", [pytest.param(False, id=""), pytest.param(True, id="keep-exit-code", marks=pytest.mark.soak)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_ends_as_the_table_says(case, keep, tmp_path):
    with memory_group() if case.limited else contextlib.nullcontext() as group:
        program = started(case, tmp_path, group, keep=keep)
        try:
            case.act(program)
        finally:
            code = program.finish()
        program.assert_nothing_left()
    assert [text for text in case.says if text not in program.errors] == [], program.errors
    assert code == (case.kept if keep else case.code), program.errors
    assert [(text, program.output.count(text)) for text, _ in case.prints] == list(case.prints)


def table() -> str:
    """The table in Markdown."""
    lines = [f"| {' | '.join(HEADER)} |", "|--|--|--|--|", *(case.row() for case in CASES)]
    return "\n".join(lines) + "\n"


def test_the_page_shows_the_table():
    """``python tests/test_launch_ends.py`` writes the page anew."""
    assert PAGE.read_text() == page()


def test_the_launcher_page_shows_no_other_table():
    """Next to the page of the table itself, the launcher's page may repeat it."""
    path = DOCS / "launcher.md"
    if not path.exists():
        pytest.skip("there is no docs/launcher.md")
    rest = path.read_text().partition(f"# {SECTION}\n")[2]
    section = re.split(r"^#", rest, maxsplit=1, flags=re.MULTILINE)[0]
    rows = [line for line in section.splitlines() if line.startswith("|")]
    assert rows in ([], table().splitlines())
    assert rows or PAGE.name in section, "the section leads to the table, or has it"


ON_SEVERAL = """## Faults on several machines

A trainer's script with a checkpoint now and then, `--max-restarts` above 0 and a run directory that all machines share. `timeout_s`
is the trainer's. Whoever is cut off from the rendezvous' host is the one that ends; nobody who is alone writes a checkpoint, since
each takes all ranks.
"""


STANDS_STILL = """With a fixed number of machines, the others wait for one that is lost as long as `join_timeout` of `--rdzv-conf` says: 600 seconds
unless told otherwise, as under torchrun, since it often takes minutes until a machine is replaced. They say so at once, and for how long. Nobody
comes: `the machines did not come together: wanted 2, 1 joined`, exit code 1. `--rdzv-conf join_timeout=60` ends it sooner; with
`--nnodes 1:2` nobody waits.

How long training stands still, from the fault to the end of the next step, with `timeout_s=10` where nothing else is said. Both launchers
ran the same script in turn on two cores that other programs used as well, two network namespaces as machines, and were started again
whenever they ended, as a scheduler does it. `python benchmarks/several_machines.py` measures it anew.

| seconds to the next step | torchtrainer run | torchrun |
|--|--|--|
| a worker is killed | 3.4 | 10.7 |
| a launcher is killed, with its worker | 6.9 | 57.3 |
| a link is cut for 15 s | 31.5 | 37.5 |
| what a machine sends is lost for 15 s | 29.0 | 37.7 |
| what is sent to a machine is lost for 15 s | 17.6 | 23.3 |
| a link is cut for 10 s, `timeout_s` is 20 | 13.6 | 13.5 |
| a machine loses its power and is back after 10 s | 22.1 | 68.1 |
| a machine loses its power, the other one goes on alone (`--nnodes 1:2`) | 15.0 | 26.5 |
| three in a row: a worker here, a worker there, a launcher | 20.9 | 112.1 |
| a worker is killed, with 200 ms of delay and 5 % of packets lost | 41.6 | 56.6 |
| a worker is killed, the run directory is not shared: until all launches have ended | 18.0 | 48.3 |
"""


def page() -> str:
    return f"# {SECTION}\n\n{table()}\n{ON_SEVERAL}\n{faults_table()}\n{STANDS_STILL}"


if __name__ == "__main__":
    PAGE.write_text(page())
