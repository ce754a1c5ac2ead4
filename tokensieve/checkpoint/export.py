"""The config.json that transformers, vLLM and SGLang read, and the models that they cannot run."""

from typing import Any

import torch

from tokensieve.families import family_of


def export_config(config: dict[str, Any], dtype: torch.dtype, mtp: bool) -> dict[str, Any]:
    """Return the ``config.json`` that transformers, vLLM and SGLang all read: the fields of the published checkpoint.

    config: a dict of config fields; dtype: that of the tensors; mtp: whether the multi-token-prediction layer is there.
    RoPE is written as ``rope_theta`` and ``rope_scaling``, not as transformers 5's ``rope_parameters``: all three still
    read those, and older versions read nothing else. Derived fields are dropped, because older readers refuse values
    that they do not know (``layer_types``); ``quantization_config``, because the tensors are no longer quantized; and
    ``auto_map``, because the code that it names is of another model.
    """
    family = family_of(config)
    dropped = {
        "layer_types",
        *family.derived,
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
    out = family.tidy(out, mtp) | {"architectures": [family.architecture]}
    out["torch_dtype"] = str(dtype).removeprefix("torch.")
    return dict(sorted(out.items()))


def exportable(config: Any) -> list[str]:
    """Return the reasons why transformers, vLLM or SGLang cannot run a checkpoint of ``config``; none if all can.

    Each reason begins with the programs that it applies to.
    """
    return family_of(config).refusals(config)
