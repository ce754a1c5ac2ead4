"""The decoder as a Hugging Face model: dense (`deepseek_v2`, `deepseek_v3`) or sparse (`deepseek_v32`).

Legend: B rows, S tokens a row, N = B * S packed tokens, K selected keys, V vocabulary. Modules and parameters are named as in the published
checkpoint, so that state dicts, transformers, vLLM and SGLang agree; only the experts are fused in memory.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from tokensieve.config import ModelConfig, UserError
from tokensieve.model.attention import Attention, Pass
from tokensieve.model.cache import LatentCache
from tokensieve.model.kl import InjectedKL, KLScale
from tokensieve.model.moe import MLP, Experts, MoE, Router
from tokensieve.model.norm import RMSNorm
from tokensieve.model.pack import Pack, make_pack
from tokensieve.model.rope import Rotation, frequencies, rotation
from tokensieve.model.selection import Selection, indexer, resolve
from tokensieve.model.supported import check_supported

Objective = Literal["none", "warmup", "adapt"]


@dataclass
class TrunkOutput(ModelOutput):
    """last_hidden_state (B, S, hidden); kl: the indexer's loss of this pass, summed over its queries with their weights."""

    last_hidden_state: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    selection: list[Tensor | None] | None = None
    kl: Tensor | None = None


