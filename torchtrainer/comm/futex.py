"""Sleeping on a word of shared memory until another process changes it: Linux's futex, by way of the C library."""

from __future__ import annotations

import ctypes
import functools
import math
import platform
import sys
from typing import Any

_SYS_FUTEX = 202
"""Number of the system call on x86-64."""
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYBODY = 2**31 - 1
_LOW_32_BITS = 2**32 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_int64), ("nanoseconds", ctypes.c_int64))


@functools.cache
def why_not_shared() -> str | None:
    """None where processes can exchange through shared memory; else the reason, in words. From any process and thread.

    Linux on x86-64 only: what a process writes there before it writes a flag, another process that sees the flag sees too.
    Other processors need instructions for that which Python does not have.
    """
    if sys.platform != "linux":
        return f"there is no futex on {sys.platform}"
    if platform.machine() != "x86_64" or sys.maxsize < 2**32:
        return f"{platform.machine()} may show another process a flag before the data written ahead of it"
    word = ctypes.c_uint64()
    if _syscall()(_SYS_FUTEX, ctypes.addressof(word), _FUTEX_WAKE, 1, None, None, 0) != 0:
        return f"the system refuses the futex call (error {ctypes.get_errno()})"
    return None


def wait(address: int, seen: int, timeout_s: float) -> None:
    """Sleeps until the word is woken, a signal comes or the time is over; not at all if the word has changed.

    Args:
        address: of an aligned 64-bit word, of which the lower half is compared.
        seen: value of the word for which there is reason to sleep.
        timeout_s: longest sleep.
    """
    fraction, seconds = math.modf(timeout_s)
    timeout = _Timespec(int(seconds), int(fraction * 1e9))
    _syscall()(_SYS_FUTEX, address, _FUTEX_WAIT, seen & _LOW_32_BITS, ctypes.byref(timeout), None, 0)


def wake(address: int) -> None:
    """Wakes everybody who sleeps on the word, in all processes that map it."""
    _syscall()(_SYS_FUTEX, address, _FUTEX_WAKE, _EVERYBODY, None, None, 0)


@functools.cache
def _syscall() -> Any:
    function = ctypes.CDLL(None, use_errno=True).syscall
    number, pointer = ctypes.c_long, ctypes.c_void_p
    function.argtypes = (number, pointer, ctypes.c_int, ctypes.c_uint32, pointer, pointer, ctypes.c_uint32)
    function.restype = ctypes.c_long
    return function
