"""The launcher's promise: any command line does under it what it does under torch's launcher."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from parity import (
    EMPTY,
    INHERITED,
    WORKER_MARK,
    Case,
    Difference,
    Finding,
    Form,
    Observation,
    Zygote,
    compare,
    flat,
    observe,
)

from torchtrainer.process.signals import STACK_DUMP_SIGNAL

TORCH = {
    "run": Form(name="torch run", reference="run", command=(), preloaded="torch.distributed.run"),
    "launch": Form(name="torch launch", reference="launch", command=(), preloaded="torch.distributed.launch"),
}
REAL_TORCH = Form(name="torchrun", reference="run", command=(sys.executable, "-m", "torch.distributed.run"))
OURS = (
    Form(
        name="torchtrainer run",
        reference="run",
        command=(sys.executable, "-m", "torchtrainer", "run"),
        launcher_form="RUN",
    ),
    Form(
        name="torchtrainer.run",
        reference="run",
        command=(sys.executable, "-m", "torchtrainer.run"),
        launcher_form="MODULE_RUN",
    ),
    Form(
        name="torchtrainer.launch",
        reference="launch",
        command=(sys.executable, "-m", "torchtrainer.launch"),
        launcher_form="LAUNCH",
    ),
)

DEFAULT_EVERY = 13
"""Every so many cases belong to the default suite, some of each group; all others with `make soak`."""
WHOLE_EVERY = 6
"""Every so many cases our commands run from their first line on; in the others from where they have imported torch."""

LOGS = "--log-dir {run}/logs"
TWO = "--nproc-per-node 2"
BOTH = f"{TWO} {LOGS}"
ERROR_FILE = {"TORCHELASTIC_ERROR_FILE": "{run}/launcher_error.json"}
STATIC = "--master-addr 127.0.0.1 --master-port {port}"
C10D = "--rdzv-backend c10d --rdzv-endpoint localhost:{port} --rdzv-id job"
SHORT = "--rdzv-conf join_timeout=10,last_call_timeout=1,timeout=10"
EVENTS = r'"name": "([^"]+)".*?"state": "(\w+)"'

WORKERS = (
    Case(id="nothing", reports=1),
    Case(id="nproc 2", options=TWO, reports=2),
    Case(id="nproc =3", options="--nproc-per-node=3", reports=3),
    Case(id="nproc underscore", options="--nproc_per_node=2", reports=2),
    Case(id="nproc abbreviated", options="--nproc 2", exit_code=2),  # both spellings begin with it
    Case(id="abbreviated", options="--standal --nnod 1 --rol trainer --mod", script="report", reports=1),
    Case(id="nproc cpu", options="--nproc-per-node cpu", reports=-1),
    Case(id="nproc auto", options="--nproc-per-node auto", reports=-1),
    Case(id="nproc unknown", options="--nproc-per-node many", env=ERROR_FILE, exit_code=1),
    Case(id="nproc gpu without", options="--nproc-per-node gpu", env={"CUDA_VISIBLE_DEVICES": ""}, exit_code=1),
    Case(id="nproc from environment", env={"PET_NPROC_PER_NODE": "2"}, reports=2),
    Case(
        id="command line before environment", options="--nproc-per-node 1", env={"PET_NPROC_PER_NODE": "2"}, reports=1
    ),
    Case(
        id="omp unset",
        whole=True,
        options=TWO,
        reports=2,
        stderr_pattern="Setting OMP_NUM_THREADS environment variable",
    ),
    Case(
        id="omp set",
        whole=True,
        options=TWO,
        env={"OMP_NUM_THREADS": "3"},
        reports=2,
        stderr_pattern="Setting OMP_NUM_THREADS",
    ),
    Case(
        id="environment inherited",
        options=TWO,
        env={"EMPTY": "", "ÜNÏ": "cödé", "RANK": "7", "LOCAL_RANK": "x"},
        reports=2,
    ),
    Case(id="launcher variables of an outer run", env={"TORCHELASTIC_RUN_ID": "outer", "MASTER_PORT": "1"}, reports=1),
    Case(id="nccl variable kept", env={"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, reports=1),
    Case(id="role", options="--role trainer", reports=1),
    Case(id="role from environment", env={"PET_ROLE": "reader"}, reports=1),
    Case(id="start method", options="--start-method fork", reports=1),
    Case(id="monitor interval", options="--monitor-interval 0.02", reports=1),
    Case(id="local address", options="--local-addr localhost", reports=1),
    Case(id="signals exported", options="--signals-to-handle SIGTERM,SIGUSR1", reports=1),
    Case(id="shutdown timeout", options="--shutdown-timeout 3", reports=1),
    Case(id="shutdown timeout negative", options="--shutdown-timeout=-1", exit_code=1),
    Case(id="virtual local rank", options=f"{TWO} --virtual-local-rank", reports=2),
    Case(
        id="virtual local rank with devices",
        options=f"{TWO} --virtual-local-rank",
        env={"CUDA_VISIBLE_DEVICES": "4,7"},
        reports=2,
    ),
    Case(id="devices", options=TWO, env={"CUDA_VISIBLE_DEVICES": "4,7"}, reports=2),
    Case(id="warnings from environment", whole=True, env={"PYTHONWARNINGS": "error::UserWarning,ignore:x"}, reports=1),
    Case(
        id="interpreter from environment",
        whole=True,
        env={"PYTHONHASHSEED": "3", "PYTHONPATH": "{run}/more"},
        reports=1,
    ),
    Case(id="interpreter optimised from environment", whole=True, env={"PYTHONOPTIMIZE": "1"}, reports=1),
    Case(id="interpreter given", whole=True, env={"PYTHON_EXEC": "{python}"}, reports=1),
    Case(id="interpreter missing", whole=True, env={"PYTHON_EXEC": "/no/such/python"}, exit_code=1),
    Case(
        id="health check and timer",
        env={"TORCHELASTIC_ENABLE_FILE_TIMER": "1", "TORCHELASTIC_TIMER_FILE": "{run}/timer"},
        reports=1,
    ),
)

RENDEZVOUS = (
    Case(id="standalone", options=f"--standalone {TWO} {LOGS}", reports=2),
    Case(id="standalone from environment", env={"PET_STANDALONE": "1"}, reports=1),
    Case(id="standalone not from environment", env={"PET_STANDALONE": "0"}, reports=1),
    Case(id="standalone text from environment", env={"PET_STANDALONE": "true"}, exit_code=1),
    Case(id="standalone over static", options=f"--standalone --master-port {{port}} --rdzv-id mine {LOGS}", reports=1),
    Case(id="implicit standalone with id", options=f"--rdzv-id mine {LOGS}", reports=1),
    Case(id="static", options=f"{STATIC} {BOTH}", reports=2),
    Case(id="static underscores", options="--master_addr=localhost --master_port={port} --node_rank=0", reports=1),
    Case(id="static endpoint", options=f"--rdzv-endpoint localhost:{{port}} {BOTH}", reports=2),
    Case(id="static with id", options=f"{STATIC} --rdzv-id job-7 {LOGS}", reports=1),
    Case(id="static from environment", env={"PET_MASTER_PORT": "{port}", "PET_MASTER_ADDR": "localhost"}, reports=1),
    Case(id="static two nodes", options=f"--nnodes 2 --node-rank {{node}} {STATIC} {BOTH}", nodes=2, reports=4),
    Case(id="c10d", options=f"{C10D} {BOTH}", reports=2),
    Case(id="c10d underscores", options="--rdzv_backend=c10d --rdzv_endpoint=localhost:{port} --rdzv_id=a", reports=1),
    Case(id="c10d node rank ignored", options=f"{C10D} --node-rank 3", reports=1),
    Case(id="c10d own store", options=C10D, env={"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}, reports=1),
    Case(id="c10d two nodes", options=f"--nnodes 2 {C10D} {SHORT} {BOTH}", nodes=2, reports=4),
    Case(id="c10d two of one to three nodes", options=f"--nnodes 1:2 {C10D} {SHORT} {BOTH}", nodes=2, reports=4),
    Case(id="c10d one of one to two nodes", options=f"--nnodes 1:2 {C10D} {SHORT}", reports=1),
    Case(
        id="c10d file store",
        options=f"--rdzv-backend c10d --rdzv-endpoint {{run}}/store --rdzv-conf store_type=file {LOGS}",
        reports=1,
    ),
    Case(id="nnodes 1", options="--nnodes 1", reports=1),
    Case(id="nnodes 1:1", options="--nnodes=1:1", reports=1),
    Case(id="nnodes zero", options="--nnodes 0", exit_code=1),
    Case(id="nnodes reversed", options="--nnodes 2:1", exit_code=1),
    Case(id="nnodes three parts", options="--nnodes 1:2:3", exit_code=1),
    Case(id="nnodes text", options="--nnodes one", exit_code=1),
    Case(id="backend unknown", options="--rdzv-backend carrier_pigeon --rdzv-endpoint localhost:{port}", exit_code=1),
    Case(id="rendezvous configuration malformed", options=f"{C10D} --rdzv-conf timeout", exit_code=1),
)

PROGRAMS = (
    Case(id="absolute path", script="{work}/report.py", reports=1),
    Case(id="below", script="'with space/ünï.py'", reports=1),
    Case(id="parent", script="../report.py", directory="work/package", reports=1),
    Case(id="dot", script="./report.py", reports=1),
    Case(id="symbolic link", script="link.py", reports=1),
    Case(id="no ending", script="no_ending", reports=1),
    Case(id="directory with main", script="package", reports=1),
    Case(id="missing", whole=True, script="missing.py", exit_code=1),
    Case(id="a file that is no program", script="hello.sh", exit_code=1),
    Case(id="module", options="-m", script="report", reports=1),
    Case(id="module long", options=f"{TWO} --module", script="report", arguments="a -b", reports=2),
    Case(id="module in package", options="-m", script="package.part", reports=1),
    Case(id="package", options="-m", script="package", reports=1),
    Case(id="module from environment", env={"PET_MODULE": "1"}, script="report", reports=1),
    Case(id="module missing", options="-m", script="missing", exit_code=1),
    Case(id="arguments", arguments="a 'two words' '' -x --nproc-per-node 7 --help -- - 'ünï' '*' '$HOME'", reports=1),
    Case(id="separator before script", options="--", arguments="-x", reports=1),
    Case(
        id="substitution", options=TWO, arguments="'${local_rank}' 'x${local_rank}y' '${rank}' '$local_rank'", reports=2
    ),
    Case(
        id="no python",
        options=f"{TWO} --no-python",
        script="./hello.sh",
        arguments="a 'b c'",
        launch_options="--use-env",
    ),
    Case(
        id="no python underscore",
        options="--no_python",
        script="{python} report.py",
        launch_options="--use-env",
        reports=1,
    ),
    Case(
        id="no python shell",
        options="--no-python",
        script="bash -c 'echo \"worker> $RANK $0\"'",
        arguments="x",
        launch_options="--use-env",
    ),
    Case(
        id="no python binary",
        options="--no-python",
        script="/bin/echo",
        arguments="'worker> ${local_rank}'",
        launch_options="--use-env",
    ),
    Case(
        id="no python missing",
        options="--no-python",
        script="/no/such/program",
        launch_options="--use-env",
        exit_code=1,
    ),
    Case(
        id="no python with module", options="--no-python -m", script="report", launch_options="--use-env", exit_code=1
    ),
    Case(id="no python without use env", options="--no-python", script="/bin/echo", exit_code=1, forms=("launch",)),
    Case(id="use env", options=f"{TWO} --use-env", reports=2, forms=("launch",)),
    Case(id="use env underscore", options="--use_env", arguments="--local-rank=9", reports=1, forms=("launch",)),
    Case(id="use env only in launch", options="--use-env", exit_code=2, forms=("run",)),
    Case(id="run path", options=f"{BOTH} --run-path", script="{work}/main_exit.py"),
    Case(
        id="run path fails",
        options=f"{LOGS} --run-path",
        script="{work}/main_exit.py",
        arguments="raise",
        env=ERROR_FILE,
        exit_code=1,
    ),
    Case(
        id="run path forked",
        options="--run-path --start-method fork",
        script="{work}/main_exit.py",
        arguments="3",
        exit_code=1,
    ),
    Case(id="standard input", script="reads.py", stdin="one\ntwo\n"),
    Case(id="standard input empty", script="reads.py", options=TWO),
    Case(id="own processes", whole=True, script="children.py"),
    Case(id="own processes in module", whole=True, options="-m", script="children"),
    Case(id="after the last line", whole=True, script="ends.py"),
    Case(id="process group", whole=True, options=TWO, script="reduces.py"),
    Case(id="process group static", whole=True, options=f"{TWO} {STATIC}", script="reduces.py"),
)

OUTPUT = (
    Case(id="console", options=f"{BOTH}", script="streams.py"),
    Case(id="redirect none", options=f"{BOTH} -r 0", script="streams.py"),
    Case(id="redirect out", options=f"{BOTH} -r 1", script="streams.py"),
    Case(id="redirect err", options=f"{BOTH} --redirects 2", script="streams.py"),
    Case(id="redirect both abbreviated", options=f"{BOTH} --redirect=3", script="streams.py"),
    Case(id="redirect map", options=f"{BOTH} -r 0:1,1:2", script="streams.py"),
    Case(id="redirect from environment", options=BOTH, env={"PET_REDIRECTS": "3"}, script="streams.py"),
    Case(id="redirect unknown", options="-r 4", exit_code=1),
    Case(id="tee out", options=f"{BOTH} -t 1", script="streams.py"),
    Case(id="tee both", options=f"{BOTH} --tee=3", script="streams.py"),
    Case(id="tee map", options=f"{BOTH} -t 0:3", script="streams.py"),
    Case(id="tee and redirect", options=f"{BOTH} -t 1 -r 2", script="streams.py"),
    Case(id="tee without directory", options=f"{TWO} -t 3", script="streams.py"),
    Case(id="tee of role", options=f"{BOTH} -t 3 --role trainer", script="streams.py"),
    Case(id="tee without end of line", options=f"{LOGS} -t 3", script="ends.py"),
    Case(
        id="prefix",
        options=f"{BOTH} -t 3 --log-line-prefix-template '${{role_name}}/${{local_rank}}/${{rank}}/${{hostname}}/${{x}}: '",
        script="streams.py",
    ),
    Case(
        id="prefix from environment",
        options=f"{BOTH} -t 1",
        env={"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "<${rank}> "},
        script="streams.py",
    ),
    Case(
        id="prefix from other variable",
        options=f"{BOTH} -t 1",
        env={"PET_LOG_LINE_PREFIX_TEMPLATE": "(${rank})"},
        script="streams.py",
    ),
    Case(id="ranks shown", options=f"{BOTH} --local-ranks-filter 0", script="streams.py"),
    Case(id="ranks shown of tee", options=f"{BOTH} -t 3 --local_ranks_filter=1", script="streams.py"),
    Case(id="ranks shown of redirect", options=f"{BOTH} -r 1 --local-ranks-filter 1", script="streams.py"),
    Case(id="ranks shown malformed", options="--local-ranks-filter a", exit_code=1),
    Case(
        id="filters",
        options=f"{BOTH} -t 3 --duplicate-stdout-filters apple --duplicate-stderr-filters 'orange,a,,b'",
        script="streams.py",
    ),
    Case(id="filters underscore", options=f"{BOTH} -t 1 --duplicate_stdout_filters=apple,orange", script="streams.py"),
    Case(id="filters without tee", options=f"{BOTH} -r 3 --duplicate-stdout-filters apple", script="streams.py"),
    Case(id="unicode output", options=f"{BOTH} -t 3", script="streams.py", arguments="'ünï ☃'"),
    Case(id="unicode output in C", options=f"{LOGS} -t 3", script="streams.py", arguments="'ünï'", env={"LC_ALL": "C"}),
    Case(id="log directory null", options=f"{TWO} --log-dir /dev/null", script="streams.py"),
    Case(id="log directory null in workers", options="--log-dir /dev/null", reports=1),
    Case(id="log directory a file", options="--log-dir {work}/a_file", exit_code=1),
    Case(id="log directory deep", options="--log-dir {run}/a/b/c -r 3", reports=1),
    Case(id="log directory relative", options="--log_dir logs -r 3", reports=1),
    Case(id="log directory from environment", env={"PET_LOG_DIR": "{run}/logs"}, reports=1),
    Case(id="logs specification", options=f"--logs-specs default {LOGS} -r 3", reports=1),
    Case(id="logs specification unknown", options="--logs-specs none", exit_code=1),
    Case(id="events", options="--event-log-handler console", script="streams.py", stderr_pattern=EVENTS),
    Case(
        id="events of failure",
        options="--event-log-handler console",
        script="fail.py",
        arguments="3",
        exit_code=1,
        stderr_pattern=EVENTS,
    ),
)


# Two workers only where they write nothing once the first of them may have failed: the launcher stops the other one.
def failing(name: str, arguments: str, *, options: str = LOGS, exit_code: int = 1, script: str = "fail.py") -> Case:
    return Case(
        id=name, options=f"-r 3 {options}", script=script, arguments=arguments, env=ERROR_FILE, exit_code=exit_code
    )


ENDS = (
    failing("exit 3", "3", options=BOTH),
    failing("exit 75", "75", options=BOTH),
    failing("exit 255", "255"),
    failing("exit 0", "0", exit_code=0),
    failing("exit None", "none", exit_code=0),
    failing("exit text", "text"),
    failing("exit True", "true"),
    failing("exit 259", "large"),
    failing("exit -1", "negative"),
    failing("exit nested", "nested"),
    failing("os exit", "os", options=BOTH),
    failing("exception", "exception"),
    failing("exception chained", "chained"),
    failing("exception not of Exception", "base"),
    failing("KeyboardInterrupt", "interrupt"),
    failing("import error", "import"),
    failing("error file by hand", "reply"),
    failing("SIGKILL", "SIGKILL", options=BOTH),
    failing("SIGSEGV", "SIGSEGV"),
    failing("SIGTERM to itself", "SIGTERM"),
    failing("record exception", "exception", script="recorded.py"),
    failing("record exit 4", "4", script="recorded.py"),
    failing("record exit 0", "0", script="recorded.py", exit_code=0),
    failing("restart once", "3 1", options=f"{BOTH} --max-restarts 1", exit_code=0),
    failing("restart twice", "3 2", options=f"{BOTH} --max_restarts=3", exit_code=0),
    failing("restart in vain", "reply", options=f"{LOGS} --max-restarts 2"),
    failing("restart after signal", "SIGKILL 1", options=f"{BOTH} --max-restarts 1", exit_code=0),
    failing("restart static", "3 1", options=f"{BOTH} {STATIC} --max-restarts 1", exit_code=0),
    failing("restart teed", "3 1", options=f"{BOTH} -t 1 --max-restarts 1", exit_code=0),
    Case(id="restarts in environment", options="--max-restarts 4", reports=1),
    Case(id="restarts from environment", env={"PET_MAX_RESTARTS": "2"}, reports=1),
    Case(id="restarts negative", options="--max-restarts=-1", exit_code=1),
)


def signalled(name: str, sent: str, *, options: str = TWO, arguments: str = "") -> Case:
    return Case(
        id=name,
        options=f"{options} {LOGS}",
        script="waits.py",
        arguments=arguments,
        signal=sent,
        workers_ready=2,
        exit_code=1,
    )


SIGNALS = (
    signalled("SIGTERM", "SIGTERM"),
    signalled("SIGINT", "SIGINT"),
    signalled("SIGHUP", "SIGHUP"),
    signalled("SIGUSR1 listed", "SIGUSR1", options=f"{TWO} --signals-to-handle SIGTERM,SIGUSR1"),
    signalled("SIGTERM ignored", "SIGTERM", options=f"{TWO} --shutdown-timeout 1", arguments="ignore"),
)

# The parser speaks before torch is imported.
USAGE = (
    Case(id="help", options="--help", script="", stderr_pattern="."),
    Case(id="no script", script="", exit_code=2),
    Case(id="unknown option", options="--no-such-option", exit_code=2),
    Case(id="ambiguous abbreviation", options="--rdzv x", exit_code=2),
    Case(id="no value", options="--nnodes", script="", exit_code=2),
    Case(id="wrong start method", options="--start-method thread", exit_code=2),
    Case(id="wrong integer", options="--max-restarts few", exit_code=2),
    Case(id="wrong float", options="--monitor-interval soon", exit_code=2),
    Case(id="wrong port", options="--master-port http", exit_code=2),
    Case(id="wrong binding", options="--numa-binding loose", exit_code=2),
    Case(id="wrong integer from environment", env={"PET_MAX_RESTARTS": "few"}, exit_code=2),
    Case(id="wrong shell", options="--print-completion dash", script="", exit_code=2),
)

CASES = (*WORKERS, *RENDEZVOUS, *PROGRAMS, *OUTPUT, *ENDS, *SIGNALS, *USAGE)

GLIBC_SIGNALS = (32, 33)
"""The C library's own: caught from the first time that a process has had a second thread; invisible to programs."""


