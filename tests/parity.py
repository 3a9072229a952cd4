"""Runs one command line under torch's launcher and under ours, and finds what differs."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from forked import Started, Zygote
from programs import DEADLINE_S, GONE_S, MARK, marked_processes

SCRIPTS = Path(__file__).with_name("launch_scripts")
WORKER_MARK = "worker>"
"""In every line that a worker script writes, and in no text of an error, which launchers repeat: all lines on standard error
without it are the launcher's own words."""
EMPTY = "<empty directory>"
FREE_PORT = "MASTER_PORT"
"""The one variable of a worker whose value the launcher chooses freely."""
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")
"""What commands see of the environment that the tests run in."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """One command line. ``{run}``, ``{work}``, ``{port}``, ``{python}`` and ``{node}`` are replaced in every text.

    Attributes:
        options: of the launcher, as typed in a shell.
        script: as typed; empty for none.
        arguments: of the script, as typed.
        env: added to the environment of the command.
        directory: where the command runs, below the run's own.
        stdin: what the command finds on its standard input.
        exit_code: what torch's launcher ends with; so a case that tests something else than it says does not stay unnoticed.
        reports: how many worker reports torch's run leaves; for the same purpose.
        stderr_pattern: what is also compared of the launchers' own words: everything that it finds, in order of the alphabet.
        signal: sent to the launcher when ``workers_ready`` workers have said that they wait.
        nodes: how many launchers are started, all on this machine.
        forms: which commands it is for: torch's modules by their last name.
        launch_options: put before the options where the form is ``launch``.
        whole: our launcher has to run from its first line on: what it tests happens before torch is imported, or after the end.
    """

    id: str
    options: str = ""
    script: str = "report.py"
    arguments: str = ""
    env: Mapping[str, str] = field(default_factory=dict)
    directory: str = "work"
    stdin: str = ""
    exit_code: int = 0
    reports: int = 0
    stderr_pattern: str = ""
    signal: str = ""
    workers_ready: int = 1
    nodes: int = 1
    forms: tuple[str, ...] = ("run", "launch")
    launch_options: str = ""
    whole: bool = False

    def argv(self, form: str, values: Mapping[str, str]) -> list[str]:
        """The command line behind the program, with the values put in."""
        options = f"{self.launch_options} {self.options}" if form == "launch" else self.options
        words = [*shlex.split(options), *shlex.split(self.script), *shlex.split(self.arguments)]
        return [replaced(word, values) for word in words]


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way to start workers.

    Attributes:
        name: shown in differences.
        reference: which of torch's two programs it stands for: ``run`` or ``launch``.
        command: run by this interpreter.
        preloaded: what to run in a fork of the zygote instead; empty to run the command.
        launcher_form: the name by which our launcher knows this form.
    """

    name: str
    reference: str
    command: tuple[str, ...]
    preloaded: str = ""
    launcher_form: str = ""

    @property
    def in_zygote(self) -> Form:
        """The same from where our launcher has imported torch on."""
        return replace(self, name=f"{self.name} (preloaded)", preloaded="torchtrainer")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that is not the same. ``None`` is: not there."""

    case: str
    aspect: str
    where: str
    torch: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.aspect} | {self.where} | torch: {self.torch!r} | ours: {self.ours!r}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Something that is not the same by intent, and why."""

    name: str
    reason: str
    covers: Callable[[Finding], bool]


@dataclass(frozen=True, kw_only=True)
class Observation:
    """What a run showed, without what differs from run to run: by aspect, by place."""

    aspects: Mapping[str, Mapping[str, Any]]
    left_behind: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One form's run of a case, in a directory of its own that goes with it."""

    case: Case
    form: Form
    root: Path
    port: int
    mark: str

    def path(self, *names: str) -> Path:
        return self.root.joinpath(*names)

    def values(self, node: int) -> dict[str, str]:
        return {
            "{run}": str(self.root),
            "{work}": str(self.path("work")),
            "{port}": str(self.port),
            "{python}": sys.executable,
            "{node}": str(node),
        }

    def environ(self, node: int) -> dict[str, str]:
        own = {k: replaced(v, self.values(node)) for k, v in self.case.env.items()}
        parity = {"PARITY_REPORTS": str(self.path("reports")), "PARITY_READY": str(self.path("ready"))}
        inherited = {k: v for k, v in os.environ.items() if k in INHERITED}
        return {**inherited, "TMPDIR": str(self.path("tmp")), MARK: self.mark, **parity, **own}

    def start(self, node: int, zygote: Zygote) -> Started:
        argv = self.case.argv(self.form.reference, self.values(node))
        directory = str(self.path(self.case.directory))
        outputs = {name: self.path("output", f"{name}.{node}") for name in ("stdout", "stderr")}
        if self.form.preloaded:
            request = {
                "program": self.form.preloaded,
                "arguments": argv,
                "form": self.form.launcher_form,
                "directory": directory,
                "environ": self.environ(node),
                "stdin": str(self.path("stdin")),
            }
            return zygote.start({**request, **{k: str(v) for k, v in outputs.items()}})
        with self.path("stdin").open() as stdin, outputs["stdout"].open("w") as out, outputs["stderr"].open("w") as err:
            return subprocess.Popen(
                [*self.form.command, *argv],
                cwd=directory,
                env=self.environ(node),
                stdin=stdin,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )


