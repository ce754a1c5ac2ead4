"""Estimates of the parts of post-training: from a timed row at first, then from the parts that are done."""

import pytest

from tests.support.models import config, ours
from tokensieve.config import load_config
from tokensieve.posttrain.pace import Pace, Work
from tokensieve.posttrain_config import PosttrainConfig
from tokensieve.train import estimate


def test_what_parts_took_replaces_the_timed_row() -> None:
    settings = load_config(PosttrainConfig, "posttrain-tiny", ("tokens=48", "new_tokens=16", "device=cpu"))
    pace = Pace(ours(config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=1)), settings)
    trained, mixed = Work(trained=4), Work(trained=2, read=3, answers=5)
    timed = pace.of(trained, 1)
    assert timed.seconds > 0 and timed.tokens == 4 * 64
    share = pace.of(mixed, 1).seconds / timed.seconds
    pace.learn(trained, 40.0)
    assert pace.of(Work(trained=2), 1).seconds == pytest.approx(20)
    assert pace.of(mixed, 1).seconds == pytest.approx(40 * share)
    pace.learn(mixed, 120 * share)  # three times as slow: all that was done counts
    assert pace.of(trained, 1).seconds == pytest.approx(4 * (40 + 120 * share) / (4 + 4 * share))
    assert pace.of(trained, 2).activation_bytes == 2 * timed.activation_bytes


def test_a_whole_row_is_timed_however_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """The FLOPs of a row of 2 k tokens say too little about one of 3 k."""
    timed: list[int] = []

    def rehearse(run: object, stage: object, model: object, tokens: int, *others: object) -> float:
        timed.append(tokens)
        return 100.0 * tokens

    monkeypatch.setattr(estimate, "rehearse", rehearse)
    settings = load_config(PosttrainConfig, "posttrain-tiny", ("tokens=700", "new_tokens=100", "device=cpu"))
    pace = Pace(ours(config("v32", index_topk=16, vocab_size=4096, num_hidden_layers=1)), settings)
    assert timed == [512, 800] and pace.of(Work(trained=1), 1).seconds == pytest.approx(80_000)
