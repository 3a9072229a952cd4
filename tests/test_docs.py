"""The Markdown files: links lead somewhere, code runs, and what they say about names, defaults and commands is so."""

from __future__ import annotations

import ast
import builtins
import inspect
import itertools
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch
from programs import run_program
from torch.utils.data import DataLoader, TensorDataset

import torchtrainer
from torchtrainer import TorchTrainer, TorchTrainerError
from torchtrainer.arguments import RETIRED
from torchtrainer.comm.futex import why_not_shared
from torchtrainer.config import FailureConfig, Timeouts
from torchtrainer.launcher.cli import COMMANDS, make_parser
from torchtrainer.observe.events import CALLBACK_METHODS

ROOT = Path(torchtrainer.__file__).parents[1]
DOCS = ROOT / "docs"
PACKAGE = ROOT / "torchtrainer"
NOT_OURS = {"_build", "runs", "dist", "build", "node_modules"}
PAGES = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in NOT_OURS for part in path.relative_to(ROOT).parts)
)
PROGRAM = "# program"

LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PLACE = re.compile(r"`((?:\w+/)*\w+\.py)`\s+`([\w.]+)`")
CODE_FILE = re.compile(r"`((?:\w+/)*\w+(?:\.py|/))`")


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def python_blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text()
        for match in FENCE.finditer(text):
            if match[1] == "python":
                yield Block(page, text[: match.start()].count("\n") + 2, match[2])


BLOCKS = list(python_blocks())
PROGRAMS = [block for block in BLOCKS if block.text.startswith(PROGRAM)]


