"""Every example runs as it stands, in a directory of its own, on the images that scikit-learn brings."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from programs import TORCH_ABORT

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def output_of(command: list[str | Path], directory: Path) -> str:
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 or TORCH_ABORT in done.stderr, done.stdout + done.stderr
    return done.stdout


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
BOTH_WAYS = pytest.mark.parametrize(
    "launcher",
    [pytest.param([sys.executable], id="by itself"), pytest.param(TORCHRUN, id="torchrun", marks=pytest.mark.soak)],
)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory) -> Path:
    """A few of CIFAR-10's images as an image folder, if this machine has the archive."""
    archive = Path(os.environ.get("TORCHTRAINER_TEST_DATA", ROOT.parent / "shared" / "data")) / "cifar10-subset.zip"
    if not archive.exists():
        pytest.skip(
            f"{archive} is not there: set TORCHTRAINER_TEST_DATA to the directory that holds cifar10-subset.zip"
        )
    directory = tmp_path_factory.mktemp("images")
    with zipfile.ZipFile(archive) as images:
        images.extractall(directory, [name for name in images.namelist() if re.search(r"/00[01]\d\.jpg$", name)])
    return directory / "cifar10-subset"


def accuracy_in(text: str) -> float:
    found = re.search(r"accuracy on 360 test images: ([\d.]+)%", text)
    assert found, text
    return float(found.group(1))


@pytest.mark.soak
def test_image_classifier_learns_digits(tmp_path):
    script = EXAMPLES / "cifar10" / "train.py"
    text = output_of([sys.executable, script, "--dataset", "digits", "--epochs", "6", "--no-tqdm"], tmp_path)
    assert text.count("epoch ") == 6
    assert accuracy_in(text) > 95


def test_the_demo_kills_a_worker_says_what_it_cost_and_learns_the_same(tmp_path):
    makefile = (ROOT / "Makefile").read_text()
    assert "examples/cifar10/train.py --num-workers 2 --kill 1 $(DEMO_ARGS)" in makefile
    script = EXAMPLES / "cifar10" / "train.py"
    options = ["--num-workers", "2", "--dataset", "digits", "--epochs", "3", "--no-tqdm"]
    command = [sys.executable, script, *options, "--kill", "1"]
    killed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert killed.returncode == 0, killed.stderr
    # The timer of the kill may fire between two steps or right after the last one: whose step it was does not matter.
    assert re.search(
        r"rank 1 \(pid \d+\) was killed by SIGKILL at step \d+; .* took it over, [\d.]+ s lost", killed.stderr
    )
    assert re.search(r"1 failure cost [\d.]+ s of \d.* % goodput\), no step was lost", killed.stderr)
    undisturbed = output_of([sys.executable, script, *options], tmp_path)
    losses = re.compile(r"^epoch .*?%", re.MULTILINE)
    assert losses.findall(killed.stdout) == losses.findall(undisturbed)
    assert accuracy_in(killed.stdout) == accuracy_in(undisturbed)


@pytest.mark.soak
def test_image_classifier_is_the_same_run_under_torchrun(tmp_path):
    script = [EXAMPLES / "cifar10" / "train.py", "--dataset", "digits", "--epochs", "3", "--no-tqdm"]
    launched = output_of([*TORCHRUN, *script], tmp_path)
    alone = output_of([sys.executable, *script], tmp_path)
    assert launched.count("epoch ") == 3, "rank 0 prints, and no other rank"
    assert accuracy_in(launched) == accuracy_in(alone)


@pytest.mark.soak
def test_image_classifier_takes_an_image_folder(tmp_path):
    from PIL import Image

    for part, count in (("train", 12), ("test", 5)):
        for name, colour in (("dark", 40), ("light", 200)):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                Image.new("RGB", (32, 32), (colour + index, colour, colour)).save(folder / f"{index}.png")
    options = ["--data", tmp_path / "images", "--model", "cnn", "--epochs", "3", "--batch-size", "8", "--no-tqdm"]
    text = output_of([sys.executable, EXAMPLES / "cifar10" / "train.py", *options], tmp_path)
    assert "training cnn on folder with 2 workers" in text
    assert "accuracy on 10 test images" in text


@BOTH_WAYS
@pytest.mark.soak
def test_image_classifier_learns_from_photographs(tmp_path, photographs, launcher):
    options = ["--data", photographs, "--model", "cnn", "--epochs", "1", "--batch-size", "16", "--no-tqdm"]
    text = output_of([*launcher, EXAMPLES / "cifar10" / "train.py", *options], tmp_path)
    assert "training cnn on folder with 2 workers" in text
    assert text.count("accuracy on 200 test images") == 1


@BOTH_WAYS
@pytest.mark.soak
def test_introductory_script_learns_from_photographs(tmp_path, photographs, launcher):
    text = output_of([*launcher, EXAMPLES / "raysgd_intro.py", photographs], tmp_path)
    assert text.count("'num_samples': 200") == 2, "20 images of each class in training, and in validation"
    assert text.count("success!") == 1
    assert (tmp_path / "checkpoint.pt").stat().st_size > 40_000_000


def test_image_classifier_names_the_folder_that_is_missing(tmp_path):
    command = [sys.executable, EXAMPLES / "cifar10" / "train.py", "--data", tmp_path]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"--data {tmp_path} has no folder train/" in done.stderr


@pytest.mark.soak
def test_introductory_script_runs_as_it_stands(tmp_path):
    text = output_of([sys.executable, EXAMPLES / "raysgd_intro.py", "digits"], tmp_path)
    assert "'num_samples': 1440" in text
    assert "'num_samples': 357" in text
    assert text.rstrip().endswith("success!")
    assert (tmp_path / "checkpoint.pt").stat().st_size > 40_000_000


@BOTH_WAYS
@pytest.mark.soak
def test_gan_draws_what_is_nearer_to_digits_than_noise(tmp_path, launcher):
    text = output_of([*launcher, EXAMPLES / "gan.py", "--epochs", "10", "--no-tqdm"], tmp_path)
    found = re.search(r"nearest real digit: ([\d.]+) \(random pixels: ([\d.]+)\)", text)
    assert found, text
    drawn, noise = map(float, found.groups())
    assert drawn < 0.8 * noise


@pytest.mark.kernel
def test_notebook_runs_in_a_jupyter_kernel(tmp_path):
    notebook = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
    client = NotebookClient(
        notebook, timeout=280, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    cells = {cell["id"]: cell for cell in notebook.cells}
    printed = "".join(output.get("text", "") for output in cells["get-model"]["outputs"])
    assert accuracy_in(printed) > 90
    assert any("image/png" in output.get("data", {}) for output in cells["plot"]["outputs"]), "History is plotted"
