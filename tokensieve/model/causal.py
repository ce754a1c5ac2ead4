"""The decoder with its vocabulary head, behind the interface of Hugging Face's classes and trainers.

Legend: B rows, S tokens a row, K selected keys, V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from transformers import GenerationMixin
from transformers.modeling_outputs import ModelOutput

from tokensieve.config import UserError
from tokensieve.families import ModelConfig
from tokensieve.model import files
from tokensieve.model.cache import LatentCache
from tokensieve.model.context import ForwardOptions
from tokensieve.model.kl import reported, warmup_loss
from tokensieve.model.transformer import DecoderPreTrainedModel, Trunk

# Options of transformers' from_pretrained and values that change nothing: attention has kernels of its own, which
# compute the same function; no code of a folder is ever run; only safetensors are read.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attn_implementation": ("eager", "sdpa"),
    "trust_remote_code": (True, False),
    "use_safetensors": (True,),
    "low_cpu_mem_usage": (True, False),
    "revision": ("main",),
    "adapter_kwargs": ({}, {"revision": None}),  # AutoModelForCausalLM's, if the folder holds no adapter
}


@dataclass
class CausalOutput(ModelOutput):
    """Output of `DecoderForCausalLM`.

    loss (). logits (B, S, V), or (B, positions, V) of those that `logits_to_keep` names. selection: per layer (B, S, K)
    int32 positions in the row, then -1. kl (): the indexers' loss in nats per query and layer, detached.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Any = None
    hidden_states: tuple[Tensor, ...] | None = None
    selection: list[Tensor | None] | None = None
    kl: Tensor | None = None


class DecoderForCausalLM(DecoderPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ModelConfig):
        super().__init__(config)
        self.model = Trunk(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.extras: Any = None  # tensors of the checkpoint that are carried, not used (the MTP layer)
        self.post_init()

    @property
    def is_sparse(self) -> bool:
        return self.model.is_sparse

    @property
    def top_k(self) -> int:
        return self.model.top_k

    def end_tokens(self, tokenizer: Any) -> set[int]:
        """Tokens that end an answer: the tokenizer's eos, and those that the checkpoint's files name."""
        named = self.generation_config.eos_token_id
        return {tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None}

    def indexer_parameters(self) -> list[nn.Parameter]:
        return [x for name, x in self.named_parameters() if ".indexer." in name]

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
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        options: ForwardOptions | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> CausalOutput | tuple:
        """Logits, and a loss if `labels` (B, S) are given (unshifted; -100 is ignored). In warm-up the loss is the KL.

        `selection`: per layer (B, S, K) positions to use instead of selecting, as `return_selection=True` returned
        them; None for a layer whose attention is dense. `options`: how the pass runs; an enclosing `selecting` or
        `training` block fills in whatever they leave open. `output_hidden_states` None takes config's. UserError for
        `output_attentions`, here or in config, since no kernel keeps the attention weights, and for
        `output_router_logits`, since no balance loss is computed.
        """
        if self.config.output_attentions if output_attentions is None else output_attentions:
            raise UserError(
                "output_attentions is not supported, since attention weights are never kept; return_selection=True "
                "returns the selected keys"
            )
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
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
            options=options,
            output_router_logits=output_router_logits,
        )
        hidden, objective = out.last_hidden_state, out.objective
        counted = self.training and kwargs.get("num_items_in_batch") is not None
        if counted and objective.kind != "none" and objective.scale is None:
            raise UserError(
                f"{objective.kind} under a Hugging Face trainer needs the scale of the KL; "
                "add what tokensieve.training() gives to its callbacks"
            )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss, logits = None, None
        if objective.kind == "warmup":
            # No logits in warm-up: the head is not part of the loss, and they would cost more than the indexers.
            loss = warmup_loss(out.kl, objective.scale, counted)
        else:
            logits = self.lm_head(hidden[:, positions])
            if labels is not None or kwargs.get("shift_labels") is not None:
                loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        kl = None if out.kl is None else reported(out.kl, objective.scale)
        result = CausalOutput(loss, logits, out.past_key_values, out.hidden_states, out.selection, kl)
        return result.to_tuple() if return_dict is False else result

    # loading and saving, as transformers and its trainers call them

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        config: ModelConfig | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: str | int | torch.device | dict[str, Any] | None = None,
        use_cache: bool | None = None,
        torch_dtype: torch.dtype | str | None = None,
        **others: Any,
    ) -> "DecoderForCausalLM":
        """`tokensieve.load` under transformers' name.

        `AutoModelForCausalLM` opens these folders too, in this class if transformers has none of its own for the family
        (`llama_dsa`, not `deepseek_v32`). `dtype` "auto" is that of the folder's weights, as its config.json names it;
        `torch_dtype` is the option's old name. Of transformers' other options those are accepted that change nothing
        here (`NEUTRAL`), and any that is None. Raises UserError for the rest, for an unknown dtype or device, and as
        `load` does.
        """
        others.pop("_from_auto", None)
        if not (others.get("adapter_kwargs") or {}).get("_adapter_model_path"):
            others.pop(
                "adapter_kwargs", None
            )  # of AutoModelForCausalLM if PEFT is installed, whether or not there is one
        for name, value in others.items():
            if value is not None and value not in NEUTRAL.get(name, ()):
                raise UserError(f"from_pretrained: {name}={value!r} is not supported; leave it out")
        dtype = torch_dtype if dtype is None else dtype
        if dtype == "auto":
            dtype = files.stored_dtype(pretrained_model_name_or_path)
        kind = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
        if kind is not None and not isinstance(kind, torch.dtype):
            raise UserError(f"dtype {dtype!r} is not one of torch's; use for instance 'bfloat16'")
        model = files.read(cls, pretrained_model_name_or_path, kind, files.fitting_device(device_map), config)
        if use_cache is not None:
            model.config.use_cache = use_cache
        return model

    def save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        max_shard_size: int | float = 5e9,
        **kwargs: Any,
    ) -> None:
        """Saves in the published layout, as `tokensieve.save` does.

        The folder may hold other things, as a trainer's does.
        """
        if kwargs.get("push_to_hub"):
            raise UserError(
                "save_pretrained: push_to_hub is not supported; save, then upload the folder with: hf upload"
            )
        if is_main_process:
            state = self.state_dict() if state_dict is None else state_dict
            files.save_into(self, Path(save_directory), state, max_shard_size)

    # generation

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        kind = generation_config.cache_implementation
        if kind not in (None, "dynamic"):
            raise UserError(
                f"generate: cache_implementation {kind!r} is not supported, since the cache grows with the tokens; "
                "leave it out"
            )
        if generation_config.use_cache is False:
            return
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = LatentCache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False
