"""The definitions of design sections (1)-(4), naive and in float64: the oracle that every backend is measured against.

Everything is written one query at a time, straight from the equations, with nothing blocked or fused, so that it can be
checked by eye. Gradients come from autograd over plain torch operations, so the backward is an oracle too.

Legend: S query tokens, T key tokens, N the keys that one query sees, H heads, G key-value groups (head h reads group
h // (H / G)), K selected, D key width, V value width, E entry width.
"""

import torch
from torch import Tensor

from tokensieve.ops.quant import quantize_e4m3


def index_scores(q_SHD: Tensor, k_TD: Tensor, w_SH: Tensor, k_scale_T: Tensor | None = None) -> Tensor:
    """Equation (1) for every pair (t, s), visible or not: I[t,s] = scale[s] * sum_j w[t,j] * relu(q[t,j] . k[s])."""
    q_SHD, k_TD, w_SH = q_SHD.double(), k_TD.double(), w_SH.double()
    scores_ST = torch.stack(
        [(w_H[:, None] * torch.relu(q_HD @ k_TD.T)).sum(0) for q_HD, w_H in zip(q_SHD, w_SH, strict=True)]
    )
    return scores_ST if k_scale_T is None else scores_ST * k_scale_T.double()


def select_topk(scores_ST: Tensor, k: int, starts_S: Tensor, ends_S: Tensor) -> Tensor:
    """Equation (2): the min(k, ends - starts) best keys of each range, ties to the smaller position, ascending, then
    -1."""
    rows = []
    for scores_T, start, end in zip(scores_ST.tolist(), starts_S.tolist(), ends_S.tolist(), strict=True):
        visible = range(start, end)
        if any(scores_T[s] != scores_T[s] for s in visible):
            raise ValueError("NaN score")
        # Python compares -0.0 and 0.0 as equal, which is the contract.
        best = sorted(sorted(visible, key=lambda s: (-scores_T[s], s))[:k])
        rows.append(best + [-1] * (k - len(best)))
    return torch.tensor(rows, dtype=torch.int32, device=scores_ST.device).reshape(len(rows), k)


def block_means(k_TD: Tensor, k_scale_T: Tensor | None, block: int) -> Tensor:
    """The mean key of every whole block (P, D), rounded to the keys' dtype: E4M3 by one power of two a block."""
    keys_TD = k_TD.double() if k_scale_T is None else k_TD.double() * k_scale_T.double()[:, None]
    blocks = len(k_TD) // block
    means_PD = keys_TD[: blocks * block].reshape(blocks, block, k_TD.shape[1]).mean(1)
    if k_TD.dtype != torch.float8_e4m3fn:
        return means_PD.to(k_TD.dtype).double()
    values, scales = quantize_e4m3(means_PD, k_TD.shape[1], "ue8m0")
    return values.double() * scales.double()


