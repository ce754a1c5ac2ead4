"""When the entries are expanded to the keys and values of every head."""

import pytest
import torch

from tests.support.models import config, ours
from tokensieve.model import LatentCache, selecting
from tokensieve.model.mla import LatentAttention


def test_expansion_is_weighed_per_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many questions after one cached context: the entries of a row serve that row's few queries alone."""
    sparse = ours(config("v32"), seed=1).eval()
    attention = sparse.model.layers[0].self_attn
    queries = (
        attention.latent
        * (attention.nope + attention.value)
        // (2 * attention.latent - attention.nope - attention.value)
    )
    expanded: list[int] = []
    whole = LatentAttention.per_head
    monkeypatch.setattr(
        LatentAttention, "per_head", lambda *given, **named: expanded.append(1) or whole(*given, **named)
    )

    def asked(rows: int, tokens: int) -> int:
        cache = LatentCache()
        with torch.no_grad(), selecting(sparse, "dense"):
            sparse(torch.zeros(rows, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
            expanded.clear()
            sparse(torch.zeros(rows, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
        return len(expanded)

    assert asked(1, queries + 1) and not asked(4, queries // 2)