@dataclass
class CausalOutput(ModelOutput):
    """loss (); logits (B, S or kept, V); selection: per layer (B, S, K) int32 positions in the row, then -1; kl (): the indexer's loss,
    detached."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    selection: list[Tensor | None] | None = None
    kl: Tensor | None = None


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.self_attn = Attention(config, layer)
        kinds = getattr(config, "mlp_layer_types", None)
        dense_ffn = layer < (config.first_k_dense_replace or 0) if kinds is None else kinds[layer] == "dense"
        self.mlp = MLP(config.hidden_size, config.intermediate_size) if dense_ffn else MoE(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_ND: Tensor, p: Pass) -> Tensor:
        x_ND = x_ND + self.self_attn(self.input_layernorm(x_ND), p)
        x = self.post_attention_layernorm(x_ND)
        return x_ND + (self.mlp(x, p.paged.real) if p.paged is not None and isinstance(self.mlp, MoE) else self.mlp(x))


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


class Trunk(DecoderPreTrainedModel):
    """Everything below the vocabulary head. Trainers that bypass the head (TRL) call this, so the objective and the selection live here."""

    def __init__(self, config: ModelConfig):
        check_supported(config)
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.selection: Selection = indexer
        self.top_k: int = getattr(config, "index_topk", config.max_position_embeddings)
        self.form: Literal["auto", "mha", "mqa"] = "auto"
        self.backend = "auto"  # of the ops
        self.objective: Objective = "none"
        self.kl_scale: KLScale | None = (
            None  # set by whoever trains; None: the mean over the valid queries of each call
        )
        self._frequencies: tuple[Tensor, float] | None = None
        self.post_init()

    @property
    def is_sparse(self) -> bool:
        return self.config.model_type == "deepseek_v32"

    def use_yarn(self, on: bool) -> None:
        """Off: plain frequencies and softmax scale, as a model trains before its context is extended.

        Part of training, not of the config.
        """
        config = self.config
        rope = (
            config.rope_parameters
            if on
            else {"rope_type": "default", "rope_theta": config.rope_parameters["rope_theta"]}
        )
        with torch.device("cpu"):
            self._frequencies = frequencies(rope, config.qk_rope_head_dim, config.max_position_embeddings)
        for module in self.modules():
            if isinstance(module, Attention):
                module.use_rope(rope)

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
        **kwargs: Any,
    ) -> TrunkOutput:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if selection is not None and len(selection) != len(self.layers):
            raise ValueError(
                f"selection has {len(selection)} layers and the model {len(self.layers)}; pass what the model returned"
            )
        x_BSD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, S, _ = x_BSD.shape
        device = x_BSD.device
        if use_cache and past_key_values is None and not self.training:
            past_key_values = LatentCache()
        if past_key_values is not None and not isinstance(past_key_values, LatentCache):
            raise ValueError(f"past_key_values must be a tokensieve LatentCache, got {type(past_key_values).__name__}")
        pack = make_pack(
            B, S, device, position_ids, attention_mask, past_key_values, self.config.max_position_embeddings
        )
        objective = self.objective if self.training or self.objective == "warmup" else "none"
        p = Pass(
            pack=pack,
            rotation=self.rotation(pack.positions_N),
            selection=self.selection,
            top_k=self.top_k,
            cache=past_key_values,
            objective=objective,
            kl_weight=None if objective == "none" else self._query_weights(pack, device),
            replay=None if selection is None else [None if s is None else to_packed(s, pack) for s in selection],
            form=self.form,
            backend=self.backend,
            keep_selection=return_selection,
        )
        # Under autocast the residual stream is held in its dtype, as a model loaded in that dtype holds it.
        x = x_BSD.flatten(0, 1)
        if torch.is_autocast_enabled(device.type):
            x = x.to(torch.get_autocast_dtype(device.type))
        states = [x_BSD] if output_hidden_states else None
        for layer in self.layers:
            if self.gradient_checkpointing and self.training and objective != "warmup":
                x = checkpoint(layer, x, p, use_reentrant=False)
            else:
                x = layer(x, p)
            if states is not None:
                states.append(x.unflatten(0, (B, S)))
        if past_key_values is not None:
            past_key_values.advance(S)
        kl = torch.stack([p.kl[i] for i in sorted(p.kl)]).sum() if p.kl else None
        last = self.norm(x).unflatten(0, (B, S))
        if objective == "warmup" and kl is not None and kl.requires_grad:
            # For a trainer that bypasses the head: whatever it computes from these states, its backward pass brings the KL's gradient.
            last = InjectedKL.apply(last, kl, torch.ones_like(kl))
        if states is not None:
            states[-1] = last  # as everywhere in transformers
        return TrunkOutput(
            last_hidden_state=last,
            past_key_values=past_key_values,
            hidden_states=None if states is None else tuple(states),
            selection=[to_rows(p.selected[i], pack) if i in p.selected else None for i in range(len(self.layers))]
            if return_selection
            else None,
            kl=kl,
        )

    def rotation(self, positions_N: Tensor) -> Rotation:
        """The rotation of tokens at these positions, by the config's frequencies unless `use_yarn` said otherwise."""
        if self._frequencies is None:
            self.use_yarn(True)
        assert self._frequencies is not None
        inverse, factor = self._frequencies
        if inverse.device != positions_N.device:  # once: a copy at every step would stop a GPU's queue
            self._frequencies = inverse, factor = inverse.to(positions_N.device), factor
        return rotation(positions_N, inverse, factor)

    def _query_weights(self, pack: Pack, device: torch.device) -> Tensor:
        """(N) float32: every valid query's share in the mean over queries and layers."""
        scale = self.kl_scale or KLScale()
        if scale.per_query is not None:
            one: float | Tensor = scale.per_query
        else:
            count = pack.valid_count
            one = scale.share / (count.clamp_min(1) if isinstance(count, Tensor) else count)
        valid = torch.ones(pack.positions_N.shape[0], device=device) if pack.valid_N is None else pack.valid_N.float()
        return valid * (one / len(self.layers))


def to_rows(indices_NK: Tensor, pack: Pack) -> Tensor:
    """Packed key positions -> (B, S, K) positions within each row; -1 stays."""
    indices = indices_NK.unflatten(0, (pack.batch, pack.length))
    row = torch.arange(pack.batch, device=indices.device, dtype=indices.dtype)[:, None, None]
    return torch.where(indices < 0, indices, indices - row * pack.row_keys)


