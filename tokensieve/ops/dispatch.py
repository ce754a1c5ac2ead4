"""Which backend runs an op: the one place where kernels are picked.

A backend is a module with one function per op (and `<op>_backward` where the op has a gradient). `BACKENDS` is ordered, fastest
first; `auto` takes the first that has no reason against this call and logs the choice once per op. A backend asked for by name
that cannot run raises with its reason: there is no silent fallback.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType

import torch

from tokensieve.ops import fused

log = logging.getLogger("tokensieve.ops")

PAGED_OPS = ("index_scores_paged", "sparse_attention_paged", "write_caches")
OPS = (
    "index_scores",
    "select_topk",
    "index_topk",
    "dense_attention",
    "masked_attention",
    "sparse_attention",
    "sparse_attention_kl",
    "indexer_kl_dense",
    *PAGED_OPS,
)
TRITON_OPS = tuple(op for op in OPS if op not in ("dense_attention", "masked_attention"))
# Wider heads do not fit into a program's shared memory: on Hopper (576 is MLA's entry), and on every other GPU (docs/kernels.md).
ATTENTION_OPS = ("sparse_attention", "sparse_attention_kl", "sparse_attention_paged", "indexer_kl_dense")
INDEX_OPS = ("index_scores", "index_scores_paged", "index_topk")
TRITON_WIDEST = dict.fromkeys(INDEX_OPS, (128, 64)) | dict.fromkeys(ATTENTION_OPS, (576, 128))


@dataclass(frozen=True)
class Backend:
    """`limits(op, q, causal_documents)` says in one clause why this backend cannot run a call on its devices, or None if it can."""

    name: str
    path: str  # of its module, which is imported when it first runs: Triton is not on every machine
    ops: tuple[str, ...]
    devices: tuple[str, ...]  # none named: all
    limits: Callable[[str, torch.Tensor, bool], str | None]

    def has(self, op: str, device: str) -> bool:
        return op in self.ops and (not self.devices or device in self.devices)

    def why_not(self, op: str, q: torch.Tensor, causal_documents: bool) -> str | None:
        """Why this backend cannot run `op` for queries like `q`, in one clause, or None if it can."""
        if op not in self.ops:
            return f"it has no {op}"
        if not self.has(op, q.device.type):
            return f"it does not run on {q.device.type}"
        return self.limits(op, q, causal_documents)


@cache
def _module(path: str) -> ModuleType:
    return importlib.import_module(path)


@cache
def _no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@cache
def _is_hopper(device: torch.device) -> bool:
    # ROCm calls its devices cuda too
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _triton_limits(op: str, q: torch.Tensor, causal_documents: bool) -> str | None:
    dtypes = [torch.float16, torch.bfloat16]
    if op in INDEX_OPS:
        dtypes.append(torch.float8_e4m3fn)
    if op == "write_caches":  # no products
        dtypes.append(torch.float32)
    if op == "select_topk":  # scores are float32 whatever the model's dtype is
        dtypes = [torch.float32]
    if q.dtype not in dtypes:
        return f"no kernel takes {q.dtype}"
    if op in TRITON_WIDEST:
        widest = TRITON_WIDEST[op][0 if _is_hopper(q.device) else 1]
        if q.shape[-1] > widest:
            return f"no kernel for this GPU takes heads wider than {widest}"
    return _no_triton()


def _interpreter_limits(op: str, q: torch.Tensor, causal_documents: bool) -> str | None:
    if q.dtype not in (torch.float16, torch.float32):
        return f"it is not used for {q.dtype}"
    return _no_triton() if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set"


# The interpreter runs the same kernels slowly, without a GPU. It stands behind the reference, which runs everything: `auto` never
# comes to it.
BACKENDS: tuple[Backend, ...] = (
    Backend("fused", "tokensieve.ops.fused", ("dense_attention",), ("cpu", "cuda"), fused.limits),
    Backend("triton", "tokensieve.ops.triton", TRITON_OPS, ("cuda",), _triton_limits),
    Backend("reference", "tokensieve.ops.reference", OPS, (), lambda op, q, causal_documents: None),
    Backend("interpreter", "tokensieve.ops.triton", TRITON_OPS, ("cpu",), _interpreter_limits),
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
                return _module(candidate.path)
        known = ", ".join(b.name for b in BACKENDS)
        raise ValueError(f"unknown backend {backend!r} for {op}; known: auto, {known}")
    device = q.device.type
    passed_over: tuple[str, ...] = ()
    for candidate in BACKENDS:
        if not candidate.has(op, device):  # that is not worth a word
            continue
        reason = candidate.limits(op, q, causal_documents)
        if reason is None:
            if not torch.compiler.is_compiling():
                _log_choice(op, candidate.name, device, passed_over)
            return _module(candidate.path)
        passed_over += (f"{candidate.name}: {reason}",)
    raise ValueError(f"no backend can run {op} on {device} with {q.dtype}")
