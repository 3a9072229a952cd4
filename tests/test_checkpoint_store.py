"""Checkpoints on disk: whole or not at all, whatever is killed, full, damaged or run twice."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from torchtrainer.checkpoint import failpoints
from torchtrainer.checkpoint.durable import write_file
from torchtrainer.checkpoint.manifest import FORMAT, MANIFEST, Identity, Manifest, _tail, check_file_name
from torchtrainer.checkpoint.store import CheckpointStore, next_generation
from torchtrainer.checkpoint.temporary import Owner, is_stale, new_directory
from torchtrainer.checkpoint.verified import verify
from torchtrainer.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointVersionError,
    CheckpointWriteError,
    InvalidArgumentError,
    InvalidArgumentTypeError,
)

SEED = 20
needs_root = pytest.mark.skipif(os.getuid() != 0, reason="mounts and changes owners: needs root")
LOCAL_FAILPOINTS = [name for name in failpoints.FAILPOINTS if name.startswith("checkpoint.")]
AFTER_THE_WRITE = ("checkpoint.sweep", "checkpoint.retire", "checkpoint.delete", "checkpoint.set_aside")


def open_store(root, *, keep=3, generation=1, problems=None) -> CheckpointStore:
    def fail(text) -> None:
        raise AssertionError(text)

    return CheckpointStore(
        root, keep=keep, generation=generation, on_problem=fail if problems is None else problems.append
    )


def payload(step: int) -> bytes:
    return random.Random(step).randbytes(2000)


def write(store: CheckpointStore, step: int, **changes):
    files = {"state.pt": lambda file: torch.save({"step": step, "weights": torch.arange(64.0) + step}, file)}
    files["rng"] = lambda file: file.write(payload(step))
    return store.write(step, {"position": step, "world_size": 2}, files, **changes)


def names(root: Path, prefix: str = "") -> list[str]:
    return sorted(name for name in os.listdir(root) if name.startswith(prefix))


def steps(store: CheckpointStore) -> list[int]:
    return [verify(path).step for path in store.all()]


def assert_nothing_unfinished(root: Path) -> None:
    assert [name for name in os.listdir(root) if name.startswith(".")] == []


@pytest.fixture
def two(tmp_path):
    """A store with sound checkpoints of steps 1 and 2, and what it has to say."""
    problems = []
    store = open_store(tmp_path / "c", problems=problems)
    write(store, 1)
    write(store, 2)
    return store, problems


def test_what_was_written_is_found_and_reads_back(tmp_path) -> None:
    store = open_store(tmp_path / "c")
    assert store.newest() is None
    written = write(store, 7, reserve_bytes=4000)
    found = open_store(tmp_path / "c").newest()
    assert found == written
    assert (found.step, found.generation, found.meta) == (7, 1, {"position": 7, "world_size": 2})
    assert found.path.name == "step-000000000007-g0001-n000001"
    assert torch.load(found.file("state.pt"), weights_only=True)["weights"][3] == 10
    assert found.file("rng").read_bytes() == payload(7)
    with pytest.raises(CheckpointError, match="has no file 'other'"):
        found.file("other")


def test_everything_is_for_its_owner_only(two) -> None:
    store, _ = two
    for folder, folders, files in os.walk(store.root):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
        assert all(stat.S_IMODE(os.stat(Path(folder, name)).st_mode) == 0o600 for name in files)
        assert all(name.startswith("step-") for name in folders)


def test_a_manifest_is_plain_json_with_sums_that_sha256sum_agrees_with(two) -> None:
    path = two[0].newest().path
    manifest = json.loads((path / MANIFEST).read_text())
    assert (manifest["format"], manifest["step"], manifest["meta"]["position"]) == (FORMAT, 2, 2)
    done = subprocess.run(["sha256sum", path / "rng"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split()[0] == manifest["files"]["rng"]["sha256"]


@pytest.mark.parametrize(("keep", "left"), [(1, [6, 5]), (2, [6, 5]), (3, [6, 5, 4]), (9, [6, 5, 4, 3, 2, 1])])
def test_the_newest_stay_and_never_fewer_than_two(tmp_path, keep, left) -> None:
    store = open_store(tmp_path / "c", keep=keep)
    for step in range(1, 7):
        write(store, step)
        assert store.newest().step == step
    assert steps(store) == left
    assert_nothing_unfinished(store.root)


def test_a_damaged_one_does_not_count_among_those_that_stay(tmp_path) -> None:
    problems = []
    for step in (1, 2, 3):
        write(open_store(tmp_path / "c", keep=3, problems=problems), step)
    flip(tmp_path / "c" / "step-000000000003-g0001-n000003" / "rng", 0)
    store = open_store(tmp_path / "c", keep=2, problems=problems)
    write(store, 4)
    assert steps(store) == [4, 2]
    assert len(problems) == 1
    assert "step-000000000003-g0001-n000003.corrupt" in problems[0]


def test_the_last_one_written_counts_also_after_steps_were_set_back(tmp_path) -> None:
    store = open_store(tmp_path / "c", keep=9)
    for step in (5, 9, 5, 5):
        assert store.newest() is None or store.newest().step in {5, 9}
        write(store, step)
    assert [verify(path).manifest.identity.serial for path in store.all()] == [4, 3, 2, 1]
    assert store.newest().step == 5


def test_a_later_generation_knows_better_than_an_earlier_one_with_more_steps(tmp_path) -> None:
    write(open_store(tmp_path / "c"), 100)
    assert next_generation(tmp_path / "c") == 2
    write(open_store(tmp_path / "c", generation=2), 90)
    store = open_store(tmp_path / "c", generation=3)
    assert store.newest().step == 90
    assert next_generation(tmp_path / "c") == 4
    assert next_generation(tmp_path / "nothing") == 1


# Damage


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@contextmanager
def damaged(path: Path):
    """Puts a directory back as it was, wherever it was set aside to."""
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    yield
    aside = path.with_name(path.name + ".corrupt")
    if aside.exists():
        shutil.rmtree(aside)
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(0o700)
    for name, data in before.items():
        (path / name).write_bytes(data)


def assert_older_is_used(store, problems, newest: Path) -> None:
    problems.clear()
    found = store.newest()
    assert found is not None and found.step == 1, "a damaged checkpoint was loaded"
    assert len(problems) == 1
    assert f"checkpoint {newest.name} is damaged and is not used" in problems[0]
    assert f"{newest}.corrupt" in problems[0]
    assert os.path.isdir(f"{newest}.corrupt")


def test_a_thousand_single_bit_flips_are_all_seen(two) -> None:
    store, problems = two
    newest = store.all()[0]
    sizes = {name: (newest / name).stat().st_size for name in os.listdir(newest)}
    assert len(sizes) == 3
    generator = random.Random(SEED)
    for _ in range(1000):
        name = generator.choices(list(sizes), weights=sizes.values())[0]
        at = generator.randrange(8 * sizes[name])
        flip(newest / name, at)
        with pytest.raises(CheckpointDamagedError):
            verify(newest)
        flip(newest / name, at)
    assert store.newest().step == 2
    flip(newest / name, at)
    assert_older_is_used(store, problems, newest)


def test_every_byte_of_the_manifest_and_of_the_zip_headers_counts(two) -> None:
    newest = two[0].all()[0]
    generator = random.Random(SEED)
    offsets = {MANIFEST: range((newest / MANIFEST).stat().st_size), "state.pt": zip_header_bytes(newest / "state.pt")}
    for name, positions in offsets.items():
        assert len(positions) > 500
        for position in positions:
            bit = 8 * position + generator.randrange(8)
            flip(newest / name, bit)
            with pytest.raises(CheckpointDamagedError):
                verify(newest)
            flip(newest / name, bit)
    assert verify(newest).step == 2


def zip_header_bytes(path: Path) -> list[int]:
    """Where the local headers, the central directory and its end are."""
    with zipfile.ZipFile(path) as archive:
        local = [
            position
            for record in archive.infolist()
            for position in range(record.header_offset, record.header_offset + 30 + len(record.filename))
        ]
        return local + list(range(archive.start_dir, path.stat().st_size))


def test_a_hundred_truncations_are_all_seen(two) -> None:
    store, problems = two
    newest = store.all()[0]
    generator = random.Random(SEED)
    for turn in range(100):
        name = ("state.pt", MANIFEST, "rng")[turn % 3]
        size = (newest / name).stat().st_size
        length = (0, size - 1, generator.randrange(size))[min(turn // 3, 2)]
        with damaged(newest):
            os.truncate(newest / name, length)
            assert_older_is_used(store, problems, newest)
    assert store.newest().step == 2


def zero_hole(newest: Path, older: Path) -> None:
    with open(newest / "state.pt", "r+b") as file:
        file.seek(file.seek(0, io.SEEK_END) // 2 - 64)
        file.write(bytes(128))


def longer(newest: Path, older: Path) -> None:
    with open(newest / "rng", "ab") as file:
        file.write(b"\0")


def swap(name: str):
    def change(newest: Path, older: Path) -> None:
        mine, other = (newest / name).read_bytes(), (older / name).read_bytes()
        assert mine != other
        (newest / name).write_bytes(other)

    return change


def files_swapped_within(newest: Path, older: Path) -> None:
    (newest / "rng").rename(newest / "x")
    (newest / "state.pt").rename(newest / "rng")
    (newest / "x").rename(newest / "state.pt")


def content_of_the_other_step(newest: Path, older: Path) -> None:
    for name in os.listdir(newest):
        shutil.copy(older / name, newest / name)


def replaced_by(make):
    def change(newest: Path, older: Path) -> None:
        (newest / "rng").rename(newest / "elsewhere")
        make(newest / "rng", newest / "elsewhere")

    return change


@pytest.mark.parametrize(
    "change",
    [
        zero_hole,
        longer,
        swap("state.pt"),
        swap("rng"),
        swap(MANIFEST),
        files_swapped_within,
        content_of_the_other_step,
        lambda newest, older: (newest / MANIFEST).unlink(),
        lambda newest, older: (newest / "rng").unlink(),
        lambda newest, older: shutil.copy(newest / "state.pt", newest / MANIFEST),
        lambda newest, older: (newest / MANIFEST).write_text("{}"),
        replaced_by(lambda path, elsewhere: path.symlink_to(elsewhere)),
        replaced_by(lambda path, elsewhere: path.mkdir()),
        replaced_by(lambda path, elsewhere: os.mkfifo(path)),
    ],
)
def test_other_damage_is_seen_and_the_older_one_used(two, change) -> None:
    store, problems = two
    newest, older = store.all()
    change(newest, older)
    assert_older_is_used(store, problems, newest)
    write(store, 3)
    assert steps(store) == [3, 1]
    assert names(store.root, newest.name) == [f"{newest.name}.corrupt"]


def test_where_all_are_damaged_there_is_none_and_all_are_kept_for_a_person(two) -> None:
    store, problems = two
    for path in store.all():
        flip(path / "rng", 9)
    assert store.newest() is None
    assert len(problems) == len(names(store.root, "step-")) == 2
    write(store, 3)
    assert len(names(store.root, "step-")) == 3


def test_a_link_in_the_place_of_a_checkpoint_is_no_checkpoint(two) -> None:
    store, _ = two
    newest = store.all()[0]
    newest.rename(store.root / "moved")
    newest.symlink_to(store.root / "moved")
    assert store.newest().step == 1


def test_a_checkpoint_that_cannot_be_read_now_is_not_called_damaged(two) -> None:
    newest = two[0].all()[0]
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, before[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            verify(newest)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert type(caught.value) is CheckpointError
    assert "Too many open files" in str(caught.value)


def test_a_newer_format_is_named_and_left_as_it_is(two) -> None:
    store, problems = two
    newest = store.all()[0]
    raw = (newest / MANIFEST).read_bytes().replace(b'"format": 1', b'"format": 7').replace(b"0.1.0", b"9.8.7")
    head = raw[: -len(_tail(b""))]
    (newest / MANIFEST).write_bytes(head + _tail(head))
    with pytest.raises(CheckpointVersionError) as caught:
        store.newest()
    for text in ("has format 7", "torchtrainer 9.8.7", "torchtrainer 0.1.0 reads formats up to 1", str(newest)):
        assert text in str(caught.value)
    assert newest in store.all()
    assert problems == []


# Processes that die


PROGRAM = """
import sys
from pathlib import Path
from torchtrainer.checkpoint.store import CheckpointStore, next_generation
from torchtrainer.errors import CheckpointWriteError

