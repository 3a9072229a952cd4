"""The launch kits: what is rendered, that it is valid where it goes, and that it does what it says."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
KITS = ("kubeflow", "kubernetes", "slurm", "ssh", "systemd")
README_COMMANDS = re.findall(
    r"^python (launch/render\.py (?:[a-z]+ --script) .*)$", (LAUNCH / "README.md").read_text(), re.MULTILINE
)
DEADLINE_S = 60
PREEMPTED = 75

REQUIRED = {
    "slurm": {},
    "kubernetes": {"image": "registry.example/train:1"},
    "kubeflow": {"image": "registry.example/train:1"},
    "ssh": {"hosts": "a b"},
    "systemd": {"user": "trainer"},
}
EVERYTHING = {
    "slurm": {
        "nodes": 2,
        "gpus_per_node": "a100:8",
        "cpus_per_node": 64,
        "memory_per_node": "64G",
        "partition": "gpu",
        "account": "me",
        "setup_file": "/x y/env.sh",
    },
    "kubernetes": {"nodes": 2, "gpus_per_node": 8, "volume_claim": "checkpoints"},
    "kubeflow": {"nodes": 2, "gpus_per_node": 8, "volume_claim": "checkpoints"},
    "ssh": {"addresses": "10.0.0.1 10.0.0.2"},
    "systemd": {"working_directory": "/opt/run"},
}
HOSTILE = (
    "plain",
    "",
    "two words",
    'it\'s "quoted" `id` $(id) $HOME ${HOME} $$ \\ \\n',
    "first\nsecond: [x]\n  \n#SBATCH --uid=0\nExecStart=/bin/false\n---\n",
    "$(POD_IP) %n %h @{name} ; & | > * ~ !x #",
    "\ttab \r\x07\x1b \x7f\x85\u2028 ünïcode \U0001f600",
    "-leading",
)


def render(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, LAUNCH / "render.py", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)


def settings(values: dict[str, object]) -> list[str]:
    return [argument for name, value in values.items() for argument in ("--set", f"{name}={value}")]


def render_to(out: Path, kit: str, *arguments: object, **values: object) -> Path:
    """The first file of a kit, written below ``out``."""
    done = render(kit, "--script", "train.py", *settings(REQUIRED[kit] | values), *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    names = {
        "kubeflow": "trainjob.yaml",
        "kubernetes": "job.yaml",
        "slurm": "job.sbatch",
        "ssh": "hosts.sh",
        "systemd": "run.service",
    }
    return out / names[kit]


@dataclass
class Launchers:
    """Stand-ins for the launcher: each writes down how it was called, and says so through a pipe.

    With ``STAND_IN_WAITS=<node>`` or ``all`` they stay until a signal comes and then end with 75; otherwise with
    ``STAND_IN_STATUS`` or ``STAND_IN_STATUS_<node>``, the one of ``STAND_IN_GO=<node>`` only after ``go``.
    """

    directory: Path
    ready: int

    @property
    def command(self) -> str:
        return shlex.join([sys.executable, str(self.directory / "launcher.py")])

    @property
    def environ(self) -> dict[str, str]:
        return os.environ | {
            "STAND_IN_DIR": str(self.directory),
            "PATH": f"{self.directory / 'bin'}:{os.environ['PATH']}",
        }

    def add_program(self, name: str, text: str) -> None:
        path = self.directory / "bin" / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "${{0##*/}} $*" >> "$STAND_IN_DIR/calls"\n{text}\n')
        path.chmod(0o755)

    def calls(self, program: str) -> list[str]:
        lines = (self.directory / "calls").read_text().splitlines()
        return [line for line in lines if line.split()[0] == program]

    def wait_for(self, number: int) -> list[int]:
        """Process ids of the launchers that are up."""
        text = b""
        while text.count(b"\n") < number:
            assert select.select([self.ready], [], [], DEADLINE_S)[0], "no launcher came up"
            text += os.read(self.ready, 1)
        return [int(line) for line in text.split()]

    def go(self) -> None:
        (self.directory / "go").write_text("")

    def seen(self) -> list[dict]:
        return sorted(
            (json.loads(path.read_text()) for path in self.directory.glob("seen-*")), key=lambda one: one["node"]
        )

    def got(self) -> list[str]:
        return [path.read_text() for path in self.directory.glob("signal-*")]


LAUNCHER = """
import json, os, pathlib, signal, sys

