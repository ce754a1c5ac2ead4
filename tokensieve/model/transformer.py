"""The decoder below its vocabulary head: layers, and the trunk that runs them.

Legend: B rows, S tokens a row, N = B * S packed tokens, D hidden width, K selected keys. Modules and parameters are
named as in the published checkpoint, so that state dicts, transformers, vLLM and SGLang agree; only the experts are
fused in memory.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tokensieve.config import UserError
from tokensieve.families import ModelConfig, family_of
from tokensieve.model.attention import Attention
from tokensieve.model.cache import Cached, LatentCache
from tokensieve.model.context import NOTHING, ForwardContext, ForwardOptions, LayerResult, Lent
from tokensieve.model.entries import Entries, Fresh
from tokensieve.model.gathered import Gathered
from tokensieve.model.grouped import GroupedAttention
from tokensieve.model.kl import InjectedKL, Objective, query_weights
from tokensieve.model.mla import LatentAttention
from tokensieve.model.moe import MLP, Experts, MoE, Router
from tokensieve.model.norm import RMSNorm
from tokensieve.model.pack import Pack, make_pack
from tokensieve.model.rope import Rotation, frequencies, softmax_factor, tables
from tokensieve.model.selection import indexer

ATTENTION: dict[str, type[Attention]] = {"latent": LatentAttention, "grouped": GroupedAttention}


@dataclass
class TrunkOutput(ModelOutput):
    """Output of `Trunk`.

    last_hidden_state (B, S, D). selection: per layer (B, S, K) int32 positions in the row, then -1. kl (): the
    indexers' loss of this pass, summed over its queries with their weights. objective: the one that `kl` belongs to.
    loads: per layer the number of tokens sent to each expert (E), None for a layer without experts.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    selection: list[Tensor | None] | None = None
    kl: Tensor | None = None
    objective: Objective | None = None
    loads: list[Tensor | None] | None = None


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        family, hidden = family_of(config), config.hidden_size
        self.self_attn = ATTENTION[family.attention](config, layer)
        dense = family.dense_layer(config, layer)
        self.mlp = MLP(hidden, config.intermediate_size, family.mlp_bias(config)) if dense else MoE(config)
        self.input_layernorm = RMSNorm(hidden, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(hidden, config.rms_norm_eps)

    def forward(self, x_ND: Tensor, ctx: ForwardContext, lent: Lent = NOTHING) -> tuple[Tensor, LayerResult]:
        """lent: by the layer before."""
        attended, result = self.self_attn(self.input_layernorm(x_ND), ctx, lent)
        x_ND = x_ND + attended
        x = self.post_attention_layernorm(x_ND)
        if not isinstance(self.mlp, MoE):
            return x_ND + self.mlp(x), result
        out, load_E = self.mlp(x, ctx.real)
        # Not result._replace(...), which torch 2.11 cannot compile.
        return x_ND + out, LayerResult(result.kl, result.indices, load_E, result.lent)


class DecoderPreTrainedModel(PreTrainedModel):
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    main_input_name = "input_ids"
    _no_split_modules = ("DecoderLayer",)
    _supports_sdpa = True
    _keep_in_fp32_modules = ("indexer.weights_proj",)
    _keep_in_fp32_modules_strict = ("e_score_correction_bias",)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0.0, std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, Router):
            module.weight.normal_(0.0, std)
        elif isinstance(module, Experts):
            module.gate_up_proj.normal_(0.0, std)
            module.down_proj.normal_(0.0, std)
        elif isinstance(module, RMSNorm | nn.LayerNorm):
            module.weight.fill_(1.0)
            if isinstance(module, nn.LayerNorm):
                module.bias.zero_()


class Frequencies(NamedTuple):
    """The rotation's constants, for one device."""

    attention: Tensor  # (width / 2)
    indexer: Tensor | None  # None: the tables of the attention serve the indexer too
    factor: float  # on cos and sin
    index_factor: float
    interleaved: bool
    index_interleaved: bool
    softmax_factor: float


