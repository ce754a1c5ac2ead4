"""A batch as the ops see it: one packed axis of tokens, and for every token the range of keys that it may see.

Legend: B rows, S tokens a row, N = B * S packed tokens, T packed keys.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.cache import LatentCache


@dataclass(frozen=True)
class Pack:
    batch: int  # rows
    length: int  # tokens per row
    positions_N: Tensor  # int64, position within the document, for RoPE
    starts_N: Tensor  # int32, first visible key on the packed key axis
    ends_N: Tensor  # int32, one past the last visible key; start == end for padding
    row_keys: int  # distance on the key axis between one row's first key and the next row's
    max_keys: int  # no query sees more keys than this
    bounds: Tensor | None  # int32 cumulative document lengths when the batch is a causal pack of whole documents
    longest: int  # tokens of the longest document, at least
    valid_N: Tensor | None  # bool, False for padding; None when nothing is padded

    @property
    def valid_count(self) -> Tensor | int:
        return self.positions_N.shape[0] if self.valid_N is None else self.valid_N.sum()


def make_pack(
    batch: int,
    length: int,
    device: torch.device,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: LatentCache | None,
    max_positions: int,
) -> Pack:
    """Key ranges from what Hugging Face callers pass.

    `position_ids` (B or 1, S) that do not continue by one begin a new document, whose tokens see only each other. `attention_mask`
    (B, past + S) marks padding with 0 on either side; a hole in the middle raises. Past tokens come from the cache.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if length == 0:
        raise UserError("the input holds no token; give at least one")
    if past + length > max_positions:
        raise UserError(
            f"a sequence of {past + length} tokens is past the model's {max_positions} positions; shorten it or extend the model with YaRN"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(
            "attention_mask must be (batch, tokens) of 0 and 1; packed documents are given by position_ids that restart"
        )
    mask = None
    if attention_mask is not None and not bool(attention_mask.all()):
        if attention_mask.shape[1] < past + length:
            raise UserError(
                f"attention_mask covers {attention_mask.shape[1]} tokens of {past + length}; cached ones count"
            )
        mask = attention_mask[:, -(past + length) :].bool()
        if bool((mask.int().diff(dim=1, prepend=mask.new_zeros(batch, 1).int()) == 1).sum(1).gt(1).any()):
            raise UserError("attention_mask has a hole: padding must lie at the ends of a row")
    if position_ids is None:
        if mask is None:
            positions = torch.arange(past, past + length, device=device).expand(batch, length)
            if (
                cache is not None and cache.row_starts is not None
            ):  # counted from the row's own beginning, as what is cached was
                positions = positions - cache.row_starts
        else:
            positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    else:
        positions = position_ids.to(torch.long).expand(batch, length)

    row_keys = length if cache is None else cache.room_for(length)
    offset = torch.arange(batch, device=device, dtype=torch.int32)[:, None] * row_keys
    index = torch.arange(past, past + length, device=device, dtype=torch.int32).expand(batch, length)
    ends = index + 1
    plain = position_ids is None and mask is None and (cache is None or cache.row_starts is None)
    bounds, longest, valid = None, length, None
    # Fused kernels want queries and keys on the same axis: nothing cached before, and no room between the rows.
    same_axis = past == 0 and (cache is None or batch == 1)
    if plain:
        starts = torch.zeros_like(index)
        bounds = torch.arange(0, (batch + 1) * length, length, device=device, dtype=torch.int32) if same_axis else None
    else:
        first = torch.zeros(batch, 1, dtype=torch.int32, device=device)
        if cache is not None and cache.row_starts is not None:
            first = cache.row_starts
        begins = torch.zeros(batch, length, dtype=torch.bool, device=device)
        begins[:, 0] = positions[:, 0] == 0 if past else True
        begins[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
        if mask is not None:
            # A row's own start is its first token that is not padding, wherever its position ids begin.
            own = torch.cat((mask.new_zeros(batch, 1), mask[:, :-1]), dim=1)
            begins |= (mask & ~own)[:, -length:]
        starts = torch.where(begins, index, first).cummax(1).values
        if mask is not None:
            valid = mask[:, -length:]
            starts = torch.where(valid, starts, ends)
            valid = valid.flatten()
        if past == 0:  # then a document is no longer than the distance between two beginnings
            edges = begins.flatten().nonzero().flatten().to(torch.int32)
            if mask is None:
                edges = torch.cat((edges, edges.new_full((1,), batch * length)))
                longest = int(edges.diff().max())
                bounds = edges if same_axis else None
        if cache is not None:
            cache.row_starts = starts[:, -1:]
    max_keys = longest if past == 0 else past + length
    return Pack(
        batch,
        length,
        positions.flatten(),
        (starts + offset).flatten(),
        (ends + offset).flatten(),
        row_keys,
        max_keys,
        bounds,
        longest,
        valid,
    )
