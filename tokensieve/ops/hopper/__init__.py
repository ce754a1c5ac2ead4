"""Kernels for Hopper in Gluon: in plain Triton one cannot say which warps do what, and when a buffer is free.

Attention over selected entries: one entry of 576 a token, of which the first 512 are the value, shared by any number of
heads, in memory or on quantized pages, as in the 671B model; and grouped queries with keys and values 64 or 128 wide.
Index scores: E4M3 queries and keys of 128, a power of two of heads. All else runs on the portable kernels of
`tokensieve.ops.triton`. docs/kernels.md has the measurements that earned these their place.

`warps` holds what the kernels share, `forward`, `dq` and `dkv` one kernel each, `attention` and `attention_kl` the ops
made of them, `index` the scores and the ops on them, `decode` the op on pages. `folded` makes one query of several with
few heads. `unions` takes the wide blocks of grouped queries, with the kernels `union_forward` and `union_backward`,
which share `union_rows`. `selected` chooses among them by the shape.

A block is of queries (or heads) that a program holds together, a tile of keys that a product takes at once. Queries are
folded if those of a block lie as the heads of one.

`backend` is the module that dispatch imports, and `limits` says what it can run. Neither this file nor `limits` imports
Triton: it is not on every machine.
"""
