"""Nodes on one machine: network namespaces on a bridge of their own, launchers in them, and a desk where their workers report.

Every :class:`Lan` is an island: its addresses and ports collide with nothing on the machine, nor with another test's. A node
has a host name, a hosts file and one address of its own; files and Unix sockets are the machine's, as on a shared file system.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

DEADLINE_S = 60.0
"""Only a deadlock takes this long."""
GONE_S = 2.0
"""How long after a launcher's end its processes may still be there."""
ENTER = 'echo "$1" > /proc/sys/kernel/hostname && mount --bind "$2" /etc/hosts && cd "$3" && unset OLDPWD && shift 3 && exec "$@"'
"""What a process does on its way into a node: ``ip netns exec`` gave it mounts of its own, ``unshare`` a host name."""

SIOCETHTOOL, ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO = 0x8946, 0x17, 0x1F, 0x24
"""Of ``linux/ethtool.h``: switches what the sending hardware does."""

REPORT = """
import json, os, signal, socket, sys

desk = socket.socket(socket.AF_UNIX)
desk.connect(os.environ["DESK"])

def say(**what):
    desk.sendall(json.dumps(what).encode() + b"\\n")

def stop(number, frame):
    say(signal=number)
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)

def obey(command):
    name, *words = command.split()
    if name == "exit":
        sys.exit(int(words[0]))
    if name == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "connect":
        socket.create_connection((words[0], int(words[1])), timeout=30).close()
        say(connected=True)

signal.signal(signal.SIGTERM, stop)
say(environ=dict(os.environ), pid=os.getpid(), arguments=sys.argv[1:])
"""
"""The start of every worker script: it reports at the desk, with its environment."""
OBEY = """
for line in desk.makefile():
    obey(line)
sys.exit("the test has ended")
"""
"""The rest of most: do what the desk says. The desk's end is the worker's end, so that nothing outlives a test."""


def run_ip(*arguments: str) -> str:
    """Runs ``ip``; returns its standard output."""
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def let_the_sender_do_the_checksums(namespace: str) -> None:
    """Leaves nothing to the hardware: a frame that a program forwards has to be whole, and no longer than the line takes."""
    code = textwrap.dedent(f"""
        import array, fcntl, socket, struct
        for command in {(ETHTOOL_STXCSUM, ETHTOOL_STSO, ETHTOOL_SGSO)}:
            value = array.array("I", [command, 0])
            request = struct.pack("16sP", b"eth0", value.buffer_info()[0])
            fcntl.ioctl(socket.socket(), {SIOCETHTOOL}, request.ljust(40, b"\\0"))
    """)
    subprocess.run(["ip", "netns", "exec", namespace, sys.executable, "-c", code], check=True)


def pids_in(namespace: str) -> list[int]:
    return [int(pid) for pid in run_ip("netns", "pids", namespace).split()]


def command_of(pid: int) -> str:
    try:
        return f"{pid} " + Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # gone meanwhile
        return f"{pid}"


def remove_namespace(namespace: str) -> None:
    """Ends what runs in a namespace, and removes it."""
    for pid in pids_in(namespace):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run_ip("netns", "delete", namespace)


def remove_leftovers() -> None:
    """Removes the namespaces of test processes that were killed."""
    for line in run_ip("netns", "list").splitlines():
        name = line.split()[0]
        mark, _, rest = name.partition("-")
        owner = rest.partition("-")[0]
        if mark == "ttnode" and owner.isdigit() and not Path("/proc", owner).exists():
            with contextlib.suppress(subprocess.CalledProcessError):  # another test process was faster
                remove_namespace(name)