directory = pathlib.Path(os.environ["STAND_IN_DIR"])
node = os.environ.get("SLURM_NODEID") or os.environ.get("STAND_IN_NODE") or os.environ.get("JOB_COMPLETION_INDEX") or "0"

def stop(number, frame):
    (directory / f"signal-{node}").write_text(signal.Signals(number).name)
    raise SystemExit(75)

for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1"):
    signal.signal(getattr(signal, name), stop)
# Not signal.pause(): a signal that comes just before it would be handled only after the next one.
woken, wake = os.pipe()
os.set_blocking(wake, False)
signal.set_wakeup_fd(wake)
seen = dict(node=node, arguments=sys.argv[1:], environ=dict(os.environ), cwd=os.getcwd())
(directory / f"seen-{node}-{os.getpid()}").write_text(json.dumps(seen))
with open(directory / "ready", "w") as ready:
    print(os.getpid(), file=ready)
if os.environ.get("STAND_IN_GO") == node:
    (directory / "go").read_text()
while os.environ.get("STAND_IN_WAITS", "") in ("all", node):
    os.read(woken, 1)
sys.exit(int(os.environ.get(f"STAND_IN_STATUS_{node}", os.environ.get("STAND_IN_STATUS", "0"))))
"""


@pytest.fixture
def launchers(tmp_path: Path) -> Iterator[Launchers]:
    directory = tmp_path / "stand-in"
    (directory / "bin").mkdir(parents=True)
    (directory / "launcher.py").write_text(LAUNCHER)
    os.mkfifo(directory / "ready")
    os.mkfifo(directory / "go")
    ready = os.open(directory / "ready", os.O_RDWR)
    yield Launchers(directory, ready)
    os.close(ready)


def script_of(kit: str, text: str) -> str:
    """The shell script in a manifest, as the container gets it: Kubernetes makes $ of $$."""
    documents = list(yaml.safe_load_all(text))
    if kit == "kubeflow":
        command = documents[1]["spec"]["trainer"]["command"]
    else:
        command = documents[1]["spec"]["template"]["spec"]["containers"][0]["command"]
    assert command[:2] == ["sh", "-c"]
    assert "$" not in command[2].replace("$$", "")
    return command[2].replace("$$", "$")


# The command line


def test_list_names_every_kit_and_parameter():
    done = render("--list")
    assert done.returncode == 0
    for kit in KITS:
        assert f"\n{kit}: " in "\n" + done.stdout
    one = render("--list", "slurm")
    assert "max_restarts" in one.stdout and "kubernetes" not in one.stdout


@pytest.mark.parametrize("command", README_COMMANDS)
def test_commands_of_the_readme(command, tmp_path):
    words = shlex.split(command)
    done = subprocess.run([sys.executable, ROOT / words[0], *words[1:]], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "==> commands that submit it <==" in done.stdout
    assert not list(tmp_path.iterdir()), "a dry run writes nothing"


def test_readme_has_a_command_for_every_kit():
    assert {shlex.split(command)[1] for command in README_COMMANDS} == set(KITS)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "which kit?"),
        (["slurn"], "Did you mean slurm?"),
        (["slurm"], "needs a value, --set NAME=VALUE, for: script ("),
        (["kubernetes"], "script (the training script, as the machines that run it see it); image ("),
        (["slurm", "--script", "t.py", "--set", "nodez=2"], "no parameter 'nodez'. Did you mean nodes?"),
        (["slurm", "--script", "t.py", "--set", "nodes"], "--set takes NAME=VALUE, not 'nodes'"),
        (["slurm", "--script", ""], "script must not be empty"),
        (["slurm", "--script", "t.py", "--set", "nodes=two"], "nodes is a number, not 'two'"),
        (["slurm", "--script", "t.py", "--set", "nodes=010"], "nodes is a number, not '010'"),
        (["slurm", "--script", "t.py", "--set", "nodes=0"], "nodes has to match [1-9][0-9]*"),
        (["slurm", "--script", "t.py", "--set", "partition=a\n#SBATCH --uid=0"], "partition takes letters"),
        (["slurm", "--script", "t.py", "--set", "arguments='"], "No closing quotation"),
        (["slurm", "--script", "t.py", "--set", "environment=A=1 B"], "'B' does not"),
        (["slurm", "--script", "t.py", "--set", "launcher= "], "launcher must not be empty"),
        (["slurm", "--script", "t.py", "--set", "stop_timeout_s=60"], "has to be greater than shutdown_timeout_s=60"),
        (["slurm", "--script", b"\xff.py"], "a value is Unicode text"),
        (["kubernetes", "--script", "t.py", "--set", "image=i", "--set", "name=Train_1"], "name has to match"),
        (["ssh", "--script", "t.py", "--set", "hosts=-oProxyCommand=id"], "hosts has to match"),
        (["slurm", "--scrip", "t.py"], "unrecognized arguments"),
    ],
)
def test_wrong_usage_ends_with_2_and_one_clear_line(arguments, complaint):
    done = subprocess.run([sys.executable, LAUNCH / "render.py", *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert complaint in done.stderr.splitlines()[-1]
    assert done.stdout == ""


@pytest.mark.parametrize("kit", KITS)
def test_every_parameter_is_used_and_described(kit, tmp_path):
    templates = "".join(path.read_text() for path in (LAUNCH / kit).iterdir())
    listed = render("--list", kit).stdout
    names = re.findall(r"^  (\w+) ", listed, re.MULTILINE)
    assert names and set(names) | {"out", "pod.sh", "node.sh"} >= set(re.findall(r"@\{\??([\w.]+)\}", templates))
    assert all(f"@{{{name}}}" in templates for name in names)


def test_submit_says_which_program_is_missing(tmp_path):
    command = [sys.executable, LAUNCH / "render.py", "slurm", "--script", "t.py", "--submit"]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "sbatch is not on this machine" in done.stderr
    assert (tmp_path / "train-slurm" / "job.sbatch").exists()


# What is rendered is valid where it goes


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
@pytest.mark.parametrize("kit", ["slurm", "ssh", "kubernetes", "kubeflow"])
def test_scripts_are_good_shell(kit, values, tmp_path):
    path = render_to(tmp_path, kit, **values.get(kit, {}), environment="A=1 'B=x y'", working_directory="/a b")
    shell = "bash"
    if path.suffix == ".yaml":
        shell, path = "sh", tmp_path / "pod.sh"
        path.write_text(script_of(kit, (tmp_path / ("trainjob.yaml" if kit == "kubeflow" else "job.yaml")).read_text()))
    assert subprocess.run([shell, "-n", path], capture_output=True, text=True).stderr == ""
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("no shellcheck for this platform; the syntax is right")
    done = subprocess.run([shellcheck, f"--shell={shell}", "--exclude=SC1091", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("version", ["1.31", kubernetes_validate.latest_version()])
@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_manifests_fit_the_schema_of_kubernetes(values, version, tmp_path):
    service, job = yaml.safe_load_all(render_to(tmp_path, "kubernetes", **values.get("kubernetes", {})).read_text())
    for document in (service, job):
        kubernetes_validate.validate(document, version, strict=True)
    pod = job["spec"]["template"]["spec"]
    assert service["spec"]["clusterIP"] == "None" and pod["subdomain"] == service["metadata"]["name"]
    assert pod["terminationGracePeriodSeconds"] > 60
    assert job["spec"]["podFailurePolicy"]["rules"][0] == {
        "action": "Ignore",
        "onExitCodes": {"containerName": pod["containers"][0]["name"], "operator": "In", "values": [PREEMPTED]},
    }


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_train_job_fits_kubeflow(values, tmp_path):
    # There is no kept library with the schema of Kubeflow's own objects; the Job inside one is Kubernetes' own.
    runtime, train_job = yaml.safe_load_all(render_to(tmp_path, "kubeflow", **values.get("kubeflow", {})).read_text())
    assert {document["apiVersion"] for document in (runtime, train_job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert set(train_job["spec"]) == {"runtimeRef", "trainer"}
    assert set(train_job["spec"]["trainer"]) == {"numNodes", "image", "command", "resourcesPerNode"}
    assert train_job["spec"]["runtimeRef"]["name"] == runtime["metadata"]["name"]
    assert set(runtime["spec"]) == {"mlPolicy", "template"}
    job_set = runtime["spec"]["template"]["spec"]
    assert set(job_set) == {"failurePolicy", "replicatedJobs"}
    (replicated,) = job_set["replicatedJobs"]
    assert replicated["name"] == "node" and set(replicated) == {"name", "template"}
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "node"},
        "spec": replicated["template"]["spec"],
    }
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("values", [{}, EVERYTHING], ids=["defaults", "everything"])
def test_unit_is_accepted_by_systemd(values, tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    path = render_to(tmp_path, "systemd", **values.get("systemd", {}), user="daemon", arguments=shlex.join(HOSTILE))
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True)
    assert f"{tmp_path}" not in done.stderr, done.stderr


def test_unit_goes_on_after_a_preemption_and_stops_when_done(tmp_path):
    unit = render_to(tmp_path, "systemd", stop_timeout_s=70).read_text().splitlines()
    for line in (
        "Restart=on-failure",
        "RestartForceExitStatus=75",
        "KillSignal=SIGTERM",
        "KillMode=mixed",
        "TimeoutStopSec=70",
    ):
        assert line in unit
    assert "WantedBy=multi-user.target" in unit
    assert any(line.startswith("ExecStopPost=") and "systemctl disable" in line for line in unit)


# Values are data


def words_of_unit(line: str) -> list[str]:
    """The words of a unit's command line, as systemd reads what render.py writes."""
    words = []
    for quoted, bare in re.findall(r'"((?:[^"\\]|\\.)*)"|(\S+)', line):
        word = re.sub(
            r"\\(?:x([0-9a-f]{2})|(.))", lambda found: chr(int(found[1], 16)) if found[1] else found[2], quoted or bare
        )
        assert not re.search(r"\$(?!\$)|%(?!%)", re.sub(r"\$\$|%%", "", word))
        words.append(word.replace("$$", "$").replace("%%", "%"))
    return words


