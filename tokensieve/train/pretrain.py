"""Pretraining of a small dense model: cross-entropy, with the expert load balanced by the router's correction bias.

It begins with a new model, or goes on with one that is there, whose positions it may extend.
"""

import torch
from transformers import DeepseekV3Config

from tokensieve import checkpoint
from tokensieve.config import TrainConfig, UserError
from tokensieve.families import ModelConfig, model_config
from tokensieve.model import DecoderForCausalLM, model_path
from tokensieve.model.moe import Router
from tokensieve.train.stage import Stage, language_losses


def new_model(config: TrainConfig) -> DecoderForCausalLM:
    """A freshly initialized dense model of the shape in `config.shape`; weights from `config.seed`."""
    if not config.shape:
        raise UserError("pretrain makes a new model: give its shape in a [shape] table of the config file")
    known = set(DeepseekV3Config().to_dict())
    for name in config.shape:
        if name not in known:
            raise UserError(
                f"config shape: unknown key {name}; known keys are the fields of transformers' DeepseekV3Config"
            )
    torch.manual_seed(config.seed)
    model = DecoderForCausalLM(DeepseekV3Config(num_nextn_predict_layers=0, **config.shape))
    # Residual outputs start smaller with depth, so that the first steps are stable at a high learning rate.
    smaller = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(smaller)
    return model


POSITIONS = ("max_position_embeddings", "rope_parameters")  # fields that no tensor's size depends on


def extended_config(config: TrainConfig) -> ModelConfig:
    """The config of the model `config.model` with other positions: those in `config.shape`, the rest as it was.

    Raises:
        UserError: the shape names fields of anything else.
    """
    for name in config.shape:
        if name not in POSITIONS:
            raise UserError(
                f"config shape: {name} cannot change, since the run goes on with model {config.model}; "
                f"give {' and '.join(POSITIONS)} alone, or no model"
            )
    fields = model_config(checkpoint.read_config(model_path(config.model))).to_dict()
    rope = (fields.get("rope_parameters") or {}) | config.shape.get("rope_parameters", {})
    return model_config(fields | config.shape | {"rope_parameters": rope})


def routers(model: DecoderForCausalLM) -> list[Router]:
    return [m for m in model.modules() if isinstance(m, Router)]


@torch.no_grad()
def balance(model: DecoderForCausalLM, config: TrainConfig, loads: tuple[torch.Tensor, ...]) -> None:
    """Moves each expert's bias by `balance_rate` towards even load: up if it got fewer tokens than the mean, else down.

    An expert with the mean load keeps its bias. A softmax router has no biases. loads: per router, the number of tokens
    sent to each expert (E) in the step. Source: DeepSeek-V3 report, section 2.1.2, auxiliary-loss-free load balancing.
    """
    for router, load_E in zip(routers(model), loads, strict=True):
        if router.softmax:
            continue
        load = load_E.float()
        router.e_score_correction_bias += config.balance_rate * torch.sign(load.mean() - load)


STAGE = Stage(lambda config: "none", lambda config: "all", language_losses, balance)
