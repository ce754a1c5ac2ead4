"""Small GGUF files, written with llama.cpp's own package as its conversion writes them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.support.models import randomize

NORMAL, CONTROL = 1, 3  # types of tokens
ARCHITECTURES = {
    "llama": MODEL_ARCH.LLAMA,
    "qwen2": MODEL_ARCH.QWEN2,
    "qwen3": MODEL_ARCH.QWEN3,
    "qwen3_moe": MODEL_ARCH.QWEN3MOE,
}


def llama(vocab_size: int, **changes: Any) -> LlamaForCausalLM:
    """A random model whose rows are whole blocks of 32."""
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
    config = LlamaConfig(**(shape | {"vocab_size": vocab_size, "tie_word_embeddings": True} | changes))
    return randomize(LlamaForCausalLM(config), 3)


def _permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """The rows of q_proj and k_proj as llama.cpp stores them: neighbours form the rotated pairs."""
    return weight.reshape(heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def _apart(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused gate and up rows of experts as two tensors."""
    halves: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if name.endswith("experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            halves |= {name.replace("gate_up_proj", kind): x for kind, x in (("gate_proj", gate), ("up_proj", up))}
        else:
            halves[name] = tensor
    return halves


def _fused(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    gates = {n: x for n, x in state.items() if n.endswith("experts.gate_proj")}
    whole = {n: x for n, x in state.items() if not n.endswith(("experts.gate_proj", "experts.up_proj"))}
    return whole | {
        n.replace("gate_proj", "gate_up_proj"): torch.cat((x, state[n.replace("gate_proj", "up_proj")]), 1)
        for n, x in gates.items()
    }


def write(
    path: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    architecture: str = "",
    **metadata: Any,
) -> dict[str, torch.Tensor]:
    """Writes the file. Returns its weights as they read back, under the model's names."""
    config, own = model.config, ARCHITECTURES[model.config.model_type]
    writer = GGUFWriter(path, architecture or MODEL_ARCH_NAMES[own])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type({"F32": 0, "F16": 1, "Q4_1": 3, "Q8_0": 7}[kind.name])
    if config.model_type != "qwen2":
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if config.model_type == "qwen3_moe":
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    for key, value in metadata.items():
        writer.add_key_value(key.replace("__", "."), value, _type_of(value))
    _add_tokenizer(writer, tokenizer)
    names = get_tensor_name_map(own, config.num_hidden_layers)
    permuted = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    read: dict[str, torch.Tensor] = {}
    for name, tensor in _apart(model.state_dict()).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        data = tensor.float().numpy()
        heads = permuted.get(name.split(".")[-2]) if own == MODEL_ARCH.LLAMA else None
        stored = data if heads is None else _permuted(data, heads)
        form = kind if data.ndim >= 2 else GGMLQuantizationType.F32
        values = quants.quantize(np.ascontiguousarray(stored), form)
        back = torch.from_numpy(quants.dequantize(values, form).reshape(data.shape))
        if heads is not None:
            back = back.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(back.shape)
        read[name] = back
        named = name if name.endswith((".weight", ".bias")) else f"{name}.weight"
        writer.add_tensor(names.get_name(named, (".weight", ".bias")), values, raw_dtype=form)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return _fused(read)


def _type_of(value: Any) -> Any:
    from gguf import GGUFValueType

    kinds = {str: GGUFValueType.STRING, float: GGUFValueType.FLOAT32, int: GGUFValueType.UINT32}
    return kinds[type(value)]


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerFast) -> None:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    tokens = [token for token, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if number in added else NORMAL for number in range(len(tokens))])
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