@pytest.mark.parametrize("kit", KITS)
def test_values_reach_the_launcher_as_they_are(kit, tmp_path, launchers):
    directory = tmp_path / HOSTILE[3].replace("/", "") / "x y"
    directory.mkdir(parents=True)
    script = HOSTILE[4]
    given = {
        "arguments": shlex.join(HOSTILE),
        "environment": shlex.join(["A=" + HOSTILE[3], "B=" + HOSTILE[4]]),
        "launcher": launchers.command,
    }
    if kit != "systemd":
        given["working_directory"] = str(directory)
    path = render_to(tmp_path, kit, "--script", script, **(given | ({"hosts": "a"} if kit == "ssh" else {})))
    if kit == "systemd":
        (line,) = [line for line in path.read_text().split("\n") if line.startswith("ExecStart=")]
        subprocess.run(words_of_unit(line.removeprefix("ExecStart=")), env=launchers.environ, cwd=directory, check=True)
    elif path.suffix == ".yaml":
        environ = launchers.environ | {"POD_IP": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}
        subprocess.run(["sh", "-c", script_of(kit, path.read_text())], env=environ, check=True)
    else:
        launchers.add_program("ssh", 'exec sh -c "${!#}"')
        launchers.add_program("srun", 'while [[ $1 == -* ]]; do shift; done; exec "$@"')
        environ = launchers.environ | {"SLURM_JOB_ID": "7"}
        subprocess.run(["bash", path], env=environ, check=True, stdin=subprocess.DEVNULL)
    (seen,) = launchers.seen()
    assert seen["arguments"][-len(HOSTILE) - 1 :] == [script, *HOSTILE]
    assert seen["arguments"][0] == "--standalone"
    assert seen["environ"]["A"] == HOSTILE[3] and seen["environ"]["B"] == HOSTILE[4]
    assert seen["cwd"] == str(directory)