def payload(file):
    if sys.argv[2:] == ["wait"]:
        print("writing", flush=True)
        sys.stdin.readline()
    file.write(b"4" * 2000)

root = Path(sys.argv[1])
def problem(text):
    print("problem", text, flush=True)
for attempt in range(2):
    try:
        store = CheckpointStore(root, keep=2, generation=next_generation(root), on_problem=problem)
        print("found", store.newest().step, flush=True)
        store.write(4, {}, {"rng": payload})
        print("durable 4", flush=True)
    except CheckpointWriteError as error:
        print("failed", error, flush=True)
"""


def run_writer(root: Path, armed: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, failpoints.ENVIRONMENT: armed}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, root], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """Steps 1 and 2 are sound, 3 is damaged, and a process died in the middle of 4: each failpoint comes up."""
    root = tmp_path_factory.mktemp("prepared") / "c"
    store = open_store(root)
    for step in (1, 2, 3):
        write(store, step)
    assert run_writer(root, "checkpoint.publish:kill").returncode == -signal.SIGKILL
    assert len(names(root, ".tmp-")) == 1
    flip(store.all()[0] / "rng", 4)
    return root


@pytest.fixture
def root(prepared, tmp_path):
    return shutil.copytree(prepared, tmp_path / "c")


def assert_goes_on(root: Path, durable: int) -> None:
    """What was durable is found, and the next run writes as if nothing had been."""
    problems = []
    store = open_store(root, keep=2, generation=next_generation(root), problems=problems)
    found = store.newest()
    assert found.step in {durable, 4}
    assert found.file("rng").read_bytes() == (b"4" * 2000 if found.step == 4 else payload(found.step))
    write(store, 5)
    assert_nothing_unfinished(root)
    assert steps(store) == [5, found.step]


@pytest.mark.parametrize("name", LOCAL_FAILPOINTS)
def test_a_kill_at_any_point_leaves_what_was_durable(root, name) -> None:
    done = run_writer(root, f"{name}:kill@1")
    assert done.returncode == -signal.SIGKILL, done
    assert_goes_on(root, 4 if "durable 4" in done.stdout else 2)


@pytest.mark.parametrize("name", LOCAL_FAILPOINTS)
def test_an_error_at_any_point_is_told_once_and_the_next_write_succeeds(root, name) -> None:
    done = run_writer(root, f"{name}:error@1")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "No space left on device" in line]
    assert len(told) == 1, done.stdout
    assert told[0].startswith("problem" if name in AFTER_THE_WRITE else "failed")
    assert done.stdout.count("durable 4") == (2 if name in AFTER_THE_WRITE else 1)
    assert_goes_on(root, 4)


def test_a_slow_disk_is_only_slow(root) -> None:
    done = run_writer(root, "checkpoint.payload.fsync:slow@1")
    assert done.stdout.count("durable 4") == 2


@pytest.mark.parametrize("armed", ["nowhere:kill", "checkpoint.publish:explode", "checkpoint.publish:kill@0", "x"])
def test_a_failpoint_that_does_not_exist_is_an_error(root, armed) -> None:
    done = run_writer(root, armed)
    assert done.returncode == 1
    assert (
        f"InvalidArgumentError: {failpoints.ENVIRONMENT}={armed!r} must be name:action or name:action@n" in done.stderr
    )


def test_a_writer_that_was_superseded_publishes_nothing_and_keeps_its_files_until_it_ends(tmp_path) -> None:
    root = tmp_path / "c"
    write(open_store(root), 1)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM, root, "wait"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as old:
        assert [old.stdout.readline() for _ in range(2)] == ["found 1\n", "writing\n"]
        store = open_store(root, generation=next_generation(root))
        write(store, 2)
        assert len(names(root, ".tmp-")) == 1  # its process lives
        _, stderr = old.communicate("\n", timeout=60)
    assert old.returncode == 1
    assert (
        f"CheckpointFencedError: generation 2 of this run was superseded: generation 3 owns the checkpoints in {root}"
        in stderr
    )
    assert_nothing_unfinished(root)
    assert steps(store) == [2, 1]


def test_of_two_generations_only_the_later_one_may_write_open_or_delete(tmp_path) -> None:
    old = open_store(tmp_path / "c", keep=2)
    for step in (1, 2):
        write(old, step)
    new = open_store(tmp_path / "c", generation=2)
    with pytest.raises(CheckpointFencedError, match="generation 1 of this run was superseded: generation 2"):
        write(old, 3)
    with pytest.raises(CheckpointFencedError):
        open_store(tmp_path / "c", generation=1)
    write(open_store(tmp_path / "c", generation=2), 3)  # another process of the same run
    write(new, 4)
    assert steps(new) == [4, 3, 2]
    assert names(new.root, "generation") == ["generation-0002"]


def owner(**changes) -> Owner:
    here = Owner.here()
    return Owner(**{"host": here.host, "boot": here.boot, "pid": here.pid, "started": here.started, **changes})


@pytest.mark.parametrize(
    ("changes", "lives"),
    [
        ({}, True),
        ({"boot": "0"}, False),
        ({"started": "1"}, False),  # the number of the process was used again
        ({"pid": 2**22 + 1}, False),
        ({"host": "other"}, None),
    ],
)
def test_whether_the_owner_of_a_directory_lives(changes, lives) -> None:
    assert owner(**changes).may_live() is lives


def test_a_process_that_ended_does_not_live_even_before_anybody_asked_how() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[19]
    assert owner(pid=child.pid, started=started).may_live() is True
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert owner(pid=child.pid, started=started).may_live() is False
    child.communicate()


def test_what_another_machine_left_goes_only_after_it_was_superseded(tmp_path) -> None:
    name = new_directory(tmp_path, 3).name
    assert not is_stale(name, 4)
    elsewhere = f"{name}-on-another"
    assert [is_stale(elsewhere, generation) for generation in (2, 3, 4)] == [False, False, True]
    assert not is_stale(".tmp-of-the-user", 4)


# Systems that refuse


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB, and how to make it read-only."""
    path = tmp_path / "disk"
    path.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, timeout=60)
    if mounted.returncode != 0:
        pytest.skip(f"cannot mount: {mounted.stderr!r}")
    yield path
    subprocess.run(["umount", path], check=True, timeout=60)


