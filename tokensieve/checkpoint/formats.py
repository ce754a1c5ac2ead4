"""Formats of weights that are not read, recognized by files and tensor names, so that the reason given is the reason.

Sources: the tensor names that ModelOpt (NVFP4), compressed-tensors, AutoGPTQ, AWQ and bitsandbytes write; GGUF's file
names; PEFT's file names; the fused experts of transformers 5.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from tokensieve.config import UserError

_QUANTIZED = {  # end of a tensor's name: what writes it
    ".weight_scale_2": "NVFP4 (4 bits)",
    ".weight_packed": "compressed-tensors",
    ".qweight": "GPTQ or AWQ",
    ".quant_state.bitsandbytes__nf4": "bitsandbytes",
    ".quant_state.bitsandbytes__fp4": "bitsandbytes",
    ".SCB": "bitsandbytes (8 bits)",
    ".weight_scale": "FP8 with one scale a tensor or row",
    "_blocks": "MXFP4 (4 bits)",
    ".W_q": "HQQ",
}
_FUSED = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_MODEL = re.compile(r"^(.+\.)(model\.layers|layers|lm_head|model\.embed_tokens)\.")


def refuse_quantized(names: Mapping[str, Path]) -> None:
    """Raises UserError if tensors (name -> file) are quantized in a way other than FP8 blocks.

    It goes by the tensors, since a quantization_config may be left over from other weights, or be absent.
    """
    for end, kind in _QUANTIZED.items():
        found = next((name for name in names if name.endswith(end)), None)
        if found:
            raise UserError(
                f"{names[found]}: quantized, as {found} shows ({kind}), which is not supported; "
                "use the bf16 or FP8-block weights"
            )


def refuse_renamed(folder: Path, missing: Iterable[str], present: Iterable[str]) -> None:
    """Raises UserError if the missing tensors are there under the names of another program."""
    here = set(present)
    fused = sorted(name for name in here if _FUSED.search(name))
    if fused:
        raise UserError(
            f"{folder}: the experts are fused ({fused[0]}), as transformers 5 holds them in memory; write one tensor "
            "an expert with transformers: save_pretrained(folder, save_original_format=True)"
        )
    adapter = next((name for name in here if ".lora_A." in name or ".lora_B." in name), None)
    if adapter:
        raise UserError(
            f"{folder}: holds tensors of an adapter ({adapter}); merge it first (PEFT: model.merge_and_unload()), "
            "then save"
        )
    lost = set(missing)
    if all(".indexer." in name for name in lost) and not any(".indexer." in name for name in here):
        raise UserError(
            f"{folder}: config.json is that of a sparse model, and the weights are those of a dense one, without "
            "indexers; use the config.json that belongs to them, then tokensieve sparsify"
        )
    changed = next((name for name in sorted(here) if ".parametrizations." in name), None)
    if changed:
        raise UserError(
            f"{folder}: {changed} is a part of a weight that PyTorch parametrizes; fold it into the weight first "
            "(torch.nn.utils.parametrize.remove_parametrizations), then save"
        )
    first = next(iter(missing))
    for name in sorted(here):
        prefix = _MODEL.match(name)
        if prefix and any(f"{prefix[1]}{wanted}" in here for wanted in (first, first.removeprefix("model."))):
            raise UserError(
                f"{folder}: names begin with {prefix[1]} ({name}), as in a model with other parts; write the language "
                f"model alone, with the names of its own checkpoint ({first})"
            )
    if first.startswith("model.") and first.removeprefix("model.") in here:
        raise UserError(
            f"{folder}: names lack the prefix model. ({first.removeprefix('model.')}), as a trunk saved without its "
            "head; save the whole model (AutoModelForCausalLM)"
        )