# Slurm

SBATCH = """
while [[ $1 == -* ]]; do shift; done
export SLURM_JOB_ID=12345 SLURM_JOB_NODELIST='a[1-2]'
bash "$1"
"""
SRUN = """
while [[ $1 == -* ]]; do shift; done
SLURM_NODEID=0 "$@" & first=$!
SLURM_NODEID=1 "$@" & second=$!
if [[ -n $STAND_IN_NOTICE ]]; then
    read -r _ < "$STAND_IN_DIR/notice"
    kill -s "$STAND_IN_NOTICE" "$first" "$second"
fi
wait "$first"; status=$?
wait "$second"; other=$?
exit $((status > other ? status : other))
"""
SCONTROL = '[[ $1 == show ]] && printf "a1\\na2\\n"; true'


@pytest.fixture
def slurm(launchers: Launchers) -> Launchers:
    for name, text in {
        "sbatch": SBATCH,
        "srun": SRUN,
        "scontrol": SCONTROL,
        "squeue": "echo ${STAND_IN_STATE:-RUNNING}",
        "scancel": "",
    }.items():
        launchers.add_program(name, text)
    return launchers


def submit_slurm(
    slurm: Launchers, tmp_path: Path, values: dict[str, object], **environ: str
) -> subprocess.CompletedProcess[str]:
    given = settings({"launcher": slurm.command, "nodes": 2, "sbatch_options": "--qos=low"} | values)
    command = [
        sys.executable,
        LAUNCH / "render.py",
        "slurm",
        "--script",
        "train.py",
        *given,
        "--out",
        tmp_path / "out",
        "--submit",
    ]
    return subprocess.run(command, env=slurm.environ | environ, capture_output=True, text=True, timeout=DEADLINE_S)