@needs_root
def test_a_full_disk_loses_only_the_checkpoint_that_did_not_fit(small_disk) -> None:
    store = open_store(small_disk / "c")
    write(store, 1)
    big = {"big": lambda file: torch.save(torch.zeros(1 << 20), file)}
    with pytest.raises(CheckpointWriteError) as caught:
        store.write(2, {}, big)
    for text in (
        f"the checkpoint of step 2 could not be written to {store.root}: [Errno 28] No space left on device",
        "Its size is not known, 1.0 MiB are free there",
        "No older checkpoint was touched.",
        "Free some space, lower CheckpointConfig(keep=...), or pass CheckpointConfig(path=...) on another disk.",
    ):
        assert text in str(caught.value)
    assert_nothing_unfinished(store.root)
    assert store.newest().step == 1
    write(store, 3)
    assert steps(store) == [3, 1]


def test_what_cannot_fit_is_not_even_begun(tmp_path) -> None:
    store = open_store(tmp_path / "c")
    asked = []
    with pytest.raises(
        CheckpointWriteError, match=r"No space left on device\. It needs 1099511627776\.0 MiB, .* are free"
    ):
        store.write(1, {}, {"big": asked.append}, reserve_bytes=2**60)
    assert asked == []
    assert_nothing_unfinished(store.root)


