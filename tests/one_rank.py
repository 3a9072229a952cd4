"""An executor that carries one rank, for tests: its calls return what they do for that rank."""

from __future__ import annotations

from typing import Any

from torchtrainer.train.metrics import PassResult
from torchtrainer.worker.executor import Executor


class OneRank:
    """Hands everything on to an executor, which has the arguments given."""

    def __init__(self, operator: Any, **arguments: Any) -> None:
        self.executor = Executor(operator, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.executor, name)

    def train(self, **keywords: Any) -> PassResult:
        (found,) = self.executor.train(**keywords).values()
        return found

    def validate(self, **keywords: Any) -> PassResult:
        (found,) = self.executor.validate(**keywords).values()
        return found
