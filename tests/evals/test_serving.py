"""The check of sparse serving: it finds each fault that is switched on in our engine, and nothing in the right one."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import models, servers
from tokensieve.config import UserError
from tokensieve.engine import EngineConfig
from tokensieve.engine.core import Engine
from tokensieve.evals import FAULTS, Checker, Endpoint, ProbeResult, check_serving, diagnose
from tokensieve.evals.diagnosis import failed_places
from tokensieve.evals.endpoint import Refused, Reply
from tokensieve.evals.serving import answers_differ, worse
from tokensieve.evaluate_config import ServingSizes
from tokensieve.families import family_of
from tokensieve.model import entries
from tokensieve.model.paged import PagedKeys
from tokensieve.model.selection import SelectionContext

K = 208
COMPARED = ("repeat", "cached", "crowd", "ragged", "decode", "pieces", "dense")
SIZES = ServingSizes(probes=COMPARED, questions=2, texts=1, answer_tokens=16, generated=12, crowd=2)
SIZES = replace(SIZES, tolerance=0.02)  # on the CPU our engine's bits depend on nothing else, so any difference is real


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """Random weights: they answer nothing, and yet the same tokens have the same probabilities.

    Only whole words are likely, which are split into the same tokens when they are read.
    """
    tokenizer = tokensieve.load_tokenizer("sparse")
    shape = {"vocab_size": len(tokenizer), "num_hidden_layers": 1, "first_k_dense_replace": 1, "hidden_size": 32}
    config = models.config("v32", **shape, index_topk=K, index_n_heads=4, max_position_embeddings=2048)
    model = models.ours(config)
    words = [token for text, token in tokenizer.get_vocab().items() if text[:1] == "Ġ" and text[1:].isalpha()]
    with torch.no_grad():
        model.lm_head.weight[words] *= 4
    return model, tokenizer


@contextmanager
def checker(loaded: tuple[Any, Any], sizes: ServingSizes, k: int = K, chunk: int = 128) -> Iterator[Checker]:
    limits = {"max_tokens": 0, "max_prompt_tokens": 0, "max_body": 2**20}
    with servers.running(loaded, EngineConfig(pages=160, running=8, chunk=chunk, top_k=k), **limits) as (at, _):
        endpoint = Endpoint(at + "/v1")
        cards = endpoint.models()
        assert [card["index_topk"] for card in cards] == [k, None]
        yield Checker(endpoint, "sparse", k, cards[0]["max_model_len"], sizes, seed=0, dense="sparse:dense")
        endpoint.close()


def failed(loaded: tuple[Any, Any], *probes: str, **changes: Any) -> tuple[set[str], str]:
    """The probes that found something, and the diagnosis."""
    with checker(loaded, replace(SIZES, probes=probes or COMPARED, **changes)) as asked:
        results = check_serving(asked)
    fault = diagnose(results, K)
    return failed_places(results, K), "" if fault is None else fault.cause


def test_the_right_engine_is_clean(loaded) -> None:
    with checker(loaded, SIZES) as asked:
        results = check_serving(asked)
    assert diagnose(results, K) is None
    assert [r.name for r in results if r.found is None] == [], [r.line for r in results]
    assert len(results) == 11
    assert max(d for r in results for d in r.details.get("differences", ())) < 1e-4  # rounding of decode and prefill


# Each fault is switched on in the engine or the model, in the way in which it happened to others.


def test_index_keys_that_a_cached_prefix_lacks(loaded, monkeypatch) -> None:
    right = Engine._prefill

    def prefill(self: Engine, batch: list[Any]) -> list[Any]:
        running = batch[0]
        if running.reused and running.cached == running.reused:
            for pool in self.runner.pools.index:
                pool[running.pages[: running.reused // 64]] = 0
        return right(self, batch)

    monkeypatch.setattr(Engine, "_prefill", prefill)
    places, cause = failed(loaded, "cached", "crowd", "decode")
    assert "cached above" in places and "cached below" not in places
    assert cause.startswith("index keys are missing or wrong for prefixes from the cache")


def test_a_topk_over_padding(loaded, monkeypatch) -> None:
    """Every row selects among as many places as the longest sequence of the step has."""
    right = PagedKeys.index_topk

    def index_topk(self: PagedKeys, q: Any, w: Any, k: int, rows: Any) -> Any:
        longest = int(self.ends_N.max())
        chosen = right(self, q, w, k, rows)
        padding = longest - self.ends_N[:, None]
        first = torch.arange(k, dtype=torch.int32)
        return torch.where((padding > 64) & (first < k // 2), -1, chosen)  # the padding's places are read as nothing

    monkeypatch.setattr(PagedKeys, "index_topk", index_topk)
    places, cause = failed(loaded, "cached", "crowd", "ragged", "decode")
    assert places == {"ragged above"} and "padding that is not masked" in cause


def test_indices_of_another_sequence(loaded, monkeypatch) -> None:
    right = PagedKeys.index_topk

    def index_topk(self: PagedKeys, q: Any, w: Any, k: int, rows: Any) -> Any:
        chosen = right(self, q, w, k, rows)
        real = int((self.ends_N > 0).sum())
        stale = torch.cat((chosen[:real].roll(1, 0), chosen[real:]))
        return torch.where((stale < self.ends_N[:, None]) & (self.ends_N[:, None] > k), stale, chosen)

    monkeypatch.setattr(PagedKeys, "index_topk", index_topk)
    places, cause = failed(loaded, "cached", "crowd", "decode")
    assert places == {"crowd above"} and "of another sequence are read" in cause


def test_wrong_scores_on_pages(loaded, monkeypatch) -> None:
    """From k tokens on decoding selects the first keys, and a prompt of the same tokens does not."""
    right = PagedKeys.index_topk

    def index_topk(self: PagedKeys, q: Any, w: Any, k: int, rows: Any) -> Any:
        return torch.where(self.ends_N[:, None] > k, torch.arange(k, dtype=torch.int32), right(self, q, w, k, rows))

    monkeypatch.setattr(PagedKeys, "index_topk", index_topk)
    places, cause = failed(loaded, "cached", "crowd", "decode")
    assert {"decode above"} <= places <= {"decode above", "decode crossing", "crowd above"}, places
    assert cause.startswith("decoding selects other keys than reading a prompt does")


def test_k_is_ignored(loaded, monkeypatch) -> None:
    monkeypatch.setattr(SelectionContext, "topk", lambda self, k=None: None)
    places, cause = failed(loaded, "dense", "decode")
    assert places == {"dense ignored"} and cause.startswith("k is ignored")


def test_a_smaller_k_than_the_models(loaded, monkeypatch) -> None:
    right = entries.ContiguousKeys.all_within
    monkeypatch.setattr(entries.ContiguousKeys, "all_within", lambda self, k: right(self, 8))
    topk = SelectionContext.topk
    monkeypatch.setattr(SelectionContext, "topk", lambda self, k=None: topk(self, 8))
    places, cause = failed(loaded, "dense")
    assert places == {"dense early"} and "k is smaller than --k" in cause


def test_a_topk_that_is_not_deterministic(loaded, monkeypatch) -> None:
    topk = PagedKeys.index_topk
    draw = torch.Generator().manual_seed(0)

    def unstable(self: PagedKeys, q: Any, w: Any, k: int, rows: Any) -> Any:
        chosen = topk(self, q, w, k, rows)
        lost = torch.rand(chosen.shape, generator=draw) < 0.5
        return torch.where(lost & (self.ends_N[:, None] > k), -1, chosen).sort(dim=1, descending=False).values

    monkeypatch.setattr(PagedKeys, "index_topk", unstable)
    places, _ = failed(loaded, "repeat", "cached")
    assert "repeat above" in places and "cached below" not in places


@pytest.mark.slow
@pytest.mark.parametrize("swapped", [False, True])
def test_the_indexers_rope_is_swapped(swapped: bool) -> None:
    """Known answers are right below k, and wrong far past it, where dense attention has them right.

    The bundled model's indexer depends little on positions, so it takes 16 times k.
    """
    model, tokenizer = tokensieve.load("sparse"), tokensieve.load_tokenizer("sparse")
    family, k = family_of(model.config), 256
    sizes = ServingSizes(contexts=(4096,), probes=("answers",), questions=12, texts=1)
    with pytest.MonkeyPatch.context() as patch:
        if swapped:
            patch.setattr(type(family), "index_interleaved", True)
            for layer in model.model.layers:
                layer.self_attn.indexer.interleaved = True
        with checker((model, tokenizer), sizes, k, chunk=512) as asked:
            results = check_serving(asked)
    fault = diagnose(results, k)
    assert [r.found for r in results] == [False, swapped], [r.line for r in results]
    if swapped:
        assert fault is not None and "RoPE layout of the indexer" in fault.cause and "mlx-lm #1453" in fault.known


# the checker itself


def test_a_model_that_answers_nothing_is_not_measurable(loaded) -> None:
    with checker(loaded, replace(SIZES, probes=("answers", "boundary"), contexts=(600,))) as asked:
        results = check_serving(asked)
    assert [r.found for r in results] == [None, None] and diagnose(results, K) is None
    assert all("not measurable with this model" in r.line for r in results)


def test_finished_probes_are_not_asked_again(loaded) -> None:
    kept: list[ProbeResult] = []
    with checker(loaded, replace(SIZES, probes=("cached", "decode"))) as asked:
        whole = check_serving(asked, on_result=kept.append)
        assert whole == kept and len(whole) == 5
        again: list[ProbeResult] = []
        seen: list[str] = []
        finished = [r.to_dict() for r in kept[:4]]
        assert check_serving(asked, finished, lambda what, *_: seen.append(what), again.append)[:4] == kept[:4]
        assert [r.name for r in again] == ["decode-above"] and len(seen) == 1
        assert check_serving(asked, [r.to_dict() for r in kept], on_result=again.append) == kept and len(again) == 1


def test_lengths_and_refusals(loaded) -> None:
    endpoint = Endpoint("http://127.0.0.1:9/v1")
    asked = Checker(endpoint, "m", 2048, 163_840, ServingSizes(), 0)
    assert asked.lengths() == (2304, 8192, 32768, 131_072, 163_808)
    assert Checker(endpoint, "m", 2048, 163_840, ServingSizes(most=9000), 0).lengths() == (2304, 8192)
    assert len({name for name, *_ in asked.plan()}) == len(asked.plan())
    with pytest.raises(UserError, match="too small for a question below it"):
        Checker(endpoint, "m", 64, 4096, ServingSizes(), 0)
    with pytest.raises(UserError, match="there is room for"):
        Checker(endpoint, "m", 2048, 4096, ServingSizes(), 0)
    with pytest.raises(UserError, match="200000 is not above k = 2048 and at most 163808"):
        Checker(endpoint, "m", 2048, 163_840, ServingSizes(contexts=(8192, 200_000)), 0).plan()


def test_worse_is_fishers_test() -> None:
    """By hand: 0 of 4 beside 4 of 4 has one chance in 70."""
    assert not worse(0, 4, 4, 4) and worse(0, 8, 8, 8) and worse(5, 16, 14, 16)
    assert not worse(8, 8, 8, 8) and not worse(12, 16, 16, 16)


class Guessing(Checker):
    """The answers' probes, by a model that is right with a probability that depends on the prompt's length."""

    def __init__(self, accuracy: Callable[[int], float]):
        super().__init__(Endpoint("http://127.0.0.1:9/v1"), "m", 2048, 163_840, ServingSizes(probes=("answers",)), 0)
        self.accuracy, self.draw = accuracy, random.Random(0)

    def begin(self) -> None:
        pass

    def _questions(self, tokens: int) -> list[Any]:
        return [tokens] * self.sizes.questions

    def _ask(self, way: str, model: str, questions: Any) -> int:
        return sum(self.draw.random() < self.accuracy(tokens) for tokens in questions)


def test_a_healthy_endpoint_is_seldom_called_wrong() -> None:
    """1% of checks at most, whatever the number of lengths; and a fault that halves the accuracy far past k is seen."""
    asked = Guessing(lambda n: 0.8)
    healthy = [check_serving(asked) for _ in range(1000)]
    assert sum(any(r.found for r in results) for results in healthy) <= 10
    asked = Guessing(lambda n: 1.0 if n < 30_000 else 0.5)
    halved = [check_serving(asked) for _ in range(200)]
    assert sum(any(r.found for r in results) for results in halved) >= 190
    broken = check_serving(Guessing(lambda n: 1.0 if n < 2048 else 0.25))  # a wrong length is no control of the next
    assert [r.found for r in broken] == [False, *[True] * 5]


def test_a_length_that_is_refused_is_no_control() -> None:
    def accuracy(tokens: int) -> float:
        if tokens == 8192:
            raise Refused("too long for now")
        return 1.0

    results = check_serving(Guessing(accuracy))
    assert [r.found for r in results] == [False, False, None, False, False, False]
    assert "too long for now" in results[2].line


def test_answers_that_differ() -> None:
    a = Reply(text="", tokens=("x", "cat"), logprobs=(-0.5, -1.0), top=({}, {}), prompt_tokens=0)
    b = replace(a, tokens=("x", "dog"), logprobs=(-0.7, -1.0), top=({}, {"dog": -1.0, "cow": -4.0}))
    assert answers_differ(a, b) == pytest.approx((0.2 + 3.0) / 2)
    assert math.isnan(answers_differ(b, a))  # of an endpoint that gives no alternatives: nobody knows


def test_every_fault_can_be_the_diagnosis() -> None:
    """No row of the table stands behind one that takes its symptoms."""
    for fault in FAULTS:
        others = [f for f in FAULTS[: FAULTS.index(fault)] if {*f.failed} <= {*fault.failed}]
        assert all({*f.clean} & {*fault.failed} for f in others), fault
