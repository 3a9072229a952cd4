"""What a rank leaves behind at each step is read whole or not at all, while it goes on."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from torchtrainer.errors import EngineError
from torchtrainer.train import rng
from torchtrainer.train.records import RecordFile
from torchtrainer.train.rng import StreamReader, isolated_rng, set_rng_state, streams_from_plain

pytestmark = pytest.mark.pure

TENSORS = [torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.int64)]
LONG = 4000
"""Numbers on a card: more than are copied at once."""
CARDS = 3000

WRITER = f"""
import sys, torch
from torchtrainer.train.records import RecordFile

cards = RecordFile(sys.argv[1], rank=0, tensors=[torch.zeros(3, dtype=torch.float64), torch.zeros((), dtype=torch.int64)])
for number in range({CARDS}):
    value = [torch.full((3,), number, dtype=torch.float64), torch.tensor(number)]
    cards.write(number, value, [number] * ({LONG} + number % 7))
    if number == 0:
        print("begun", flush=True)
"""


DRAWS = {
    "nothing": lambda: None,
    "a number": random.random,
    "one of a pair of normal numbers": lambda: random.gauss(0, 1),
    "many numbers": lambda: [random.random() for _ in range(700)],
    "a seed": lambda: random.seed(3),
    "of numpy": np.random.rand,
    "one of a pair of numpy's normal numbers": np.random.randn,
    "of torch": lambda: torch.rand(2),
}


def next_draws() -> list:
    return [random.gauss(0, 1), random.random(), np.random.randn(), np.random.rand(), torch.rand(1).item()]


@pytest.mark.parametrize("finds", ["the memory of Python's generator", "none"])
def test_streams_go_on_from_a_card_whatever_was_drawn_before(monkeypatch, finds) -> None:
    with isolated_rng():
        if finds == "none":
            monkeypatch.setattr(rng, "_python_twister", lambda: None)
        reader = StreamReader()
        for draw in DRAWS.values():
            draw()
            read = reader.read()
            expected = next_draws()
            set_rng_state(streams_from_plain(read))
            assert next_draws() == expected
            set_rng_state(streams_from_plain(read))


@pytest.fixture
def path(tmp_path) -> str:
    file = tmp_path / "cards"
    file.touch()
    return str(file)


def test_the_two_latest_cards_are_there(path) -> None:
    mine, other = (RecordFile(path, rank=0, tensors=TENSORS) for _ in range(2))
    assert not other.has(0)
    for number in range(5):
        mine.write(number, [torch.full((3,), number, dtype=torch.float64), torch.tensor(number)], {"number": number})
    for number in (3, 4):
        tensors, plain = other.read(number)
        assert plain == {"number": number}
        assert [one.sum() for one in tensors] == [3 * number, number]
    with pytest.raises(EngineError, match="left no state of exchange 2 behind"):
        other.read(2)


def test_a_card_that_is_being_written_over_is_not_read(path) -> None:
    with subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "begun\n"
        cards, number, read = RecordFile(path, rank=0, tensors=TENSORS), 0, 0
        while number < CARDS - 1:
            try:
                plain = cards.read(number)[1]
            except EngineError:
                number = next((one for one in range(number, CARDS) if cards.has(one)), number)
                continue
            assert plain == [number] * (LONG + number % 7)
            read += 1
            number += cards.has(number + 1)
    assert writer.returncode == 0
    assert read
