"""Kimi-K2: DeepSeek-V3 under a name of its own, which the published folder explains by code that is never run.

Source: the config.json of Kimi-K2-Instruct, and the names in its index.
"""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import DeepseekV3Config

from tokensieve.families.deepseek import DeepSeek


@strict
class KimiConfig(DeepseekV3Config):
    """`kimi_k2` as published: the fields of `deepseek_v3`."""

    model_type = "kimi_k2"


class Kimi(DeepSeek):
    def refusals(self, config: Any) -> list[str]:
        reason = (
            "transformers, vLLM, SGLang: they know kimi_k2 by the code of the published folder alone, which tokensieve "
            'neither runs nor saves; write "model_type": "deepseek_v3" in config.json, for the same model'
        )
        return [reason, *super().refusals(config)]


FAMILIES = (Kimi("kimi_k2", "DeepseekV3ForCausalLM", KimiConfig, "deepseek_v32", engine_fields=()),)
