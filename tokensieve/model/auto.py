"""Registration with transformers: its Auto classes open folders of the families that it lacks, such as `llama_dsa`.

They open them in our class. Families that transformers has, such as `deepseek_v32`, stay its own.
"""

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

from tokensieve.families import FAMILIES
from tokensieve.model.causal import DecoderForCausalLM


def register() -> None:
    """Makes these families known to `AutoConfig` and `AutoModelForCausalLM`. To repeat it changes nothing."""
    for name, family in FAMILIES.items():
        if name not in CONFIG_MAPPING:
            CONFIG_MAPPING.register(name, family.config)
            MODEL_FOR_CAUSAL_LM_MAPPING.register(family.config, DecoderForCausalLM)
