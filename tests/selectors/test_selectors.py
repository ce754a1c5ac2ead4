"""The selectors beside top k, each against a naive loop over queries, and on every road."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support import grouped
from tests.support.models import config, ours, tokens
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.model import SelectionContext
from tokensieve.model.selection import check_indices, resolve
from tokensieve.selectors import (
    DenseBelow,
    DenseIfSpread,
    DenseLayers,
    PerLayer,
    PerQuery,
    Recent,
    Shared,
    TwoLevel,
)

K = 16


def model_of(kind: str = "v32", **changes: Any) -> Any:
    make = grouped.config if kind.endswith("_dsa") else config
    return ours(make(kind, index_topk=K, **changes))


def best(scores: list[float], k: int) -> list[int]:
    """Places of the k largest, ties to the smaller place, ascending."""
    return sorted(sorted(range(len(scores)), key=lambda s: (-scores[s], s))[:k])


def shares(scores: list[float]) -> list[float]:
    largest = max(scores)
    weights = [math.exp(s - largest) for s in scores]
    return [w / sum(weights) for w in weights]


def recent(scores: list[float], layer: int, before: list[int] | None) -> list[int]:
    n = len(scores)
    return sorted({*best(scores, K - 6), *range(min(2, n)), *range(max(0, n - 4), n)})


def per_query(scores: list[float], layer: int, before: list[int] | None) -> list[int]:
    p, read = shares(scores), 0.0
    order = sorted(range(len(p)), key=lambda s: (-scores[s], s))[: 2 * K]
    for n, s in enumerate(order):
        read += p[s]
        if p[s] / read < 0.06:
            return sorted(order[:n])
    return sorted(order)


def dense_if_spread(scores: list[float], layer: int, before: list[int] | None) -> list[int]:
    p, chosen = shares(scores), best(scores, K)
    return chosen if sum(p[s] for s in chosen) >= 0.6 or len(scores) <= K else list(range(len(scores)))


def two_level(scores: list[float], layer: int, before: list[int] | None) -> list[int]:
    """With so many blocks that none is left out. Which blocks are: tests/ops/test_two_level.py."""
    return best(scores, K)


CASES: dict[str, tuple[Any, Callable[..., list[int]]]] = {
    "recent": (Recent(last=4, first=2), recent),
    "per query": (PerQuery(0.06, most=2), per_query),
    "per layer": (PerLayer((5, 40, 16)), lambda scores, layer, before: best(scores, (5, 40, 16)[layer])),
    "dense below": (DenseBelow(30), lambda s, layer, before: list(range(len(s))) if len(s) <= 30 else best(s, K)),
    "dense if spread": (DenseIfSpread(0.6), dense_if_spread),
    "two level": (TwoLevel(block=16, blocks=8), two_level),
    "shared": (Shared((1,)), lambda scores, layer, before: before if layer == 1 else best(scores, K)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["v32", "llama_dsa"])
@torch.no_grad()
def test_each_selects_as_a_naive_loop_does(case: str, kind: str) -> None:
    """Two packed documents, so that ranges begin elsewhere than at 0."""
    selector, naive = CASES[case]
    model, seen = model_of(kind), 0
    positions = torch.cat((torch.arange(25), torch.arange(65)))[None]

    def compared(c: SelectionContext) -> Tensor:
        nonlocal seen
        indices, scores = selector(c), c.scores()
        check_indices(selector, c, indices)
        for t in range(len(c)):
            start, end = int(c.starts_N[t]), int(c.ends_N[t])
            read = None if c.before is None else [s - start for s in c.before[t].tolist() if s >= 0]
            wanted = naive(scores[t, start:end].tolist(), c.layer, read)
            assert [s - start for s in indices[t].tolist() if s >= 0] == wanted, (c.layer, t)
        seen += 1
        return indices

    with tokensieve.selecting(model, compared):
        model(tokens(1, 90), position_ids=positions)
    assert seen == 3


@pytest.mark.parametrize("case", [*CASES, "dense layers", "few blocks"])
@torch.no_grad()
def test_the_engine_selects_as_generate_does(case: str) -> None:
    """On pages, in chunks and steps; the prompt is several times longer than k."""
    more = {"dense layers": DenseLayers((1,)), "few blocks": TwoLevel(block=16, blocks=3)}
    selector = more[case] if case in more else CASES[case][0]
    model, ids = model_of("v32", vocab_size=4096), tokens(1, 100)
    with tokensieve.selecting(model, selector):
        whole = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)[0, 100:]
    config_ = EngineConfig(pages=8, chunk=64, check_selection=True)
    engine = Engine(model, tokensieve.load_tokenizer("base"), config_, {"mine": selector})
    engine.add(Request("x", tuple(ids[0].tolist()), Sampling(max_tokens=5, ignore_eos=True), "mine"))
    answer: list[int] = []
    while engine.busy:
        answer += [token for output in engine.step() for token in output.tokens]
    assert answer == whole.tolist()


@torch.no_grad()
def test_the_number_of_keys_is_the_querys_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one, even if no key but the best is worth it; many if scores are flat, at most 1 / share."""
    model = model_of()

    def counts(share: float, scale: float) -> Tensor:
        selected: list[Tensor] = []

        def watch(c: SelectionContext) -> Tensor:
            scores = c.scores
            monkeypatch.setattr(c, "scores", lambda: scale * scores())
            monkeypatch.setattr(c, "rows", lambda rows: c)
            selected.append((PerQuery(share)(c) >= 0).sum(1))
            return c.topk()

        with tokensieve.selecting(model, watch):
            model(tokens(1, 90))
        return torch.stack(selected)

    seen = torch.arange(1, 91).expand(3, -1)
    assert torch.equal(counts(1.0, 1.0), torch.ones_like(seen))
    assert torch.equal(counts(0.049, 0.0), seen.clamp_max(20))  # flat: key j holds 1 / j of what is read
    assert len(counts(0.06, 1.0).unique()) > 5


