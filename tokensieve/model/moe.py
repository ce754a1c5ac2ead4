"""Feed-forward layers: the gated MLP, the router, the fused experts, and the mixture with its shared expert.

Legend: N tokens, E routed experts, K experts per token, D hidden width, I expert width.
"""

from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from tokensieve.families import ModelConfig, family_of
from tokensieve.model.expert_group import ExpertGroup
from tokensieve.ops.eager import is_single_token, without_autocast

# With a multiple of this many rows, a row's bits do not depend on the other rows: matrix libraries compute a remainder
# of rows otherwise than whole groups.
ORDINARY_ROWS = 4


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int, bias: bool = False):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=bias)
        self.up_proj = nn.Linear(hidden, width, bias=bias)
        self.down_proj = nn.Linear(width, hidden, bias=bias)

    def forward(self, x_ND: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_ND)) * self.up_proj(x_ND))


class Router(nn.Module):
    """Chooses K of E experts per token, in float32.

    V3 ("sigmoid"): scores = sigmoid(logits); a correction bias is added for the choice only. Groups are ranked by the
    sum of their two best biased scores and only the best `topk_group` groups are considered. Weights = unbiased scores,
    normalized to sum 1, times the scale. V2 and Qwen3 ("softmax"): scores = softmax(logits); groups are ranked by their
    best score; weights = scores (Qwen3: normalized if `norm_topk_prob`) times the scale. Source: DeepSeek-V3 report,
    section 2.1.2; official demo, class Gate; Qwen3, arXiv 2505.09388, section 2.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        family = family_of(config)
        experts = family.experts(vars(config))
        self.top_k, self.experts = experts.per_token, experts.routed
        self.groups, self.best_groups = experts.groups, experts.best_groups
        self.scale, self.normalize = experts.scale, experts.normalize
        self.softmax = family.softmax_router(config)
        self.limited = getattr(config, "topk_method", "noaux_tc") != "greedy"
        self.weight = nn.Parameter(torch.empty(self.experts, config.hidden_size))
        if not self.softmax:
            self.e_score_correction_bias: Tensor
            self.register_buffer("e_score_correction_bias", torch.zeros(self.experts, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """experts (N, K) int64 and weights (N, K) float32."""
        with without_autocast(x_ND):
            logits = F.linear(x_ND.float(), self.weight.float())
        scores = logits.softmax(-1) if self.softmax else logits.sigmoid()
        choice = scores if self.softmax else scores + self.e_score_correction_bias
        if self.limited and self.best_groups < self.groups:
            choice = self._within_best_groups(choice)
        # The choice has no gradient; the weights of the chosen experts have one.
        chosen = choice.detach().topk(self.top_k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return chosen, weights * self.scale

    def _within_best_groups(self, choice_NE: Tensor) -> Tensor:
        by_group = choice_NE.unflatten(-1, (self.groups, -1))
        rank = by_group.amax(-1) if self.softmax else by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
        best = rank.topk(self.best_groups, dim=-1, sorted=False).indices
        closed = torch.ones_like(rank, dtype=torch.bool).scatter_(1, best, False)
        return by_group.masked_fill(closed.unsqueeze(-1), 0.0 if self.softmax else float("-inf")).flatten(-2)


class Experts(nn.Module):
    """All routed experts as two tensors: gate and up rows (E, 2I, D), down (E, D, I). On disk each expert is by itself.

    first: index of this rank's first expert if other ranks hold the others and have the same tokens; tokens that are
    routed to those contribute zero here. group: the ranks that hold the others and have tokens of their own, which they
    exchange; the tensors are then DTensors of all experts.
    """

    first: int | None = None
    group: ExpertGroup | None = None

    def __init__(self, config: ModelConfig):
        super().__init__()
        experts = family_of(config).experts(vars(config))
        E, D, width = experts.routed, config.hidden_size, experts.width
        self.gate_up_proj = nn.Parameter(torch.empty(E, 2 * width, D))
        self.down_proj = nn.Parameter(torch.empty(E, D, width))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        """Accepts one matrix per expert too, as on disk: to resume, trainers load the file of `save_pretrained`.

        A shard may hold some of the experts only, so each goes straight to its place.
        """
        width = self.down_proj.shape[2]
        for name in [n for n in state_dict if n.startswith(prefix) and n.endswith("_proj.weight")]:
            expert, kind, _ = name.removeprefix(prefix).split(".")
            rows = {"gate_proj": slice(0, width), "up_proj": slice(width, None), "down_proj": slice(None)}[kind]
            target = self.down_proj if kind == "down_proj" else self.gate_up_proj
            with torch.no_grad():
                target[int(expert), rows].copy_(state_dict.pop(name))
            fused = "down_proj" if kind == "down_proj" else "gate_up_proj"
            state_dict.setdefault(prefix + fused, target.detach())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> tuple[Tensor, Tensor]:
        """out (N, D), and the number of tokens that each expert got, (E) int64."""
        N, K = chosen_NK.shape
        E = self.gate_up_proj.shape[0]
        if self.first is not None:
            chosen_NK = chosen_NK - self.first
            chosen_NK = chosen_NK.where((chosen_NK >= 0) & (chosen_NK < E), E)  # rows of other ranks' experts come last
        by_expert, order = chosen_NK.flatten().sort(stable=True)
        # The end of each expert's rows; bincount would stop a GPU's queue, since it looks at the largest number.
        ends_E = torch.searchsorted(by_expert, torch.arange(E, device=x_ND.device), right=True)
        counts_E = ends_E.diff(prepend=ends_E.new_zeros(1))
        # Autocast would turn the sum over K, and with it the residual stream, into float32.
        with without_autocast(x_ND):
            x = x_ND.index_select(0, order // K)
            if self.group is None:
                y = self._products(x, ends_E, counts_E)
            else:
                y = self.group.products(self._products, x, counts_E)
            if self.first is not None:
                y = y.masked_fill((torch.arange(N * K, device=y.device) >= ends_E[-1]).unsqueeze(-1), 0)
            # Back to the tokens' order: a gather and a sum over K, so that no addition depends on the batch.
            back = torch.empty_like(order)
            back[order] = torch.arange(N * K, device=order.device)
            out = (y.index_select(0, back).view(N, K, -1) * weights_NK.unsqueeze(-1).to(y.dtype)).sum(1)
        return out, counts_E

    def _products(self, x: Tensor, ends_E: Tensor, counts_E: Tensor) -> Tensor:
        """Outputs of rows that are sorted by expert. Rows behind the last expert's give unspecified numbers."""
        if x.is_cuda and x.dtype == torch.bfloat16:
            return self._grouped(x, ends_E.to(torch.int32))
        return self._one_by_one(x, counts_E)

    def _own(self) -> tuple[Tensor, Tensor]:
        """The two tensors of the experts that are here."""
        gate_up: Any = self.gate_up_proj
        down: Any = self.down_proj
        return (gate_up, down) if self.group is None else (gate_up.to_local(), down.to_local())

    @torch.compiler.disable  # every new set of counts would be another program
    def _one_by_one(self, x: Tensor, counts_E: Tensor) -> Tensor:
        counts = counts_E.tolist()
        *by_expert, others = x.split([*counts, x.shape[0] - sum(counts)])
        parts = []
        # unbind, not indexing: each expert's gradient of an index is a tensor of all experts' size, mostly zeros.
        matrices = (own.unbind() for own in self._own())
        for part, gate_up, down in zip(by_expert, *matrices, strict=True):
            if rows := part.shape[0]:
                if not torch.is_grad_enabled():
                    part = F.pad(part, (0, 0, 0, -rows % ORDINARY_ROWS))
                gate, up = F.linear(part, gate_up.to(x.dtype)).chunk(2, dim=-1)
                parts.append(F.linear(F.silu(gate) * up, down.to(x.dtype))[:rows])
        return torch.cat([*parts, others])

    def few_tokens(self, x_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """out (N, D) of `forward`, to the bit, for decode on the CPU: rows are sorted here, with few operators."""
        K = chosen_NK.shape[1]
        rows: dict[int, list[int]] = {}  # expert -> its rows, as places in chosen
        for place, expert in enumerate(chosen_NK.flatten().tolist()):
            rows.setdefault(expert, []).append(place)
        padded = [places + places[:1] * (-len(places) % ORDINARY_ROWS) for places in rows.values()]
        order = [place for places in padded for place in places]
        sizes, dtype = [len(places) for places in padded], x_ND.dtype
        parts = x_ND.index_select(0, torch.tensor([place // K for place in order])).split(sizes)
        both = [F.linear(x, self.gate_up_proj[e].to(dtype)) for x, e in zip(parts, rows, strict=True)]
        gate, up = torch.cat(both).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).split(sizes)
        y = torch.cat([F.linear(x, self.down_proj[e].to(dtype)) for x, e in zip(inner, rows, strict=True)])
        back = {place: row for row, place in enumerate(order)}
        y = y.index_select(0, torch.tensor([back[place] for place in range(chosen_NK.numel())]))
        return (y.view(*chosen_NK.shape, -1) * weights_NK.unsqueeze(-1).to(dtype)).sum(1)

    def one_token(self, x_1D: Tensor, chosen_1K: Tensor, weights_1K: Tensor) -> Tensor:
        """out (1, D) of a single token in decode, without sorting and counting, which take longer than the products."""
        chosen = chosen_1K[0].tolist()
        gate, up = torch.cat([F.linear(x_1D, self.gate_up_proj[e].to(x_1D.dtype)) for e in chosen]).chunk(2, dim=-1)
        inner = (F.silu(gate) * up).split(1)
        down = [F.linear(x, self.down_proj[e].to(x.dtype)) for x, e in zip(inner, chosen, strict=True)]
        return weights_1K.to(x_1D.dtype) @ torch.cat(down)

    def _grouped(self, x: Tensor, ends_E: Tensor) -> Tensor:
        # Grouped products exist in bfloat16 only; float32 parameters are cast, as autocast does for a linear layer.
        gate_up, down = (own.to(x.dtype).transpose(1, 2) for own in self._own())
        gate, up = torch._grouped_mm(x, gate_up, offs=ends_E).chunk(2, dim=-1)
        return torch._grouped_mm(F.silu(gate) * up, down, offs=ends_E)


class MoE(nn.Module):
    """Routed experts plus the shared one, if there is one, which every token passes through."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Router(config)
        self.experts = Experts(config)
        experts = family_of(config).experts(vars(config))
        shared = experts.width * experts.shared
        self.shared_experts = MLP(config.hidden_size, shared) if shared else None

    def forward(self, x_ND: Tensor, real: int | None = None) -> tuple[Tensor, Tensor | None]:
        """out (N, D), and the number of tokens sent to each expert (E), or None if they were not counted.

        real: the first `real` rows are tokens; the rest is padding, which no expert sees.
        """
        chosen_NK, weights_NK = self.gate(x_ND)
        load_E = None
        # A module in the experts' place (an adapter), or one that holds some of them only, has no way but forward().
        whole = isinstance(self.experts, Experts) and self.experts.first is None and self.experts.group is None
        if real is not None:
            rows = x_ND[:real], chosen_NK[:real], weights_NK[:real]
            routed = self.experts.few_tokens(*rows) if whole else self.experts(*rows)[0]
            routed = F.pad(routed, (0, 0, 0, len(x_ND) - real))
        elif whole and is_single_token(x_ND):
            routed = self.experts.one_token(x_ND, chosen_NK, weights_NK)
        else:
            routed, load_E = self.experts(x_ND, chosen_NK, weights_NK)
        return routed if self.shared_experts is None else routed + self.shared_experts(x_ND), load_E
