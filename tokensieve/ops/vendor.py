"""The kernels of FlashMLA and DeepGEMM as a backend, if their packages are installed, with our conventions.

Legend: S queries, B sequences, T keys, P pages that a row of the page table names, H heads, I index heads, K selected.

FlashMLA (`flash_mla`) has the forward of sparse attention, with entries of 576 whose first 512 are the value, 64 or 128
heads, in bfloat16. The places of a row must be a multiple of 128, and the logsumexp of a query without keys is +inf.
Gradients are our own. On quantized pages, whose layout is FlashMLA's, the places must be a multiple of 64 and name
places in the pool instead of positions: a kernel of ours finds them. There it computes unused places too: a row that is
mostly unused takes as long as a full one.

DeepGEMM (`deep_gemm`) has index scores of E4M3 queries and keys, with 32 or 64 heads of 128, and products with one
weight in FP8 blocks, for which our own kernel rounds the activations. It compiles its kernels with nvcc when they first
run. The selection is always our own, because theirs breaks ties in any order; so are scores from pages (docs/kernels.md
says why).
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tokensieve.ops.hopper.limits import aligned, in_lines
from tokensieve.ops.quant import LATENT_TOKEN_BYTES, LATENT_WIDTH, PAGE_TOKENS, ROPE_WIDTH
from tokensieve.ops.triton.limits import is_hopper, no_triton

PLACES, PAGED_PLACES = 128, 64  # FlashMLA's rows have a multiple of these
# Limits of a call on pages: its plan is made in a multiprocessor's shared memory, and its offsets have 32 bits.
MOST_QUERIES, MOST_PLACES = 1 << 13, 1 << 17
# Queries x heads x places, here two queries of the 671B model. FlashMLA needs two more launches: our own kernel was
# faster at one query, and slower at four (docs/kernels.md).
FEW_LOGITS = 2 * 128 * 2048
FEW_ROWS = 64  # of a product: up to this many our own kernel is about as fast, and needs no compiler

ATTENTION, INDEX, PAGED = ("sparse_attention",), ("index_scores", "index_topk"), ("sparse_attention_paged",)
LINEAR = ("block_linear",)
OPS = (*ATTENTION, *INDEX, *PAGED, *LINEAR)


@cache
def _package(name: str) -> ModuleType:
    return importlib.import_module(name)


@cache
def _missing(op: str) -> str | None:
    """What is not installed, or not built for this machine, in one clause; None if nothing is missing."""
    module, kernel = ("flash_mla", "flash_mla_sparse_fwd") if op in ATTENTION else ("deep_gemm", "fp8_mqa_logits")
    if op in PAGED:  # older versions have a function of the same name with other arguments
        module, kernel = "flash_mla.flash_mla_interface", "FlashMLASchedMeta"
    if op in LINEAR:
        kernel = "fp8_gemm_nt"
    name = module.partition(".")[0]
    if not importlib.util.find_spec(name):
        return f"the package {name} is not installed"
    compiler = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
    if op in (*INDEX, *LINEAR) and not compiler:
        return "deep_gemm needs nvcc"
    try:
        has_kernel = hasattr(_package(module), kernel)
    except (ImportError, OSError, AssertionError) as error:  # built for another torch or CUDA, or no toolkit
        return f"the package {name} does not load: {error}"
    return None if has_kernel else f"this version of {name} has no {kernel}"


def limits(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why the vendors' kernels cannot take this call, in one clause, or None if they can."""
    if not is_hopper(q.device):
        return "it is for Hopper GPUs"
    return _call_limits(op, q, operands) or _missing(op) or no_triton()


