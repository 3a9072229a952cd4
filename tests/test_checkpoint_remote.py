"""Copies of checkpoints by fsspec: seen only when they are whole, and whole when they are downloaded."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import uuid

import fsspec
import pytest

from torchtrainer.checkpoint import failpoints
from torchtrainer.checkpoint.manifest import MANIFEST, _tail
from torchtrainer.checkpoint.remote import RemoteStore
from torchtrainer.checkpoint.store import CheckpointStore, next_generation
from torchtrainer.checkpoint.verified import verify
from torchtrainer.errors import (
    CheckpointDamagedError,
    CheckpointError,
    CheckpointFencedError,
    CheckpointVersionError,
    CheckpointWriteError,
    InvalidArgumentError,
)

REMOTE_FAILPOINTS = [name for name in failpoints.FAILPOINTS if name.startswith("remote.")]


def payload(step: int) -> bytes:
    return random.Random(step).randbytes(3000)


def local(root, *, generation=1, keep=9) -> CheckpointStore:
    def fail(text) -> None:
        raise AssertionError(text)

    return CheckpointStore(root, keep=keep, generation=generation, on_problem=fail)


def write(store: CheckpointStore, step: int):
    files = {
        "state.pt": lambda file: file.write(payload(step)),
        "rng": lambda file: file.write(payload(-step)),
        "empty": lambda file: None,
    }
    return store.write(step, {"position": step, "loss": 0.1}, files)


def prefixes(remote: RemoteStore) -> list[str]:
    remote._files.invalidate_cache()
    return sorted(path.rpartition("/")[2] for path in remote._files.ls(remote._base, detail=False))


def change(remote: RemoteStore, path: str, data: bytes) -> None:
    remote._files.pipe_file(path, data)


@pytest.fixture(params=["memory", "file"])
def url(request, tmp_path):
    if request.param == "file":
        yield f"file://{tmp_path}/remote/run"
        return
    path = f"/{uuid.uuid4().hex}"
    yield f"memory:/{path}/run"
    if fsspec.filesystem("memory").exists(path):
        fsspec.filesystem("memory").rm(path, recursive=True)


@pytest.fixture
def problems():
    return []


@pytest.fixture
def remote(url, problems):
    return RemoteStore(url, keep=2, on_problem=problems.append)


def test_a_copy_is_found_and_comes_back_byte_for_byte(remote, url, tmp_path, problems) -> None:
    assert remote.newest() is None
    assert remote.next_generation() == 1
    written = write(local(tmp_path / "here"), 7)
    copied = remote.upload(written)
    other = RemoteStore(url, keep=2, on_problem=problems.append)
    found = other.newest()
    assert found == copied
    assert (found.step, found.generation, found.manifest) == (7, 1, written.manifest)
    assert remote._files.cat_file(f"{found.prefix}/{MANIFEST}") == (written.path / MANIFEST).read_bytes()

    store = local(tmp_path / "there", generation=other.next_generation())
    downloaded = other.download(found, store)
    assert downloaded == store.newest()
    assert downloaded.meta == {"position": 7, "loss": 0.1}
    assert {name: (downloaded.path / name).read_bytes() for name in os.listdir(downloaded.path)} == {
        name: (written.path / name).read_bytes() for name in os.listdir(written.path)
    }
    assert other.download(found, store) == downloaded
    write(store, 8)
    assert store.newest().step == 8
    assert next_generation(store.root) == 3
    assert problems == []


def test_the_newest_copies_stay(remote, tmp_path, problems) -> None:
    store = local(tmp_path / "c")
    for step in (1, 2, 3, 4):
        remote.upload(write(store, step))
        assert remote.newest().step == step
    assert [copy.step for copy in remote.all()] == [4, 3]
    remote.upload(verify(store.all()[0]))
    assert [copy.step for copy in remote.all()] == [4, 3]
    assert len(prefixes(remote)) == 2
    assert problems == []


def test_other_things_at_the_url_are_left_alone(remote, tmp_path) -> None:
    change_me = f"{remote._base}/step-of-mine/{MANIFEST}"
    remote._files.makedirs(f"{remote._base}/step-of-mine", exist_ok=True)
    change(remote, change_me, b"mine")
    store = local(tmp_path / "c")
    for step in (1, 2, 3):
        remote.upload(write(store, step))
    assert remote._files.cat_file(change_me) == b"mine"
    assert [copy.step for copy in remote.all()] == [3, 2]


def test_a_copy_whose_files_are_damaged_is_refused_and_the_older_one_is_there(remote, tmp_path) -> None:
    store = local(tmp_path / "here")
    for step in (1, 2):
        remote.upload(write(store, step))
    newest, older = remote.all()
    data = bytearray(payload(2))
    data[1000] ^= 4
    there = local(tmp_path / "there", generation=2)
    for bad in (bytes(data), payload(2)[:-1], payload(1)):
        change(remote, f"{newest.prefix}/state.pt", bad)
        with pytest.raises(CheckpointDamagedError, match=r"was not written correctly: \['state.pt'\]"):
            remote.download(newest, there)
    remote._files.rm_file(f"{newest.prefix}/state.pt")
    with pytest.raises(CheckpointDamagedError, match=r"state\.pt is missing in"):
        remote.download(newest, there)
    assert [name for name in os.listdir(there.root) if not name.startswith("generation")] == []
    assert remote.download(older, there).step == 1


@pytest.mark.parametrize("damage", [lambda raw: raw[:-1], lambda raw: raw.replace(b"1", b"3", 1), lambda raw: b""])
def test_a_damaged_manifest_hides_its_copy_loudly(remote, tmp_path, problems, damage) -> None:
    store = local(tmp_path / "c")
    for step in (1, 2):
        remote.upload(write(store, step))
    path = f"{remote.newest().prefix}/{MANIFEST}"
    change(remote, path, damage(remote._files.cat_file(path)))
    assert remote.newest().step == 1
    assert len(problems) == 1
    assert f"a copy in {remote.url} is damaged and is not used: {path}" in problems[0]


def test_a_manifest_of_another_copy_hides_its_copy(remote, tmp_path, problems) -> None:
    store = local(tmp_path / "c")
    for step in (1, 2):
        remote.upload(write(store, step))
    newest, older = remote.all()
    change(remote, f"{newest.prefix}/{MANIFEST}", remote._files.cat_file(f"{older.prefix}/{MANIFEST}"))
    assert remote.newest() == older
    assert f"belongs to {older.manifest.identity.name}" in problems[0]


def test_a_newer_format_is_named_and_left_as_it_is(remote, tmp_path) -> None:
    remote.upload(write(local(tmp_path / "c"), 1))
    path = f"{remote.newest().prefix}/{MANIFEST}"
    head = remote._files.cat_file(path).replace(b'"format": 1', b'"format": 2')[: -len(_tail(b""))]
    change(remote, path, head + _tail(head))
    with pytest.raises(CheckpointVersionError, match="has format 2"):
        remote.newest()
    assert remote._files.exists(path)


def test_what_changed_on_the_local_disk_meanwhile_is_not_published(remote, tmp_path) -> None:
    checkpoint = write(local(tmp_path / "c"), 1)
    checkpoint.file("rng").write_bytes(payload(5))
    with pytest.raises(CheckpointWriteError) as caught:
        remote.upload(checkpoint)
    for text in (
        f"the checkpoint of step 1 could not be copied to {remote.url}",
        "rng arrived as",
        str(checkpoint.path),
    ):
        assert text in str(caught.value)
    assert remote.newest() is None
    assert prefixes(remote) == []


def test_a_run_that_was_superseded_publishes_nothing(remote, tmp_path) -> None:
    old = write(local(tmp_path / "old"), 9)
    remote.upload(write(local(tmp_path / "new", generation=2), 5))
    with pytest.raises(
        CheckpointFencedError, match="generation 1 of this run was superseded: generation 2 owns the copies"
    ):
        remote.upload(old)
    assert [copy.step for copy in remote.all()] == [5]
    assert remote.next_generation() == 3


def test_a_store_of_an_earlier_generation_takes_no_copy_of_a_later_one(remote, tmp_path) -> None:
    remote.upload(write(local(tmp_path / "new", generation=4), 5))
    with pytest.raises(InvalidArgumentError, match="later generation than this store: open it with generation=5"):
        remote.download(remote.newest(), local(tmp_path / "old", generation=3))


# Uploads that are interrupted


PROGRAM = """
import sys
from pathlib import Path
from torchtrainer.checkpoint.remote import RemoteStore
from torchtrainer.checkpoint.verified import verify
from torchtrainer.errors import CheckpointWriteError

