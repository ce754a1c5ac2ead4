"""FP8 blocks as DeepSeek publishes them: which tensors are stored so, and what config.json says of it.

Source: the official demo's inference/convert.py and kernel.py (blocks, names of the scales). The fields of `PUBLISHED`
and the list of tensors that stay were not compared with a published folder.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch

from tokensieve.config import UserError
from tokensieve.ops.quant import ScaleFormat, quantize_weight

PUBLISHED = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128],
}
SCALE = "_scale_inv"

# The matrices of attention, feed-forward layers and experts, and the indexer's two large ones. Norms, embedding, head,
# router, biases, the indexer's weights_proj and the MTP layer's eh_proj stay.
_MATRIX = re.compile(
    r".+\.(self_attn\.(\w+_proj(_with_mqa)?|indexer\.(wq_b|wk))|mlp\.(.+\.)?(gate|up|down|gate_up)_proj)(\.weight)?"
)


def in_blocks(name: str) -> bool:
    """Whether the published FP8 checkpoints store a tensor of this name, on disk or in memory, in blocks."""
    return _MATRIX.fullmatch(name) is not None


def quantized(
    name: str, tensor: torch.Tensor, settings: dict[str, Any] = PUBLISHED
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields what is stored of a tensor (N, K): itself, or its E4M3 values and its scales, a float32 for each block.

    settings: a `quantization_config`. With "ue8m0" the scales are powers of two. Raises UserError for a weight
    that is not finite.
    """
    if not in_blocks(name):
        yield name, tensor
        return
    rows, columns = settings["weight_block_size"]
    scale_format: ScaleFormat = "ue8m0" if settings.get("scale_fmt") == "ue8m0" else "float32"
    try:
        values, scales = quantize_weight(tensor, (rows, columns), scale_format)
    except ValueError as error:
        raise UserError(f"{name}: {error}; such a model computes nothing, so save an earlier one") from error
    yield name, values
    yield name + SCALE, scales
