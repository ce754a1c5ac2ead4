"""Random weights in a published shape, and random prompts: enough to measure speed without a checkpoint."""

import random
from typing import Any

import torch

# What this takes from the model.
from tokensieve.engine.tensor_parallel import shard
from tokensieve.families import ModelConfig
from tokensieve.mesh import Mesh
from tokensieve.model import DecoderForCausalLM, fp8


def random_model(
    config: ModelConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    seed: int = 0,
    in_fp8: bool = False,
    ranks: Mesh | None = None,
) -> Any:
    """A model of this shape with drawn weights, made on the device: no checkpoint of it need exist.

    in_fp8: weights in FP8 blocks. ranks: makes this rank's part. All ranks draw the same numbers, so that the tensors
    that they share are the same.
    """
    with torch.device("meta"):
        model = DecoderForCausalLM(config).to(dtype)
        if in_fp8:
            fp8.hold(model, fp8.holdable(model, set(model.state_dict())))
    if ranks is not None:
        shard(model, ranks)
    for name, part in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith(("weights_proj.weight", "e_score_correction_bias")):
            part.data = part.data.float()
    model = model.to_empty(device=device)
    torch.manual_seed(seed)
    for module in model.modules():
        if isinstance(module, fp8.BlockLinear | fp8.BlockExperts):
            for name, x in module.named_parameters():
                _draw_blocks(x.data, name.endswith("_scale_inv"), config.initializer_range)
        else:
            model._init_weights(module)
    for buffer in model.buffers():
        buffer.zero_()
    return model.eval()


def _draw_blocks(x: torch.Tensor, is_scale: bool, std: float) -> None:
    if is_scale:
        x.fill_(std)
        return
    for matrix in (
        x.flatten(0, -3) if x.dim() > 2 else x[None]
    ):  # drawn all at once, they would take four times the room
        matrix.copy_(torch.randn(matrix.shape, device=x.device))


def random_prompts(count: int, length: int, vocabulary: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Token ids of `count` prompts of one length, none of them from the first quarter of the vocabulary."""
    draw = random.Random(seed)
    return [tuple(draw.choices(range(vocabulary // 4, vocabulary), k=length)) for _ in range(count)]
