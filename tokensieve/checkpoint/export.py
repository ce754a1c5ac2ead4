"""What transformers, vLLM and SGLang read of a checkpoint's config, and which models they cannot run."""

from typing import Any

import torch

from tokensieve.families import family_of


def export_config(config: dict[str, Any], dtype: torch.dtype, mtp: bool) -> dict[str, Any]:
    """Return the ``config.json`` that transformers, vLLM and SGLang all read: the fields of the published checkpoint.

    config: a dict of config fields; dtype: that of the tensors; mtp: whether the multi-token-prediction layer is there.
    RoPE goes back from transformers 5's ``rope_parameters`` to ``rope_theta`` and ``rope_scaling``: every one of the
    three still reads those, older ones nothing else. Derived fields go, because older readers refuse values that they
    do not know (``layer_types``); ``quantization_config`` goes, because the tensors are no longer quantized, and
    ``auto_map``, because the code that it names is not copied.
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
    """Return why transformers, vLLM or SGLang cannot run a checkpoint of ``config``; an empty list when all can.

    Each reason begins with the programs it holds for.
    """
    return family_of(config).refusals(config)