def page_text(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def table(text: str, header: str) -> list[list[str]]:
    """Rows of the table whose first header cell is ``header``, cell by cell."""
    lines = text.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    assert rows, header
    return rows


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def anchors(page: Path) -> set[str]:
    """Fragments of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page):
    broken = []
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, fragment = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if not found.exists() or (fragment and found.suffix == ".md" and fragment not in anchors(found)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_index():
    toctrees = "\n".join(re.findall(r"^```\{toctree\}\n(.*?)^```$", page_text("index"), re.MULTILINE | re.DOTALL))
    listed = set(re.findall(r"^\w+$", toctrees, re.MULTILINE))
    assert listed == {path.stem for path in DOCS.glob("*.md")} - {"index"}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_python_blocks_compile(block):
    compile("\n" * (block.line - 1) + block.text, str(block.page), "exec")


@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_programs_run(block, tmp_path):
    program = run_program(tmp_path, block.text, whole="lightning" in block.text)  # which sets what torch's import reads
    assert program.process.returncode == 0, f"{program.output}\n{program.errors}"
    program.assert_nothing_left()


def test_there_are_programs():
    assert {block.page.stem for block in PROGRAMS} >= {"quick_start", "data", "errors_and_logs", "recovery"}


def everything() -> str:
    return "\n".join(page.read_text() for page in PAGES)


def test_make_targets_exist():
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    # As code only: "make sure" is English.
    code = [inner for page in PAGES for inner in re.findall(r"`([^`\n]+)`", page.read_text())]
    code += [line for page in PAGES for _, body in FENCE.findall(page.read_text()) for line in body.splitlines()]
    mentioned = {match[1] for line in code if (match := re.match(r"make ([a-z]+)", line))}
    assert "demo" in mentioned
    assert mentioned <= set(phony[1].split())


def test_commands_exist():
    known = set(COMMANDS)
    options = {name for action in make_parser()._actions for name in action.option_strings}
    mentioned = set(re.findall(r"`torchtrainer ([\w-]+)", everything()))
    assert mentioned
    assert mentioned <= known | options


def test_extras_exist():
    extras = re.search(
        r"\[project\.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.DOTALL
    )
    assert extras is not None
    mentioned = set(re.findall(r"pip install '\.\[(\w+)\]'", everything()))
    assert mentioned
    assert mentioned <= set(re.findall(r"^(\w+) = ", extras[1], re.MULTILINE))


def test_table_of_timeouts_agrees_with_the_code():
    documented = {
        codes(name)[0]: float(seconds) for name, seconds, _ in table(page_text("errors_and_logs"), "`Timeouts`")
    }
    assert documented == {field.name: field.default for field in fields(Timeouts)}


def test_table_of_failure_settings_agrees_with_the_code():
    documented = {
        codes(name)[0]: ast.literal_eval(default.strip("`"))
        for name, default, _ in table(page_text("recovery"), "setting")
    }
    expected = {f"FailureConfig.{one.name}": one.default for one in fields(FailureConfig)}
    trainers = inspect.signature(TorchTrainer.__init__).parameters
    expected |= {name: trainers[name].default for name in ("num_workers", "min_workers")}
    assert documented == expected


def test_table_of_arguments_agrees_with_the_code():
    documented = {
        codes(row[0])[0]: ast.literal_eval(codes(row[1])[0])
        for row in table(page_text("coming_from_raysgd"), "argument")
    }
    parameters = inspect.signature(TorchTrainer.__init__).parameters.values()
    expected = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    assert list(documented.items()) == list(expected.items())


def test_table_of_retired_arguments_agrees_with_the_code():
    assert {codes(row[0])[0] for row in table(page_text("coming_from_raysgd"), "retired")} == set(RETIRED)


def test_methods_in_the_tables_exist():
    for row in table(page_text("coming_from_raysgd"), "method"):
        for code in codes(row[0]):
            name = code.partition("(")[0]
            assert hasattr(TorchTrainer, name) == (not row[1].startswith("not there")), name


def test_table_of_errors_agrees_with_the_code():
    rows = table(page_text("errors_and_logs"), "class")
    exported = {name: getattr(torchtrainer, name) for name in torchtrainer.__all__}
    errors = {name for name, one in exported.items() if isinstance(one, type) and issubclass(one, TorchTrainerError)}
    assert {codes(row[0])[0] for row in rows} == errors - {"TorchTrainerError"}
    for row in rows:
        for base in codes(row[1]):
            wanted = getattr(builtins, base, None) or exported[base]
            assert issubclass(exported[codes(row[0])[0]], wanted)


def test_reference_has_every_public_name():
    reference = page_text("api")
    missing = [name for name in torchtrainer.__all__ if not re.search(rf"\b{name}\b", reference)]
    assert not missing
    assert {codes(row[0])[0] for row in table(reference, "method")} == set(CALLBACK_METHODS)


def defined(path: Path) -> set[str]:
    """Functions, classes and methods of a module, dotted."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
            if isinstance(node, ast.ClassDef):
                names |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return names


def test_files_and_functions_of_the_architecture_exist():
    text = page_text("architecture")
    missing = [name for name in CODE_FILE.findall(text) if not (PACKAGE / name).exists() and not (ROOT / name).exists()]
    places = PLACE.findall(text)
    assert len(places) > 20
    missing += [f"{name} {what}" for name, what in places if what not in defined(PACKAGE / name)]
    assert not missing


class Trace:
    """Notes which functions this process calls."""

    def __init__(self) -> None:
        self.called: dict[tuple[str, str], None] = {}

    def __call__(self, frame, event, _):
        if event == "call":
            self.called[frame.f_code.co_filename, frame.f_code.co_name] = None


def trace_calls():
    sys.setprofile(Trace())


def called():
    trace = sys.getprofile()
    sys.setprofile(None)
    return list(trace.called)


@pytest.mark.slow
@pytest.mark.skipif(why_not_shared() is not None, reason=str(why_not_shared()))
def test_a_batch_goes_the_way_that_the_architecture_tells():
    story = page_text("architecture").partition("## A batch, from")[2].partition("\n## ")[0]
    places = PLACE.findall(story)
    files = list(dict.fromkeys(file for file, _ in places))
    assert len(files) <= 9
    assert [file for file, _ in itertools.groupby(places, key=lambda place: place[0])] == files, "it returns to none"
    with TorchTrainer(
        model_creator=lambda config: torch.nn.Linear(1, 1),
        optimizer_creator=lambda model, config: torch.optim.SGD(model.parameters(), lr=0.1),
        data_creator=lambda config: DataLoader(TensorDataset(torch.ones(16, 1), torch.ones(16, 1)), batch_size=2),
        loss_creator=torch.nn.MSELoss,
        num_workers=2,
        initialization_hook=trace_calls,
    ) as trainer:
        trainer.train()
        ways = trainer.apply_all_workers(called)
    for way in ways:
        found = {
            (str(Path(file).relative_to(PACKAGE)), name) for file, name in way if Path(file).is_relative_to(PACKAGE)
        }
        missing = [place for place in places if (place[0], place[1].rpartition(".")[2]) not in found]
        assert not missing
