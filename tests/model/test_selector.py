"""A selector of one's own: the same function in training, generate, the engine and evaluation; what it returns is
checked.

(The server's part is in tests/serve, the command line's in tests/cli.)
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support.models import config, ours, tokens
from tests.support.training import OPTIMIZER, batch, step_gradients
from tests.support.training import model as small
from tokensieve.config import PhaseConfig, TrainConfig, UserError
from tokensieve.engine import Engine, EngineConfig, Request, Sampling
from tokensieve.model import SelectionContext, join
from tokensieve.model.selection import indexer, oracle, resolve, window

RECENT = 10
NAME = "tests.model.test_selector:with_recent"
SELECTING = ("indexer", "window", "sinks", "oracle")


def with_recent(c: SelectionContext) -> Tensor:
    return join(indexer(c), window(c, RECENT))


def generated(model: Any, ids: Tensor, selector: Any) -> list[int]:
    with torch.no_grad(), tokensieve.selecting(model, selector):
        out = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    return out[0, ids.shape[1] :].tolist()


def engine_answers(model: Any, ids: Tensor, **requests: str) -> dict[str, list[int]]:
    """The engine's greedy answers, all requests at once; a chunk is shorter than the prompt."""
    config = EngineConfig(pages=24, running=4, chunk=64)
    engine = Engine(model, tokensieve.load_tokenizer("base"), config, {"recent": with_recent})
    sampling = Sampling(max_tokens=8, ignore_eos=True)
    for name, selector in requests.items():
        engine.add(Request(name, tuple(ids[0].tolist()), sampling, selector))
    answers: dict[str, list[int]] = {name: [] for name in requests}
    while engine.busy:
        for output in engine.step():
            assert output.finish in (None, "length"), output.error
            answers[output.id] += output.tokens
    return answers


@pytest.mark.parametrize("seed", [0, 1])
def test_the_engine_answers_as_generate_does(seed: int) -> None:
    """Each selector with its own answer, all in one batch."""
    model, ids = ours(config("v32", vocab_size=4096), seed), tokens(1, 150, seed)
    found = engine_answers(model, ids, own=NAME, given="recent", **{name: name for name in SELECTING})
    expected = {name: generated(model, ids, name) for name in SELECTING}
    expected |= {"own": generated(model, ids, with_recent), "given": generated(model, ids, NAME)}
    assert found == expected and expected["own"] == expected["given"]
    assert len({tuple(answer) for answer in expected.values()}) >= 3  # they do select differently


