"""The sample of a source: its lengths, what is cut, and which texts are drawn."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from tests.support import stdlib
from tokensieve.config import UserError
from tokensieve.profile.lengths import Sample, draw, read_sample
from tokensieve.tasks import PlainEncoder


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> PlainEncoder:
    return stdlib.encoder(stdlib.documents("textwrap", "typing"), tmp_path_factory.mktemp("tokenizer"), 512)


def sample(*lengths: int, whole: bool = True) -> Sample:
    return Sample(tuple((f"d{i}", np.arange(n) % 500) for i, n in enumerate(lengths)), 7, whole)


def test_figures_of_a_sample() -> None:
    found = sample(10, 90, 900, 3000).to_dict()
    assert (found["documents"], found["tokens"], found["bytes"], found["whole"]) == (4, 4000, 7, True)
    assert found["quantiles"]["0.5"] == 495 and found["quantiles"]["1"] == 3000
    assert found["tokens_past"] == {"1024": 1976 / 4000, "2048": 952 / 4000}
    histogram = found["histogram"]
    assert sum(histogram["documents"]) == 4 and sum(histogram["tokens"]) == 4000
    for begin, end, documents in zip(histogram["edges"], histogram["edges"][1:], histogram["documents"], strict=False):
        assert documents == sum(begin <= n < end for n in (10, 90, 900, 3000))
        assert end / begin == pytest.approx(2**0.5)
    assert sample(64).to_dict()["histogram"]["documents"] == [1]


def test_tokens_past_a_position() -> None:
    """A token sees more than k keys, itself among them, if k or more come before it."""
    assert sample(10).share_past(8) == 0.2 and sample(10).share_past(10) == 0


def test_a_source_is_read_up_to_a_limit(encode: PlainEncoder, tmp_path: Path) -> None:
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"line {i}\n" * 100)
    found = read_sample(str(tmp_path), encode, 1_000_000)
    assert found.whole and len(found.documents) == 6 and found.bytes == 6 * 700
    assert found.lengths.tolist() == [len(encode(f"line {i}\n" * 100)) for i in range(6)]
    part = read_sample(str(tmp_path), encode, 1500)
    assert not part.whole and len(part.documents) == 3
    (tmp_path / "rows.jsonl").write_text('{"body": "two words"}\n' * 5)
    rows = read_sample(str(tmp_path / "rows.jsonl") + "#body", encode, 20)
    assert not rows.whole and len(rows.documents) == 3


def test_texts_too_short_to_have_an_attention(encode: PlainEncoder, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="shorter than 2 tokens"):
        read_sample(str(tmp_path), encode, 1000)


def test_texts_are_drawn_by_their_tokens(encode: PlainEncoder) -> None:
    documents = sample(30, 100, 100, 400, 5)
    texts = draw(documents, encode, 9, 20, 200)
    assert sorted(map(len, texts)) == [31, 101, 101, 200]  # bos first; the last is too short, the longest cut
    assert all(text[0] == encode.bos and text[1:].tolist() == [i % 500 for i in range(len(text) - 1)] for text in texts)
    assert len(draw(documents, encode, 2, 20, 200)) == 2
    first = Counter()
    for seed in range(2000):
        named = Sample(tuple((f"{seed} {n}", np.zeros(n)) for n in (50, 100, 800)), 0, True)
        first[len(draw(named, encode, 1, 20, 201)[0])] += 1
    assert first[201] / 2000 == pytest.approx(201 / 351, abs=0.04) and first[51] / 2000 == pytest.approx(
        50 / 351, abs=0.04
    )