def to_packed(indices_BSK: Tensor, pack: Pack) -> Tensor:
    row = torch.arange(pack.batch, device=indices_BSK.device, dtype=indices_BSK.dtype)[:, None, None]
    packed = torch.where(indices_BSK < 0, indices_BSK, indices_BSK + row * pack.row_keys).flatten(0, 1)
    # Looking at values costs a synchronization on a GPU.
    if packed.device.type == "cpu":
        unseen = (packed < pack.starts_N[:, None]) | (packed >= pack.ends_N[:, None])
        if bool((unseen & (packed >= 0)).any()):
            raise ValueError(
                "selection names keys that their query may not see; replay it with its own mask and positions"
            )
    return packed


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.model = Trunk(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.extras: Any = None  # tensors of the checkpoint that are carried, not used (the MTP layer)
        self.post_init()

    # selection and objective, kept on the trunk

    @property
    def is_sparse(self) -> bool:
        return self.model.is_sparse

    @property
    def selection(self) -> Selection:
        return self.model.selection

    @selection.setter
    def selection(self, value: str | Selection) -> None:
        self.model.selection = resolve(value)

    @property
    def top_k(self) -> int:
        return self.model.top_k

    @top_k.setter
    def top_k(self, value: int) -> None:
        self.model.top_k = value

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [x for name, x in self.named_parameters() if ".indexer." in name]

    def train_for(self, objective: Objective) -> None:
        """ "warmup": only the indexers train, on equation (3), and `loss` is the KL. "adapt": everything trains, the indexers on equation
        (4), whose gradient is injected in the attention's backward. "none": no indexer loss (pretraining, dense models, evaluation)."""
        if objective != "none" and not self.is_sparse:
            raise UserError(
                f"{objective} trains indexers and this model has none; make it sparse first: tokensieve sparsify"
            )
        self.model.objective = objective
        self.model.kl_scale = None  # whoever trains next sets its own
        indexers = {id(x) for x in self.indexer_parameters()}
        for x in self.parameters():
            x.requires_grad_(objective != "warmup" or id(x) in indexers)

    # forward

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: LatentCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        selection: list[Tensor | None] | None = None,
        return_selection: bool = False,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalOutput | tuple:
        """Logits, and a loss where `labels` (B, S) are given (unshifted; -100 is ignored). In warm-up the loss is the KL.

        `selection`: per layer (B, S, K) positions to use instead of selecting, as `return_selection=True` gave them;
        None where the layer's attention is dense.
        """
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            selection=selection,
            return_selection=return_selection,
        )
        hidden, trunk = out.last_hidden_state, self.model
        scale, counted = trunk.kl_scale, kwargs.get("num_items_in_batch") is not None
        if self.training and trunk.objective != "none" and scale is None and counted:
            raise UserError(
                f"{trunk.objective} under a Hugging Face trainer needs the scale of the KL; add tokensieve.KLCallback() to its callbacks"
            )
        kl = None if out.kl is None else out.kl.detach() / ((scale.share if scale else 1.0) or 1.0)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss, logits = None, None
        if trunk.objective == "warmup":
            # The head is not part of the loss, and in warm-up nobody reads logits: they would cost more than the indexers.
            loss = out.kl
            if kl is not None and scale is not None and scale.divisor is not None:
                loss = kl / (scale.divisor if counted and self.training else 1)
                if out.kl.requires_grad:
                    loss = InjectedKL.apply(loss, out.kl, torch.ones_like(out.kl)).clone()  # trainers scale it in place
        else:
            logits = self.lm_head(hidden[:, kept])
            if labels is not None or kwargs.get("shift_labels") is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        result = CausalOutput(loss, logits, out.past_key_values, out.hidden_states, out.selection, kl)
        return result.to_tuple() if return_dict is False else result

    # what transformers and its trainers call to load and save

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: ModelConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | torch.device | None = None,
    ) -> "DecoderForCausalLM":
        """`tokensieve.load`, under the name that transformers has for it. UserError where that raises it, or for a dtype torch lacks."""
        from tokensieve.model.loading import load

        named = None if dtype == "auto" else getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if named is not None and not isinstance(named, torch.dtype):
            raise UserError(f"dtype {dtype!r} is not one of torch's; use for instance 'bfloat16'")
        return load(pretrained_model_name_or_path, named, "cpu" if device_map in (None, "auto") else device_map, config)

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | float = 5e9,
        **kwargs: Any,
    ) -> None:
        """As `tokensieve.save`, in the published layout, but into a folder that may hold other things, as a trainer's does."""
        from tokensieve.model.loading import save_into

        if kwargs.get("push_to_hub"):
            raise UserError(
                "save_pretrained: push_to_hub is not supported; save, then upload the folder with: hf upload"
            )
        if is_main_process:
            save_into(
                self, Path(save_directory), self.state_dict() if state_dict is None else state_dict, max_shard_size
            )

    # generation

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LatentCache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