def index_topk_blocks(
    q_SHD: Tensor,
    k_TD: Tensor,
    w_SH: Tensor,
    k: int,
    starts_S: Tensor,
    ends_S: Tensor,
    k_scale_T: Tensor | None,
    block: int,
    blocks: int,
) -> Tensor:
    """Equation (2) among the keys of a query's first and last block, and of the best ones between them."""
    scores = index_scores(q_SHD, k_TD, w_SH, k_scale_T).tolist()
    of_blocks = index_scores(q_SHD, block_means(k_TD, k_scale_T, block), w_SH).tolist()
    rows = []
    for t, (start, end) in enumerate(zip(starts_S.tolist(), ends_S.tolist(), strict=True)):
        first, last = start // block, (end - 1) // block
        between = sorted(range(first + 1, last), key=lambda b: (-of_blocks[t][b], b))
        searched = {first, last, *between[: blocks - 2]}
        keys = [s for s in range(start, end) if s // block in searched]
        best = sorted(sorted(keys, key=lambda s: (-scores[t][s], s))[:k])
        rows.append(best + [-1] * (k - len(best)))
    return torch.tensor(rows, dtype=torch.int32, device=q_SHD.device).reshape(len(rows), k)


def attend(q_HD: Tensor, k_NGD: Tensor, v_NGV: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention of one query over N keys: out_HV, lse_H (natural log), p_HN; without keys zeros, -inf and (H,
    0)."""
    heads, groups = q_HD.shape[0], k_NGD.shape[1]
    k_NHD = k_NGD.double().repeat_interleave(heads // groups, 1)
    v_NHV = v_NGV.double().repeat_interleave(heads // groups, 1)
    logits_HN = scale * torch.einsum("hd,nhd->hn", q_HD.double(), k_NHD)
    if k_NGD.shape[0] == 0:
        return torch.einsum("hn,nhv->hv", logits_HN, v_NHV), logits_HN.sum(1) - torch.inf, logits_HN
    p_HN = torch.softmax(logits_HN, 1)
    return torch.einsum("hn,nhv->hv", p_HN, v_NHV), torch.logsumexp(logits_HN, 1), p_HN


def dense_attention(
    q_SHD: Tensor, k_TGD: Tensor, v_TGV: Tensor, starts_S: Tensor, ends_S: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out_SHV, lse_SH over every key of [starts, ends)."""
    rows = [
        attend(q_HD, k_TGD[start:end], v_TGV[start:end], scale)
        for q_HD, start, end in zip(q_SHD, starts_S.tolist(), ends_S.tolist(), strict=True)
    ]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def masked_attention(
    q_SHD: Tensor, k_THD: Tensor, v_THV: Tensor, indices_SK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """out_SHV, lse_SH over the keys named by indices (-1 names none)."""
    rows = []
    for q_HD, indices_K in zip(q_SHD, indices_SK.long(), strict=True):
        chosen_N = indices_K[indices_K >= 0]
        rows.append(attend(q_HD, k_THD[chosen_N], v_THV[chosen_N], scale))
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def sparse_attention(
    q_SHD: Tensor, kv_TGE: Tensor, indices_SK: Tensor, scale: float, d_k: int, v_start: int, d_v: int
) -> tuple[Tensor, Tensor]:
    """As masked_attention, key and value being parts [0, d_k) and [v_start, v_start + d_v) of one entry."""
    return masked_attention(q_SHD, kv_TGE[..., :d_k], kv_TGE[..., v_start : v_start + d_v], indices_SK, scale)


def head_mass(q_SHD: Tensor, k_TGD: Tensor, starts_S: Tensor, ends_S: Tensor, scale: float) -> Tensor:
    """p (S, T): the mean over heads of dense attention's probabilities, zero for keys that a query does not see."""
    mass_ST = q_SHD.new_zeros(q_SHD.shape[0], k_TGD.shape[0], dtype=torch.float64)
    for t, (start, end) in enumerate(zip(starts_S.tolist(), ends_S.tolist(), strict=True)):
        if start < end:
            mass_ST[t, start:end] = attend(q_SHD[t], k_TGD[start:end], k_TGD[start:end], scale)[2].mean(0)
    return mass_ST


def kl(p_N: Tensor, scores_N: Tensor) -> Tensor:
    """KL(p || softmax(scores)) over one query's keys; 0 where there is no key."""
    return (torch.xlogy(p_N, p_N) - p_N * torch.log_softmax(scores_N, 0)).sum()


def indexer_kl_dense(
    q_SHD: Tensor,
    k_TGD: Tensor,
    scale: float,
    q_SID: Tensor,
    k_TD: Tensor,
    w_SI: Tensor,
    starts_S: Tensor,
    ends_S: Tensor,
) -> Tensor:
    """Equation (3) per query: p is the mean over heads of dense attention's probabilities, over ALL visible keys,
    detached."""
    scores_ST = index_scores(q_SID, k_TD, w_SI)
    p_ST = head_mass(q_SHD, k_TGD, starts_S, ends_S, scale).detach()
    spans = zip(starts_S.tolist(), ends_S.tolist(), strict=True)
    return torch.stack([kl(p_ST[t, start:end], scores_ST[t, start:end]) for t, (start, end) in enumerate(spans)])


def sparse_attention_kl(
    q_SHD: Tensor,
    kv_TGE: Tensor,
    indices_SK: Tensor,
    scale: float,
    d_k: int,
    v_start: int,
    d_v: int,
    q_SID: Tensor,
    k_TD: Tensor,
    w_SI: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """out_SHV, lse_SH as sparse_attention; kl_S of equation (4): p and softmax(I) both over the selected keys, p
    detached."""
    scores_ST = index_scores(q_SID, k_TD, w_SI)
    outs, lses, kl_S = [], [], []
    for t, indices_K in enumerate(indices_SK.long()):
        chosen_N = indices_K[indices_K >= 0]
        entries_NGE = kv_TGE[chosen_N]
        out_HV, lse_H, p_HN = attend(q_SHD[t], entries_NGE[..., :d_k], entries_NGE[..., v_start : v_start + d_v], scale)
        outs.append(out_HV)
        lses.append(lse_H)
        kl_S.append(kl(p_HN.mean(0).detach(), scores_ST[t, chosen_N]))
    return torch.stack(outs), torch.stack(lses), torch.stack(kl_S)


def lse_rounding(lse_SH: Tensor, dtype: torch.dtype) -> float:
    """The relative error of a probability that is recomputed as exp(logit - lse) from an lse stored in `dtype` (bf16
    inputs: in float32): half a unit in lse's last place. It bounds every backward pass, and equation (3), at huge
    logits."""
    largest = lse_SH[lse_SH.isfinite()].abs().max().item() if lse_SH.isfinite().any() else 0.0
    return largest * 2.0 ** (-53 if dtype == torch.float64 else -24)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, floor: float = 1.0, what: str = "") -> None:
    """|actual - expected| <= tolerance * max(floor, max |expected|) everywhere; infinities must be the same ones, NaN
    fails.

    floor is the natural size of the quantity, for results that cancel to about zero.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    actual, expected = actual.detach().double(), expected.detach().double()
    finite = expected.isfinite()
    assert torch.equal(actual[~finite], expected[~finite]), f"{what}: differs where {expected[~finite]} is expected"
    if not finite.any():
        return
    error = (actual - expected)[finite].abs().max().item()
    bound = tolerance * max(floor, expected[finite].abs().max().item())
    assert error <= bound, f"{what}: error {error:.3g}, bound {bound:.3g}"