def only_stack_dump(finding: Finding) -> bool:
    """Whether a worker differs in nothing but how it can be asked for its stacks."""
    if finding.where.endswith(".process.signals.SigCgt"):
        own = {STACK_DUMP_SIGNAL, *GLIBC_SIGNALS}
        return not (int(finding.torch, 16) ^ int(finding.ours, 16)) & ~sum(1 << (s - 1) for s in own if s)
    return ".process.descriptors." in finding.where and finding.torch is None and finding.ours.endswith(".stacks")


TORCH_LEFTOVERS = ("/tmp/pytorch-errorfile-", "/tmp/torchinductor_")

WRONG_VALUES = (
    "shutdown timeout negative",
    "standalone text from environment",
    "no python with module",
    "no python without use env",
    "nnodes zero",
    "nnodes reversed",
    "nnodes three parts",
    "nnodes text",
    "rendezvous configuration malformed",
    "redirect unknown",
    "ranks shown malformed",
    "restarts negative",
)
"""Cases whose options torch's parser takes and a later step refuses with a traceback."""

DIFFERENCES = (
    Difference(
        name="two spellings of one option",
        reason="an abbreviation of --nproc-per-node and --nproc_per_node stands for one option, as in newer versions of Python",
        covers=lambda f: f.case == "nproc abbreviated" and (f.aspect != "exit code" or (f.torch, f.ours) == (2, 0)),
    ),
    Difference(
        name="wrong values are wrong usage",
        reason="a value that no run can use is refused by the parser in one line, with its exit code",
        covers=lambda f: f.case in WRONG_VALUES and (f.aspect, f.torch, f.ours) == ("exit code", 1, 2),
    ),
    Difference(
        name="leftovers of functions that fail",
        reason="torch leaves what its processes for functions and its compiler put into the temporary directory",
        covers=lambda f: f.aspect == "files" and f.where.startswith(TORCH_LEFTOVERS) and f.ours is None,
    ),
    Difference(
        name="stack dump",
        reason="workers write their Python stacks to a file on a real-time signal: what a report of a hang is made from",
        covers=lambda f: f.aspect == "reports" and only_stack_dump(f),
    ),
    Difference(
        name="empty log directories go",
        reason="without --log-dir torch leaves a directory per run in the temporary one; ours goes where no file is in it",
        covers=lambda f: (
            f.aspect == "files" and f.where.startswith("/tmp/torchelastic_") and f.torch == [EMPTY] and f.ours is None
        ),
    ),
    Difference(
        name="error file without record",
        reason="the first error is known without a decorator, so the launcher's own error file is there as well, in every form",
        covers=lambda f: (f.aspect, f.where, f.torch) == ("files", "/launcher_error.json", None),
    ),
    Difference(
        name="own words",
        reason="one summary line at the start and one at the end, and a report of failures that starts with the first cause",
        covers=lambda f: f.aspect == "launcher's own words",
    ),
    Difference(
        name="own variables",
        reason="workers find the launcher's own facts in variables of its own",
        covers=lambda f: f.aspect == "reports" and ".environ.TORCHTRAINER_" in f.where and f.torch is None,
    ),
    Difference(
        name="preempted",
        reason="workers say with exit code 75 that they stopped for a preemption with their state saved; so does the launcher",
        covers=lambda f: (f.case, f.aspect, f.torch, f.ours) == ("exit 75", "exit code", 1, 75),
    ),
    Difference(
        name="help text",
        reason="the help describes our options in our words, and our launch form is not deprecated",
        covers=lambda f: f.case == "help" and f.aspect in ("stdout", "stderr"),
    ),
)