@torch.no_grad()
def test_up_to_its_tokens_a_request_is_answered_by_the_dense_model() -> None:
    model, ids = model_of(), tokens(1, 60)
    with tokensieve.selecting(model, "dense"):
        dense = model(ids).logits
    with tokensieve.selecting(model, DenseBelow(40)):
        mixed = model(ids).logits
    assert float((mixed - dense)[:, :40].abs().max()) < 1e-5 < 0.01 < float((mixed - dense)[:, 40:].abs().max())


@pytest.mark.parametrize("selector", [Recent(4, 2), PerQuery(0.06), Shared((1, 2)), DenseLayers((0,)), DenseBelow(30)])
def test_training_takes_them(selector: Any) -> None:
    model = model_of().train()
    ids = tokens(1, 90)
    with tokensieve.training(model, "adapt"), tokensieve.selecting(model, selector):
        model(ids, labels=ids).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    assert all(g is not None and bool(g.isfinite().all()) for n, g in grads.items() if "q_a_proj" in n)
    taught = {int(n.split(".")[2]) for n, g in grads.items() if ".indexer.wk" in n and g is not None and bool(g.any())}
    assert taught == ({1, 2} if isinstance(selector, DenseLayers) else {0, 1, 2})


def test_options_are_written_as_in_python() -> None:
    assert resolve("tokensieve.selectors:Recent(last=8)") == Recent(last=8)
    assert resolve("tokensieve.selectors:Shared([1, 3])") == Shared((1, 3))
    assert resolve("tokensieve.selectors:DenseIfSpread(mass=0.5)") == DenseIfSpread(0.5)
    assert resolve("tokensieve.selectors:PerLayer(k=(8, 16))") == PerLayer((8, 16))
    assert resolve("tokensieve.selectors:PerQuery(1)") == PerQuery(1.0)


WRONG = {
    "tokensieve.selectors:Recent": "Recent has options; write tokensieve.selectors:Recent",
    "tokensieve.selectors:Recent(last=)": "write options as in Python",
    "tokensieve.selectors:Recent(last=open('x'))": "write options as in Python",
    "tokensieve.selectors:Recent(last=1).x": "write options as in Python",
    "tokensieve.selectors:Recent(1)(2)": "write options as in Python",
    "tokensieve.selectors:Recent(last={[]: 1})": "write options as in Python",
    "tokensieve.selectors:Recent(**{'last': 1})": "write options as in Python",
    "os:system('exit')": "options are for a selector that is a dataclass, and system is none",
    "builtins:dict()": "options are for a selector that is a dataclass, and dict is none",
    "tokensieve.selectors:Recent(tail=1)": "the options of Recent are last, first, each at most once",
    "tokensieve.selectors:Recent(1, 2, 3)": "the options of Recent are last, first, each at most once",
    "tokensieve.selectors:Recent(1, last=2)": "the options of Recent are last, first, each at most once",
    "tokensieve.selectors:Recent(last=2.5)": 'wrong value type for field "last"',
    "tokensieve.selectors:Recent(last=0)": "give at least 1 of each",
    "tokensieve.selectors:Absent(1)": "has no Absent",
    "tokensieve.selectors:DenseLayers(0)": "correct the option",
    "tokensieve.selectors:Shared(layers=[0, 1])": "the first layer to read another's keys is layer 1",
    "tokensieve.selectors:DenseLayers([])": "name at least one layer",
    "tokensieve.selectors:DenseLayers([-1])": "the first is layer 0",
    "tokensieve.selectors:Shared()": 'missing value for field "layers"',
    "tokensieve.selectors:PerQuery(share=0)": "0 < share <= 1, and most is at least 1",
    "tokensieve.selectors:PerQuery(share=1.5)": "0 < share <= 1, and most is at least 1",
    "tokensieve.selectors:PerQuery(0.1, most=0)": "0 < share <= 1, and most is at least 1",
    "tokensieve.selectors:PerQuery((0.1, 0.2))": "correct the option",
    "tokensieve.selectors:PerLayer(k=[4, 0])": "at least 1 key",
    "tokensieve.selectors:DenseBelow(0)": "at least 1 token",
    "tokensieve.selectors:TwoLevel(block=24)": "a power of two of at least 16",
    "tokensieve.selectors:TwoLevel(blocks=1)": "there are 2 or more",
    "tokensieve.selectors:DenseIfSpread(1)": "between 0 and 1",
    "tokensieve.config:SourceConfig('x')": "SourceConfig is not callable",
}


@pytest.mark.parametrize("name", WRONG)
def test_names_with_wrong_options(name: str) -> None:
    with pytest.raises(UserError, match=re.escape(WRONG[name])):
        resolve(name)


def test_what_only_a_model_can_refuse() -> None:
    model, ids = model_of(), tokens(1, 90)
    for selector, message in (
        (PerLayer((4, 4)), "PerLayer has k for 2 layers, and the model has 3"),
        (PerLayer((4, 4, 4, 4)), "PerLayer has k for 4 layers, and the model has 3"),
        (DenseLayers((0, 3)), "DenseLayers names layer 3, and the last of the model is layer 2"),
        (Shared((9,)), "Shared names layer 9, and the last of the model is layer 2"),
        (TwoLevel(16, 2), "holds 2 keys, and k is 16"),
        (Recent(12, 4), "k = 16 leaves none to the indexer"),
    ):
        with pytest.raises(UserError, match=message), tokensieve.selecting(model, selector):
            model(ids)