@needs_root
def test_a_disk_that_became_read_only(small_disk) -> None:
    store = open_store(small_disk / "c")
    write(store, 1)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=60)
    with pytest.raises(CheckpointWriteError) as caught:
        write(store, 2)
    assert "Read-only file system" in str(caught.value)
    assert "Make the directory writable, or pass CheckpointConfig(path=...)" in str(caught.value)
    assert store.newest().step == 1
    with pytest.raises(CheckpointWriteError, match=r"checkpoints cannot be kept in .*Read-only file system"):
        open_store(small_disk / "c", generation=2)


@needs_root
def test_a_damaged_one_on_a_read_only_disk_is_told_of_and_not_used(small_disk) -> None:
    problems = []
    store = open_store(small_disk / "c", problems=problems)
    write(store, 1)
    flip(write(store, 2).file("rng"), 0)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True, timeout=60)
    assert store.newest().step == 1
    assert len(problems) == 1 and "It stays in place: [Errno 30]" in problems[0]


@contextmanager
def largest_file(size_bytes: int):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def hides_the_error(file) -> None:
    try:
        file.write(bytes(100_000))
    except OSError:
        return


def replaces_the_error(file) -> None:
    try:
        file.write(bytes(100_000))
    except OSError:
        raise RuntimeError("unexpected pos 64 vs 0") from None


