"""The mathematics of DeepSeek Sparse Attention as functions on tensors: no modules, no state.

Legend: S query tokens, T key tokens, H heads, G key-value groups (head h reads group h // (H/G)), K places for selected keys, D key
width, E entry width, V value width, H_I and d_I heads and width of the indexer.

Everything is packed, without a batch axis. `starts_S`, `ends_S` (integers) give each query the keys [start, end) that it may see, so
documents and batches are key ranges; start >= end is a query without keys. `indices_SK` (int32) are positions on the key axis: ascending
and without duplicates, then -1 for unused places. A query without keys returns zeros, lse = -inf and KL 0. lse is the natural log.
On the CPU a range outside [0, T] or an index outside [-1, T) raises ValueError. On a GPU looking at values would stop its queue: there a
kernel cuts ranges to [0, T] and takes an index outside [0, T) for -1, so that nothing outside the keys is ever touched; the reference
relies on PyTorch's own checks.
Sums run in float32 (float64 for float64 inputs). `backend` is `auto` or a name from `backends()`; one that cannot run raises.

Within a backend an index score has the same bits whatever the tiling, the batch, and prefill against decode. The ops of `paged.py` do
the same on caches in pages, for decoding.

Sources: DeepSeek-V3.2-Exp technical report, equations (1) to (4); file `inference/model.py` of its official demo for shapes and scales.
"""

import torch
from torch import Tensor

from tokensieve.ops import reference, table
from tokensieve.ops.dispatch import BACKENDS
from tokensieve.ops.linear import block_linear
from tokensieve.ops.paged import index_scores_paged, quantize_queries, sparse_attention_paged, write_caches
from tokensieve.ops.reference import OPS, PAGED_OPS

__all__ = [
    "OPS",
    "PAGED_OPS",
    "backends",
    "block_linear",
    "dense_attention",
    "head_mass",
    "index_scores",
    "index_scores_paged",
    "index_topk",
    "indexer_kl_dense",
    "indexer_kl_dense_sum",
    "masked_attention",
    "quantize_queries",
    "select_topk",
    "sparse_attention",
    "sparse_attention_kl",
    "sparse_attention_paged",
    "write_caches",
]