def _call_limits(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    if op in INDEX:
        if not q.dtype == operands["k"].dtype == torch.float8_e4m3fn or q.shape[1] not in (32, 64) or q.shape[2] != 128:
            return "DeepGEMM takes 32 or 64 index heads of 128 in E4M3"
    elif op in LINEAR:
        if q.dtype != torch.bfloat16 or operands["weight"].shape[0] != 1 or operands["weight"].shape[1] % 64:
            return "DeepGEMM takes one weight for all rows, a multiple of 64 outputs, and bfloat16"
    elif q.dtype != torch.bfloat16 or q.shape[1] not in (64, 128):
        return "FlashMLA takes 64 or 128 heads in bfloat16"
    elif op in PAGED:
        return _paged_limits(q, operands["entry_pages"], operands["indices"])
    else:
        kv = operands["kv"]
        wide = kv.shape[1:] == (1, 576) and q.shape[-1] == 576 and kv.dtype == q.dtype
        if not wide or (operands["v_start"], operands["d_v"]) != (0, 512):
            return "FlashMLA takes entries of 576 in bfloat16, of which the first 512 are the value"
    return None


def _paged_limits(q: Tensor, pages: Tensor, indices: Tensor) -> str | None:
    if pages.dtype != torch.uint8:
        return "FlashMLA takes quantized pages: one group, MLA's widths"
    # Pages may lie apart, but it loads 16 bytes at a time. Copying a pool would cost more than any kernel gains.
    if not in_lines(pages, LATENT_TOKEN_BYTES) or pages.stride(0) >= 1 << 31:
        return "FlashMLA takes pages whose bytes lie together, at multiples of 16"
    if q.shape[0] > MOST_QUERIES or indices.shape[1] > MOST_PLACES:
        return f"FlashMLA takes at most {MOST_QUERIES} queries with {MOST_PLACES} places each"
    return None


def slower(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why `auto` prefers our own kernel to the vendor's for a call that both can run, in one clause, or None."""
    if op in PAGED and q.shape[0] * q.shape[1] * operands["indices"].shape[1] <= FEW_LOGITS:
        return "it is no faster for so few queries"
    if op in LINEAR and q.shape[0] <= FEW_ROWS:
        return "it is no faster for so few rows"
    return None


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    if S == 0 or 0 in (kv_TGE.shape[0], indices_SK.shape[1]):
        return q_SHD.new_zeros(S, H, d_v), q_SHD.new_full((S, H), float("-inf"), dtype=torch.float32)
    # a number below 0, or past the keys, names no key here either
    indices = torch.nn.functional.pad(
        indices_SK.clamp(-1, kv_TGE.shape[0]), (0, -indices_SK.shape[1] % PLACES), value=-1
    )
    out, _, lse = _package("flash_mla").flash_mla_sparse_fwd(
        aligned(q_SHD), aligned(kv_TGE), indices.to(torch.int32)[:, None].contiguous(), scale, d_v
    )
    return out, torch.where(lse == float("inf"), float("-inf"), lse)


def sparse_attention_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from tokensieve.ops.hopper.attention import sparse_attention_backward

    return sparse_attention_backward(*arguments)


def _attend_paged(
    q_SHD: Tensor, entry_pages: Tensor, places_SK: Tensor, scale: float, plan: Any
) -> tuple[Tensor, Tensor]:
    """Every query as a sequence of its own; fills in the plan if it is empty."""
    out, lse = _package("flash_mla").flash_mla_with_kvcache(
        aligned(q_SHD)[:, None],
        entry_pages.view(torch.float8_e4m3fn).unsqueeze(2),
        None,
        None,
        LATENT_WIDTH,
        plan,
        softmax_scale=scale,
        is_fp8_kvcache=True,
        indices=places_SK[:, None],
    )
    return out[:, 0], lse[..., 0]


@cache
def _kept_plan(device: torch.device, S: int, H: int, K: int) -> Any:
    """How calls of these sizes are shared out among multiprocessors; only the sizes decide.

    It is never dropped: CUDA graphs read it.
    """
    return _package("flash_mla").get_mla_metadata()[0]


def _fill(plan: Any, device: torch.device, S: int, H: int, K: int) -> None:
    with torch.cuda.device(device):
        q = torch.zeros(S, H, LATENT_WIDTH + ROPE_WIDTH, dtype=torch.bfloat16, device=device)
        page = torch.zeros(1, PAGE_TOKENS, LATENT_TOKEN_BYTES, dtype=torch.uint8, device=device)
        _attend_paged(q, page, torch.full((S, K), -1, dtype=torch.int32, device=device), 1.0, plan)
        torch.cuda.synchronize(device)  # any stream may read it next


def _plan(device: torch.device, S: int, H: int, K: int) -> Any:
    """The plan of these sizes, filled in now unless an earlier call did it.

    A call that a CUDA graph records before that gets an empty plan, which then belongs to the graph.
    """
    plan = _kept_plan(device, S, H, K)
    if plan.tile_scheduler_metadata is None:
        if torch.cuda.is_current_stream_capturing():
            # Nothing runs yet, and what is allocated belongs to the graph.
            return _package("flash_mla").get_mla_metadata()[0]
        # In another thread: before torch.compile records a graph, it lends this thread memory of which nothing may be
        # kept.
        with ThreadPoolExecutor(1) as other_thread:
            other_thread.submit(_fill, plan, device, S, H, K).result()
    return plan


def sparse_attention_paged(
    q_SHD: Tensor,
    entry_pages: Tensor,
    indices_SK: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
) -> tuple[Tensor, Tensor]:
    (S, H, _), pages = q_SHD.shape, entry_pages.shape[0]
    if 0 in (S, pages, page_table.shape[1], indices_SK.shape[1]):
        return q_SHD.new_zeros(S, H, d_v), q_SHD.new_full((S, H), float("-inf"), dtype=torch.float32)
    from tokensieve.ops.triton.paged_places import pool_places

    places = pool_places(indices_SK, page_table, lengths, pages, PAGED_PLACES)
    plan = _plan(q_SHD.device, S, H, places.shape[1])
    out, lse = _attend_paged(q_SHD, entry_pages, places, scale, plan)
    # +inf becomes -inf in one launch, because launches are what a decode step is short of
    return out, lse.nan_to_num_(nan=float("nan"), posinf=float("-inf"), neginf=float("-inf"))


def block_linear(x_NK: Tensor, weight_1MK: Tensor, scale: Tensor, ends: None, gated: bool) -> Tensor:
    from tokensieve.ops.triton.linear import rounded

    out = x_NK.new_empty(x_NK.shape[0], weight_1MK.shape[1])
    if x_NK.shape[0]:
        values = rounded(x_NK, weight_1MK.shape[2], gated)
        _package("deep_gemm").fp8_gemm_nt(values, (aligned(weight_1MK[0]), aligned(scale[0])), out)
    return out


def _scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    """(S, T), a view of rows that are longer than T."""
    (S, _, _), T = q_SHD.shape, k_TD.shape[0]
    if S == 0 or T == 0:
        return q_SHD.new_empty(S, T, dtype=torch.float32)
    scale = k_scale_T.float() if k_scale_T is not None else torch.ones(T, dtype=torch.float32, device=k_TD.device)
    starts, ends = (x.clamp(0, T).to(torch.int32).contiguous() for x in (starts_S, ends_S))
    return _package("deep_gemm").fp8_mqa_logits(
        aligned(q_SHD),
        (aligned(k_TD), aligned(scale)),
        aligned(w_SH.float()),
        starts,
        ends.clamp_min(starts),
        clean_logits=False,
    )


def index_scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    return _scores(q_SHD, k_TD, w_SH, starts_S, ends_S, k_scale_T).contiguous()


def index_scores_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from tokensieve.ops.triton.index import index_scores_backward

    return index_scores_backward(*arguments)


def index_topk(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    from tokensieve.ops.triton import topk

    return topk.index_topk(q_SHD, k_TD, w_SH, k, starts_S, ends_S, k_scale_T, scores_of=_scores)
