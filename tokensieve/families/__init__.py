"""The families of models that tokensieve knows: a table of rows, and the look-up of a config's row.

To add a family, write its rows, dense and sparse: in `grouped.py` if it has grouped keys and values, else in a file
beside it with the abstract methods of `Family` and a config class of the sparse form. If no class of `tokensieve.model`
attends as it does, that class is a second file.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from tokensieve.config import UserError
from tokensieve.families import deepseek, glm, grouped, kimi
from tokensieve.families.deepseek import SparseConfig
from tokensieve.families.family import TOP_K_BY_LAYER, AttentionCost, Entry, Experts, Family
from tokensieve.families.published import PUBLISHED
from tokensieve.families.rope_fields import check_rope
from tokensieve.families.unsupported import refusal
from tokensieve.integers import LARGEST, is_too_large

__all__ = [
    "FAMILIES",
    "TOP_K_BY_LAYER",
    "AttentionCost",
    "Entry",
    "Experts",
    "Family",
    "ModelConfig",
    "SparseConfig",
    "family_of",
    "is_sparse",
    "model_config",
    "published_config",
]

ModelConfig: TypeAlias = PreTrainedConfig  # of any family

MOST_LAYERS = 2**16  # config classes make lists of them

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {row.model_type: row for row in (*deepseek.FAMILIES, *kimi.FAMILIES, *glm.FAMILIES, *grouped.FAMILIES)}
)


def family_of(config: Any, where: str = "config.json") -> Family:
    """The row of a config object, or of the fields of a config.json. UserError for a model_type without a row."""
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    if kind not in FAMILIES:
        raise UserError(f"{where}: {refusal(config, kind, FAMILIES)}")
    return FAMILIES[str(kind)]


def is_sparse(config: Any) -> bool:
    """Whether a model of this config has indexers."""
    return family_of(config).sparse


def published_config(model_type: str, **changes: Any) -> ModelConfig:
    """The config of the published model that a model_type stands for, with some keys changed: one of `PUBLISHED`, or
    the config class's own sizes.

    Grouped keys and values have indexers as `sparsify --index-heads 16` makes them.
    """
    return FAMILIES[model_type].config(**PUBLISHED.get(model_type.removesuffix("_dsa"), {}) | changes)


def model_config(raw: dict[str, Any]) -> Any:
    """A config object from the contents of a config.json.

    Both forms are read, the published one (rope_scaling) and that of transformers 5 (rope_parameters). UserError for an
    unknown family, and for a field with an unsuitable value.
    """
    family = family_of(raw)
    for name, value in raw.items():
        if is_too_large(value) or (name == "num_hidden_layers" and isinstance(value, int) and value > MOST_LAYERS):
            most = MOST_LAYERS if name == "num_hidden_layers" else LARGEST
            raise UserError(f"config.json: {name} is beyond {most}; correct the field in the checkpoint's config.json")
    for name in ("rope_scaling", "rope_parameters"):  # before transformers, whose complaints name no remedy
        check_rope(name, raw.get(name))
    try:
        config = family.config.from_dict({k: v for k, v in family.readable(raw).items() if k != "quantization_config"})
    except (TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"config.json: {' '.join(str(error).split())}; correct the field in the checkpoint's config.json"
        ) from error
    if getattr(config, "mlp_bias", False) and not family.mlp_bias(config):
        raise UserError(
            "config.json: mlp_bias is not supported; "
            "no published model of this family has biases in its feed-forward layers"
        )
    topk = getattr(config, "index_topk", 1)
    if topk < 1:
        raise UserError(f"config.json: index_topk is {topk}; the number of selected keys must be at least 1")
    return config
