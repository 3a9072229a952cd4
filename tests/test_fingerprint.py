"""What a training depends on, as names and short texts: what a change of each kind shows, and what shows none."""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from torchtrainer.driver.fingerprint import differences, fingerprint, script_arguments
from torchtrainer.driver.made_anew import Source

pytestmark = pytest.mark.pure


def changed(before, after) -> list[str]:
    return differences(fingerprint({"value": before}), fingerprint({"value": after}))


class Box:
    """Of the user."""

    def __init__(self, **values):
        self.__dict__.update(values)

    def of_class(self):
        return 1


class Slotted:
    __slots__ = ("lr",)

    def __init__(self, lr):
        self.lr = lr


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        (0.1, 0.2, "value was 0.1 and is 0.2"),
        (1, 1.0, "value was 1 and is 1.0"),
        ("a", "b", "value was 'a' and is 'b'"),
        ([1, [2, 3]], [1, [2, 4]], "value[1][1] was 3 and is 4"),
        ({"a": {"b": 1}}, {"a": {"b": 2}}, "value['a']['b'] was 1 and is 2"),
        ({"a": 1}, {"a": 1, "b": 2}, "value['b'] was not there and is 2"),
        ({1, 2}, {1, 3}, "value was set of 1, 2 and is set of 1, 3"),
        (Box(lr=1), Box(lr=2), "value.lr was 1 and is 2"),
        (Slotted(1), Slotted(2), "value.lr was 1 and is 2"),
        (SimpleNamespace(lr=1), SimpleNamespace(lr=2), "value.lr was 1 and is 2"),
        (argparse.Namespace(lr=1), argparse.Namespace(lr=2), "value.lr was 1 and is 2"),
        (Path("a"), Path("b"), "value was PosixPath('a') and is PosixPath('b')"),
        (torch.zeros(3), torch.ones(3), "value has changed"),
        (torch.zeros(3), torch.zeros(4), "value was tensor of torch.float32 (3,) and is tensor of torch.float32 (4,)"),
        (list(range(100)), [*range(99), 7], "value has changed"),
        ({str(i): [i] for i in range(100)}, {str(i): [i + (i == 7)] for i in range(100)}, "value has changed"),
        (functools.partial(max, 1), functools.partial(max, 2), "value.args[0] was 1 and is 2"),
        (torch.optim.SGD, torch.optim.Adam, "value was torch.optim.sgd.SGD and is torch.optim.adam.Adam"),
        (torch.nn.Dropout(0.1), torch.nn.Dropout(0.2), "value has changed"),
        (random.Random(1), random.Random(2), "value has changed"),
    ],
)
def test_a_changed_value_is_named(before, after, difference) -> None:
    assert changed(before, after) == [difference]
    assert changed(before, before) == []


@pytest.mark.parametrize(
    "make",
    [
        threading.Lock,
        lambda: sys.__stderr__,
        lambda: (one for one in range(3)),
        lambda: os.environ,
        lambda: Box(lock=threading.Lock()),
        lambda: torch.nn.Linear(3, 3),
        lambda: {"model": torch.nn.Linear(3, 3), "place": object()},
        lambda: functools.lru_cache(lambda: 1),
        time,
    ],
)
def test_what_cannot_be_compared_is_equal_to_itself(make) -> None:
    assert changed(make() if callable(make) else make, make() if callable(make) else make) == []


def test_a_value_that_holds_itself_ends() -> None:
    inside: list[object] = [1]
    inside.append(inside)
    box = Box(lr=1)
    box.me = box
    assert changed(inside, inside) == changed(box, box) == []


def test_code_counts_by_what_it_does() -> None:
    factor = 2

    def one(config):
        # a comment
        return config["a"] + 1

    first = one

    def one(config):  # the same again, elsewhere
        """Now with a docstring."""
        return config["a"] + 1

    assert changed(first, one) == []
    assert changed(first, lambda config: config["a"] + 2) == ["value has changed"]

    def other(config, least=0):
        return config["a"] + factor

    before = fingerprint({"f": other})
    factor = 3
    assert differences(before, fingerprint({"f": other})) == ["factor of f was 2 and is 3"]
    other.__defaults__ = (1,)
    assert "least of f was 0 and is 1" in differences(before, fingerprint({"f": other}))


MODULE = """
import abc, dataclasses, datetime, functools, os, random, time, uuid
from contextlib import contextmanager
{top}
@contextmanager
def wrapped():
    yield {wrapped}

@functools.lru_cache
def cached(x):
    return {cached}

class Parent(abc.ABC):
    rate = {inherited}
    @property
    def size(self):
        return {in_property}
    @staticmethod
    def fixed():
        return 1
    class Inner:
        width = {inner}

class Child(Parent):
    def go(self):
        import other
        from other import IMPORTED
        return wrapped(), cached(1), super().size, IMPORTED

def creator(config):
    return Child(), VALUE

def not_reached():
    return {unrelated}

if __name__ == "__main__":
    import json, other
    from torchtrainer.driver.fingerprint import fingerprint
    print(json.dumps(fingerprint(dict(creator=creator))))
"""
USUAL = {
    "top": "VALUE = 1",
    "wrapped": "1",
    "cached": "1",
    "inherited": "1",
    "in_property": "1",
    "inner": "1",
    "unrelated": "1",
}


