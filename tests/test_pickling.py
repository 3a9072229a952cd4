"""What does not pickle is found, however deep it is."""

from __future__ import annotations

import collections
import dataclasses
import functools
import pickle
import threading
import types

import pytest
import torch

from torchtrainer import NotSerializableError
from torchtrainer.driver.pickling import dumps, find_culprit

LOCK = threading.Lock()


class Bag:
    def __init__(self, **things):
        self.__dict__.update(things)

    def method(self):
        return self


def closure():
    lock = threading.Lock()

    def function():
        return lock

    return function


def model():
    outer = torch.nn.Sequential(torch.nn.Linear(1, 1))
    outer[0].lock = threading.Lock()
    return outer


def in_main(thing):
    """The same as if the script had defined it: its code travels."""
    for one in (thing, *vars(thing).values()) if isinstance(thing, type) else (thing,):
        if isinstance(one, type | types.FunctionType):
            one.__module__ = "__main__"
    return thing


@in_main
class UsesSuper(Bag):
    def first(self):
        super().method()

    def method(self):
        with LOCK:
            return super().method()


@in_main
class UsesLockAtStart:
    def __init__(self):
        LOCK.acquire()


@in_main
class HasProperty(UsesSuper):
    @property
    def locked(self):
        return [LOCK.locked() for _ in range(1)]


@in_main
class Static:
    @staticmethod
    @in_main
    def locked():
        return LOCK.locked()


@in_main
@dataclasses.dataclass
class WithFactory:
    lock: object = dataclasses.field(default_factory=lambda: LOCK)


@in_main
@dataclasses.dataclass(slots=True)
class Slotted:
    inner: object


def decorated(function):
    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


@in_main
@decorated
@in_main
def uses_lock_inside():
    def inner():
        return LOCK

    return inner


class LeavesOut(Bag):
    def __getstate__(self):
        return {"kept": self.kept}


LOCAL = type("Local", (), {"lock": threading.Lock(), "__module__": "__main__"})


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (threading.Lock(), "it"),
        ({"a": [0, (threading.Lock(),)]}, "it['a'][1][0]"),
        (Bag(a=Bag(b=threading.Lock())), "it.a.b"),
        (Bag(lock=threading.Lock()).method, "it.__self__.lock"),
        (closure(), "it: lock"),
        (lambda: LOCK, "it: LOCK"),
        (lambda x=LOCK: x, "it.__defaults__[0]"),
        (lambda *, x=LOCK: x, "it.__kwdefaults__['x']"),
        (functools.partial(print, 1, threading.Lock()), "it.args[1]"),
        (functools.partial(print, end=threading.Lock()), "it.keywords['end']"),
        (model(), "it._modules['0'].lock"),
        ((number for number in range(3)), "it"),
        (LOCAL, "it.lock"),
        (UsesSuper, "it.method: LOCK"),
        (UsesSuper(), "it.__class__.method: LOCK"),
        ([UsesSuper().first], "it[0].__self__.__class__.method: LOCK"),
        (UsesLockAtStart, "it.__init__: LOCK"),
        (HasProperty, "it.locked: LOCK"),
        (Static.locked, "it: LOCK"),
        (Static, "it.locked: LOCK"),
        (WithFactory, "it.__dataclass_fields__['lock'].default_factory: LOCK"),
        (Slotted(inner=[threading.Lock()]), "it.inner[0]"),
        (uses_lock_inside, "it: function: LOCK"),
        (collections.deque([1, threading.Lock()]), "it[1]"),
        (LeavesOut(left=threading.Lock(), kept={"deep": threading.Lock()}), "it.kept['deep']"),
        (functools.lru_cache(lambda: LOCK), "it: LOCK"),
    ],
)
def test_the_culprit_is_named(value, path) -> None:
    with pytest.raises(NotSerializableError) as caught:
        dumps(value, "it")
    assert str(caught.value).startswith(f"{path} cannot be sent to the worker processes: ")
    assert "does not pickle" in str(caught.value)
    assert isinstance(caught.value, TypeError)
    assert caught.value.__cause__ is not None


def test_an_object_that_contains_itself_ends_the_search() -> None:
    bag = Bag(lock=threading.Lock())
    bag.itself = bag
    path, culprit = find_culprit({"bag": bag}, "it")
    assert path.endswith(".lock")
    assert culprit is bag.lock


def test_an_object_that_refuses_by_itself_is_named() -> None:
    class Refuses:
        def __reduce__(self):
            raise RuntimeError("not me")

    with pytest.raises(
        NotSerializableError, match=r"it\['x'\] cannot be sent .*Refuses object does not pickle \(not me\)"
    ):
        dumps({"x": Refuses()}, "it")


def test_what_pickles_comes_back() -> None:
    assert pickle.loads(dumps(lambda: 3, "it"))() == 3