@pytest.mark.parametrize(
    "refused",
    [
        lambda file: file.write(bytes(100_000)),
        lambda file: torch.save(torch.zeros(100_000), file),
        hides_the_error,
        replaces_the_error,
    ],
)
def test_refused_bytes_are_an_error_whatever_the_library_above_makes_of_it(tmp_path, refused) -> None:
    store = open_store(tmp_path / "c")
    with largest_file(10_000), pytest.raises(CheckpointWriteError, match=r"\[Errno 27\] File too large"):
        store.write(1, {}, {"a": lambda file: file.write(b"a"), "b": refused})
    assert_nothing_unfinished(store.root)
    assert store.newest() is None


@pytest.mark.parametrize("kind", [KeyError, KeyboardInterrupt])
def test_an_exception_while_writing_comes_back_as_itself_and_leaves_nothing(tmp_path, kind) -> None:
    def broken(file) -> None:
        file.write(b"half")
        raise kind("mine")

    store = open_store(tmp_path / "c")
    with pytest.raises(kind, match="mine"):
        store.write(1, {}, {"state": broken})
    assert_nothing_unfinished(store.root)
    assert store.all() == []


def test_a_directory_that_is_gone(tmp_path) -> None:
    store = open_store(tmp_path / "c")
    shutil.rmtree(store.root)
    with pytest.raises(CheckpointWriteError, match=r"No such file or directory.*is not known"):
        write(store, 1)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        store.newest()


