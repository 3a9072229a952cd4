"""What a Lightning module's hooks call and Lightning's ``Trainer`` would do: logging, optimizers, ``manual_backward``."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torchtrainer.errors import OperatorUseError
from torchtrainer.lightning.stepping import ManualStepping
from torchtrainer.train.components import internals

if TYPE_CHECKING:
    from torchtrainer.lightning.log import LoggedMetrics
    from torchtrainer.lightning.operator import LightningOperator


class ModuleCalls:
    """Takes the place of methods of the module while its hooks run.

    Args:
        operator: trains the module.
        base: Lightning's class.

    Attributes:
        logged: collects what the running call logs; None: no call is running.
    """

    def __init__(self, operator: LightningOperator, base: Any) -> None:
        self.logged: LoggedMetrics | None = None
        self._operator = operator
        self._base = base
        self._signature = inspect.signature(base.log)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Inside, hooks find the methods; afterwards the module is as it was, to be copied.

        Raises:
            OperatorUseError: a hook uses a logger that is not there.
        """
        ours = {"log": self._log, "optimizers": self._optimizers, "manual_backward": self._manual_backward}
        modules = [
            one for one in self._operator.model.modules() if isinstance(one, self._base) and "log" not in vars(one)
        ]
        for one in modules:
            vars(one).update(ours)
        try:
            yield
        except AttributeError as error:
            if (advice := _advice_on_logger(error)) is not None:
                raise OperatorUseError(advice) from error
            raise
        finally:
            for one in modules:
                for name in ours:
                    del vars(one)[name]

    def _optimizers(self, use_pl_optimizer: bool = True) -> Any:
        stepping = self._operator.stepping
        found = stepping.optimizers if use_pl_optimizer else [one.optimizer for one in stepping.optimizers]
        return found[0] if len(found) == 1 else list(found)

    def _manual_backward(self, loss: Any, *arguments: Any, **options: Any) -> None:
        stepping = self._operator.stepping
        if not isinstance(stepping, ManualStepping):
            raise OperatorUseError(
                f"{type(self._operator.model).__name__} called self.manual_backward, which is for manual optimization: set "
                "self.automatic_optimization = False in __init__, or return the loss from training_step"
            )
        stepping.backward(loss, *arguments, **options)

    def _log(self, *arguments: Any, **options: Any) -> None:
        """The module's ``log``, with its signature."""
        operator = self._operator
        given = self._signature.bind(operator.model, *arguments, **options).arguments
        if given.get("rank_zero_only") and operator.world_rank:
            return
        if self.logged is None:
            raise OperatorUseError(
                f"self.log({given['name']!r}, ...) was called outside of training and validation, where nothing is collected"
            )
        own = operator.position.weight(internals(operator).steps)
        self.logged.add(
            given["name"],
            given["value"],
            weight=(given.get("batch_size") or own) if own else 0,
            reduce_fx=given.get("reduce_fx", "mean"),
            both=bool(given.get("on_step") and given.get("on_epoch")),
        )


def _advice_on_logger(error: AttributeError) -> str | None:
    """What to do about an error that comes of ``self.logger`` being None; None: it does not."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    code = trace.tb_frame.f_code if trace is not None else None
    if error.obj is not None or error.name is None or code is None or "logger" not in code.co_names:
        return None
    return (
        f"{code.co_name} uses .{error.name} of self.logger, which is None: torchtrainer uses no Lightning logger. Log "
        "numbers with self.log, which puts them into the results of train() and validate(), and log others only where "
        "self.logger is not None"
    )
