"""Families that transformers lacks, in its Auto classes: they open in tokensieve's class.

Families that it has stay its own: `AutoModelForCausalLM` opens them in transformers' class.
"""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tokensieve.families import FAMILIES
from tokensieve.model.causal import DecoderForCausalLM


def register() -> None:
    """Adds the families that transformers does not know yet. Importing `tokensieve.model` calls this."""
    for family in FAMILIES.values():
        if family.model_type not in CONFIG_MAPPING:
            AutoConfig.register(family.model_type, family.config)
            # transformers wants one class for each config class
            own = type(DecoderForCausalLM.__name__, (DecoderForCausalLM,), {"config_class": family.config})
            AutoModelForCausalLM.register(family.config, own)