@contextmanager
def prepared(case: Case, form: Form) -> Iterator[Run]:
    """A run with its directory laid out; both go at the end."""
    # Sockets have short paths; a directory below pytest's own would be too deep for one.
    root = Path(tempfile.mkdtemp(prefix="tt-")).resolve()
    try:
        for name in ("tmp", "reports", "output"):
            (root / name).mkdir()
        (root / "stdin").write_text(case.stdin)
        os.mkfifo(root / "ready")
        work = root / "work"
        shutil.copytree(SCRIPTS, work, ignore=shutil.ignore_patterns("__pycache__", "fork_*", "ends_*"))
        report = work / "report.py"
        for copy in ("with space/ünï.py", "no_ending", "package/__main__.py", "package/part.py"):
            (work / copy).parent.mkdir(exist_ok=True)
            shutil.copy(report, work / copy)
        (work / "package/__init__.py").touch()
        (work / "link.py").symlink_to("with space/ünï.py")
        (work / "a_file").touch()
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        yield Run(case=case, form=form, root=root, port=port, mark=root.name)
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextmanager
def running(case: Case, form: Form, zygote: Zygote) -> Iterator[Callable[[], Observation]]:
    """Starts a case; what it gives waits for the end and says what was seen. Nothing of it is left afterwards."""
    with prepared(case, form) as run:
        started: list[Started] = []

        def finish() -> Observation:
            try:
                if case.signal:
                    _wait_until_ready(run)
                    for one in started:
                        os.kill(one.pid, signal.Signals[case.signal])
                codes = [one.wait(DEADLINE_S) for one in started]
            except subprocess.TimeoutExpired:
                errors = "".join(p.read_text(errors="replace") for p in run.path("output").iterdir())
                raise AssertionError(f"{form.name}: not done after {DEADLINE_S} s\n{errors}") from None
            started.clear()
            left_behind = _left_behind(run.mark) if form.launcher_form else ()
            return Observation(aspects=_look(run, codes), left_behind=left_behind)

        try:
            started += [run.start(node, zygote) for node in range(case.nodes)]
            yield finish
        finally:
            _kill(started, run.mark)


def observe(case: Case, forms: Sequence[Form], zygote: Zygote) -> list[Observation]:
    """Runs a case under several forms side by side."""
    with ExitStack() as stack:
        return [finish() for finish in [stack.enter_context(running(case, form, zygote)) for form in forms]]


