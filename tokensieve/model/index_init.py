"""Indexers that begin from the attention they select for, not from random weights.

Every layer reads a few thousand tokens once. Its index keys and queries are linear maps of its own key and query
projections (`tokensieve.model.index_basis`), so that before the ReLU an index head is close to the logits of a query
head, in the D numbers of an index key.

- Query heads. Fewer index heads than query heads: the two heads whose logits agree most are added, until they fit. More
  of them: the rest stays random, with no weight in equation (1).
- LayerNorm. wk's rows have unit variance, and the norm's bias restores the keys' mean: the centre of the unrotated
  dims, and in the rotated ones the constant key that makes an index prefer near tokens. q_I carries what the norm
  takes.
- Head weights. w has no bias, so a constant weight is one along the direction of h that is steadiest. Its size for
  each head minimises equation (3) on a few queries, pulled towards equal sizes.

Legend: N tokens, r some of them, H query heads, G key groups, J index heads that begin so, E width of a key, D of an
index key, S of the index queries' input, C hidden width.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokensieve import ops
from tokensieve.config import UserError
from tokensieve.families import ModelConfig, family_of
from tokensieve.model.attention import Attention
from tokensieve.model.causal import DecoderForCausalLM
from tokensieve.model.context import ForwardContext, selecting
from tokensieve.model.index_basis import Basis, Layout, as_complex, as_pairs
from tokensieve.model.indexer import Indexer
from tokensieve.model.rope import Rotation, frequencies, tables

ROWS, TOKENS = 2, 4096  # of random tokens, if the caller has no text
QUERIES = 2048  # whose moments are taken
KL_QUERIES = 64  # on which the head weights are fitted, and how strongly they are pulled together
PULL = 0.1
RIDGE = 1e-3  # of the mean eigenvalue


def from_attention(model: DecoderForCausalLM, ids_BS: Tensor | None = None, seed: int = 0) -> None:
    """Writes the indexers of `model` from its attention, whose activations on `ids` they read.

    ids (B, S) int64: rows of text, of a length at which the model works. None: 2 rows of 4096 random tokens, or of the
    longest context, drawn from `seed`; text gives better indexers (docs/results/training.md). One dense pass. The
    result is the same for the same input. UserError for other ids, and for activations that are not finite.
    """
    ids = _random_tokens(model.config, seed) if ids_BS is None else ids_BS
    _check(ids, model.config)
    layout = _layout(model.config, model.lm_head.weight.device)
    attentions = [m for m in model.modules() if isinstance(m, Attention) and m.indexer is not None]
    hooks = [attention.register_forward_pre_hook(_initialise(layout)) for attention in attentions]
    try:
        with torch.no_grad(), selecting(model, "dense"):
            model.model(input_ids=ids.to(model.lm_head.weight.device))
    finally:
        for hook in hooks:
            hook.remove()


def _initialise(layout: Layout) -> Callable[[Attention, tuple[Any, ...]], None]:
    def hook(attention: Attention, args: tuple[Any, ...]) -> None:
        h_NC, ctx = args[0], args[1]
        if not bool(h_NC.isfinite().all()):
            raise UserError(
                f"layer {attention.layer}: its input is not finite; are the model's weights damaged, or too large for "
                "their dtype?"
            )
        assert attention.indexer is not None
        heads = _project(attention, attention.indexer, layout, h_NC, attention.softmax_scale(ctx.rotation))
        if heads:
            _weigh(attention, attention.indexer, heads, h_NC, ctx)

    return hook


def _random_tokens(config: ModelConfig, seed: int) -> Tensor:
    shape = ROWS, min(TOKENS, config.max_position_embeddings)
    return torch.randint(config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def _check(ids: Tensor, config: ModelConfig) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] < 2:
        found = f"{tuple(ids.shape)} {ids.dtype}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"calibration is {found}; give token ids, an int64 tensor (rows, tokens) of at least 2 tokens")
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= config.vocab_size:
        raise UserError(f"calibration has no ids, or ids outside of the vocabulary of {config.vocab_size} tokens")


def _layout(config: ModelConfig, device: torch.device) -> Layout:
    family, rope, longest = family_of(config), config.rope_parameters, config.max_position_embeddings
    width, interleaved = family.rope(config)
    own, factor = frequencies(rope, width, longest)
    return Layout(
        nope=family.entry(config).d_k - width,
        frequencies_F=own.to(device),
        interleaved=interleaved,
        width=config.index_head_dim,
        index_frequencies_P=frequencies(rope, family.index_rope(config), longest)[0].to(device),
        index_interleaved=family.index_interleaved,
        gain=1.0 if family.index_rope_scaled else factor**2,
        longest=longest,
    )


def _project(attention: Attention, indexer: Indexer, layout: Layout, h_NC: Tensor, scale: float) -> int:
    """Writes wk, its norm and wq_b. Returns J; 0, and nothing is written, if all queries or keys are zero: there is
    nothing to begin from.
    """
    groups, width, d_k, _, _ = attention.entry
    rows = _spread(len(h_NC), QUERIES, h_NC.device)
    _, entries_NW, _ = attention.project(h_NC, _unrotated(layout, h_NC))
    queries, _, source_rS = attention.project(h_NC[rows], _unrotated(layout, h_NC[rows]))
    k_NGE = entries_NW.view(-1, groups, width)[..., :d_k].float()
    q_rHE = attention.gathered_queries(queries).float() * scale
    if not bool(q_rHE.any()) or not bool(k_NGE.any()):
        return 0
    h_NC, source_rS = h_NC.float(), source_rS.float()
    basis = Basis(q_rHE, k_NGE, layout)
    w_q_HES, w_k_GEC = (matrix.float() for matrix in attention.projections())

    slope_GE, _ = _line(torch.einsum("nc,gec->nge", h_NC, w_k_GEC), k_NGE)
    wk_DC = basis.keys((w_k_GEC * slope_GE[..., None]).permute(2, 0, 1)).T
    target_ND = basis.keys(k_NGE)
    target_ND[:, layout.rope :] -= target_ND[:, layout.rope :].mean(0)  # the same for all keys: it orders nothing
    power_DD = target_ND.T @ target_ND / len(target_ND)

    slope_HE, offset_HE = _line(torch.einsum("rs,hes->rhe", source_rS, w_q_HES), q_rHE)
    wq_HDS = basis.queries((w_q_HES * slope_HE[..., None]).permute(2, 0, 1)).permute(1, 2, 0)
    wq_HDS = wq_HDS + basis.queries(offset_HE[None])[0][..., None] * _steady(source_rS)
    q_rHD = basis.queries(q_rHE)
    agreement_HH = torch.einsum("rhd,de,rge->hg", q_rHD, power_DD, q_rHD)
    wq_JDS = torch.stack([wq_HDS[heads].sum(0) for heads in _merged(agreement_HH, indexer.heads)])

    spread_D = _per_pair((h_NC @ wk_DC.T).var(0), layout).sqrt()
    live_D = spread_D > 1e-6 * spread_D.max()
    wk_DC = torch.where(live_D[:, None], wk_DC / spread_D.clamp_min(1e-30)[:, None], indexer.wk.weight.float())
    normal_ND = F.layer_norm(h_NC @ wk_DC.T, (layout.width,), eps=indexer.k_norm.eps)
    covariance_D = ((normal_ND - normal_ND.mean(0)) * target_ND).mean(0)
    gain_D = _per_pair(covariance_D, layout) / _per_pair(normal_ND.var(0), layout).clamp_min(1e-12)
    live_D &= gain_D > 0
    gain_D = torch.where(live_D, gain_D, 0)
    bias_D = torch.where(live_D, target_ND.mean(0) / gain_D.clamp_min(1e-30) - normal_ND.mean(0), 0)

    indexer.wk.weight.copy_(wk_DC)
    indexer.k_norm.weight.fill_(1)
    indexer.k_norm.bias.copy_(bias_D)
    rows_J = wq_JDS * gain_D[:, None]
    indexer.wq_b.weight[: rows_J.shape[0] * layout.width].copy_(rows_J.flatten(0, 1))
    return len(wq_JDS)


def _weigh(attention: Attention, indexer: Indexer, heads: int, h_NC: Tensor, ctx: ForwardContext) -> None:
    """Writes weights_proj: constant weights, whose sizes minimise equation (3) on some queries."""
    groups, width, d_k, _, _ = attention.entry
    indexer.weights_proj.weight.zero_()
    indexer.weights_proj.weight[:heads] = _steady(h_NC.float()) * (indexer.heads * indexer.width) ** 0.5 / heads
    pack = ctx.pack
    rows = torch.nonzero(pack.ends_N - pack.starts_N > 1).flatten()
    rows = rows[_spread(len(rows), KL_QUERIES, rows.device)]
    starts, ends = pack.starts_N[rows], pack.ends_N[rows]
    some = ctx.rotation._replace(
        attention=tuple(x[rows] for x in ctx.rotation.attention), indexer=ctx.rotation.index_rows(rows)
    )
    _, entries_NW, _ = attention.project(h_NC, ctx.rotation)
    queries, _, source_rS = attention.project(h_NC[rows], some)
    k_NGE = entries_NW.view(-1, groups, width)[..., :d_k]
    q_rHE = attention.gathered_queries(queries)
    p_rN = ops.head_mass(q_rHE, k_NGE, starts, ends, attention.softmax_scale(ctx.rotation)).float()
    q_rJD, w_rJ = indexer.queries(source_rS, h_NC[rows], some.indexer)
    dots_rJN = torch.einsum("rjd,nd->rjn", q_rJD[:, :heads].float(), indexer.keys(h_NC, ctx.rotation).float())
    scores_rJN = dots_rJN.relu_() * w_rJ[:, :heads, None]
    key = torch.arange(len(h_NC), device=rows.device)
    outside_rN = (key < starts[:, None]) | (key >= ends[:, None])
    indexer.weights_proj.weight[:heads] *= fitted_sizes(scores_rJN, p_rN, outside_rN)[:, None]


def fitted_sizes(scores_rJN: Tensor, p_rN: Tensor, outside_rN: Tensor, steps: int = 30) -> Tensor:
    """Sizes c (J), all positive, of the heads in I = sum_j c_j scores_j: they minimise

        mean_r KL(p || softmax(I)) + PULL / 2 * sum_j (b_j - mean b)^2,   b = log c

    by Newton's method, damped, where the curvature of c = exp(b) is left out. outside (r, N): keys that a query may
    not see. Source: equation (3).
    """
    heads = scores_rJN.shape[1]
    centring = torch.eye(heads, device=p_rN.device) - 1 / heads
    eye = torch.eye(heads, device=p_rN.device)

    def loss(b_J: Tensor) -> tuple[Tensor, Tensor]:
        scores_rN = torch.einsum("rjn,j->rn", scores_rJN, b_J.exp())
        log_rN = scores_rN.masked_fill(outside_rN, -torch.inf).log_softmax(-1)
        cross = -(p_rN * log_rN.masked_fill(outside_rN, 0)).sum(1).mean()
        return cross + PULL / 2 * (b_J @ centring @ b_J), log_rN.exp()

    b_J = torch.zeros(heads, device=p_rN.device)
    value, softmax_rN = loss(b_J)
    for _ in range(steps):
        c_J = b_J.exp()
        mean_rJ = torch.einsum("rjn,rn->rj", scores_rJN, softmax_rN)
        gradient_J = (mean_rJ - torch.einsum("rjn,rn->rj", scores_rJN, p_rN)).mean(0) * c_J + PULL * centring @ b_J
        second_rJJ = (scores_rJN * softmax_rN[:, None]) @ scores_rJN.mT
        curvature_JJ = (second_rJJ.mean(0) - mean_rJ.T @ mean_rJ / len(mean_rJ)) * c_J[:, None] * c_J + PULL * centring
        damping = 1e-3 * curvature_JJ.diagonal().mean() + 1e-4
        step_J = torch.linalg.solve(curvature_JJ + damping * eye, gradient_J).clamp(-2, 2)
        before = value
        for _ in range(8):
            trial, trial_softmax_rN = loss(b_J - step_J)
            if trial < value:
                b_J, value, softmax_rN = b_J - step_J, trial, trial_softmax_rN
                break
            step_J = step_J / 2
        if before - value < 1e-4:
            break
    return b_J.exp()


def _merged(agreement_HH: Tensor, most: int) -> list[list[int]]:
    """At most `most` groups of heads; agreement: the inner products of their logits."""
    inner = agreement_HH.double().cpu()
    groups = [[head] for head in range(len(inner))]
    while len(groups) > most:
        size = inner.diagonal().clamp_min(1e-30).sqrt()
        correlation = (inner / size / size[:, None]).fill_diagonal_(-torch.inf)
        a, b = sorted(divmod(int(correlation.argmax()), len(groups)))
        groups[a] += groups.pop(b)
        inner[a] += inner[b]
        inner[:, a] += inner[:, b]
        others = [i for i in range(len(inner)) if i != b]
        inner = inner[others][:, others]
    return groups


def _line(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of y = slope * x + offset over the first axis, for each element of the others."""
    centred = x - x.mean(0)
    slope = ((y - y.mean(0)) * centred).sum(0) / centred.square().sum(0).clamp_min(1e-30)
    return slope, y.mean(0) - slope * x.mean(0)


