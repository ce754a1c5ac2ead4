"""Models in which layers share indexers: a layer without one reads the keys that the layer before it reads.

In config.json `indexer_types` says "full" or "shared" for each layer, as GLM-5.2 is published. Source: IndexCache,
arXiv 2603.12201.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from tokensieve.config import UserError
from tokensieve.families import TOP_K_BY_LAYER, ModelConfig, family_of, model_config
from tokensieve.model.causal import DecoderForCausalLM
from tokensieve.model.files import fill


def sharing_fields(fields: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, Any]:
    """The fields of a sparse config that change if its layers share indexers as `kinds` say."""
    form = family_of(fields).sharing_form
    return {"indexer_types": [*kinds]} | ({} if form is None else {"model_type": form})


def check_one_k(config: ModelConfig) -> None:
    """UserError for a model whose layers have a k of their own: layers that share an indexer have one together."""
    if getattr(config, TOP_K_BY_LAYER, None) is not None:
        raise UserError(
            f"each layer has a k of its own ({TOP_K_BY_LAYER}), and layers that share an indexer have one together; "
            "take the model before its keys were shared out"
        )


def share(model: DecoderForCausalLM, kept: Sequence[int]) -> DecoderForCausalLM:
    """The sparse model with the indexers of the layers `kept` alone; every other layer reads the keys of the layer
    before it.

    The tensors are the model's own, not copied. UserError for a dense model, and if `kept` has no 0 or names a layer
    without an indexer.
    """
    family, config = family_of(model.config), model.config
    if not family.sparse:
        raise UserError("the model is dense and has no indexers to share; make it sparse first: tokensieve sparsify")
    layers = config.num_hidden_layers
    without = sorted(layer for layer in {*kept} if not (0 <= layer < layers and family.has_indexer(config, layer)))
    if without or 0 not in kept:
        found = f"layer {without[0]} has none" if without else "the first layer must keep its own"
        raise UserError(
            f"indexers are kept in layers {sorted({*kept})}, but {found}; give layers from 0 to {layers - 1}"
        )
    check_one_k(config)
    fields = config.to_dict()
    fields |= sharing_fields(fields, ["full" if layer in kept else "shared" for layer in range(layers)])
    with torch.device("meta"):
        sharing = DecoderForCausalLM(model_config(fields))
    state = model.state_dict()
    fill(sharing, ((name, state[name]) for name in sharing.state_dict()))
    sharing.folder = getattr(model, "folder", None)
    return sharing.eval()
