"""The mathematics of DeepSeek Sparse Attention as functions on tensors: no modules, no state.

Legend: S query tokens, T key tokens, H heads, G key-value groups (head h reads group h // (H/G)), K places for selected
keys, D key width, E entry width, V value width, H_I and d_I heads and width of the indexer.

Everything is packed, without a batch axis. `starts_S` and `ends_S` (integers) give each query the keys [start, end)
that it may see, so documents and batches are key ranges; start >= end is a query without keys. `indices_SK` (int32) are
positions on the key axis: ascending and without duplicates, then -1 for unused places. A query without keys returns
zeros, lse = -inf and KL 0. lse is the natural log.

On the CPU a range outside [0, T] or an index outside [-1, T) raises ValueError. On a GPU looking at values would stop
its queue: there a kernel cuts ranges to [0, T] and takes an index outside [0, T) for -1, so that nothing outside the
keys is ever touched; the reference relies on PyTorch's own checks.

Sums run in float32 (float64 for float64 inputs). `backend` is `auto` or a name from `backends()`; one that cannot run
raises ValueError. Within a backend an index score has the same bits whatever the tiling, the batch, and prefill against
decode. For that the reference reads up to KEY_PAD index keys past the last one that it needs: a buffer of keys with so
many rows to spare, whatever they hold, is not copied.

The ops of `paged.py` do the same on caches in pages, for decoding.

Sources: DeepSeek-V3.2-Exp technical report, equations (1) to (4); file `inference/model.py` of its official demo for
shapes and scales.
"""

import torch
from torch import Tensor

from tokensieve.ops import checks, reference, table
from tokensieve.ops.dispatch import BACKENDS
from tokensieve.ops.paged import index_scores_paged, quantize_queries, sparse_attention_paged, write_caches
from tokensieve.ops.reference import OPS
from tokensieve.ops.reference.index import KEY_PAD

