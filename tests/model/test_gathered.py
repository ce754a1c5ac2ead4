"""The division of a row's tokens over the ranks of a context."""

import pytest
import torch

from tests.support.training import batch, model
from tokensieve.config import UserError
from tokensieve.model import ForwardOptions, LatentCache
from tokensieve.model.gathered import ContextGroup
from tokensieve.model.pack import make_pack


@pytest.mark.parametrize(("length", "ranks", "chunk"), [(2048, 4, 128), (48, 2, 128), (48, 2, 48), (66, 3, 128)])
def test_each_token_belongs_to_one_rank(length: int, ranks: int, chunk: int) -> None:
    rows = torch.arange(2 * length).view(2, length)
    own = [ContextGroup(rank, ranks, None, chunk).own(rows) for rank in range(ranks)]
    assert torch.cat(own, 1).sort(1).values.equal(rows)
    for tokens in own:
        assert tokens.shape == (2, length // ranks) and tokens.diff(dim=1).gt(0).all()
    # In a causal row the pairs of a turn have the same number of keys before them, whichever rank has them.
    assert len({int(tokens.sum()) for tokens in own}) == 1


def test_chunks_hold_whole_blocks_of_queries() -> None:
    tokens = ContextGroup(1, 2, None, 192).own(torch.arange(4 * 96)[None])[0]  # 96 divides both 192 and the quarter
    assert tokens.tolist() == [*range(96, 288)]


def test_queries_keep_their_ranges() -> None:
    inputs = batch(2, 48, documents=True)
    whole = make_pack(2, 48, torch.device("cpu"), inputs["position_ids"], None, None, 256)
    for rank in range(2):
        group = ContextGroup(rank, 2, None)
        own, token = group.own_queries(whole), group.own(torch.arange(96).view(2, 48)).flatten()
        assert own.starts_N.equal(whole.starts_N[token]) and own.ends_N.equal(whole.ends_N[token])
        assert own.ends_N.equal(token.int() + 1) and own.positions_N.equal(whole.positions_N[token])
        assert (own.length, own.row_keys, own.max_keys, own.bounds) == (24, 48, whole.max_keys, None)


def test_what_cannot_be_divided() -> None:
    with pytest.raises(UserError, match="a row of 6 tokens does not divide into 4 chunks"):
        ContextGroup(0, 2, None).own(torch.zeros(1, 6))
    with pytest.raises(ValueError, match="not cached"):
        model().model(
            torch.ones(1, 8, dtype=torch.long),
            past_key_values=LatentCache(),
            options=ForwardOptions(context=ContextGroup(0, 2, None)),
        )