def sampled() -> list[Any]:
    """All cases; those that the default suite has no time for are left to `make soak`."""
    return [
        case if at % DEFAULT_EVERY == 0 else pytest.param(case, marks=pytest.mark.soak) for at, case in enumerate(CASES)
    ]


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    started = Zygote({k: v for k, v in os.environ.items() if k in INHERITED})
    yield started
    started.close()


def check_case(case: Case, observed: Observation) -> None:
    """Fails if torch's launcher does not show what the case is about."""
    codes = set(observed.aspects["exit code"].values())
    reports = len(observed.aspects["reports"])
    if codes != {case.exit_code} or (reports != case.reports if case.reports >= 0 else not reports):
        words = "\n".join(observed.aspects["launcher's own words"].values())
        pytest.fail(f"under torch: exit code {codes}, {reports} reports\n{words}", pytrace=False)


def differing(case: Case, form: Form, torch: Observation, ours: Observation) -> list[str]:
    findings = compare(case, torch, ours, DIFFERENCES)
    problems = [f"{form.name} | {finding}" for finding in findings]
    problems += [f"{form.name} | left behind | {process}" for process in ours.left_behind]
    said = ours.aspects["launcher's own words"].values() if findings else ()
    return problems + [f"{form.name} said | {line}" for line in said]


