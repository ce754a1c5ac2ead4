"""What a backend is: a module with a function per op (and `<op>_backward` if it has a gradient), and its limits."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any

from torch import Tensor

# Takes an op, its first argument, and all of its arguments by the names that `table.py` gives them.
Reason = Callable[[str, Tensor, Mapping[str, Any]], str | None]


def no_reason(op: str, q: Tensor, operands: Mapping[str, Any]) -> None:
    return None


@dataclass(frozen=True)
class Backend:
    """`limits` says in one clause why this backend cannot run a call on its devices, or None if it can.

    `slower` says why `auto` skips it although it could run: a backend further down is as fast. Naming it still runs it.
    """

    name: str
    path: str  # of its module, which is imported when it first runs: Triton is not on every machine
    ops: tuple[str, ...]
    devices: tuple[str, ...]  # empty: all
    limits: Reason = no_reason
    slower: Reason = no_reason

    @cached_property
    def module(self) -> ModuleType:
        return importlib.import_module(self.path)

    def has(self, op: str, device: str) -> bool:
        return op in self.ops and (not self.devices or device in self.devices)

    def why_not(self, op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
        """Why this backend cannot run `op` for arguments like these, in one clause, or None if it can."""
        if op not in self.ops:
            return f"it has no {op}"
        if not self.has(op, q.device.type):
            return f"it does not run on {q.device.type}"
        return self.limits(op, q, operands)
