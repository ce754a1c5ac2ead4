"""Costs of a model: parameters, floating-point operations, bytes, memory and time, as pure functions of its config.

Nothing here computes with tensors or touches a device. Sizes are in bytes (the caller converts to GiB to print them),
times in seconds.
"""

from tokensieve.cost.forward import (
    Layout,
    attention_flops_per_key,
    cache_bytes_per_token,
    decode_cache_bytes,
    decode_weight_bytes,
    forward_flops,
    index_bytes,
    index_flops_per_key,
    kv_read_fraction,
    latent_bytes,
    visible_keys,
)
from tokensieve.cost.shape import Parameters, Shape, parameters, shape_of
from tokensieve.cost.training import (
    LONGER,
    SHORTER,
    Adapters,
    Estimate,
    activation_bytes,
    duration,
    head_rows,
    phase_estimates,
    run_estimate,
    time_range,
    train_estimate,
    train_flops,
)

__all__ = [
    "Layout",
    "Shape",
    "shape_of",
    "Parameters",
    "parameters",
    "visible_keys",
    "attention_flops_per_key",
    "index_flops_per_key",
    "forward_flops",
    "latent_bytes",
    "index_bytes",
    "cache_bytes_per_token",
    "kv_read_fraction",
    "decode_cache_bytes",
    "decode_weight_bytes",
    "Adapters",
    "Estimate",
    "train_flops",
    "activation_bytes",
    "head_rows",
    "train_estimate",
    "phase_estimates",
    "run_estimate",
    "SHORTER",
    "LONGER",
    "time_range",
    "duration",
]