def of_module(place: Path, other: str = "IMPORTED = 1", **changes: str) -> dict[str, str]:
    """The fingerprint of a script, in a process of its own, without compiled files: sources change within a second."""
    (place / "other.py").write_text(other)
    (place / "script.py").write_text(MODULE.format(**USUAL | changes))
    run = subprocess.run([sys.executable, "-B", "script.py"], cwd=place, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout)
    return found


def test_code_and_values_are_followed_to_where_they_are_used(tmp_path) -> None:
    usual = of_module(tmp_path)
    for change, difference in {
        "wrapped": "wrapped has changed",
        "cached": "cached has changed",
        "inherited": "Parent.rate was 1 and is 2",
        "in_property": "Parent.size has changed",
        "inner": "Parent.Inner.width was 1 and is 2",
    }.items():
        assert differences(usual, of_module(tmp_path, **{change: "2"})) == [difference]
    assert differences(usual, of_module(tmp_path, other="IMPORTED = 2")) == ["other.IMPORTED was 1 and is 2"]
    assert differences(usual, of_module(tmp_path, other="# a comment\nMORE = 2\nIMPORTED = 1", unrelated="2")) == []


@pytest.mark.parametrize(
    ("made", "also"),
    [
        ("time.time()", ""),
        ("f'run-{datetime.datetime.now():%H%M%S%f}'", ""),
        ("os.path.join('runs', str(os.getpid()))", ""),
        ("uuid.uuid4().hex[:8]", ""),
        ("random.random()", ""),
        ("os.pipe()[0]", ""),
        ("torch.randn(3)", ""),
        ("name()", "def name():\n    stamp = time.time_ns()\n    return f'run-{stamp}'"),
        ("float(os.environ.get('MASTER_PORT', '0'))", ""),
    ],
)
def test_what_is_made_anew_at_each_start_counts_by_how_it_is_made(made, also) -> None:
    source = Source.parse(f"import time, datetime, os, random, uuid, torch\n{also}\nVALUE = {made}\n")
    from torchtrainer.driver.made_anew import _leads_to_source

    (expression,) = source.assigned["VALUE"]
    assert _leads_to_source(expression, source, {(id(source), "VALUE")})


@pytest.mark.parametrize(
    "made",
    [
        "float(os.environ['LR'])",
        "json.load(open('config.json'))",
        "PARAMETERS['lr']",
        "random.Random(3).random()",
        "torch.randn(3, generator=torch.Generator().manual_seed(1))",
        "read()",
    ],
)
def test_what_a_user_may_have_changed_counts_by_its_value(made) -> None:
    source = Source.parse(
        "import os, json, random, time, torch\n"
        "def read():\n    begun = time.time()\n    values = json.load(open('x'))\n    print(time.time() - begun)\n    return values\n"
        f"PARAMETERS = {{'lr': 0.1, 'started': time.time()}}\nVALUE = {made}\n"
    )
    from torchtrainer.driver.made_anew import _leads_to_source

    (expression,) = source.assigned["VALUE"]
    assert not _leads_to_source(expression, source, {(id(source), "VALUE")})


@pytest.mark.parametrize(
    ("text", "seeds"),
    [
        ("torch.manual_seed(0)", True),
        ("def main():\n    torch.manual_seed(0)\nmain()", True),
        ("if __name__ == '__main__':\n    seed_everything(3)", True),
        ("g = torch.Generator().manual_seed(0)", False),
        ("def model_creator(config):\n    torch.manual_seed(0)\nTorchTrainer(model_creator=model_creator)", False),
    ],
)
def test_a_seed_counts_where_the_script_runs_it(text, seeds) -> None:
    assert Source.parse(f"import torch\nfrom lightning import seed_everything\n{text}\n").seeds is seeds


def test_arguments_are_told_by_option() -> None:
    assert script_arguments(["data.csv", "--lr", "0.1", "--flag", "--size=3", "-v", "--shift", "-0.5"]) == {
        "argument 1": "'data.csv'",
        "--lr": "'0.1'",
        "--flag": "given",
        "--size": "'3'",
        "-v": "given",
        "--shift": "'-0.5'",
    }
    assert script_arguments(["--a", "1", "--b", "2"]) == script_arguments(["--b", "2", "--a=1"])
    assert differences(script_arguments([]), script_arguments(["--flag"])) == ["--flag was not there and is given"]


def test_what_may_change_does_not_count_by_any_word_of_its_name() -> None:
    then = {"--num-epochs": "'3'", "args.num_epochs": "3", "args.lr": "0.1"}
    now = {"--num-epochs": "'4'", "args.num_epochs": "4", "args.lr": "0.2"}
    assert (
        differences(then, now, ["num_epochs"])
        == differences(then, now, ["--num-epochs"])
        == ["args.lr was 0.1 and is 0.2"]
    )


def test_names_that_refer_to_each_other_many_times_are_followed_once_each() -> None:
    """A chain in which every name uses the one before it twice has as many paths as a chessboard has grains."""
    text = "A0 = 1\n" + "".join(f"A{n} = A{n - 1} + A{n - 1}\n" for n in range(1, 60))
    from torchtrainer.driver.made_anew import _leads_to_source

    source = Source.parse(text)
    assert not _leads_to_source(source.assigned["A59"][0], source, set())
    source = Source.parse("import time\n" + text.replace("A0 = 1", "A0 = time.time()"))
    assert _leads_to_source(source.assigned["A59"][0], source, set())