def test_slurm_starts_one_launcher_per_node_that_meet_on_the_first(slurm, tmp_path):
    done = submit_slurm(slurm, tmp_path, {"launcher_options": "--max-restarts=3"})
    assert done.returncode == 0, done.stderr
    assert slurm.calls("sbatch") == [f"sbatch --qos=low {tmp_path}/out/job.sbatch"]
    first, second = slurm.seen()
    assert first["arguments"] == second["arguments"]
    assert {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a1:22345", "--rdzv-id=12345-0"} <= set(
        first["arguments"]
    )
    assert first["arguments"][-2:] == ["--max-restarts=3", "train.py"]
    assert not [call for call in slurm.calls("scontrol") if "requeue" in call]


@pytest.mark.parametrize("notice", ["USR1", "TERM"])
def test_slurm_requeues_after_a_notice(notice, slurm, tmp_path):
    os.mkfifo(slurm.directory / "notice")
    given = settings({"launcher": slurm.command, "nodes": 2})
    command = [
        sys.executable,
        LAUNCH / "render.py",
        "slurm",
        "--script",
        "train.py",
        *given,
        "--out",
        tmp_path / "out",
        "--submit",
    ]
    environ = slurm.environ | {"STAND_IN_WAITS": "all", "STAND_IN_NOTICE": notice}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE) as process:
        slurm.wait_for(2)
        (slurm.directory / "notice").write_text("now\n")
        process.communicate(timeout=DEADLINE_S)
    assert process.returncode == PREEMPTED
    assert slurm.got() == [f"SIG{notice}"] * 2
    assert slurm.calls("scontrol")[1:] == ["scontrol requeue 12345"]


@pytest.mark.parametrize(
    ("environ", "values", "requeued"),
    [
        ({"STAND_IN_STATUS": "75"}, {}, ["scontrol requeue 12345"]),
        (
            {"STAND_IN_STATUS": "75", "SLURM_ARRAY_JOB_ID": "12300", "SLURM_ARRAY_TASK_ID": "4"},
            {},
            ["scontrol requeue 12300_4"],
        ),
        ({"STAND_IN_STATUS": "75", "SLURM_RESTART_COUNT": "3"}, {"max_restarts": 3}, []),
        ({"STAND_IN_STATUS": "75", "STAND_IN_STATE": "CANCELLED"}, {}, []),
        ({"STAND_IN_STATUS": "75", "STAND_IN_STATUS_1": "137"}, {}, []),
        ({"STAND_IN_STATUS": "1"}, {}, []),
        ({"STAND_IN_STATUS": "0"}, {}, []),
    ],
    ids=["preempted", "array task", "too often", "cancelled", "one killed", "failed", "done"],
)
def test_slurm_requeues_what_was_preempted_and_nothing_else(environ, values, requeued, slurm, tmp_path):
    done = submit_slurm(slurm, tmp_path, values, **environ)
    assert done.returncode == int(environ.get("STAND_IN_STATUS_1", environ["STAND_IN_STATUS"]))
    assert [call for call in slurm.calls("scontrol") if "requeue" in call] == requeued
    assert ("max_restarts" in done.stderr) == (values != {})


