"""Sparse training, stage 2: selection is on and everything trains, the model on the language-modelling loss, the indexers on equation (4).

Without selection the same command trains the dense model on the same tokens: what a sparse model is compared with.
"""

from tokensieve.config import TrainConfig
from tokensieve.model import DecoderForCausalLM
from tokensieve.train.stage import Stage, language_losses


def prepare(model: DecoderForCausalLM, config: TrainConfig) -> None:
    if config.selection:
        model.train_for("adapt")
        return
    model.train_for("none")
    model.selection = "dense"
    for parameter in model.indexer_parameters():
        parameter.requires_grad_(False)  # nothing selects: they would get no gradient


STAGE = Stage(prepare, language_losses)