@pytest.mark.parametrize("case", sampled(), ids=lambda c: c.id)
def test_does_what_torch_does(case: Case, zygote: Zygote) -> None:
    whole = case.whole or case in USAGE or case.id in WRONG_VALUES or CASES.index(case) % WHOLE_EVERY == 0
    check_parity(case, [form if whole else form.in_zygote for form in OURS], zygote)


@pytest.mark.soak
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_whole_commands_do_what_torch_does(case: Case, zygote: Zygote) -> None:
    check_parity(case, OURS, zygote)


def check_parity(case: Case, forms: Sequence[Form], zygote: Zygote) -> None:
    ours = [form for form in forms if form.reference in case.forms]
    references = [form for name, form in TORCH.items() if name in {own.reference for own in ours}]
    observed = observe(case, [*references, *ours], zygote)
    by_reference = {form.reference: seen for form, seen in zip(references, observed, strict=False)}
    for seen in by_reference.values():
        check_case(case, seen)
    problems: list[str] = []
    for form, seen in zip(ours, observed[len(references) :], strict=True):
        problems += differing(case, form, by_reference[form.reference], seen)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


@pytest.mark.parametrize("name", ["nproc 2", "tee both", "restart in vain"])
def test_preloaded_torch_does_what_the_command_does(name: str, zygote: Zygote) -> None:
    case = next(c for c in CASES if c.id == name)
    preloaded, command = observe(case, [TORCH["run"], REAL_TORCH], zygote)
    check_case(case, preloaded)
    problems = differing(case, REAL_TORCH, preloaded, command)
    if problems:
        pytest.fail("\n".join(problems), pytrace=False)


def test_cases_have_names_of_their_own() -> None:
    assert len({case.id for case in CASES}) == len(CASES) >= 180


def test_differences_cover_nothing_else() -> None:
    """A worker's line, a torch variable that is missing, another exit code: found."""
    found = [
        Finding(case="x", aspect="stderr", where="workers", torch=[WORKER_MARK], ours=[]),
        Finding(case="x", aspect="reports", where="0.0.environ.TORCHELASTIC_RUN_ID", torch="a", ours=None),
        Finding(case="x", aspect="exit code", where="node 0", torch=1, ours=75),
        Finding(case="exit 75", aspect="exit code", where="node 0", torch=1, ours=0),
        Finding(case="x", aspect="stdout", where="lines", torch=[], ours=[""]),
    ]
    assert not [(f, d.name) for f in found for d in DIFFERENCES if d.covers(f)]


def test_flat_names_every_leaf() -> None:
    assert flat({"a": {"b": 1, "c": {}}, "d": [2]}) == {"a.b": 1, "a.c": {}, "d": [2]}
