"""What contributors are told, and what runs on their changes, is so: commands, versions, files and tests that are named exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

import torchtrainer

pytestmark = pytest.mark.pure

ROOT = Path(torchtrainer.__file__).parents[1]
PACKAGE = ROOT / "torchtrainer"
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PAGES = [ROOT / "CONTRIBUTING.md", ROOT / "docs" / "extending.md"]
TARGETS = set(re.findall(r"^([a-z]+)(?::| [a-z]+:)", (ROOT / "Makefile").read_text(), re.MULTILINE))
PROJECT = (ROOT / "pyproject.toml").read_text()


def read(path: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = yaml.safe_load(path.read_text())
    return found


def commands(path: Path) -> list[str]:
    """What the steps of a workflow run."""
    return [step["run"] for job in read(path)["jobs"].values() for step in job["steps"] if "run" in step]


@pytest.mark.parametrize("path", [*WORKFLOWS, ROOT / "CONTRIBUTING.md"], ids=lambda path: path.name)
def test_targets_that_are_named_are_in_the_makefile(path):
    text = "\n".join(commands(path)) if path.suffix == ".yml" else path.read_text()
    named = {word for call in re.findall(r"\bmake ([a-z ]+)", text) for word in call.split() if word != "in"}
    wanted = {"tests": {"check", "test", "torches"}, "release": {"lint", "test"}, "docs": {"docs"}}
    assert named >= wanted.get(path.stem, {"check", "fast", "test", "repeat"})
    assert named <= TARGETS, f"not in the Makefile: {named - TARGETS}"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_have_limits_and_name_no_hosts(path):
    workflow = read(path)
    assert set(workflow["permissions"]) == {"contents"}
    assert all(job["timeout-minutes"] <= 90 for job in workflow["jobs"].values())
    assert not re.findall(r"https?://|\b[\w-]+\.(?:org|com|io)\b", path.read_text()), "pip is used as it is configured"


def test_the_oldest_versions_that_are_promised_are_tested():
    jobs = read(ROOT / ".github" / "workflows" / "tests.yml")["jobs"]
    pythons = jobs["suite"]["strategy"]["matrix"]["python"]
    assert f'requires-python = ">={pythons[0]}"' in PROJECT
    oldest = jobs["torch"]["strategy"]["matrix"]["torch"]
    assert f'"torch>={oldest[0]}"' in PROJECT
    assert oldest[-1] == "newest"
    assert jobs["macos"]["runs-on"].startswith("macos")


def test_hooks_before_a_commit_run_what_lint_runs():
    hooks = read(ROOT / ".pre-commit-config.yaml")["repos"][0]["hooks"]
    run = " ".join(hook["entry"] for hook in hooks)
    assert all(f"-m {tool}" in run for tool in ("ruff check", "ruff format", "mypy"))


def test_forms_can_be_filled_in():
    for path in FORMS:
        form = read(path)
        if path.name != "config.yml":
            assert form["name"]
            assert any(part.get("validations", {}).get("required") for part in form["body"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_names_of_the_pages_exist(page):
    text = page.read_text()
    below = {True: ROOT, False: PACKAGE}
    named = re.findall(r"`((?:\w+/)*\w+\.(?:py|sh|toml|md))`", text)
    missing = [
        one
        for one in named
        if not (below[one.startswith(("tests/", "docs/", "pyproject", "CHANGELOG"))] / one).exists()
    ]
    missing = [one for one in missing if not (ROOT / one).exists()]
    for test in re.findall(r"\b(test_\w+)`", text):
        if not any(f"def {test}(" in path.read_text() for path in (ROOT / "tests").glob("test_*.py")):
            missing.append(test)
    for module, name in re.findall(r"`((?:\w+/)*\w+\.py)`,? `(\w+)`", text):
        tree = ast.parse((PACKAGE / module).read_text())
        if name not in {getattr(node, "name", "") for node in ast.walk(tree)} | set(
            re.findall(r"^(\w+)\b", (PACKAGE / module).read_text(), re.MULTILINE)
        ):
            missing.append(f"{module} {name}")
    assert named
    assert not missing
