"""A batch in the ops' form: one packed axis of tokens, and for every token the range of keys that it may see.

Legend: B rows, S tokens a row, N = B * S packed tokens, T packed keys.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.model.positions import check_positions


class Past(Protocol):
    """The part of a cache that a pack reads; `make_pack` sets its `row_starts`."""

    row_starts: Tensor | None  # (B, 1) int32, first key of each row's current document; None: every row's first key

    def get_seq_length(self) -> int: ...

    def room_for(self, tokens: int) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Pack:
    batch: int  # rows
    length: int  # tokens per row
    positions_N: Tensor  # int64, position within the document, for RoPE
    starts_N: Tensor  # int32, first visible key on the packed key axis
    ends_N: Tensor  # int32, one past the last visible key; start == end for padding
    row_keys: int  # distance on the key axis between one row's first key and the next row's
    max_keys: int  # no query sees more keys than this
    bounds: Tensor | None  # int32 cumulative lengths if every document is whole, or a prompt's part with all before it
    longest: int  # no document has more tokens than this
    valid_N: Tensor | None  # bool, False for padding; None if nothing is padded

    @property
    def valid_count(self) -> Tensor | int:
        return self.positions_N.shape[0] if self.valid_N is None else self.valid_N.sum()


def make_pack(
    batch: int,
    length: int,
    device: torch.device,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    cache: Past | None,
    max_positions: int,
) -> Pack:
    """Key ranges from the arguments of Hugging Face callers.

    `position_ids` (B or 1, S) that do not continue by one begin a new document, whose tokens see only each other.
    `attention_mask` (B, past + S) marks padding with 0 at either end of a row. Past tokens come from the cache.
    UserError for a mask with a hole in the middle, for an empty input, and for one past `max_positions`.
    """
    past = 0 if cache is None else cache.get_seq_length()
    if length == 0:
        raise UserError("the input holds no token; give at least one")
    what = f"a sequence of {past + length} tokens is"
    check_positions(max_positions, past + length, what, "shorten it or extend the model with YaRN")
    mask = _padding(attention_mask, batch, past + length)
    row_starts = None if cache is None else cache.row_starts
    row_keys = length if cache is None else cache.room_for(length)
    offset = torch.arange(batch, device=device, dtype=torch.int32)[:, None] * row_keys
    index = torch.arange(past, past + length, device=device, dtype=torch.int32).expand(batch, length)
    positions = _positions(index, position_ids, mask, row_starts)
    ends = index + 1
    bounds, longest, valid = None, length, None
    # Fused kernels need queries and keys on the same axis: nothing cached before, and no room between the rows.
    same_axis = past == 0 and (cache is None or batch == 1)
    if position_ids is None and mask is None and row_starts is None:
        starts = torch.zeros_like(index)
        bounds = torch.arange(0, (batch + 1) * length, length, device=device, dtype=torch.int32) if same_axis else None
    else:
        begins = _beginnings(positions, mask, past)
        first = torch.zeros(batch, 1, dtype=torch.int32, device=device) if row_starts is None else row_starts
        starts = torch.where(begins, index, first).cummax(1).values
        if mask is not None:
            valid = mask[:, -length:]
            starts = torch.where(valid, starts, ends)
            valid = valid.flatten()
        elif past == 0:  # then a document is no longer than the distance between two beginnings
            edges = begins.flatten().nonzero().flatten().to(torch.int32)
            edges = torch.cat((edges, edges.new_full((1,), batch * length)))
            longest = int(edges.diff().max())
            bounds = edges if same_axis else None
        if cache is not None:
            cache.row_starts = starts[:, -1:]
    return Pack(
        batch=batch,
        length=length,
        positions_N=positions.flatten(),
        starts_N=(starts + offset).flatten(),
        ends_N=(ends + offset).flatten(),
        row_keys=row_keys,
        max_keys=longest if past == 0 else past + length,
        bounds=bounds,
        longest=longest,
        valid_N=valid,
    )


def _padding(attention_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """The mask (B, tokens) as bool, past tokens included; None if nothing is padded."""
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UserError(
            "attention_mask must be (batch, tokens) of 0 and 1; packed documents are given by position_ids that restart"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    if attention_mask.shape[1] < tokens:
        raise UserError(f"attention_mask covers {attention_mask.shape[1]} tokens of {tokens}; cached ones count")
    mask = attention_mask[:, -tokens:].bool()
    if bool((mask.int().diff(dim=1, prepend=mask.new_zeros(batch, 1).int()) == 1).sum(1).gt(1).any()):
        raise UserError("attention_mask has a hole: padding must lie at the ends of a row")
    return mask


def _positions(index_BS: Tensor, position_ids: Tensor | None, mask: Tensor | None, row_starts: Tensor | None) -> Tensor:
    """Positions (B, S) int64: as given, else counted from the row's own beginning, as for the cached tokens."""
    if position_ids is not None:
        return position_ids.to(torch.long).expand(index_BS.shape)
    if mask is not None:
        return (mask.long().cumsum(1) - 1).clamp_min(0)[:, -index_BS.shape[1] :]
    return index_BS.long() if row_starts is None else index_BS.long() - row_starts


def _beginnings(positions_BS: Tensor, mask: Tensor | None, past: int) -> Tensor:
    """(B, S) bool, True for a document's first token: positions do not continue by one there, or a row begins."""
    begins = torch.zeros_like(positions_BS, dtype=torch.bool)
    begins[:, 0] = positions_BS[:, 0] == 0 if past else True
    begins[:, 1:] = positions_BS[:, 1:] != positions_BS[:, :-1] + 1
    if mask is not None:
        # A row begins at its first token that is not padding, whatever its position ids.
        previous = torch.cat((mask.new_zeros(mask.shape[0], 1), mask[:, :-1]), dim=1)
        begins |= (mask & ~previous)[:, -positions_BS.shape[1] :]
    return begins
