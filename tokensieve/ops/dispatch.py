"""Which backend runs an op: the one place where kernels are picked.

A backend is a module with one function per op (and `<op>_backward` where the op has a gradient). `BACKENDS` is ordered, fastest
first; `auto` takes the first whose `why_not` returns None for this call and logs the choice once per op. A backend asked for by name
that cannot run raises with its reason: there is no silent fallback.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType

import torch

from tokensieve.ops import fused, reference

log = logging.getLogger("tokensieve.ops")

WhyNot = Callable[[str, torch.Tensor, "bool"], str | None]


@dataclass(frozen=True)
class Backend:
    """`why_not(op, q, causal_documents)` says in one clause why this backend cannot run the call, or None if it can."""

    name: str
    module: ModuleType
    why_not: WhyNot


BACKENDS: tuple[Backend, ...] = (
    Backend("fused", fused, fused.why_not),
    Backend("reference", reference, lambda op, q, causal_documents: None),
)


@lru_cache
def _log_choice(op: str, name: str, device: str, passed_over: tuple[str, ...]) -> None:
    log.info("%s on %s: %s backend%s", op, device, name, f" ({'; '.join(passed_over)})" if passed_over else "")


def pick(op: str, q: torch.Tensor, backend: str = "auto", causal_documents: bool = False) -> ModuleType:
    """The module that runs `op` for queries like `q`. Raises ValueError for an unknown or unable backend asked for by name."""
    if backend != "auto":
        for candidate in BACKENDS:
            if candidate.name == backend:
                reason = candidate.why_not(op, q, causal_documents)
                if reason is not None:
                    raise ValueError(f"backend {backend!r} cannot run {op}: {reason}; use backend='auto'")
                return candidate.module
        known = ", ".join(b.name for b in BACKENDS)
        raise ValueError(f"unknown backend {backend!r} for {op}; known: auto, {known}")
    passed_over: tuple[str, ...] = ()
    for candidate in BACKENDS:
        reason = candidate.why_not(op, q, causal_documents)
        if reason is None:
            if not torch.compiler.is_compiling():
                _log_choice(op, candidate.name, q.device.type, passed_over)
            return candidate.module
        if op in vars(candidate.module):  # that a backend has no such op is not worth a word
            passed_over += (f"{candidate.name}: {reason}",)
    raise ValueError(f"no backend can run {op} on {q.device.type} with {q.dtype}")
