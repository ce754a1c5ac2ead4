"""Why vLLM or SGLang could not serve a checkpoint folder: its config, tensors, quantization, tokenizer and split.

It is also a reason if an engine would misread what is stored and go on, because it would then answer wrongly.
Sources, read in 2026: vLLM's models/deepseek_v2.py and quantization/fp8.py, SGLang's models/deepseek_v2.py and
configs/model_config.py.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokensieve.checkpoint import Header, expected_tensors
from tokensieve.config import UserError
from tokensieve.families import ModelConfig, family_of
from tokensieve.model import check_tokenizer, load_tokenizer
from tokensieve.tasks.turns import render

FP8_BLOCK = 128  # rows and columns that share a scale: the only size that their kernels are built for

_QUANTIZED = re.compile(r"(?<!weights)_proj(_with_mqa)?\.weight$|\.indexer\.w(q_b|k)\.weight$")
_SCALE = "_scale_inv"


def config_reasons(raw: Mapping[str, Any]) -> list[str]:
    """Reasons in config.json: fields that both engines read are missing, or name another model."""
    family, reasons = family_of(raw), []
    missing = [field for field in family.engine_fields if field not in raw]
    if missing:
        remedy = "write the checkpoint again with tokensieve.save"
        reasons.append(f"config.json lacks {', '.join(missing)}, which the engines read by that name; {remedy}")
    named = (raw.get("architectures") or [None])[0]
    if named != family.architecture:
        reasons.append(
            f"config.json: architectures names {named}, which engines go by; it must be {family.architecture}"
        )
    if "topk_method" in family.engine_fields and raw.get("topk_method", "noaux_tc") != "noaux_tc":
        reasons.append(
            f"config.json: topk_method is {raw['topk_method']}, and the router's correction bias is read with noaux_tc"
        )
    return reasons


def tensor_reasons(
    folder: Path, raw: Mapping[str, Any], config: ModelConfig, headers: Mapping[str, Header]
) -> list[str]:
    """Reasons in the tensors: files outside of the folder, and FP8 or float32 scales not as engines expect them."""
    reasons = []
    outside = sorted(str(file) for file in {h.file for h in headers.values()} if file.parent != folder)
    if outside:
        reasons.append(
            f"tensors lie outside of the folder, in {', '.join(outside)}, where engines do not look; "
            "write it whole: tokensieve.save(tokensieve.load(FOLDER), NEW)"
        )
    quantization = raw.get("quantization_config")
    stored = {name: headers[name].dtype for name in expected_tensors(config)}
    if not quantization:
        eights = [name for name, dtype in stored.items() if dtype == "F8_E4M3"]
        if eights:
            reasons.append(f"{_are(eights)} FP8, but config.json has no quantization_config; copy that of the original")
        return reasons
    for field, value in (("weight_block_size", [FP8_BLOCK, FP8_BLOCK]), ("activation_scheme", "dynamic")):
        if quantization.get(field) != value:
            reasons.append(
                f"config.json: the quantization_config's {field} is {quantization.get(field)}; "
                f"the engines' FP8 blocks need {value}"
            )
    wrong = [name for name, dtype in stored.items() if (dtype == "F8_E4M3") != bool(_QUANTIZED.search(name))]
    if wrong:
        reasons.append(
            f"{_are(wrong)} {stored[wrong[0]]}: with a quantization_config engines read FP8 in all linear layers and "
            "nowhere else; quantize all of them, or save the checkpoint without (tokensieve.save)"
        )
    scales = [name for name, h in headers.items() if name.endswith(_SCALE) and h.dtype != "F32"]
    if scales:
        reasons.append(f"{_are(scales)} {headers[scales[0]].dtype}: the scales of FP8 blocks are read as float32")
    return reasons


def split_reasons(raw: Mapping[str, Any], config: ModelConfig, gpus: int, attention_parts: int) -> list[str]:
    """Reasons in the split: heads or feed-forward widths do not divide among the devices, or not into whole FP8 blocks.

    attention_parts: devices that the heads are divided among; 1 if each device attends for requests of its own.
    """
    unit = FP8_BLOCK if raw.get("quantization_config") else 1
    widths = {"moe_intermediate_size": (config.moe_intermediate_size, gpus)}
    if config.first_k_dense_replace:
        widths["intermediate_size"] = config.intermediate_size, gpus
    heads, nope, rope, value = (
        config.num_attention_heads,
        config.qk_nope_head_dim,
        config.qk_rope_head_dim,
        config.v_head_dim,
    )
    if unit > 1 and attention_parts > 1:  # a single device does not cut these, and their last block may be smaller
        for name, width in (("q_b_proj", nope + rope), ("kv_b_proj", nope + value), ("o_proj", value)):
            widths[f"the heads' width in {name}"] = heads * width, attention_parts
    reasons = [
        f"{name} is {width}, which does not split into {parts} parts" + f" of whole FP8 blocks of {unit}" * (unit > 1)
        for name, (width, parts) in widths.items()
        if width % (parts * unit)
    ]
    if heads % attention_parts:
        reasons.append(f"num_attention_heads is {heads}, which does not split into {attention_parts} parts")
    return [f"{reason}; choose another --gpus" for reason in reasons]


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer has a chat template. False if it cannot be read, which is a reason of its own."""
    try:
        return load_tokenizer(folder).chat_template is not None
    except UserError:
        return False


def tokenizer_reasons(folder: Path, config: ModelConfig) -> list[str]:
    """Reasons in the tokenizer: transformers cannot read it, or its chat template is missing or renders no message.

    DeepSeek-V3.2 is published without one; both engines bring its encoder.
    """
    try:
        tokenizer = load_tokenizer(folder)
        check_tokenizer(tokenizer, config)
    except UserError as error:
        return [str(error)]
    if tokenizer.chat_template is None:
        if family_of(config).engines_encode_chat:
            return []
        return [
            f"{folder}: no chat template, without which nobody can chat; copy the original's chat_template.jinja, or "
            "chat_template in its tokenizer_config.json"
        ]
    try:
        render(tokenizer, [{"role": "user", "content": "Hello"}], add_generation_prompt=True)
    except UserError as error:
        return [f"{folder}: the chat template does not render a message; copy the original's again ({error})"]
    return []


def _are(names: list[str]) -> str:
    """'a is', 'a and 3 more are'."""
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
