"""FlashMLA's and DeepGEMM's kernels as a backend, where their packages are installed: their conventions turned into ours.

Legend: S queries, T keys, H heads, I index heads, K selected.

FlashMLA (`flash_mla`): the forward of sparse attention; entries of 576 whose first 512 are the value, 64 or 128 heads, bfloat16. It wants
the places of a row to be a multiple of 128, and says +inf for the logsumexp of a query without keys. Gradients are our own.

DeepGEMM (`deep_gemm`): index scores of E4M3 queries and keys, 32 or 64 heads of 128. It compiles its kernels with nvcc when they first
run. The selection is always our own: theirs breaks ties in any order.
"""

import importlib
import importlib.util
import os
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tokensieve.ops.aligned import aligned

PLACES = 128  # of a row, a multiple for FlashMLA

ATTENTION, INDEX = ("sparse_attention",), ("index_scores", "index_topk")


@cache
def _package(name: str) -> ModuleType:
    return importlib.import_module(name)


@cache
def _missing(op: str) -> str | None:
    """What is not installed, or not for this machine, in one clause."""
    name, kernel = ("flash_mla", "flash_mla_sparse_fwd") if op in ATTENTION else ("deep_gemm", "fp8_mqa_logits")
    if not importlib.util.find_spec(name):
        return f"the package {name} is not installed"
    compiler = shutil.which("nvcc") or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc").exists()
    if op in INDEX and not compiler:
        return "deep_gemm needs nvcc"
    try:
        found = hasattr(_package(name), kernel)
    except (ImportError, OSError, AssertionError) as error:  # built for another torch or CUDA, or no toolkit
        return f"the package {name} does not load: {error}"
    return None if found else f"this version of {name} has no {kernel}"


def limits(op: str, q: Tensor, operands: Mapping[str, Any]) -> str | None:
    """Why the vendors' kernels cannot take this call on a Hopper GPU, in one clause, or None if they can."""
    if op in ATTENTION:
        kv = operands["kv"]
        if q.dtype != torch.bfloat16 or kv.dtype != q.dtype or q.shape[1] not in (64, 128):
            return "FlashMLA takes 64 or 128 heads in bfloat16"
        if kv.shape[1:] != (1, 576) or q.shape[-1] != 576 or (operands["v_start"], operands["d_v"]) != (0, 512):
            return "FlashMLA takes entries of 576, of which the first 512 are the value"
    elif not q.dtype == operands["k"].dtype == torch.float8_e4m3fn or q.shape[1] not in (32, 64) or q.shape[2] != 128:
        return "DeepGEMM takes 32 or 64 index heads of 128 in E4M3"
    return _missing(op)


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    S, H, _ = q_SHD.shape
    if S == 0 or 0 in (kv_TGE.shape[0], indices_SK.shape[1]):
        return q_SHD.new_zeros(S, H, d_v), q_SHD.new_full((S, H), float("-inf"), dtype=torch.float32)
    # a number below 0, or one past the keys, names no key here either
    indices = torch.nn.functional.pad(
        indices_SK.clamp(-1, kv_TGE.shape[0]), (0, -indices_SK.shape[1] % PLACES), value=-1
    )
    out, _, lse = _package("flash_mla").flash_mla_sparse_fwd(
        aligned(q_SHD), aligned(kv_TGE), indices.to(torch.int32)[:, None].contiguous(), scale, d_v
    )
    return out, torch.where(lse == float("inf"), float("-inf"), lse)


def sparse_attention_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from tokensieve.ops.hopper import sparse_attention_backward

    return sparse_attention_backward(*arguments)


def _scores(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    """(S, T) in rows that are longer than T."""
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
    from tokensieve.ops.triton import index_scores_backward

    return index_scores_backward(*arguments)


def index_topk(
    q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, k_scale_T: Tensor | None
) -> Tensor:
    from tokensieve.ops.triton import topk

    return topk.index_topk(q_SHD, k_TD, w_SH, k, starts_S, ends_S, k_scale_T, scores_of=_scores)