@pytest.mark.parametrize(("status", "cancelled"), [(75, False), (0, True), (1, True)])
def test_slurm_chain_goes_on_only_after_a_preemption(status, cancelled, slurm, tmp_path):
    environ = {"STAND_IN_STATUS": str(status), "SLURM_ARRAY_JOB_ID": "12300", "SLURM_ARRAY_TASK_ID": "1"}
    done = submit_slurm(slurm, tmp_path, {"chain": 5}, **environ)
    assert done.returncode == status
    assert "#SBATCH --array=1-5%1" in (tmp_path / "out" / "job.sbatch").read_text()
    assert not [call for call in slurm.calls("scontrol") if "requeue" in call]
    assert slurm.calls("scancel") == (["scancel --state=PENDING 12300"] if cancelled else [])


# Kubernetes


@pytest.mark.parametrize("kit", ["kubernetes", "kubeflow"])
def test_pods_meet_at_the_first(kit, launchers, tmp_path):
    text = render_to(tmp_path, kit, nodes=2, launcher=launchers.command).read_text()
    for index in ("0", "1"):
        environ = {
            "POD_IP": f"10.0.0.{index}",
            "JOB_COMPLETION_INDEX": index,
            "PET_MASTER_ADDR": "train-node-0-0.train",
        }
        subprocess.run(["sh", "-c", script_of(kit, text)], env=launchers.environ | environ, check=True)
    for index, seen in enumerate(launchers.seen()):
        endpoint = {"kubernetes": "train-0.train:29400", "kubeflow": "train-node-0-0.train:29400"}[kit]
        conf = f"--rdzv-conf=is_host={int(index == 0)},join_timeout=1800,read_timeout=1800"
        assert {f"--rdzv-endpoint={endpoint}", f"--local-addr=10.0.0.{index}", conf} <= set(seen["arguments"])


def test_submit_hands_the_written_file_to_kubectl(launchers, tmp_path):
    launchers.add_program("kubectl", "exit 3")
    arguments = [
        "--script",
        "t.py",
        "--set",
        "image=i",
        "--set",
        "namespace=team",
        "--out",
        tmp_path / "out",
        "--submit",
    ]
    done = subprocess.run(
        [sys.executable, LAUNCH / "render.py", "kubernetes", *arguments], env=launchers.environ, capture_output=True
    )
    assert done.returncode == 3, "the status of what was run"
    assert launchers.calls("kubectl") == [f"kubectl apply --namespace=team --filename={tmp_path}/out/job.yaml"]


def test_submit_stops_at_the_first_command_that_fails(launchers, tmp_path):
    launchers.add_program("install", "")
    launchers.add_program("systemctl", "[[ $1 != daemon-reload ]] || exit 4")
    arguments = ["--script", "/t.py", "--set", "user=me", "--out", tmp_path, "--submit"]
    done = subprocess.run(
        [sys.executable, LAUNCH / "render.py", "systemd", *arguments], env=launchers.environ, capture_output=True
    )
    assert done.returncode == 4
    assert launchers.calls("install") == [
        f"install -D -m 0644 {tmp_path}/run.service /etc/systemd/system/train.service"
    ]
    assert launchers.calls("systemctl") == ["systemctl daemon-reload"]


# Plain hosts

FAKE_SSH = 'export STAND_IN_NODE=${*: -2:1}; exec sh -c "${!#}"'


