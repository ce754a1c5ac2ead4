"""Waiting for processes that begin and end by themselves."""

import time
from collections.abc import Callable

import psutil

SECONDS = 60.0  # until a process must have begun or ended, on a busy machine


def until(true: Callable[[], bool]) -> None:
    """Waits. AssertionError after `SECONDS`."""
    end = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