def problem(text):
    print("problem", text, flush=True)
remote = RemoteStore(sys.argv[1], keep=2, on_problem=problem)
for attempt in range(2):
    try:
        remote.upload(verify(Path(sys.argv[2])))
        print("there", flush=True)
    except CheckpointWriteError as error:
        print("failed", error, flush=True)
"""


def run_upload(url: str, path, armed: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, failpoints.ENVIRONMENT: armed}
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, url, path], env=environment, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def three(tmp_path):
    """A local store, and a file system that holds copies of its steps 1 and 2; step 3 is only local."""
    store, url = local(tmp_path / "c"), f"file://{tmp_path}/remote"
    remote = RemoteStore(url, keep=2, on_problem=pytest.fail)
    for step in (1, 2):
        remote.upload(write(store, step))
    return store, remote, url, write(store, 3)


@pytest.mark.parametrize("hit", [1, 2])
@pytest.mark.parametrize("name", REMOTE_FAILPOINTS)
def test_a_killed_upload_is_never_seen(three, tmp_path, name, hit) -> None:
    store, remote, url, third = three
    done = run_upload(url, third.path, f"{name}:kill@{hit}")
    assert done.returncode == -signal.SIGKILL, done
    published = "there" in done.stdout or name in {"remote.retire", "remote.delete"}
    for copy in remote.all():
        assert remote.download(copy, local(tmp_path / "there", generation=2)).step == copy.step
    assert remote.newest().step == (3 if published else 2)
    remote.upload(write(store, 4))
    assert [copy.step for copy in remote.all()] == ([4, 3] if published else [4, 2])
    assert len(prefixes(remote)) == 2


@pytest.mark.parametrize("name", REMOTE_FAILPOINTS)
def test_a_failed_upload_is_told_once_and_leaves_nothing(three, name) -> None:
    _, remote, url, third = three
    done = run_upload(url, third.path, f"{name}:error@1")
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stdout.splitlines() if "No space left on device" in line]
    assert len(told) == 1, done.stdout
    late = name in {"remote.retire", "remote.delete"}
    assert told[0].startswith(f"problem old copies in {url}" if late else "failed the checkpoint of step 3")
    assert done.stdout.count("there") == (2 if late else 1)
    assert remote.newest().step == 3
    assert len(prefixes(remote)) == 2


# URLs


def test_without_fsspec_the_error_says_what_to_install(tmp_path) -> None:
    program = (
        "import sys; sys.modules['fsspec'] = None\n"
        "from torchtrainer.checkpoint.remote import RemoteStore\n"
        "RemoteStore('s3://bucket/run', keep=2, on_problem=print)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert "ImportError: checkpoints in s3://bucket/run need fsspec" in done.stderr
    assert 'run: pip install "torchtrainer[remote]"' in done.stderr


def test_a_kind_of_url_that_does_not_exist() -> None:
    with pytest.raises(InvalidArgumentError, match=r"checkpoints cannot be kept in nowhere://b: .*nowhere"):
        RemoteStore("nowhere://key:secret@b", keep=2, on_problem=print)
    with pytest.raises(InvalidArgumentError, match="keep must be at least 1"):
        RemoteStore("memory://x", keep=0, on_problem=print)


def test_a_store_that_cannot_be_read(tmp_path) -> None:
    (tmp_path / "file").write_text("x")
    remote = RemoteStore(f"file://{tmp_path}/file/run", keep=2, on_problem=print)
    with pytest.raises(CheckpointError, match="file/run cannot be listed: NotADirectoryError"):
        remote.newest()
    with pytest.raises(CheckpointWriteError, match=r"could not be copied to .*file/run"):
        remote.upload(write(local(tmp_path / "c"), 1))


def test_a_downloaded_checkpoint_is_one_like_any_other(remote, tmp_path) -> None:
    remote.upload(write(local(tmp_path / "here"), 1))
    store = local(tmp_path / "there", generation=2, keep=2)
    path = remote.download(remote.newest(), store).path
    for step in (2, 3):
        write(store, step)
    assert [verify(one).step for one in store.all()] == [3, 2]
    assert not path.exists()
