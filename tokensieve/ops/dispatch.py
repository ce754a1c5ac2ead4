"""Which backend runs an op: the one place where kernels are picked.

A backend is a module with one function per op (and `<op>_backward` where the op has a gradient). `BACKENDS` is ordered, fastest
first; `auto` takes the first that has no reason against this call and logs the choice once per op. A backend asked for by name
that cannot run raises with its reason: there is no silent fallback.
"""

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Any

import torch

from tokensieve.ops import fused, vendor
from tokensieve.ops.aligned import pages_in_lines
from tokensieve.ops.quant import LATENT_TOKEN_BYTES

log = logging.getLogger("tokensieve.ops")

PAGED_OPS = ("quantize_queries", "index_scores_paged", "sparse_attention_paged", "write_caches")
OPS = (
    "index_scores",
    "select_topk",
    "index_topk",
    "dense_attention",
    "masked_attention",
    "sparse_attention",
    "sparse_attention_kl",
    "indexer_kl_dense",
    "block_linear",
    *PAGED_OPS,
)
TRITON_OPS = tuple(op for op in OPS if op != "dense_attention")
HOPPER_OPS = ("index_scores", "index_topk", "sparse_attention", "sparse_attention_kl", "sparse_attention_paged")
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Backend:
    """`limits(op, q, operands)` says in one clause why this backend cannot run a call on its devices, or None if it can.

    `operands` are the op's arguments by the names that they have in `table.py`.
    `slower` says why `auto` passes over a backend that could run a call: one further down is as fast. Asked for by name it runs.
    """

    name: str
    path: str  # of its module, which is imported when it first runs: Triton is not on every machine
    ops: tuple[str, ...]
    devices: tuple[str, ...]  # none named: all
    limits: Callable[[str, torch.Tensor, Mapping[str, Any]], str | None]
    slower: Callable[[str, torch.Tensor, Mapping[str, Any]], str | None] = lambda op, q, operands: None

    def has(self, op: str, device: str) -> bool:
        return op in self.ops and (not self.devices or device in self.devices)

    def why_not(self, op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
        """Why this backend cannot run `op` for arguments like these, in one clause, or None if it can."""
        if op not in self.ops:
            return f"it has no {op}"
        if not self.has(op, q.device.type):
            return f"it does not run on {q.device.type}"
        return self.limits(op, q, operands)


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


def _product_limits(q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...], widest: int) -> str | None:
    """Why no kernel multiplies these queries with these keys."""
    if q.dtype not in dtypes:
        return f"no kernel takes {q.dtype}"
    if k.dtype != q.dtype:
        return f"no kernel takes {q.dtype} with {k.dtype}"
    return f"no kernel for this GPU takes heads wider than {widest}" if q.shape[-1] > widest else None