class Trunk(DecoderPreTrainedModel):
    """Everything below the vocabulary head.

    Options of a pass are read here, since trainers that bypass the head (TRL) call the trunk.
    """

    takes_forward_options = True

    def __init__(self, config: ModelConfig):
        family_of(config).check(config)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.entry = family_of(config).entry(config)
        self._frequencies: dict[tuple[bool, torch.device], Frequencies] = {}
        self.post_init()

    @property
    def is_sparse(self) -> bool:
        return family_of(self.config).sparse

    @property
    def indexers(self) -> int:
        """Number of layers with an indexer."""
        family = family_of(self.config)
        return sum(family.has_indexer(self.config, layer) for layer in range(len(self.layers)))

    @property
    def top_k(self) -> int:
        """Number of keys selected per query, in the mean over the layers, unless a pass's options override it."""
        return getattr(self.config, "index_topk", self.config.max_position_embeddings)

    def layer_top_k(self, top_k: int | None = None) -> tuple[int, ...]:
        """Numbers of keys that a query selects in each layer, `top_k` in the mean: the model's own, if that is its own
        number too or None; else the same in all layers.
        """
        if self.is_sparse and top_k in (None, self.top_k):
            return family_of(self.config).top_k(self.config)
        return (top_k or self.top_k,) * len(self.layers)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LatentCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        selection: list[Tensor | None] | None = None,
        return_selection: bool = False,
        options: ForwardOptions | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> TrunkOutput:
        if output_router_logits:
            raise UserError(
                "output_router_logits is not supported, since no balance loss of the routers is computed; set the "
                "trainer's router_aux_loss_coef to 0"
            )
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if selection is not None and len(selection) != len(self.layers):
            raise ValueError(
                f"selection has {len(selection)} layers and the model {len(self.layers)}; pass what the model returned"
            )
        options = options or ForwardOptions()
        context = options.context
        if context is not None:
            if past_key_values is not None or use_cache:
                raise ValueError("tokens that ranks share are not cached; generate without options.context")
            input_ids, inputs_embeds = (None if x is None else context.own(x) for x in (input_ids, inputs_embeds))
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, S, _ = x_BSD.shape
        device = x_BSD.device
        if use_cache and past_key_values is None and not self.training:
            past_key_values = LatentCache()
        if past_key_values is not None and not isinstance(past_key_values, LatentCache):
            raise ValueError(f"past_key_values must be a tokensieve LatentCache, got {type(past_key_values).__name__}")
        pack = make_pack(
            B,
            S if context is None else S * context.size,
            device,
            position_ids,
            attention_mask,
            past_key_values,
            self.config.max_position_embeddings,
        )
        if context is not None:
            pack = context.own_queries(pack)
        objective = options.objective or Objective()
        if objective.kind == "adapt" and not self.training:
            objective = Objective()
        backend = options.backend or "auto"
        kl_queries = objective.queries(B * S, device)
        entries: Entries = Fresh(pack, self.entry, backend)
        if context is not None:
            entries = Gathered(context, pack, self.entry, backend)
        if past_key_values is not None:
            entries = Cached(past_key_values, pack, self.entry, backend)
        ctx = self.context(
            pack,
            entries,
            options,
            objective=objective.kind,
            kl_queries=kl_queries,
            kl_weight=None
            if objective.kind == "none"
            else query_weights(objective, kl_queries, pack, len(self.layers)),
            replay=None if selection is None else [None if s is None else to_packed(s, pack) for s in selection],
            keep_indices=return_selection,
        )
        # Under autocast the residual stream has autocast's dtype, as in a model loaded in that dtype.
        x = x_BSD.flatten(0, 1)
        if torch.is_autocast_enabled(device.type):
            x = x.to(torch.get_autocast_dtype(device.type))
        states = [x_BSD] if output_hidden_states else None
        x, results = self.run(x, ctx, states)
        if past_key_values is not None:
            past_key_values.advance(S)
        kls = [result.kl for result in results if result.kl is not None]
        kl = torch.stack(kls).sum() if kls else None
        last = self.norm(x).unflatten(0, (B, S))
        if objective.kind == "warmup" and kl is not None and kl.requires_grad:
            # For a trainer that bypasses the head: any loss of these states brings the KL's gradient in backward.
            last = InjectedKL.apply(last, kl, torch.ones_like(kl))
        if states is not None:
            states[-1] = last  # the last state is normalized, as everywhere in transformers
        indices = [None if r.indices is None else to_rows(r.indices, pack) for r in results]
        return TrunkOutput(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
            selection=indices if return_selection else None,
            kl=kl,
            objective=objective,
            loads=[r.load_E for r in results],
        )

    def context(self, pack: Pack, entries: Entries, options: ForwardOptions, **more: Any) -> ForwardContext:
        """The context of a pass, which all layers share; defaults replace options that are None.

        more: further fields of it.
        """
        check = options.check_selection
        return ForwardContext(
            pack=pack,
            rotation=self.rotation(pack.positions_N, options.yarn is not False),
            entries=entries,
            selector=options.selector or indexer,
            top_k=self.layer_top_k(options.top_k),
            form=options.form or "auto",
            backend=options.backend or "auto",
            check_selection=pack.positions_N.is_cpu if check is None else check,
            **more,
        )

    def run(
        self, x_ND: Tensor, ctx: ForwardContext, states: list[Tensor] | None = None
    ) -> tuple[Tensor, list[LayerResult]]:
        """Runs all layers, without embedding and last norm, in training and in the engine alike.

        states: every layer's output (B, S, D) is appended to it.
        """
        results: list[LayerResult] = []
        lent = NOTHING
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and ctx.objective != "warmup":
                x_ND, result = checkpoint(layer, x_ND, ctx, lent, use_reentrant=False)
            else:
                x_ND, result = layer(x_ND, ctx, lent)
            lent = result.lent
            results.append(result._replace(lent=NOTHING))
            if states is not None:
                states.append(x_ND.unflatten(0, (ctx.pack.batch, ctx.pack.length)))
        return x_ND, results

    def rotation(self, positions_N: Tensor, yarn: bool = True) -> Rotation:
        """The rotation of tokens at these positions.

        yarn False: by plain frequencies, as a model trains before its context is extended.
        """
        device = positions_N.device
        if (yarn, device) not in self._frequencies:  # kept, since a copy at every step would stop a GPU's queue
            self._frequencies[yarn, device] = self._frequencies_on(device, yarn)
        known = self._frequencies[yarn, device]
        attention = index = tables(positions_N, known.attention, known.factor, known.interleaved)
        if known.indexer is not None:
            index = tables(positions_N, known.indexer, known.index_factor, known.index_interleaved)
        return Rotation(attention, index, known.softmax_factor)

    def _frequencies_on(self, device: torch.device, yarn: bool) -> "Frequencies":
        config, family = self.config, family_of(self.config)
        rope, longest = config.rope_parameters, config.max_position_embeddings
        if not yarn:
            rope = {"rope_type": "default", "rope_theta": rope["rope_theta"]}
        width, interleaved = family.rope(config)
        with torch.device("cpu"):
            inverse, factor = frequencies(rope, width, longest)
            index = frequencies(rope, family.index_rope(config), longest)[0] if family.sparse else None
        index_factor = factor if family.index_rope_scaled else 1.0
        same = index is not None and len(index) == len(inverse)
        same = same and interleaved == family.index_interleaved and index_factor == factor
        return Frequencies(
            inverse.to(device),
            None if index is None or same else index.to(device),
            factor,
            index_factor,
            interleaved,
            family.index_interleaved,
            softmax_factor(rope, longest) if family.softmax_mscale else 1.0,
        )


def to_rows(indices_NK: Tensor, pack: Pack) -> Tensor:
    """Positions (B, S, K) within each row from packed key positions (N, K); -1 stays."""
    indices = indices_NK.unflatten(0, (pack.batch, pack.length))
    row = torch.arange(pack.batch, device=indices.device, dtype=indices.dtype)[:, None, None]
    return torch.where(indices < 0, indices, indices - row * pack.row_keys)


def to_packed(indices_BSK: Tensor, pack: Pack) -> Tensor:
    """Packed key positions (N, K) from positions (B, S, K) within each row; -1 stays.

    ValueError for a key that its query may not see. Only on the CPU, since reading values would stop a GPU's queue.
    """
    row = torch.arange(pack.batch, device=indices_BSK.device, dtype=indices_BSK.dtype)[:, None, None]
    packed = torch.where(indices_BSK < 0, indices_BSK, indices_BSK + row * pack.row_keys).flatten(0, 1)
    if packed.device.type == "cpu":
        unseen = (packed < pack.starts_N[:, None]) | (packed >= pack.ends_N[:, None])
        if bool((unseen & (packed >= 0)).any()):
            raise ValueError(
                "selection names keys that their query may not see; replay it with its own mask and positions"
            )
    return packed
