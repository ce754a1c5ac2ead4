"""Two-level selection: blocks of keys first, then keys (HISA, arXiv 2603.28458), which needs no training."""

from dataclasses import dataclass

from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.selection import SelectionContext


@dataclass(frozen=True)
class TwoLevel:
    """The top k among the keys of the best `blocks` blocks of `block` keys, by `tokensieve.ops.index_topk_blocks`.

    Of T keys it scores T / block means and block * blocks keys, instead of T. Blocks lie at positions of the pass, so
    the choice in a packed document depends on where in the pack it begins. UserError for fewer than 2 blocks, for a
    block that is not a power of two of at least 16, and for a k that the blocks cannot hold.
    """

    block: int = 128
    blocks: int = 64

    def __post_init__(self) -> None:
        if self.blocks < 2 or self.block < 16 or self.block & (self.block - 1):
            raise UserError(
                f"TwoLevel(block={self.block}, blocks={self.blocks}): a block is a power of two of at least 16 keys, "
                "and there are 2 or more"
            )

    def __call__(self, c: SelectionContext) -> Tensor:
        most = (self.blocks - 2) * self.block + 2
        if c.k > most:
            raise UserError(f"TwoLevel(block={self.block}, blocks={self.blocks}) holds {most} keys, and k is {c.k}")
        return c.topk_blocks(self.block, self.blocks)