def test_training_selects_by_it() -> None:
    step, seen = [batch(2, 48)], []

    def run(selection: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
        settings = TrainConfig("adapt", "", "", (PhaseConfig(1, 48, 2, 2),), optimizer=OPTIMIZER, device="cpu")
        return step_gradients(TrainConfig(**vars(settings) | {"selection": selection}), small(), step)

    _, own = run(NAME)
    _, plain = run(True)
    assert own["kl"] != plain["kl"] and own["lm"] != plain["lm"]
    settings = TrainConfig("adapt", "", "", (PhaseConfig(1, 48, 2, 2),), optimizer=OPTIMIZER, device="cpu")
    around = small()
    with tokensieve.selecting(around, with_recent):
        _, block = step_gradients(settings, around, step)
    assert (block["kl"], block["lm"]) == (own["kl"], own["lm"])
    with pytest.raises(UserError, match="write your own function as module:function"):
        run(with_recent)
    made = small()
    with torch.no_grad(), tokensieve.selecting(made, with_recent):
        seen = made(**step[0], return_selection=True)
    assert float(seen.loss) == pytest.approx(own["lm"], rel=1e-6)
    sizes = (seen.selection[0] >= 0).sum(-1)
    assert int(sizes.max()) > made.top_k and bool((sizes <= made.top_k + RECENT).all())


@pytest.mark.parametrize("selector", [oracle, lambda c: (c.attention_queries, indexer(c))[1], with_recent, window])
def test_whatever_the_selector_reads_all_weights_learn(selector: Any) -> None:
    """What it reads of the main attention is computed without gradients, and attention needs the same with them."""
    made = small().train()
    step = batch(2, 48)
    with tokensieve.selecting(made, selector), tokensieve.training(made, "adapt"):
        made(**step).loss.backward()
    for layer in made.model.layers:
        gradient = layer.self_attn.kv_b_proj.weight.grad
        assert gradient is not None and bool(gradient.any())


def test_join_is_the_union() -> None:
    a = torch.tensor([[1, 4, 7, -1], [0, -1, -1, -1], [-1, -1, -1, -1]], dtype=torch.int32)
    b = torch.tensor([[4, 5], [-1, -1], [-1, -1]], dtype=torch.int32)
    joined = join(a, b)
    assert joined.dtype == torch.int32 and joined.tolist() == [[1, 4, 5, 7, -1, -1], [0] + [-1] * 5, [-1] * 6]
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        sets = [sorted(set(torch.randint(0, 30, (9,), generator=draw).tolist())) for _ in range(2)]
        rows = [torch.tensor([s + [-1] * (9 - len(s))], dtype=torch.int32) for s in sets]
        union = sorted({*sets[0], *sets[1]})
        assert join(*rows).tolist() == [union + [-1] * (18 - len(union))]


def future(c: SelectionContext) -> Tensor:
    return (c.ends_N[:, None]).to(torch.int32)


def twice(c: SelectionContext) -> Tensor:
    return window(c)[:, [0, 0]]


WRONG = {
    "the future": (future, r"future gave query 0 of layer 0 a key that its query may not see"),
    "before the document": (lambda c: (c.starts_N[:, None] - 1).clamp_min(0), "may not see"),
    "twice": (twice, "twice gave query .* do not ascend, or a key twice; join"),
    "disorder": (lambda c: window(c).flip(1), "do not ascend"),
    "a gap": (lambda c: torch.cat((torch.full_like(window(c), -1), window(c)), 1), "do not ascend"),
    "negative": (lambda c: window(c).masked_fill(window(c) < 0, -2), "a negative position other than -1"),
    "too few rows": (lambda c: window(c)[1:], r"returned \(\d+, 24\) in layer 0; return \(90, K\)"),
    "a mask": (lambda c: window(c) >= 0, "returned torch.bool"),
    "no column": (lambda c: window(c)[:, :0], "returned no key in layer 0"),
    "k = 0": (lambda c: c.topk(0), "asked for k = 0 keys"),
    "a part of a key": (lambda c: c.topk(2.5), "asked for k = 2.5 keys"),
    "k in letters": (lambda c: c.topk("8"), "asked for k = '8' keys"),
    "k is a truth value": (lambda c: c.topk(True), "asked for k = True keys"),
    "a window of no width": (lambda c: window(c, c.k - 24), "asked for k = 0 keys in layer 0"),
    "a window of less": (lambda c: window(c, c.k - 64), "asked for k = -40 keys in layer 0"),
    "nothing joined": (lambda c: join(c.topk(), c.before), "join got .90, 24. and NoneType; .*c.before is None"),
    "other queries joined": (lambda c: join(c.topk(), window(c)[1:]), r"join got \(90, 24\) and \(89, 24\)"),
    "no key at all": (lambda c: torch.full_like(c.topk(), -1), "gave query 0 of layer 0 no key, though it sees some"),
    "no key here": (lambda c: c.topk().masked_fill(c.ends_N[:, None] == 7, -1), "gave query 6 of layer 0 no key"),
    "no tensor": (lambda c: [1, 2], "returned list"),
    "another device": (lambda c: c.topk().to("meta"), "returned a torch.strided on meta in layer 0; make it dense"),
    "no dense tensor": (lambda c: c.topk().to_sparse(), "returned a torch.sparse_coo on cpu"),
    "scores of NaN": (lambda c: c.select(c.scores() * torch.nan), "layer 0: index scores of query 0 contain NaN"),
    "scores of few keys": (lambda c: c.select(c.scores()[:, :3]), "layer 0: select_topk: key ranges must lie in"),
    "scores of few queries": (
        lambda c: c.select(c.scores()[1:]),
        r"gave \(89, \d+\) as scores in layer 0",
    ),
    "no scores": (lambda c: c.select([1.0]), "gave list as scores in layer 0"),
}


@pytest.mark.parametrize("kind", WRONG)
@torch.no_grad()
def test_what_a_selector_returns_is_checked(kind: str) -> None:
    selector, message = WRONG[kind]
    model = ours(config("v32"))
    positions = torch.cat((torch.arange(40), torch.arange(50)))[None]  # two documents
    with pytest.raises(UserError, match=message), tokensieve.selecting(model, selector):
        model(tokens(1, 90), position_ids=positions)


@torch.no_grad()
def test_the_check_on_pages_and_its_switch() -> None:
    model, ids = ours(config("v32", vocab_size=4096)), tokens(1, 90)
    engine = Engine(model, tokensieve.load_tokenizer("base"), EngineConfig(pages=4), {"future": future})
    for name, selector in (("good", "window"), ("bad", "future")):
        engine.add(Request(name, tuple(ids[0].tolist()), Sampling(max_tokens=3, ignore_eos=True), selector))
    ends = {}
    while engine.busy:
        ends |= {output.id: output for output in engine.step() if output.finish is not None}
    assert ends["good"].finish == "length"
    assert ends["bad"].finish == "error" and "future gave query 0 of layer 0" in ends["bad"].error
    assert engine.scheduler.pool.used == 0
    with tokensieve.selecting(model, twice, check=False):  # the caller answers for it
        model(ids)


def test_no_key_for_a_query_without_keys() -> None:
    """Padding sees none, so -1 alone is right there."""
    model, ids = ours(config("v32")), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    with torch.no_grad(), tokensieve.selecting(model, with_recent):
        selection = model(ids, attention_mask=mask, return_selection=True).selection
    assert bool((selection[0][0, :9] < 0).all())


def test_more_keys_than_there_are_on_pages() -> None:
    """They cost no more columns than the pages hold, and answer as `generate` does."""
    model, ids = ours(config("v32", vocab_size=4096)), tokens(1, 90)
    widths = set()

    def greedy(c: SelectionContext) -> Tensor:
        widths.add(c.topk(10**12).shape[1])
        return c.topk(10**12)

    engine = Engine(model, tokensieve.load_tokenizer("base"), EngineConfig(pages=4), {"greedy": greedy})
    engine.add(Request("one", tuple(ids[0].tolist()), Sampling(max_tokens=8, ignore_eos=True), "greedy"))
    answer: list[int] = []
    while engine.busy:
        answer += [token for output in engine.step() for token in output.tokens]
    assert widths == {90, 4 * 64} and answer == generated(model, ids, "dense")


def test_no_later_token_changes_an_earlier_one() -> None:
    """What the check is for: a selection that sees the future would let it."""
    model, ids = ours(config("v32")), tokens(1, 90)
    other = ids.clone()
    other[0, 60:] = tokens(1, 30, seed=9)[0]
    for selector in (indexer, with_recent, window, oracle):
        with torch.no_grad(), tokensieve.selecting(model, selector):
            assert torch.equal(model(ids).logits[:, :60], model(other).logits[:, :60])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("best", "'best' is unknown; use one of indexer, window, sinks, oracle, dense, or module:function"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("tests.no_such:f", "there is no module tests.no_such"),
        ("tests.model.test_selector:absent", "has no absent"),
        ("tests.model.test_selector:NAME", "NAME is not callable"),
        (":f", "is unknown"),
    ],
)
def test_names_that_name_no_selector(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve(name)
    assert resolve(NAME) is with_recent
