"""Ctrl-C and SIGTERM while a run trains."""

import contextlib
import signal
from typing import Any


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to stop after the step; the same once more interrupts at once.

    After a Ctrl-C, which reaches all processes, torchrun sends them SIGTERM too.
    """

    def __init__(self) -> None:
        self.numbers: set[int] = set()
        self.before: dict[int, Any] = {}  # handlers, as signal.signal gives them

    def __enter__(self) -> "StopSignal":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # outside the main thread signals cannot be handled
                self.before[number] = signal.signal(number, self._handle)
        return self

    @property
    def requested(self) -> bool:
        return bool(self.numbers)

    def _handle(self, number: int, frame: object) -> None:
        if number in self.numbers:
            raise KeyboardInterrupt
        self.numbers.add(number)

    def __exit__(self, *exc: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
