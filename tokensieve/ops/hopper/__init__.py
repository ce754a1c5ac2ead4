"""Attention over selected MLA entries on Hopper, in Gluon: what plain Triton cannot say is which warps do what, and when a buffer is free.

The shape is the 671B model's: one entry of 576 a token, of which the first 512 are the value, shared by any number of heads. All else
runs on the portable kernels of `tokensieve.ops.triton`. docs/kernels.md has the measurement that earned these their place.

`warps` holds what the kernels share, `forward`, `dq` and `dkv` one kernel each, `attention` and `attention_kl` the ops.
"""

from tokensieve.ops.hopper.attention import sparse_attention, sparse_attention_backward
from tokensieve.ops.hopper.attention_kl import sparse_attention_kl, sparse_attention_kl_backward

__all__ = [
    "sparse_attention",
    "sparse_attention_backward",
    "sparse_attention_kl",
    "sparse_attention_kl_backward",
]
