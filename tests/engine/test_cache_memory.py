"""The memory of the cache: taken as it is needed, and refused if there is not so much."""

import psutil
import pytest

from tests.support import servers
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig
from tokensieve.engine.runner import make_pools, page_bytes


def test_a_cache_takes_memory_as_it_is_written() -> None:
    model, _ = servers.tiny()
    pages = 2**28 // page_bytes(model)
    before = psutil.Process().memory_info().rss
    pools = make_pools(model, pages)
    assert pools.bytes > 2**27 and psutil.Process().memory_info().rss - before < 2**24
    first = pools.entries[0]
    first[pages // 2] = 1
    assert first[pages // 2].min() == 1 and first[pages // 2 - 1].max() == 0 == first[-1].max()


def test_more_pages_than_there_is_memory_for() -> None:
    model, tokenizer = servers.tiny()
    with pytest.raises(UserError, match=r"99999999999 pages .* GiB are free; choose at most \d+ pages"):
        Engine(model, tokenizer, EngineConfig(pages=99_999_999_999))
