"""What transformers, vLLM and SGLang read of a checkpoint's config, and which models they cannot run."""

from typing import Any

import torch

from tokensieve.checkpoint.names import ARCHITECTURES


def export_config(config: dict[str, Any], dtype: torch.dtype, mtp: bool) -> dict[str, Any]:
    """Return the ``config.json`` that transformers, vLLM and SGLang all read: the fields of the published checkpoint.

    config: a dict of config fields; dtype: that of the tensors; mtp: whether the multi-token-prediction layer is there.
    RoPE goes back from transformers 5's ``rope_parameters`` to ``rope_theta`` and ``rope_scaling``: every one of the
    three still reads those, older ones nothing else. Derived fields go, because older readers refuse values that they
    do not know (``layer_types``); ``quantization_config`` goes, because the tensors are no longer quantized, and
    ``auto_map``, because the code that it names is not copied.
    """
    dropped = {
        "layer_types",
        "head_dim",
        "qk_head_dim",
        "quantization_config",
        "dtype",
        "auto_map",
        "transformers_version",
    }
    out: dict[str, Any] = {
        key: value for key, value in config.items() if key not in dropped and not key.startswith("_")
    }
    rope = dict(out.pop("rope_parameters", None) or {})
    if rope:
        out["rope_theta"] = rope.pop("rope_theta", out.get("rope_theta", 10000.0))
        kind = rope.pop("rope_type", rope.pop("type", "default"))
        rope.pop("type", None)
        out["rope_scaling"] = None if kind == "default" else {"type": kind, **rope}
    dense = out.get("first_k_dense_replace", 0)
    if out.get("mlp_layer_types") == _layer_kinds(out.get("num_hidden_layers", 0), dense):
        del out["mlp_layer_types"]
    out.setdefault("moe_layer_freq", 1)  # SGLang has no default for it
    if out["model_type"] != "deepseek_v2":
        # vLLM and SGLang build the correction bias only for "noaux_tc", and route by softmax unless told otherwise.
        out = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"} | out
        out["num_nextn_predict_layers"] = (out.get("num_nextn_predict_layers") or 0) if mtp else 0
    out["architectures"] = [ARCHITECTURES[out["model_type"]]]
    out["torch_dtype"] = str(dtype).removeprefix("torch.")
    return dict(sorted(out.items()))


def _layer_kinds(layers: int, dense: int) -> list[str]:
    return ["dense"] * min(dense, layers) + ["sparse"] * (layers - min(dense, layers))


def exportable(config: Any) -> list[str]:
    """Return why transformers, vLLM or SGLang cannot run a checkpoint of ``config``; an empty list when all can.

    Each reason begins with the programs it holds for. Widths are those that the sparse kernels of vLLM and SGLang are
    built for: FlashMLA (keys of 512 + 64; prefill takes selected keys 128 at a time), DeepGEMM (32 or 64 index heads of
    128), sgl-kernel's top-k (2048 alone). Source: their model files for DeepSeek V2 to V3.2 and the assertions of these
    kernels, read in 2026.
    """
    reasons, engines, everyone = [], "vLLM, SGLang: ", "transformers, vLLM, SGLang: "
    sparse = config.model_type == "deepseek_v32"
    if sparse and config.q_lora_rank is None:
        reasons.append(everyone + "the indexer reads the query latent, and this model has none (q_lora_rank is null)")
    if config.model_type != "deepseek_v2" and getattr(config, "scoring_func", "sigmoid") != "sigmoid":
        reasons.append(everyone + f"the router is sigmoid there, here it is {config.scoring_func}")
    if config.tie_word_embeddings:
        reasons.append(engines + "lm_head is a tensor of its own there, here it is tied to the embedding")
    if config.attention_bias:
        reasons.append(engines + "attention projections have no bias there (attention_bias is true)")
    if not getattr(config, "rope_interleave", True):
        who = everyone if sparse else engines
        reasons.append(
            who + "MLA rotates interleaved pairs there, here halves of the vector (rope_interleave is false)"
        )
    kinds = getattr(config, "mlp_layer_types", None)
    if kinds is not None and kinds != _layer_kinds(config.num_hidden_layers, config.first_k_dense_replace):
        reasons.append(engines + "dense layers can only come first (mlp_layer_types)")
    widths = {"index_head_dim": (128,), "index_n_heads": (32, 64), "kv_lora_rank": (512,), "qk_rope_head_dim": (64,)}
    other = [
        f"{field} {' or '.join(map(str, built))} (here {getattr(config, field)})"
        for field, built in widths.items()
        if sparse and getattr(config, field) not in built
    ]
    if other:
        reasons.append(engines + f"the sparse kernels need {', '.join(other)}")
    if sparse and config.index_topk % 128:
        reasons.append(
            f"vLLM: the sparse kernels need an index_topk that is a multiple of 128 (here {config.index_topk})"
        )
    if sparse and config.index_topk != 2048:
        reasons.append(f"SGLang: the top-k kernel needs index_topk 2048 (here {config.index_topk})")
    return reasons