# Arguments


def test_the_directory_may_not_be_a_link(tmp_path) -> None:
    (tmp_path / "real").mkdir(0o700)
    (tmp_path / "c").symlink_to("real")
    with pytest.raises(CheckpointWriteError, match=r"is a symbolic link.*Pass CheckpointConfig\(path="):
        open_store(tmp_path / "c")
    assert os.listdir(tmp_path / "real") == []


@pytest.mark.parametrize("mode", [0o720, 0o702, 0o777])
def test_the_directory_may_not_be_open_to_others(tmp_path, mode) -> None:
    (tmp_path / "c").mkdir()
    (tmp_path / "c").chmod(mode)
    with pytest.raises(CheckpointWriteError, match=f"other users may write to it .mode {mode:o}.: run chmod go-w"):
        open_store(tmp_path / "c")


@needs_root
def test_the_directory_may_not_belong_to_somebody_else(tmp_path) -> None:
    (tmp_path / "c").mkdir(0o700)
    os.chown(tmp_path / "c", 12345, 12345)
    with pytest.raises(CheckpointWriteError, match="belongs to user id 12345, not to you"):
        open_store(tmp_path / "c")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "a\\b", "/x", ".hidden", MANIFEST, "a\0b", "ü", "a\n", "x" * 300]
)
def test_names_that_leave_the_directory(tmp_path, name) -> None:
    with pytest.raises(InvalidArgumentError, match="a file of a checkpoint cannot be called"):
        check_file_name(name)
    store = open_store(tmp_path / "c")
    with pytest.raises(InvalidArgumentError):
        store.write(1, {}, {name: lambda file: file.write(b"")})
    assert_nothing_unfinished(store.root)


