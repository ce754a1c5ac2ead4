"""What the Triton kernels take, on a GPU and in the interpreter. Imports no Triton: it is not on every machine."""

import importlib.util
import os
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from tokensieve.ops.reference import OPS as ALL_OPS
from tokensieve.ops.reference import PAGED_OPS

OPS = tuple(op for op in ALL_OPS if op != "dense_attention")
HALF = (torch.float16, torch.bfloat16)
FLOATS = (*HALF, torch.float32)
PRODUCTS = ("k", "v", "kv", "q_I", "k_I")  # the operands that meet the queries in a product


@cache
def no_triton() -> str | None:
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


@cache
def is_hopper(device: torch.device) -> bool:
    # ROCm calls its devices cuda too
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


def _product_limits(q: torch.Tensor, k: torch.Tensor, dtypes: tuple[torch.dtype, ...], widest: int) -> str | None:
    """Why no kernel multiplies these queries with these keys."""
    if q.dtype not in dtypes:
        return f"no kernel takes {q.dtype}"
    if k.dtype != q.dtype:
        return f"no kernel takes {q.dtype} with {k.dtype}"
    return f"no kernel for this GPU takes heads wider than {widest}" if q.shape[-1] > widest else None


def limits(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why the kernels cannot take this call, in one clause, or None if they can.

    The widths are those whose tiles fit into a program's shared memory: on Hopper, and on every other GPU
    (docs/kernels.md).
    """
    if op == "select_topk":  # scores are float32 whatever the model's dtype is
        return no_triton() if q.dtype == torch.float32 else f"no kernel takes {q.dtype}"
    if op == "block_linear" and not (q.is_cpu or is_hopper(q.device)):  # FP8 products; the interpreter has them too
        return "it multiplies FP8, which this GPU does not"
    if op in ("write_caches", "quantize_queries", "block_linear"):  # rounded to E4M3 before a product
        return no_triton() if q.dtype in FLOATS else f"no kernel takes {q.dtype}"
    key, value, index = (576, 256, 128) if is_hopper(q.device) else (128, 128, 64)
    if op in ("index_scores", "index_topk", "index_topk_blocks", "index_scores_paged"):  # pages come in every layout
        return _product_limits(q, operands.get("k", q), (*HALF, torch.float8_e4m3fn), index) or no_triton()
    if op == "masked_attention":
        k, v = operands["k"], operands["v"]
        return _product_limits(q, k, HALF, value) or _product_limits(v, q, HALF, value) or no_triton()
    keys = {"indexer_kl_dense": "k", "sparse_attention_paged": "q"}.get(op, "kv")  # pages are converted
    reason = _product_limits(q, operands[keys], HALF, key)
    if reason is None and "q_I" in operands:
        reason = _product_limits(operands["q_I"], operands["k_I"], HALF, index)
    if reason is None and "d_v" in operands:
        d_k, d_v = q.shape[-1], operands["d_v"]
        # the largest power of two that fits into the key is loaded once if it is the value as well, as under MLA
        apart = operands["v_start"] != 0 or d_v != 1 << d_k.bit_length() - 1
        if apart and max(d_k, d_v) > value:
            reason = (
                f"no kernel for this GPU takes keys or values wider than {value} "
                "unless the value is the key's first part"
            )
    return reason or no_triton()


def interpreter_limits(op: str, q: torch.Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why the interpreter cannot take this call, in one clause, or None if it can."""
    products = () if op in (*PAGED_OPS, "block_linear") else PRODUCTS  # pages come in every layout, weights in FP8
    for x in (q, *(operands.get(name) for name in products)):
        if isinstance(x, torch.Tensor) and (x.dtype != q.dtype or x.dtype not in (torch.float16, torch.float32)):
            return f"it is not used for {q.dtype} with {x.dtype}"
    return no_triton() if os.environ.get("TRITON_INTERPRET") == "1" else "TRITON_INTERPRET=1 is not set"
