"""The model and the optimizer that a run starts with."""

from pathlib import Path
from typing import Any

import torch
from transformers import DeepseekV3Config

from tokensieve import checkpoint
from tokensieve.config import TrainConfig, UserError
from tokensieve.families import model_config
from tokensieve.model import DecoderForCausalLM, load, model_path
from tokensieve.train import pretrain
from tokensieve.train.parallelize import mesh_of


def start(config: TrainConfig, model: DecoderForCausalLM | None) -> DecoderForCausalLM:
    """The model that a run trains from its first step on, on the CPU unless it is the caller's.

    UserError for a caller's whose parameters are narrower than float32: a step would change few of them, and round its
    moments.
    """
    if model is not None:
        wide = torch.float32, torch.float64
        rounded = ((name, p.dtype) for name, p in model.named_parameters() if p.dtype not in wide)
        for name, dtype in rounded:
            raise UserError(
                f"{name} is {str(dtype).removeprefix('torch.')}, and training keeps all parameters in float32; load "
                "the model with dtype=torch.float32"
            )
        return model
    if config.stage == "pretrain" and config.shape and config.model:
        return load(config.model, torch.float32, config=pretrain.extended_config(config))
    if config.stage == "pretrain" and config.shape:
        model = pretrain.new_model(config)
        model.folder = model_path(config.data.tokenizer)
        return model
    return load(config.model, torch.float32)


def starting_config(config: TrainConfig, model: DecoderForCausalLM | None, resumed: Path | None) -> Any:
    """The config of the model that a run will train, before it is loaded or made. resumed: its checkpoint, if any."""
    if model is not None and resumed is None:
        return model.config
    if resumed is None and not config.model:
        return DeepseekV3Config(**config.shape)
    if resumed is None and config.stage == "pretrain" and config.shape:
        return pretrain.extended_config(config)
    return model_config(checkpoint.read_config(resumed or model_path(config.model)))


def check_positions(config: TrainConfig, model: DecoderForCausalLM) -> None:
    """UserError if a phase has longer sequences than the model has positions."""
    longest = max(p.context for p in config.phases)
    if longest > model.config.max_position_embeddings:
        raise UserError(
            f"phases.context {longest} is past the model's {model.config.max_position_embeddings} positions; "
            "shorten it or choose another model"
        )


def make_optimizer(config: TrainConfig, model: DecoderForCausalLM, device: torch.device) -> torch.optim.AdamW:
    """AdamW over the parameters that learn, in groups by peak learning rate and weight decay."""
    o = config.optimizer
    indexers = {id(p) for p in model.indexer_parameters()}
    groups: dict[tuple[float, float, Any], list] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            peak = o.indexer_lr if id(parameter) in indexers and o.indexer_lr is not None else o.lr
            decay = o.weight_decay if parameter.dim() > 1 else 0.0
            groups.setdefault((peak, decay, mesh_of(parameter)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": p, "lr": peak, "peak": peak, "weight_decay": decay} for (peak, decay, _), p in groups.items()],
        betas=(o.beta1, o.beta2),
        eps=o.eps,
        fused=device.type == "cuda",
    )