def backends(device: str = "cpu") -> dict[str, list[tuple[str, str | None]]]:
    """For each op the backends that have it on `device`, in the order in which `auto` tries them, with the reason why one cannot run.

    The probe is a causal pack of documents, in bfloat16 on a GPU; scores, and everything on the CPU, are float32.
    """
    narrow, wide = (torch.empty(1, 1, 1, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    probes = {op: wide if device == "cpu" or op == "select_topk" else narrow for op in OPS}
    kind, found = torch.device(device).type, {}
    for op, probe in probes.items():
        names = ("k", "v", "kv", "q_I", "k_I", "bounds", "latent_pages", "indices", "weight")
        operands = dict.fromkeys(names, probe) | {"v_start": 0, "d_v": 1}
        found[op] = [(b.name, b.why_not(op, probe, operands)) for b in BACKENDS if b.has(op, kind)]
    return found


def _check_ranges(op: str, S: int, T: int, starts_S: Tensor, ends_S: Tensor) -> None:
    # Messages are built only when a check fails: torch.compile cannot format symbolic sizes, and decode calls this per layer.
    if starts_S.shape != (S,) or ends_S.shape != (S,):
        raise ValueError(f"{op}: starts and ends must have shape ({S},), one range per query")
    if starts_S.device.type == "cpu" and S and not torch.compiler.is_compiling():
        low, high = min(starts_S.tolist()), max(ends_S.tolist())  # for one query faster than reductions, never slow
        if low < 0 or high > T:
            raise ValueError(f"{op}: key ranges must lie in [0, {T}], got starts from {low} and ends to {high}")


def _check_index(op: str, q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k_scale_T: Tensor | None = None) -> None:
    if q_SHD.dim() != 3 or k_TD.dim() != 2:
        raise ValueError(f"{op}: q must be (S, H_I, d_I) and k (T, d_I), got {tuple(q_SHD.shape)}, {tuple(k_TD.shape)}")
    if q_SHD.shape[2] != k_TD.shape[1]:
        raise ValueError(f"{op}: q is {q_SHD.shape[2]} wide but k {k_TD.shape[1]}")
    if w_SH.shape != q_SHD.shape[:2]:
        raise ValueError(f"{op}: w must be (S, H_I) = {tuple(q_SHD.shape[:2])}, got {tuple(w_SH.shape)}")
    if k_scale_T is not None and k_scale_T.shape != k_TD.shape[:1]:
        raise ValueError(f"{op}: k_scale must be (T) = {tuple(k_TD.shape[:1])}, got {tuple(k_scale_T.shape)}")


def _check_scored(op: str, q_SHD: Tensor, k_TGD: Tensor, q_I: Tensor, k_I: Tensor, w: Tensor) -> None:
    _check_index(op, q_I, k_I, w)
    if q_I.shape[0] != q_SHD.shape[0] or k_I.shape[0] != k_TGD.shape[0]:
        raise ValueError(
            f"{op}: q_I and k_I have {q_I.shape[0]} queries and {k_I.shape[0]} keys, "
            f"the attention {q_SHD.shape[0]} and {k_TGD.shape[0]}"
        )


def _check_k(op: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{op}: k must be at least 1, got {k}")


def _check_groups(op: str, q_SHD: Tensor, k_TGD: Tensor) -> None:
    if q_SHD.dim() != 3 or k_TGD.dim() != 3:
        raise ValueError(
            f"{op}: q must be (S, H, D) and keys (kv) (T, G, D), got {tuple(q_SHD.shape)}, {tuple(k_TGD.shape)}"
        )
    if q_SHD.shape[1] % k_TGD.shape[1]:
        raise ValueError(f"{op}: {q_SHD.shape[1]} heads cannot share {k_TGD.shape[1]} key-value groups")


def _check_width(op: str, q_SHD: Tensor, k_TGD: Tensor) -> None:
    if q_SHD.shape[2] != k_TGD.shape[2]:
        raise ValueError(f"{op}: q is {q_SHD.shape[2]} wide but k {k_TGD.shape[2]}")


def _check_entries(
    op: str, q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, d_k: int, v_start: int, d_v: int
) -> None:
    _check_groups(op, q_SHD, kv_TGE)
    D, E = q_SHD.shape[2], kv_TGE.shape[2]
    if d_k != D or d_k > E:
        raise ValueError(
            f"{op}: q is {D} wide, d_k is {d_k}, an entry is {E} wide; d_k must equal q's width and fit in the entry"
        )
    if v_start < 0 or d_v < 1 or v_start + d_v > E:
        raise ValueError(
            f"{op}: the value [{v_start}, {v_start + d_v}) (d_v {d_v}) is empty or outside an entry of width {E}"
        )
    _check_indices(op, q_SHD.shape[0], kv_TGE.shape[0], indices_SK)


def _check_indices(op: str, S: int, T: int, indices_SK: Tensor) -> None:
    if indices_SK.dim() != 2 or indices_SK.shape[0] != S:
        raise ValueError(f"{op}: indices must be ({S}, K), got {tuple(indices_SK.shape)}")
    if indices_SK.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{op}: indices must be int32 or int64, got {indices_SK.dtype}")
    # Looking at values costs a synchronization on a GPU and cannot be traced: there the caller answers for them (the top of this file).
    if indices_SK.device.type == "cpu" and indices_SK.numel() and not torch.compiler.is_compiling():
        low, high = indices_SK.aminmax()
        if int(low) < -1 or int(high) >= T:
            raise ValueError(f"{op}: indices must lie in [-1, {T}), got {int(low)} to {int(high)}")


def _check_kl_dense(
    op: str,
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
) -> None:
    _check_groups(op, q_SHD, k_TGD)
    _check_width(op, q_SHD, k_TGD)
    _check_scored(op, q_SHD, k_TGD, q_I, k_I, w)
    if lse_SH.shape != q_SHD.shape[:2]:
        raise ValueError(f"{op}: lse must be (S, H) = {tuple(q_SHD.shape[:2])}, got {tuple(lse_SH.shape)}")
    _check_ranges(op, q_SHD.shape[0], k_TGD.shape[0], starts_S, ends_S)


def index_scores(
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """I[t,s] = k_scale[s] * sum_j w[t,j] * relu(q[t,j] . k[s]): equation (1).

    q (S, H_I, d_I), k (T, d_I), w (S, H_I) with every scale folded in, k_scale (T) float32 for quantized keys (no gradient).
    Returns (S, T) float32; outside a query's range unspecified. Differentiable by q, k, w. ValueError on mismatched shapes.
    """
    _check_index("index_scores", q_SHD, k_TD, w_SH, k_scale_T)
    _check_ranges("index_scores", q_SHD.shape[0], k_TD.shape[0], starts_S, ends_S)
    return table.index_scores(q_SHD, k_TD, w_SH, starts_S, ends_S, k_scale_T, backend)


def select_topk(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, *, backend: str = "auto") -> Tensor:
    """S_t = the min(k, end - start) keys with the largest score; ties go to the smaller position: equation (2).

    scores (S, T) floating. Returns (S, k) int32, ascending, then -1. -0.0 counts as 0.0. No gradient.
    ValueError when k < 1, or when a score inside a range is NaN.
    """
    _check_k("select_topk", k)
    if scores_ST.dim() != 2:
        raise ValueError(f"select_topk: scores must be (S, T), got {tuple(scores_ST.shape)}")
    _check_ranges("select_topk", scores_ST.shape[0], scores_ST.shape[1], starts_S, ends_S)
    return table.select_topk(scores_ST, k, starts_S, ends_S, backend)


def index_topk(
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    k: int,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Equations (1) and (2) in one pass: the same answer as `select_topk(index_scores(...))` without the (S, T) scores in memory.

    Shapes as in `index_scores`; returns (S, k) int32, ascending, then -1. No gradient. Errors as in both.
    """
    _check_k("index_topk", k)
    _check_index("index_topk", q_SHD, k_TD, w_SH, k_scale_T)
    _check_ranges("index_topk", q_SHD.shape[0], k_TD.shape[0], starts_S, ends_S)
    return table.index_topk(q_SHD, k_TD, w_SH, k, starts_S, ends_S, k_scale_T, backend)


def dense_attention(
    q_SHD: Tensor,
    k_TGD: Tensor,
    v_TGV: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    scale: float,
    *,
    bounds: Tensor | None = None,
    longest: int = 0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q . k) v over each query's whole range: the attention that DSA replaces and warm-up watches.

    q (S, H, D), k (T, G, D), v (T, G, V). Returns out (S, H, V) in q's dtype and lse (S, H) float32. Differentiable by q, k, v.
    `bounds` (documents + 1) int32 cumulative lengths and `longest` (tokens) may be given when S = T, documents follow one another and
    each is causal, or when the queries are the last S tokens of one document of T: they say the same as the ranges and let fused kernels
    run, whose lse carries no gradient (and the latter none at all).
    ValueError on mismatched shapes.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (MLA, of which this is the core); DeepSeek-V3.2-Exp report, section 2.
    """
    if k_TGD.shape[:2] != v_TGV.shape[:2]:
        raise ValueError(f"dense_attention: k {tuple(k_TGD.shape)} and v {tuple(v_TGV.shape)} differ in (T, G)")
    if q_SHD.shape[2] != k_TGD.shape[2]:
        raise ValueError(f"dense_attention: q is {q_SHD.shape[2]} wide but k {k_TGD.shape[2]}")
    if q_SHD.shape[1] % k_TGD.shape[1]:
        raise ValueError(f"dense_attention: {q_SHD.shape[1]} heads cannot share {k_TGD.shape[1]} groups")
    _check_ranges("dense_attention", q_SHD.shape[0], k_TGD.shape[0], starts_S, ends_S)
    return table.dense_attention(q_SHD, k_TGD, v_TGV, starts_S, ends_S, bounds, longest, scale, backend)


@torch.no_grad()
def head_mass(q_SHD: Tensor, k_TGD: Tensor, starts_S: Tensor, ends_S: Tensor, scale: float) -> Tensor:
    """p (S, T): the mean over heads of the attention's probabilities, the target of equations (3) and (4); 0 outside a query's range.

    q (S, H, D), k (T, G, D). It is what evaluation reads to judge a selection: of size S x T, so the caller passes a slice of the queries.
    No gradient; the reference computes it on every device.
    """
    if q_SHD.shape[1] % k_TGD.shape[1]:
        raise ValueError(f"head_mass: {q_SHD.shape[1]} heads cannot share {k_TGD.shape[1]} groups")
    _check_ranges("head_mass", q_SHD.shape[0], k_TGD.shape[0], starts_S, ends_S)
    return reference.head_mass(q_SHD, k_TGD, starts_S, ends_S, scale)


def masked_attention(
    q_SHD: Tensor, k_THD: Tensor, v_THV: Tensor, indices_SK: Tensor, scale: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q . k) v over the selected keys, computed densely with everything else masked: the form for short contexts.

    q (S, H, D), k (T, H, D), v (T, H, V), indices (S, K). Returns out (S, H, V), lse (S, H). Differentiable by q, k, v.
    Source: report, section 2.1, "masked MHA mode". ValueError on mismatched shapes.
    """
    if k_THD.shape[:2] != v_THV.shape[:2]:
        raise ValueError(f"masked_attention: k {tuple(k_THD.shape)} and v {tuple(v_THV.shape)} differ in (T, H)")
    if q_SHD.shape[1:] != k_THD.shape[1:]:
        raise ValueError(f"masked_attention: q {tuple(q_SHD.shape)} and k {tuple(k_THD.shape)} differ in (H, D)")
    _check_indices("masked_attention", q_SHD.shape[0], k_THD.shape[0], indices_SK)
    return table.masked_attention(q_SHD, k_THD, v_THV, indices_SK, scale, backend)


def sparse_attention(
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """u_t = Attention(h_t, {c_s : s in S_t}), the second half of equation (2): only selected entries are read.

    One entry of width E per token and group: key = [0:d_k], value = [v_start:v_start+d_v]. q (S, H, d_k), kv (T, G, E), indices (S, K).
    MLA in MQA mode: G = 1, E = 576, d_k = 576, v_start = 0, d_v = 512. GQA: E = 2d, d_k = d, v_start = d, d_v = d.
    Returns out (S, H, d_v), lse (S, H). Differentiable by q, kv. ValueError on mismatched shapes.
    """
    _check_entries("sparse_attention", q_SHD, kv_TGE, indices_SK, d_k, v_start, d_v)
    return table.sparse_attention(q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v, backend)


def sparse_attention_kl(
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """`sparse_attention`, and the indexer's loss of sparse training over the selected set: equation (4).

    kl[t] = KL( p[t,S_t] || softmax(I[t,S_t]) ), p = mean over heads of this attention's own probabilities, detached.
    q_I (S, H_I, d_I), k_I (T, d_I), w (S, H_I). Returns out (S, H, d_v), lse (S, H), kl (S) float32 in nats.
    Gradients of out and lse reach q and kv only, those of kl reach q_I, k_I and w only. Errors as in `sparse_attention`.
    """
    _check_entries("sparse_attention_kl", q_SHD, kv_TGE, indices_SK, d_k, v_start, d_v)
    _check_scored("sparse_attention_kl", q_SHD, kv_TGE, q_I, k_I, w)
    return table.sparse_attention_kl(q_SHD, kv_TGE, indices_SK, scale, d_k, v_start, d_v, q_I, k_I, w, backend)


def indexer_kl_dense(
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """The indexer's loss of dense warm-up over ALL visible keys: equation (3).

    kl[t] = KL( p[t,:] || softmax(I[t,:]) ), p = mean over heads of exp(scale * q . k - lse), the main attention's probabilities.
    q (S, H, D), k (T, G, D), lse (S, H) of the main attention (natural log), q_I (S, H_I, d_I), k_I (T, d_I), w (S, H_I).
    Returns kl (S) float32 in nats. Differentiable by q_I, k_I, w only: d kl / d I = softmax(I) * sum(p) - p; sum(p) is 1 unless lse comes
    from elsewhere than from this attention over these keys. Memory is linear in T.
    """
    _check_kl_dense("indexer_kl_dense", q_SHD, k_TGD, lse_SH, q_I, k_I, w, starts_S, ends_S)
    return table.indexer_kl_dense(q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, backend)


def indexer_kl_dense_sum(
    q_SHD: Tensor,
    k_TGD: Tensor,
    lse_SH: Tensor,
    scale: float,
    q_I: Tensor,
    k_I: Tensor,
    w: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
    weight_S: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """sum(weight * `indexer_kl_dense`) (): equation (3) as a training step wants it, its gradient computed in the same pass.

    Target and scores cost most of the loss; with the weights known beforehand they are computed once instead of once in each direction.
    weight (S) float32 is not differentiated; everything else, shapes, errors and source, as in `indexer_kl_dense`. The gradient can be
    taken once (RuntimeError otherwise): it is kept from the forward pass and scaled in place.
    """
    _check_kl_dense("indexer_kl_dense_sum", q_SHD, k_TGD, lse_SH, q_I, k_I, w, starts_S, ends_S)
    if weight_S.shape != q_SHD.shape[:1]:
        raise ValueError(f"indexer_kl_dense_sum: weight must be ({q_SHD.shape[0]},), got {tuple(weight_S.shape)}")
    return table.indexer_kl_dense_sum(
        q_SHD,
        k_TGD,
        lse_SH,
        scale,
        q_I,
        k_I,
        w,
        starts_S,
        ends_S,
        weight_S,
        backend,
    )[0]