@pytest.fixture
def hosts_script(launchers: Launchers, tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    launchers.add_program("ssh", FAKE_SSH)
    started = []

    def start(values: dict[str, object] | None = None, **environ: str) -> subprocess.Popen[str]:
        path = render_to(
            tmp_path / "out", "ssh", **({"hosts": "a user@b", "launcher": launchers.command} | (values or {}))
        )
        everything = launchers.environ | {"TMPDIR": str(tmp_path)} | environ
        started.append(
            subprocess.Popen(
                ["bash", path],
                env=everything,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def wait_until_gone(processes: list[int]) -> None:
    """Waits on descriptors of the processes, which are not children of this one."""
    for descriptor in processes:
        assert select.select([descriptor], [], [], DEADLINE_S)[0], "a launcher is still there"
        os.close(descriptor)


def test_ssh_starts_a_launcher_per_host(hosts_script, launchers, tmp_path):
    process = hosts_script()
    assert process.wait(DEADLINE_S) == 0
    a, b = launchers.seen()
    assert (a["node"], b["node"]) == ("a", "user@b")
    common = {"--nnodes=2", "--rdzv-backend=c10d", "--rdzv-endpoint=a:29400"}
    assert {*common, "--local-addr=a", "--rdzv-conf=is_host=1,join_timeout=120,read_timeout=120"} <= set(a["arguments"])
    assert {*common, "--local-addr=b", "--rdzv-conf=is_host=0,join_timeout=120,read_timeout=120"} <= set(b["arguments"])
    assert not list(tmp_path.glob("tmp.*")), "no pipes are left"


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1], ids=lambda number: number.name
)
def test_ssh_forwards_signals_to_every_launcher(number, hosts_script, launchers):
    process = hosts_script(STAND_IN_WAITS="all")
    launchers.wait_for(2)
    os.killpg(process.pid, number)  # as a terminal does: to all processes of the foreground
    assert process.wait(DEADLINE_S) == PREEMPTED
    assert launchers.got() == [number.name] * 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_ssh_forwards_a_signal_to_the_script_alone(number, hosts_script, launchers):
    process = hosts_script(STAND_IN_WAITS="all")
    launchers.wait_for(2)
    process.send_signal(number)
    assert process.wait(DEADLINE_S) == PREEMPTED
    assert launchers.got() == [number.name] * 2


def test_ssh_leaves_no_launcher_when_the_script_is_killed(hosts_script, launchers):
    process = hosts_script(STAND_IN_WAITS="all")
    watched = [os.pidfd_open(pid) for pid in launchers.wait_for(2)]
    process.kill()
    wait_until_gone(watched)
    assert launchers.got() == ["SIGTERM"] * 2


def test_ssh_fails_if_one_host_fails_and_stops_the_others(hosts_script, launchers):
    process = hosts_script(STAND_IN_WAITS="a", STAND_IN_STATUS="1", STAND_IN_GO="user@b")
    launchers.wait_for(2)
    launchers.go()
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert errors.splitlines()[0] == "launch: user@b ended with status 1"
    assert launchers.got() == ["SIGTERM"], "the other one was stopped"


def test_ssh_stops_hosts_that_stay_although_one_has_saved_its_state(hosts_script, launchers):
    patience = {"shutdown_timeout_s": 0, "stop_timeout_s": 1}
    process = hosts_script(patience, STAND_IN_WAITS="a", STAND_IN_STATUS="75", STAND_IN_GO="user@b")
    launchers.wait_for(2)
    launchers.go()
    assert process.wait(DEADLINE_S) == PREEMPTED
    assert launchers.got() == ["SIGTERM"]


def test_ssh_reports_hosts_that_cannot_be_reached(hosts_script, launchers):
    launchers.add_program("ssh", 'echo "ssh: no route" >&2; exit 255')
    process = hosts_script()
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 255
    assert "launch: a ended with status 255" in errors


def test_ssh_wants_an_address_for_every_host(hosts_script):
    process = hosts_script({"addresses": "10.0.0.1"})
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (2, "launch: 2 hosts, but 1 addresses\n")


# One kit for real: two hosts that are network namespaces


@dataclass(frozen=True, kw_only=True)
class Namespaces:
    hosts: tuple[str, str]
    addresses: tuple[str, str]

    def processes(self) -> list[str]:
        return [pid for host in self.hosts for pid in ip("netns", "pids", host).split()]


def ip(*arguments: str) -> str:
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def namespaces() -> Iterator[Namespaces]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and the ip command")
    hosts = tuple(f"ttkit{os.getpid()}{side}" for side in "ab")
    made = []
    try:
        for host in hosts:
            try:
                ip("netns", "add", host)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            made.append(host)
        ip("-n", hosts[0], "link", "add", "launch0", "type", "veth", "peer", "name", "launch0", "netns", hosts[1])
        addresses = ("10.87.0.1", "10.87.0.2")
        for host, address in zip(hosts, addresses, strict=True):
            ip("-n", host, "address", "add", f"{address}/30", "dev", "launch0")
            ip("-n", host, "link", "set", "launch0", "up")
            ip("-n", host, "link", "set", "lo", "up")
        yield Namespaces(hosts=hosts, addresses=addresses)
    finally:
        for host in made:  # the link goes with them
            for pid in ip("netns", "pids", host).split():
                os.kill(int(pid), signal.SIGKILL)
            ip("netns", "delete", host)


@pytest.fixture(params=[pytest.param("torch.distributed.run", marks=pytest.mark.soak), "torchtrainer run"])
def real_launcher(request) -> str:
    words = [sys.executable, "-m", *request.param.split()]
    done = subprocess.run([*words, "--help"], capture_output=True, text=True, timeout=DEADLINE_S)
    if done.returncode:
        pytest.skip(f"{request.param}: {done.stderr.strip().splitlines()[-1]}")
    return shlex.join(words)


TRAIN = """
import os, sys, torch, torch.distributed as dist

dist.init_process_group("gloo")
total = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(total)
with open(sys.argv[1] + "/" + str(dist.get_rank()), "w") as file:
    print(dist.get_world_size(), int(total.item()), os.environ["GROUP_RANK"], os.environ["MASTER_ADDR"], file=file)
if len(sys.argv) > 2:
    import signal
    # Not signal.pause(): a signal that comes just before it would be handled only after the next one.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
with open(sys.argv[1] + "/ready", "w") as ready:
    print(os.getpid(), file=ready)
if len(sys.argv) > 2:
    os.read(woken, 1)
dist.destroy_process_group()
"""


def start_over_namespaces(
    namespaces: Namespaces, launchers: Launchers, launcher: str, *arguments: str
) -> subprocess.Popen[str]:
    script = launchers.directory / "train it.py"
    script.write_text(TRAIN)
    launchers.add_program("ssh", 'exec ip netns exec "${*: -2:1}" sh -c "${!#}"')
    values = settings(
        {
            "hosts": " ".join(namespaces.hosts),
            "addresses": " ".join(namespaces.addresses),
            "launcher": launcher,
            "environment": "GLOO_SOCKET_IFNAME=launch0 OMP_NUM_THREADS=1",
            "processes_per_node": 2,
            "arguments": shlex.join([str(launchers.directory), *arguments]),
        }
    )
    command = [
        sys.executable,
        LAUNCH / "render.py",
        "ssh",
        "--script",
        script,
        *values,
        "--out",
        launchers.directory / "out",
        "--submit",
    ]
    return subprocess.Popen(
        command, env=launchers.environ, cwd=ROOT, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.slow
def test_ssh_kit_trains_over_two_network_namespaces(namespaces, launchers, real_launcher):
    process = start_over_namespaces(namespaces, launchers, real_launcher)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, errors
    seen = [(launchers.directory / str(rank)).read_text().split() for rank in range(4)]
    assert [line[:2] for line in seen] == [["4", "10"]] * 4
    assert sorted(line[2] for line in seen) == ["0", "0", "1", "1"]
    assert {line[3] for line in seen} <= set(namespaces.addresses)
    assert namespaces.processes() == []


@pytest.mark.slow
def test_ssh_kit_leaves_nothing_behind_in_the_namespaces(namespaces, launchers, real_launcher):
    process = start_over_namespaces(namespaces, launchers, real_launcher, "wait")
    watched = [os.pidfd_open(pid) for pid in launchers.wait_for(4)]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert process.returncode != 0
    wait_until_gone(watched)
    assert namespaces.processes() == []