def _triton_limits(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    """The widths are those whose tiles fit into a program's shared memory: on Hopper, and on every other GPU (docs/kernels.md)."""
    if op == "select_topk":  # scores are float32 whatever the model's dtype is
        return _no_triton() if q.dtype == torch.float32 else f"no kernel takes {q.dtype}"
    if op == "block_linear" and not (q.is_cpu or _is_hopper(q.device)):  # FP8 products; the interpreter has them too
        return "it multiplies FP8, which this GPU does not"
    if op in ("write_caches", "quantize_queries", "block_linear"):  # rounded to E4M3 before a product
        return _no_triton() if q.dtype in (*HALF, torch.float32) else f"no kernel takes {q.dtype}"
    key, value, index = (576, 256, 128) if _is_hopper(q.device) else (128, 128, 64)
    if op in ("index_scores", "index_topk", "index_scores_paged"):  # pages come in every layout
        return _product_limits(q, operands.get("k", q), (*HALF, torch.float8_e4m3fn), index) or _no_triton()
    if op == "sparse_attention_paged":
        return _product_limits(q, q, HALF, key) or _no_triton()
    if op == "masked_attention":
        k, v = operands["k"], operands["v"]
        return _product_limits(q, k, HALF, value) or _product_limits(v, q, HALF, value) or _no_triton()
    reason = _product_limits(q, operands["k" if op == "indexer_kl_dense" else "kv"], HALF, key)
    if reason is None and "q_I" in operands:
        reason = _product_limits(operands["q_I"], operands["k_I"], HALF, index)
    if reason is None and "d_v" in operands:
        d_k, d_v = q.shape[-1], operands["d_v"]
        # the largest power of two that fits into the key is loaded once where it is the value as well, as under MLA
        apart = operands["v_start"] != 0 or d_v != 1 << d_k.bit_length() - 1
        if apart and max(d_k, d_v) > value:
            reason = f"no kernel for this GPU takes keys or values wider than {value} where the value is not the key's first part"
    return reason or _no_triton()


def _vendor_limits(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    return vendor.limits(op, q, operands) or _no_triton() if _is_hopper(q.device) else "it is for Hopper GPUs"


def _hopper_limits(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    """One shape, the 671B model's: what else there is, the portable kernels take."""
    if not _is_hopper(q.device):
        return "it is for Hopper GPUs"
    if op in ("index_scores", "index_topk"):
        if q.dtype != torch.float8_e4m3fn or q.shape[2] != 128 or q.shape[1] not in (16, 32, 64, 128):
            return "its index scores are of E4M3 queries with 16, 32, 64 or 128 heads of 128"
    elif op == "sparse_attention_paged":
        pages = operands["latent_pages"]
        if q.dtype != torch.bfloat16 or q.shape[-1] != 576 or pages.dtype != torch.uint8:
            return "it decodes from quantized pages, with bfloat16 queries of 576"
        if not pages_in_lines(pages, LATENT_TOKEN_BYTES):
            return "it reads pages whose bytes lie together, at multiples of 16"
    elif operands["kv"].shape[1:] != (1, 576) or (q.shape[-1], operands["v_start"], operands["d_v"]) != (576, 0, 512):
        return "its entries are 576 wide, one a token, and their value is the first 512"
    return _triton_limits(op, q, operands)


def _hopper_slower(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    if op != "sparse_attention_paged":
        return None
    beats_pieces = _module("tokensieve.ops.hopper").beats_pieces
    return None if beats_pieces(*q.shape[:2], operands["indices"].shape[1]) else "it does not share out so few queries"


def _interpreter_limits(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    # pages come in every layout, weights in FP8
    products = () if op in (*PAGED_OPS, "block_linear") else ("k", "v", "kv", "q_I", "k_I")
    for x in (q, *(operands.get(name) for name in products)):
        if isinstance(x, torch.Tensor) and (x.dtype != q.dtype or x.dtype not in (torch.float16, torch.float32)):
            return f"it is not used for {q.dtype} with {x.dtype}"
    return _no_triton() if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set"


# The interpreter runs the same kernels slowly, without a GPU. It stands behind the reference, which runs everything: `auto` never
# comes to it.
BACKENDS: tuple[Backend, ...] = (
    Backend("fused", "tokensieve.ops.fused", ("dense_attention",), ("cpu", "cuda"), fused.limits),
    Backend("vendor", "tokensieve.ops.vendor", vendor.OPS, ("cuda",), _vendor_limits, vendor.slower),
    Backend("hopper", "tokensieve.ops.hopper", HOPPER_OPS, ("cuda",), _hopper_limits, _hopper_slower),
    Backend("triton", "tokensieve.ops.triton", TRITON_OPS, ("cuda",), _triton_limits),
    Backend("reference", "tokensieve.ops.reference", OPS, (), lambda op, q, operands: None),
    Backend("interpreter", "tokensieve.ops.triton", TRITON_OPS, ("cpu",), _interpreter_limits),
)


@cache
def candidates(op: str, device: str) -> tuple[Backend, ...]:
    """The backends that have `op` on this type of device, in the order in which `auto` tries them."""
    return tuple(backend for backend in BACKENDS if backend.has(op, device))


@lru_cache
def _log_choice(op: str, name: str, device: str, passed_over: tuple[str, ...]) -> None:
    log.info("%s on %s: %s backend%s", op, device, name, f" ({'; '.join(passed_over)})" if passed_over else "")


def pick(op: str, q: torch.Tensor, backend: str, operands: Mapping[str, Any]) -> ModuleType:
    """The module that runs `op` for arguments like these. Raises ValueError for an unknown or unable backend asked for by name."""
    if backend != "auto":
        for candidate in BACKENDS:
            if candidate.name == backend:
                reason = candidate.why_not(op, q, operands)
                if reason is not None:
                    raise ValueError(f"backend {backend!r} cannot run {op}: {reason}; use backend='auto'")
                return _module(candidate.path)
        known = ", ".join(b.name for b in BACKENDS)
        raise ValueError(f"unknown backend {backend!r} for {op}; known: auto, {known}")
    device = "cpu" if q.is_cpu else q.device.type  # sooner known: a decode step asks for every layer
    passed_over: tuple[str, ...] = ()
    for candidate in candidates(op, device):
        reason = candidate.limits(op, q, operands) or candidate.slower(op, q, operands)
        if reason is None:
            _log_choice(op, candidate.name, device, passed_over)
            return _module(candidate.path)
        passed_over += (f"{candidate.name}: {reason}",)
    raise ValueError(f"no backend can run {op} on {device} with {q.dtype}")