__all__ = [
    "KEY_PAD",
    "OPS",
    "backends",
    "block_linear",
    "dense_attention",
    "head_mass",
    "index_scores",
    "index_scores_paged",
    "index_topk",
    "index_topk_blocks",
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
    """For each op the backends that have it on `device`, in the order in which `auto` tries them.

    With each backend comes the reason why it cannot run, or None. The probe is a causal pack of documents, in bfloat16
    on a GPU; scores, and everything on the CPU, are float32.
    """
    narrow, wide = (torch.empty(1, 1, 1, device=device, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    names = ("q", "k", "v", "kv", "q_I", "k_I", "bounds", "entry_pages", "indices", "weight")
    kind, reasons = torch.device(device).type, {}
    for op in OPS:
        probe = wide if device == "cpu" or op == "select_topk" else narrow
        operands = dict.fromkeys(names, probe) | {"v_start": 0, "d_v": 1}
        reasons[op] = [(b.name, b.why_not(op, probe, operands)) for b in BACKENDS if b.has(op, kind)]
    return reasons


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

    q (S, H_I, d_I), k (T, d_I), w (S, H_I) with every scale folded in, k_scale (T) float32 for quantized keys.
    Returns (S, T) float32, unspecified outside a query's range. Differentiable by q, k and w, not by k_scale.
    ValueError on mismatched shapes.
    """
    checks.scoring("index_scores", q_SHD, k_TD, w_SH, k_scale_T)
    checks.ranges("index_scores", q_SHD.shape[0], k_TD.shape[0], starts_S, ends_S)
    return table.index_scores(q_SHD, k_TD, w_SH, starts_S, ends_S, k_scale_T, backend)


def select_topk(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor, *, backend: str = "auto") -> Tensor:
    """S_t = the min(k, end - start) keys with the largest score; ties go to the smaller position: equation (2).

    scores (S, T) floating. Returns (S, k) int32, ascending, then -1. -0.0 counts as 0.0. No gradient.
    ValueError if k < 1, or if a score inside a range is NaN.
    """
    checks.selected_count("select_topk", k)
    if scores_ST.dim() != 2:
        raise ValueError(f"select_topk: scores must be (S, T), got {tuple(scores_ST.shape)}")
    checks.ranges("select_topk", scores_ST.shape[0], scores_ST.shape[1], starts_S, ends_S)
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
    """Equations (1) and (2) in one pass: `select_topk(index_scores(...))` without the (S, T) scores in memory.

    Shapes as in `index_scores`. Returns (S, k) int32, ascending, then -1. No gradient. Errors as in both.
    """
    checks.selected_count("index_topk", k)
    checks.scoring("index_topk", q_SHD, k_TD, w_SH, k_scale_T)
    checks.ranges("index_topk", q_SHD.shape[0], k_TD.shape[0], starts_S, ends_S)
    return table.index_topk(q_SHD, k_TD, w_SH, k, starts_S, ends_S, k_scale_T, backend)


def index_topk_blocks(
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    k: int,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None = None,
    *,
    block: int = 128,
    blocks: int = 64,
    backend: str = "auto",
) -> Tensor:
    """Equation (2) in two levels: the best blocks of keys first, then the best keys of these blocks.

        c[b] = mean of k_scale[s] * k[s] over block b,   J[t,b] = sum_j w[t,j] * relu(q[t,j] . c[b])
        S_t  = the min(k, end - start) keys with the largest I[t,s], equation (1), among those of t's candidates

    Block b is the keys [b * block, (b + 1) * block) of the key axis. The candidates are `blocks` blocks at most: those
    that hold the first and the last key of the range, and of the blocks between them, which lie wholly in the range,
    those with the largest J. Ties go to the smaller block, and among keys to the smaller position. c is a mean in
    float32, rounded to k's dtype; if that is E4M3, as `quantize_e4m3` does with one power of two as a block's scale.

    A query scores (end - start) / block means and blocks * block keys instead of all keys. If its range touches at most
    `blocks` blocks, it selects what `index_topk` selects, to the bit within a backend. What it selects depends on its
    own range and keys alone, and on where these lie on the key axis, which is what blocks are cut from.

    Shapes as in `index_scores`. Returns (S, k) int32, ascending, then -1. No gradient. Errors as in `index_topk`, also
    for a NaN in a mean that is scored. ValueError too if block is not a power of two of at least 16, if blocks < 2, or
    if k > (blocks - 2) * block + 2: the candidates could then have fewer than k keys.
    Source: HISA, arXiv 2603.28458.
    """
    checks.selected_count("index_topk_blocks", k)
    checks.two_levels("index_topk_blocks", k, block, blocks)
    checks.scoring("index_topk_blocks", q_SHD, k_TD, w_SH, k_scale_T)
    checks.ranges("index_topk_blocks", q_SHD.shape[0], k_TD.shape[0], starts_S, ends_S)
    return table.index_topk_blocks(q_SHD, k_TD, w_SH, k, starts_S, ends_S, k_scale_T, block, blocks, backend)


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

    q (S, H, D), k (T, G, D), v (T, G, V). Returns out (S, H, V) in q's dtype and lse (S, H) float32. Differentiable by
    q, k and v.

    `bounds` (documents + 1) int32, cumulative lengths, and `longest` (tokens) may be given in two cases: if S = T,
    documents follow one another and each is causal; or if the queries are the last S tokens of one document of T. They
    say the same as the ranges and let fused kernels run. In the second case these have no gradient.

    Without `bounds` fused kernels run if S < T and the queries are blocks of 16 or more of a causal pack of T keys. To
    know that, the first call with these two tensors of ranges waits for the device (in inference mode every call).

    ValueError on mismatched shapes.
    Source: DeepSeek-V2, arXiv 2405.04434, section 2.1 (MLA, of which this is the core); DeepSeek-V3.2-Exp report,
    section 2.
    """
    checks.dense("dense_attention", q_SHD, k_TGD, v_TGV, starts_S, ends_S)
    return table.dense_attention(q_SHD, k_TGD, v_TGV, starts_S, ends_S, bounds, longest, scale, backend)


@torch.no_grad()
def head_mass(q_SHD: Tensor, k_TGD: Tensor, starts_S: Tensor, ends_S: Tensor, scale: float) -> Tensor:
    """p (S, T): the mean over heads of the attention's probabilities, the target of equations (3) and (4).

    q (S, H, D), k (T, G, D). 0 outside a query's range. Evaluation judges a selection by it. It is as large as S x T,
    so the caller passes a slice of the queries. No gradient; the reference computes it on every device. ValueError on
    mismatched shapes.
    """
    checks.queries_and_keys("head_mass", q_SHD, k_TGD)
    checks.ranges("head_mass", q_SHD.shape[0], k_TGD.shape[0], starts_S, ends_S)
    return reference.head_mass(q_SHD, k_TGD, starts_S, ends_S, scale)


def masked_attention(
    q_SHD: Tensor, k_THD: Tensor, v_THV: Tensor, indices_SK: Tensor, scale: float, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q . k) v over the selected keys, computed densely with everything else masked.

    The form for short contexts. q (S, H, D), k (T, H, D), v (T, H, V), indices (S, K). Returns out (S, H, V) and lse
    (S, H). Differentiable by q, k and v. ValueError on mismatched shapes.
    Source: report, section 2.1, "masked MHA mode".
    """
    checks.masked("masked_attention", q_SHD, k_THD, v_THV, indices_SK)
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

    One entry of width E per token and group: key = [0:d_k], value = [v_start:v_start+d_v]. q (S, H, d_k), kv (T, G, E),
    indices (S, K). MLA in MQA mode: G = 1, E = 576, d_k = 576, v_start = 0, d_v = 512. Grouped-query attention: E = 2d,
    d_k = d, v_start = d, d_v = d. Returns out (S, H, d_v) and lse (S, H). Differentiable by q and kv. ValueError on
    mismatched shapes.
    """
    checks.entries("sparse_attention", q_SHD, kv_TGE, indices_SK, d_k, v_start, d_v)
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
    q_I (S, H_I, d_I), k_I (T, d_I), w (S, H_I). Returns out (S, H, d_v), lse (S, H) and kl (S) float32 in nats.
    Gradients of out and lse reach q and kv only, those of kl reach q_I, k_I and w only. Errors as in
    `sparse_attention`.
    """
    checks.entries("sparse_attention_kl", q_SHD, kv_TGE, indices_SK, d_k, v_start, d_v)
    checks.scoring_beside("sparse_attention_kl", q_SHD, kv_TGE, q_I, k_I, w)
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

    kl[t] = KL( p[t,:] || softmax(I[t,:]) ), p = mean over heads of exp(scale * q . k - lse), the main attention's
    probabilities. q (S, H, D), k (T, G, D), lse (S, H) of the main attention (natural log), q_I (S, H_I, d_I), k_I
    (T, d_I), w (S, H_I). Returns kl (S) float32 in nats. Memory is linear in T.

    Differentiable by q_I, k_I and w only: d kl / d I = softmax(I) * sum(p) - p. sum(p) is 1 unless lse is that of
    another attention or of other keys. ValueError on mismatched shapes.
    """
    checks.warmup("indexer_kl_dense", q_SHD, k_TGD, lse_SH, q_I, k_I, w, starts_S, ends_S)
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
    """sum(weight * `indexer_kl_dense`) (): equation (3) as a training step wants it, its gradient from the same pass.

    Target and scores cost most of the loss. As the weights are known beforehand, they are computed once instead of
    once in each direction. weight (S) float32 is not differentiated. All else, shapes, errors and source, is as in
    `indexer_kl_dense`. The gradient can be taken once (RuntimeError otherwise): it is kept from the forward pass and
    scaled in place.
    """
    checks.warmup("indexer_kl_dense_sum", q_SHD, k_TGD, lse_SH, q_I, k_I, w, starts_S, ends_S)
    if weight_S.shape != q_SHD.shape[:1]:
        raise ValueError(f"indexer_kl_dense_sum: weight must be ({q_SHD.shape[0]},), got {tuple(weight_S.shape)}")
    return table.indexer_kl_dense_sum(
        q_SHD, k_TGD, lse_SH, scale, q_I, k_I, w, starts_S, ends_S, weight_S, backend
    )[0]  # fmt: skip


def block_linear(
    x_NK: Tensor,
    weight_EMK: Tensor,
    scale: Tensor,
    ends_E: Tensor | None = None,
    *,
    gated: bool = False,
    backend: str = "auto",
) -> Tensor:
    """y[n,m] = sum_b s_x[n,b] s_w[e,m,b] sum_{k in b} e4m3(x)[n,k] w[e,m,k]: a linear layer with FP8 weights.

    Legend: N rows, E weights (experts), M outputs, K inputs. The weights stay as an FP8 checkpoint stores them.

    x (N, K) floating, rounded to E4M3 in blocks of 128 values with power-of-two scales s_x. If gated, x is (N, 2K), and
    silu of its first half times its second is multiplied. weight (E, M, K) float8_e4m3fn, K a multiple of 128. scale
    (E, ceil(M / 128), K / 128) float32, s_w of blocks of 128 x 128. ends (E) int32, ascending: rows [ends[e-1],
    ends[e]) meet weight e; results of rows behind the last are unspecified. None if E = 1.
    Returns (N, M) in x's dtype, summed in float32. No gradient.

    ValueError on mismatched shapes and dtypes. For a NaN or an infinity in x the reference raises ValueError, while the
    Triton kernel turns that row into NaN.
    Sources: the weights of DeepSeek-V3.2-Exp and `fp8_gemm` of its official demo; DeepSeek-V3 report, section 3.3.
    """
    checks.block_linear("block_linear", x_NK, weight_EMK, scale, ends_E, gated)
    return table.block_linear(x_NK, weight_EMK, scale, ends_E, gated, backend)
