"""Which backend runs an op: the one place where kernels are picked.

`BACKENDS` is ordered, fastest first. `auto` takes the first that has no reason against this call and logs the choice
once per op. A backend asked for by name that cannot run raises with its reason: there is no silent fallback.
"""

import logging
from collections.abc import Mapping
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

from torch import Tensor

from tokensieve.ops import fused, reference, vendor
from tokensieve.ops.backend import Backend
from tokensieve.ops.hopper import limits as hopper
from tokensieve.ops.triton import limits as triton

log = logging.getLogger("tokensieve.ops")

# The interpreter runs the same kernels slowly, without a GPU. The reference before it runs everything: `auto` never
# gets to it.
BACKENDS: tuple[Backend, ...] = (
    Backend("fused", "tokensieve.ops.fused", fused.OPS, ("cpu", "cuda"), fused.limits),
    Backend("vendor", "tokensieve.ops.vendor", vendor.OPS, ("cuda",), vendor.limits, vendor.slower),
    Backend("hopper", "tokensieve.ops.hopper.backend", hopper.OPS, ("cuda",), hopper.limits, hopper.slower),
    Backend("triton", "tokensieve.ops.triton.backend", triton.OPS, ("cuda",), triton.limits),
    Backend("reference", "tokensieve.ops.reference", reference.OPS, ()),
    Backend("interpreter", "tokensieve.ops.triton.backend", triton.OPS, ("cpu",), triton.interpreter_limits),
)


@cache
def candidates(op: str, device: str) -> tuple[Backend, ...]:
    """The backends that have `op` on this type of device, in the order in which `auto` tries them."""
    return tuple(backend for backend in BACKENDS if backend.has(op, device))


@lru_cache
def _log_choice(op: str, name: str, device: str, skipped: tuple[str, ...]) -> None:
    log.info("%s on %s: %s backend%s", op, device, name, f" ({'; '.join(skipped)})" if skipped else "")


def _named(op: str, q: Tensor, name: str, operands: Mapping[str, Any]) -> ModuleType:
    for candidate in BACKENDS:
        if candidate.name == name:
            reason = candidate.why_not(op, q, operands)
            if reason is not None:
                raise ValueError(f"backend {name!r} cannot run {op}: {reason}; use backend='auto'")
            return candidate.module
    raise ValueError(f"unknown backend {name!r} for {op}; known: auto, {', '.join(b.name for b in BACKENDS)}")


def pick(op: str, q: Tensor, backend: str, operands: Mapping[str, Any]) -> ModuleType:
    """The module that runs `op` for arguments like these.

    q: the op's first argument. operands: all of its arguments, by the names that `table.py` gives them. Raises
    ValueError for an unknown or unable backend asked for by name.
    """
    if backend != "auto":
        return _named(op, q, backend, operands)
    device = "cpu" if q.is_cpu else q.device.type  # the quicker look: a decode step asks for every layer
    skipped: tuple[str, ...] = ()
    for candidate in candidates(op, device):
        reason = candidate.limits(op, q, operands) or candidate.slower(op, q, operands)
        if reason is None:
            _log_choice(op, candidate.name, device, skipped)
            return candidate.module
        skipped += (f"{candidate.name}: {reason}",)
    raise ValueError(f"no backend can run {op} on {device} with {q.dtype}")