def compare(case: Case, torch: Observation, ours: Observation, differences: tuple[Difference, ...]) -> list[Finding]:
    """What differs, but for the differences that are meant."""
    findings = []
    for aspect in torch.aspects:
        theirs, own = flat(torch.aspects[aspect]), flat(ours.aspects[aspect])
        for where in sorted({*theirs, *own}):
            if theirs.get(where) != own.get(where):
                found = {"torch": theirs.get(where), "ours": own.get(where)}
                findings.append(Finding(case=case.id, aspect=aspect, where=where, **found))
    return [f for f in findings if not any(d.covers(f) for d in differences)]


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """A nested mapping as one of paths to what is in it."""
    if not isinstance(value, Mapping) or not value:
        return {where: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found.update(flat(inner, f"{where}.{key}" if where else str(key)))
    return found


def replaced(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(name, value)
    return text


def _wait_until_ready(run: Run) -> None:
    """Reads one byte from each worker that is to say that it waits."""
    descriptor = os.open(run.path("ready"), os.O_RDWR)  # also open for writing: no end of file between two workers
    try:
        for _ in range(run.case.workers_ready * run.case.nodes):
            if not select.select([descriptor], [], [], DEADLINE_S)[0]:
                raise subprocess.TimeoutExpired("workers that wait for a signal", DEADLINE_S)
            os.read(descriptor, 1)
    finally:
        os.close(descriptor)


def _left_behind(mark: str) -> tuple[str, ...]:
    deadline = time.monotonic() + GONE_S
    while (left := marked_processes(mark)) and time.monotonic() < deadline:
        os.sched_yield()
    return tuple(left)


def _kill(started: list[Started], mark: str) -> None:
    """Ends commands that have not ended, and everything with the mark."""
    for pid in [*(one.pid for one in started), *(int(line.split()[0]) for line in marked_processes(mark))]:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    for one in started:
        one.wait(DEADLINE_S)


# What differs from run to run ------------------------------------------------------------------------------------------


def _look(run: Run, codes: list[int]) -> dict[str, dict[str, Any]]:
    clean = _Cleaner(run)
    errors = clean(_joined(run, "stderr")).splitlines()
    workers = [line for line in errors if WORKER_MARK in line]
    found = re.findall(run.case.stderr_pattern, "\n".join(errors)) if run.case.stderr_pattern else []
    return {
        "exit code": {f"node {node}": code for node, code in enumerate(codes)},
        "stdout": {"lines": sorted(clean(_joined(run, "stdout")).splitlines())},
        "stderr": {"workers": sorted(workers), "pattern": sorted(map(str, found))},
        "launcher's own words": {f"line {n}": e for n, e in enumerate(errors) if WORKER_MARK not in e},
        "reports": _reports(run, clean),
        "files": _files(run, clean),
    }


def _joined(run: Run, name: str) -> str:
    return "".join(p.read_text(errors="backslashreplace") for p in sorted(run.path("output").glob(f"{name}.*")))


def _reports(run: Run, clean: _Cleaner) -> dict[str, Any]:
    reports = {p.stem: json.loads(p.read_text()) for p in run.path("reports").glob("*.json")}
    drawn = [r.pop("random") for r in reports.values()]
    for report in reports.values():
        if report["environ"].get(FREE_PORT) != str(run.port):
            report["environ"][FREE_PORT] = "<free port>"
        if report["environ"].get("MASTER_ADDR") in ("127.0.0.1", socket.getfqdn()):  # on one machine, ours is loopback
            report["environ"]["MASTER_ADDR"] = "<this machine>"
        report["random of its own"] = len(set(drawn)) == len(drawn)
    return {name: clean.all(report) for name, report in reports.items()}


def _files(run: Run, clean: _Cleaner) -> dict[str, Any]:
    """Everything below the run's directory but what the tests put there; runs of several nodes side by side."""
    found: dict[str, list[str]] = {}
    for path in sorted(run.root.rglob("*")):
        name = str(path.relative_to(run.root))
        if name.split("/", maxsplit=1)[0] in ("output", "reports", "ready", "stdin"):
            continue
        if path.is_dir():
            if any(path.iterdir()) or path.parent == run.root:
                continue
            content = EMPTY
        elif not path.is_file() or b"\0" in path.read_bytes():
            content = "<opaque>"
        elif path.suffix == ".json":
            content = json.dumps(clean.error_file(path), indent=1, sort_keys=True)
        else:
            lines = clean(path.read_text(errors="backslashreplace")).splitlines()
            # Filtered files collect the ranks' lines in the order in which they are seen.
            content = "\n".join(sorted(lines) if name.rsplit("/", maxsplit=1)[-1].startswith("filtered_") else lines)
        found.setdefault(clean(f"/{name}"), []).append(content)
    return {name: sorted(contents) for name, contents in found.items()}


class _Cleaner:
    """Puts names in the place of what is different in every run."""

    def __init__(self, run: Run) -> None:
        self._root, self._port = str(run.root), str(run.port)

    def __call__(self, text: str) -> str:
        text = text.replace(self._root, "<run>").replace(Path(self._root).name, "<mark>")
        text = re.sub(rf"\b{self._port}\b", "<port>", text)
        text = re.sub(r"(?<![0-9a-f])[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}(?![0-9a-f])", "<uuid>", text)
        text = re.sub(r"\btorchelastic_[a-z0-9_]{8}\b", "torchelastic_<x>", text)
        text = re.sub(r"\bpytorch-errorfile-[a-z0-9_]{8}\b", "pytorch-errorfile-<x>", text)
        return re.sub(r"([^/\s]+)_[a-z0-9_]{8}(?=/attempt_\d)", r"\1_<x>", text)

    def all(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {k: self.all(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.all(v) for v in value]
        return self(value) if isinstance(value, str) else value

    def error_file(self, path: Path) -> Any:
        """An error file without its time and without the frames outside the worker's own program."""
        error = json.loads(path.read_text())
        information = error["message"].get("extraInfo", {}) if isinstance(error["message"], dict) else {}
        if "timestamp" in information:
            information["timestamp"] = "seconds" if re.fullmatch(r"\d+", str(information["timestamp"])) else "?"
        if "py_callstack" in information:
            lines = self(information["py_callstack"]).splitlines()
            information["py_callstack"] = [line for line in lines if "<run>" in line or not line.startswith(" ")]
        return self.all(error)
