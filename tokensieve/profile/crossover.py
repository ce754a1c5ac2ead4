"""The lengths from which on sparse attention costs less than dense, index scores included, and what that saves.

Legend: c context (the keys that a query sees, itself included), k selected keys.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tokensieve import cost

LONGEST = 1 << 24  # tokens up to which a crossover is looked for
LAYOUT: cost.Layout = "bf16"  # of the caches whose bytes are counted


@dataclass(frozen=True)
class Crossover:
    """The shortest contexts, in tokens, from which on sparse costs less; None if it does not up to `LONGEST`.

    token_bytes: of cache that one more token reads. token_flops: of one more token. prompt_flops: of a whole prompt.
    """

    token_bytes: int | None
    token_flops: int | None
    prompt_flops: int | None

    @property
    def dense_below(self) -> int | None:
        """The shortest context from which on sparse is cheaper in every respect."""
        found = (self.token_bytes, self.token_flops, self.prompt_flops)
        return None if None in found else max(n for n in found if n is not None)


def crossover(shape: cost.Shape) -> Crossover:
    """The lengths for a sparse shape, against the same model without its indexer."""

    def token_bytes(c: int, sparse: bool) -> float:
        return cost.decode_cache_bytes(shape, c, LAYOUT, sparse=sparse)

    def token_flops(c: int, sparse: bool) -> float:
        return cost.forward_flops(shape, 1, c - 1, sparse=sparse)

    def prompt_flops(c: int, sparse: bool) -> float:
        return cost.forward_flops(shape, c, sparse=sparse, logits=1)

    return Crossover(*(_first_cheaper(f, shape.top_k) for f in (token_bytes, token_flops, prompt_flops)))


def _first_cheaper(needed: Callable[[int, bool], float], top_k: int) -> int | None:
    """By bisection: beyond k, dense attention's cost grows faster than sparse attention's or never does."""
    low, high = top_k, LONGEST  # sparse is not cheaper at k keys, where it reads all of them and scores them besides
    if needed(high, True) >= needed(high, False):
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if needed(middle, True) < needed(middle, False) else (middle, high)
    return high


def spent(shape: cost.Shape, lengths: Iterable[int], dense_below: int) -> dict[str, float]:
    """Costs of documents of these lengths as shares of dense attention's, if shorter ones than `dense_below` run dense.

    {"prompt_flops": of reading them, "token_bytes": of cache that is read to write them token by token}.
    """
    flops, size = {True: 0.0, False: 0.0}, {True: 0, False: 0}
    latent, index = cost.latent_bytes(shape, LAYOUT), cost.index_bytes(shape, LAYOUT)
    for n in lengths:
        for sparse in (True, False):
            selects = sparse and n >= dense_below
            flops[sparse] += cost.forward_flops(shape, n, sparse=selects, logits=1)
            size[sparse] += latent * cost.visible_keys(n, top_k=shape.top_k if selects else 0)
            if selects:
                size[sparse] += index * (cost.visible_keys(n) - cost.visible_keys(min(n, shape.top_k)))
    return {"prompt_flops": flops[True] / flops[False], "token_bytes": size[True] / size[False]}
