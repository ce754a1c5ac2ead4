"""Portable Triton kernels: the ops on GPUs, and in Triton's interpreter, which checks them if there is no GPU.

A file holds one family: `index` (scores, equation (1), and their gradients), `topk` (the selection, equation (2)),
`attention` (over selected entries), `attention_kl` (the same with the KL of equation (4)), `masked` (over all keys,
everything but the selection masked), `loss` (the warm-up's KL, equation (3)), `linear` (products with FP8 weights); on
caches in pages `queries`, `paged_index`, `paged_attention`, `paged_write` and, for FlashMLA and the Hopper kernel,
`paged_places`.

A block is of queries (or heads) that a program holds together, a tile of keys that a product takes at once.

`backend` is the module that dispatch imports, and `limits` says what it can run. Neither this file nor `limits` imports
Triton: it is not on every machine.
"""