def _steady(x_NC: Tensor) -> Tensor:
    """u (C) with x @ u close to 1 for all tokens: least squares with a small ridge, then scaled to a mean of 1."""
    x = x_NC.double()
    moment = x.T @ x / len(x)
    moment.diagonal().add_(RIDGE * moment.diagonal().mean().clamp_min(1e-30))
    u_C = torch.linalg.solve(moment, x.mean(0))
    return (u_C / (x.mean(0) @ u_C).clamp_min(1e-30)).to(x_NC.dtype)


def _per_pair(x_D: Tensor, layout: Layout) -> Tensor:
    """Both dims of a rotated pair get their mean, so that a factor on them commutes with the rotation."""
    pairs = as_complex(x_D[: layout.rope], layout.index_interleaved)
    means = (pairs.real + pairs.imag) / 2
    return torch.cat((as_pairs(torch.complex(means, means), layout.index_interleaved), x_D[layout.rope :]))


def _unrotated(layout: Layout, h_NC: Tensor) -> Rotation:
    """The rotation at position 0, without a factor on it."""
    own = tables(h_NC.new_zeros(len(h_NC)), layout.frequencies_F, 1.0, layout.interleaved)
    return Rotation(own, own)


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of `count` rows, evenly spaced."""
    return torch.linspace(0, count - 1, min(count, most), device=device).round().long()