def test_a_manifest_that_names_files_elsewhere_is_damaged(two) -> None:
    store, problems = two
    newest = store.all()[0]
    manifest = verify(newest).manifest
    hostile = Manifest(identity=manifest.identity, meta={}, files={"../../x": manifest.files["rng"]})
    (newest / MANIFEST).write_bytes(hostile.encode())
    assert_older_is_used(store, problems, newest)


@pytest.mark.parametrize("meta", [{"a": {1, 2}}, {"a": torch.zeros(1)}, {("a",): 1}])
def test_meta_that_is_not_json(tmp_path, meta) -> None:
    store = open_store(tmp_path / "c")
    with pytest.raises(InvalidArgumentTypeError, match="meta of a checkpoint must be JSON data"):
        store.write(1, meta, {})
    assert_nothing_unfinished(store.root)


@pytest.mark.parametrize("changes", [{"keep": 0}, {"generation": 0}])
def test_numbers_below_one(tmp_path, changes) -> None:
    with pytest.raises(InvalidArgumentError, match="must be at least 1"):
        open_store(tmp_path / "c", **changes)


@pytest.mark.parametrize("step", [-1, 10**12])
def test_steps_that_have_no_name(tmp_path, step) -> None:
    with pytest.raises(InvalidArgumentError, match="step of a checkpoint must be between"):
        write(open_store(tmp_path / "c"), step)


def test_names_of_checkpoints_sort_by_age() -> None:
    identities = [
        Identity(generation=g, serial=s, step=t) for g, s, t in [(1, 9, 50), (2, 1, 3), (2, 2, 1), (10000, 1, 0)]
    ]
    assert sorted(identities) == identities
    assert [Identity.parse(identity.name) for identity in identities] == identities
    assert Identity.parse("step-1") is None


def test_a_file_is_written_to_its_last_byte_and_never_over_another(tmp_path) -> None:
    data = random.Random(SEED).randbytes(100_000)
    digest = write_file(
        tmp_path / "f",
        lambda file: [file.write(data[:7]), file.write(memoryview(data)[7:])],
        failpoints="checkpoint.payload",
    )
    assert (tmp_path / "f").read_bytes() == data
    assert digest.size_bytes == len(data)
    with pytest.raises(FileExistsError):
        write_file(tmp_path / "f", lambda file: None, failpoints="checkpoint.payload")