@functools.cache
def why_no_nodes() -> str | None:
    """Why there can be no nodes on this machine; None if there can."""
    if sys.platform != "linux":
        return "network namespaces are Linux's"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    missing = [program for program in ("ip", "unshare", "mount", "sh") if not shutil.which(program)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    try:
        remove_leftovers()
        with tempfile.TemporaryDirectory() as directory, Lan(Path(directory), count=1) as lan:
            subprocess.run(lan.nodes[0].command(["true"]), check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"
    return None


@dataclass(kw_only=True)
class Launcher:
    """A launcher that was started in a node. Its output goes to files, so that nobody has to read along."""

    node: Node
    process: subprocess.Popen[bytes]
    directory: Path

    @property
    def text(self) -> str:
        """What it wrote so far, standard output first."""
        return "\n".join((self.directory / name).read_text(errors="replace") for name in ("out", "err"))

    def await_text(self, text: str) -> None:
        """Waits until it has written something."""
        deadline = time.monotonic() + DEADLINE_S
        while text not in self.text:
            assert time.monotonic() < deadline, f"{self.node.name}: did not write {text!r}\n{self.text}"
            os.sched_yield()

    def finish(self, deadline_s: float = DEADLINE_S) -> int:
        """Waits for its end; returns the exit code."""
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.node.name}: not done after {deadline_s} s\n{self.text}") from None


@dataclass(frozen=True, kw_only=True)
class Node:
    """One namespace: a host name and an address."""

    number: int
    name: str
    address: str
    namespace: str
    switch: str
    directory: Path
    hosts: Path
    launchers: list[Launcher] = field(default_factory=list)

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one in this node, as the same process."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", ENTER, "sh"]
        return [*enter, self.name, str(self.hosts), str(self.directory), *command]

    def start(self, command: Sequence[str], environ: Mapping[str, str]) -> Launcher:
        """Starts a launcher, in a directory and with a temporary directory of its own."""
        directory = Path(tempfile.mkdtemp(prefix="launcher-", dir=self.directory))
        (directory / "tmp").mkdir()
        with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
            process = subprocess.Popen(
                self.command(command),
                env={**environ, "TMPDIR": str(directory / "tmp")},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        self.launchers.append(Launcher(node=self, process=process, directory=directory))
        return self.launchers[-1]

    @property
    def port(self) -> str:
        """Where its cable ends, in the namespace of the bridge."""
        return f"port{self.number}"

    def cut(self) -> None:
        """Takes its cable off the bridge: packets are lost without a word, in both directions."""
        run_ip("-n", self.switch, "link", "set", self.port, "nomaster")

    def heal(self) -> None:
        """Puts it back."""
        run_ip("-n", self.switch, "link", "set", self.port, "master", "bridge")

    def cut_towards(self, other: Node) -> None:
        """Loses the packets to another node; those from there arrive."""
        nobody = ("lladdr", "02:00:00:00:00:fe", "nud", "permanent", "dev", "eth0")
        run_ip("-n", self.namespace, "neighbour", "replace", other.address, *nobody)

    def heal_towards(self, other: Node) -> None:
        """Undoes `cut_towards`."""
        run_ip("-n", self.namespace, "neighbour", "delete", other.address, "dev", "eth0")

    def lose_power(self) -> None:
        """Ends all that runs here, without a packet that says so."""
        self.cut()
        for pid in pids_in(self.namespace):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def assert_empty(self) -> None:
        """Fails if a process still runs here after the time it is given."""
        deadline = time.monotonic() + GONE_S
        while (left := pids_in(self.namespace)) and time.monotonic() < deadline:
            os.sched_yield()
        assert not left, f"{self.name}: left behind: {[command_of(pid) for pid in left]}"


class Lan:
    """Some nodes on a bridge; a context manager.

    Args:
        directory: for the files of the nodes.
        count: how many nodes.
    """

    def __init__(self, directory: Path, *, count: int) -> None:
        self._stack = contextlib.ExitStack()
        # The kernel's name of an interface is short, that of a namespace is not.
        self._prefix = f"ttnode-{os.getpid()}-{secrets.token_hex(4)}"
        hosts = directory / "hosts"
        self.nodes = [
            Node(
                number=number,
                name=f"node-{number}",
                address=f"10.77.0.{number}",
                namespace=f"{self._prefix}-{number}",
                switch=f"{self._prefix}-lan",
                directory=directory / f"node-{number}",
                hosts=hosts,
            )
            for number in range(1, count + 1)
        ]
        entries = [f"{node.address} {node.name}.test {node.name}" for node in self.nodes]
        hosts.write_text("\n".join(["127.0.0.1 localhost", *entries, ""]))

    def __enter__(self) -> Lan:
        with contextlib.ExitStack() as stack:
            self._add_namespace(stack, switch := f"{self._prefix}-lan")
            run_ip("-n", switch, "link", "add", "bridge", "up", "type", "bridge")
            for node in self.nodes:
                node.directory.mkdir()
                namespace = self._add_namespace(stack, node.namespace)
                peer = ("peer", "name", "eth0", "netns", namespace)
                run_ip("-n", switch, "link", "add", node.port, "up", "master", "bridge", "type", "veth", *peer)
                run_ip("-n", namespace, "address", "add", f"{node.address}/24", "dev", "eth0")
                run_ip("-n", namespace, "link", "set", "eth0", "up")
                run_ip("-n", namespace, "link", "set", "lo", "up")
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        for launcher in (launcher for node in self.nodes for launcher in node.launchers):
            launcher.finish()

    def disturb(self, *, delay_s: float, loss: float, seed: int = 0) -> None:
        """Delays all packets from now on, and loses some."""
        for node in self.nodes:
            let_the_sender_do_the_checksums(node.namespace)
            node.cut()
        arguments = [str(seed), str(delay_s), str(loss), *(node.port for node in self.nodes)]
        bridge = [sys.executable, str(Path(__file__).with_name("slow_bridge.py")), *arguments]
        process = subprocess.Popen(
            ["ip", "netns", "exec", f"{self._prefix}-lan", *bridge], stdout=subprocess.PIPE, text=True
        )
        self._stack.callback(process.wait)
        self._stack.callback(process.kill)  # the last is done first
        assert process.stdout is not None
        with process.stdout as said:
            assert said.readline() == "forwards\n"

    @staticmethod
    def _add_namespace(stack: contextlib.ExitStack, name: str) -> str:
        run_ip("netns", "add", name)
        stack.callback(remove_namespace, name)
        return name


class Worker:
    """A worker as the desk sees it: what it said first, and a line to it."""

    def __init__(self, connection: socket.socket) -> None:
        connection.settimeout(DEADLINE_S)
        self._connection = connection
        self._file: TextIO = connection.makefile()
        hello = self.next()
        self.environ: dict[str, str] = hello["environ"]
        self.arguments: list[str] = hello["arguments"]
        self.pid: int = hello["pid"]

    def __getitem__(self, name: str) -> int:
        """A number from the environment."""
        return int(self.environ[name])

    def next(self) -> dict[str, Any]:
        """The next thing that it says; nothing, if it ended."""
        line = self._file.readline()
        found: dict[str, Any] = json.loads(line) if line else {}
        return found

    def tell(self, command: str) -> None:
        """Gives it something to do."""
        self._connection.sendall(command.encode() + b"\n")

    def ask(self, command: str) -> dict[str, Any]:
        """Gives it something to do, and waits for what it says next."""
        self.tell(command)
        return self.next()

    def close(self) -> None:
        self._file.close()
        self._connection.close()


class Desk:
    """Where workers report; a context manager."""

    def __init__(self) -> None:
        # Sockets have short paths; pytest's directories are too deep for one.
        self._directory = Path(tempfile.mkdtemp(prefix="tt-"))
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._directory / "desk"))
        self._listener.listen(64)
        self._workers: list[Worker] = []
        base = {k: v for k, v in os.environ.items() if not k.startswith(("PET_", "TORCHELASTIC_", "PYTEST_"))}
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS", "XDG_RUNTIME_DIR"):
            base.pop(name, None)
        self.environ = {**base, "DESK": str(self._directory / "desk")}

    def script(self, directory: Path, rest: str = OBEY) -> str:
        """Writes a worker script that reports here."""
        path = directory / "worker.py"
        path.write_text(REPORT + textwrap.dedent(rest))
        return str(path)

    def world(self, *, nodes: int, launchers: Sequence[Launcher]) -> list[Worker]:
        """Waits until all workers of a world have reported.

        Workers of smaller worlds on the way there are left alone: their launchers stop them as soon as another node comes.

        Args:
            nodes: how many nodes that world has.
            launchers: none of which may end meanwhile.

        Returns:
            By rank.
        """
        found: dict[int, Worker] = {}
        while not found or len(found) < next(iter(found.values()))["WORLD_SIZE"]:
            worker = self.next_worker(launchers)
            if worker["GROUP_WORLD_SIZE"] == nodes:
                found[worker["RANK"]] = worker
        return [found[rank] for rank in sorted(found)]

    def next_worker(self, launchers: Sequence[Launcher]) -> Worker:
        """Waits for the next process that reports; none of the launchers may end meanwhile."""
        with contextlib.ExitStack() as stack:
            ends = {os.pidfd_open(launcher.process.pid): launcher for launcher in launchers}
            for end in ends:
                stack.callback(os.close, end)
            ready, _, _ = select.select([self._listener, *ends], [], [], DEADLINE_S)
        if self._listener in ready:
            self._workers.append(Worker(self._listener.accept()[0]))
            return self._workers[-1]
        over = [ends[end] for end in ready] or launchers
        texts = [f"{one.node.name}, exit code {one.process.poll()}:\n{one.text}" for one in over]
        raise AssertionError("a worker was expected to report\n" + "\n".join(texts))

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()
        for worker in self._workers:
            worker.close()
        shutil.rmtree(self._directory, ignore_errors=True)


@contextlib.contextmanager
def lan_and_desk(directory: Path, count: int) -> Iterator[tuple[Lan, Desk]]:
    """Nodes on their bridge and a desk, gone afterwards."""
    with Desk() as desk, Lan(directory, count=count) as lan:
        yield lan, desk


@contextlib.contextmanager
def nodes_and_desk(directory: Path, count: int) -> Iterator[tuple[list[Node], Desk]]:
    """The same where the bridge is left alone."""
    with lan_and_desk(directory, count) as (lan, desk):
        yield lan.nodes, desk
