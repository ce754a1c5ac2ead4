"""Evaluation: what is counted, on which hidden states, in how much memory, and what a criterion decides."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import tokensieve
from tests.support import models, stdlib
from tokensieve import evals, ops
from tokensieve.config import AcceptanceSizes, ParitySizes, UserError
from tokensieve.cost import shape_of
from tokensieve.evals import evaluation, longcontext, mass
from tokensieve.evals.evaluation import evaluating
from tokensieve.tasks import Answer, Document, Documents, PlainEncoder, Score
from tokensieve.tasks.retrieval import NeedleExample, Needles

MODULES = ("argparse", "inspect", "typing", "random", "textwrap")
K, CONTEXT = 16, 320
VOCABULARY = 512


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return stdlib.documents(*MODULES)


@pytest.fixture(scope="module")
def encode(documents, tmp_path_factory) -> PlainEncoder:
    return stdlib.encoder(documents, tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="module")
def dense():
    return models.ours(models.config("v3", vocab_size=VOCABULARY, max_position_embeddings=2048))


@pytest.fixture(scope="module")
def sparse(dense):
    return tokensieve.sparsify(dense, top_k=K, index_heads=4, index_dim=16)


@pytest.fixture(scope="module")
def texts(encode, documents):
    return evals.text_sequences(encode, documents, CONTEXT, 3)


@pytest.fixture(scope="module")
def task(encode, documents):
    return Needles(encode, Documents(test=documents), needles=4, context=1024)


@pytest.fixture(scope="module")
def questions(task):
    return task.examples("test", 8)


# held-out text


def test_sequences_are_stretches_of_single_documents(encode, documents, texts):
    assert [len(t) for t in texts] == [CONTEXT] * 3
    bodies = [encode(d.text) for d in documents]
    for text in texts:
        assert text[0] == encode.bos
        assert text[1:].tolist() in [body[: CONTEXT - 1] for body in bodies]
    assert len({tuple(t.tolist()) for t in texts}) == 3


def test_later_stretches_come_when_documents_run_out(encode, documents):
    only = documents[:1]
    ids = encode(only[0].text)
    first, second = found = evals.text_sequences(encode, only, 100, 2)
    assert found.documents == (0, 0) and found[:1].documents == (0,)
    assert first[1:].tolist() == ids[:99] and second[1:].tolist() == ids[99:198]
    with pytest.raises(UserError, match="hold 0 stretches of 1000000 tokens"):
        evals.text_sequences(encode, only, 1_000_000, 1)


def test_token_losses_are_the_cross_entropy(dense, texts, monkeypatch):
    monkeypatch.setattr("tokensieve.evals.losses.HEAD_ROWS", 50)
    ids = texts[0]
    with torch.no_grad():
        logits = dense(ids[None]).logits[0]
    expected = F.cross_entropy(logits[:-1], ids[1:], reduction="none")
    torch.testing.assert_close(evals.token_losses(dense, ids), expected, rtol=1e-4, atol=1e-5)


def test_perplexity_counts_positions_that_see_more_than_k(dense, texts):
    losses = torch.stack([evals.token_losses(dense, t) for t in texts]).double()
    found = evals.perplexity(dense, texts, K, buckets=8)
    assert found.ppl == pytest.approx(math.exp(losses[:, K:].mean()))  # entry i is predicted from i + 1 tokens
    assert found.ppl_all == pytest.approx(math.exp(losses.mean()))
    assert found.tokens == 3 * (CONTEXT - 1 - K)
    assert found.edges[0] == 0 and found.edges[-1] == CONTEXT - 1
    widths = [b - a for a, b in zip(found.edges, found.edges[1:])]
    whole = sum(w * x for w, x in zip(widths, found.loss_of(3), strict=True)) / (CONTEXT - 1)
    assert whole == pytest.approx(float(losses.mean()))


def test_a_sweep_of_k_counts_the_same_tokens(encode, dense, texts, task, questions):
    """So that the dense arm stays where it is."""
    arms = {"dense": evals.Arm(dense, "dense")}
    swept = [evals.compare(arms, encode, texts, task, questions, k, ppl_after=2 * K)["dense"].text for k in (K // 2, K)]
    assert swept[0] == swept[1] == evals.perplexity(dense, texts, 2 * K)
    longer = evals.compare(arms, encode, texts, task, questions, 2 * K, ppl_after=K)["dense"].text
    assert longer == swept[0]  # what sees at most k tokens never counts


def test_arms_differ_only_beyond_k(dense, sparse, texts):
    with tokensieve.selecting(sparse, "window"):
        window = evals.token_losses(sparse, texts[0])
    difference = (window - evals.token_losses(dense, texts[0])).abs()
    assert difference[:K].max() < 1e-4 and difference[K:].max() > 1e-2


@pytest.mark.parametrize(
    ("sequences", "message"),
    [([], "at least one sequence"), ([torch.arange(9), torch.arange(8)], "one length"), ([torch.arange(9)], "k = 16")],
)
def test_perplexity_refuses(dense, sequences, message):
    with pytest.raises(UserError, match=message):
        evals.perplexity(dense, sequences, K)


def test_evaluating_puts_everything_back(sparse):
    ids = torch.arange(1, 40)[None]
    with tokensieve.training(sparse, "warmup"):
        sparse.train()
        with evaluating(sparse):
            assert not sparse.training and not torch.is_grad_enabled()
            out = sparse(ids)
            assert out.kl is None and out.logits is not None
        assert sparse.training and torch.is_grad_enabled()
        assert sparse(ids).loss.requires_grad  # the warm-up's
    sparse.eval()


# recall


def test_recall_is_that_of_a_naive_count(sparse, texts):
    """Scores and probabilities are collected whole and judged by plain Python."""
    seen = {}

    def collect(c):
        seen[c.layer] = c.scores(), c.head_mass()

    with torch.no_grad(), tokensieve.selecting(sparse, collect):
        logits = sparse(texts[0][None]).logits
    with torch.no_grad(), tokensieve.selecting(sparse, "dense"):
        assert torch.equal(logits, sparse(texts[0][None]).logits)  # who only watches leaves attention dense
    expected = []
    for scores, shares_of_all in seen.values():
        shares = []
        for t in range(K, CONTEXT):
            row = shares_of_all[t, : t + 1].double()
            order = sorted(range(t + 1), key=lambda s, t=t, scores=scores: (-float(scores[t, s]), s))
            best = float(row.sort(descending=True).values[:K].sum())
            shares.append(float(row[order[:K]].sum()) / best)
        expected.append(sum(shares) / len(shares))
    found = evals.recall(sparse, texts[:1])
    assert found.by_layer == pytest.approx(expected, rel=1e-5)
    assert found.overall == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert found.queries == CONTEXT - K
    assert all(0 < h < b <= 1 + 1e-9 for h, b in zip(found.held, found.best, strict=True))


def test_recall_holds_few_rows_at_a_time(sparse, texts, monkeypatch):
    rows = []
    original = ops.head_mass
    monkeypatch.setattr(ops, "head_mass", lambda q, *rest: rows.append(len(q)) or original(q, *rest))
    monkeypatch.setattr(mass, "ROWS", 32)
    found = evals.recall(sparse, texts, queries=100)
    assert max(rows) <= 32
    assert found.queries == 300 == sum(rows) / 3  # sequences and layers: three of each


def test_recall_of_everything_is_one(sparse, texts):
    assert evals.recall(sparse, texts[:1], top_k=CONTEXT - 1).overall == pytest.approx(1.0, abs=0.02)


def test_recall_needs_an_indexer_and_long_sequences(dense, sparse, texts):
    with pytest.raises(UserError, match="no indexer"):
        evals.recall(dense, texts, top_k=K)
    with pytest.raises(UserError, match="k = 5000"):
        evals.recall(sparse, texts, top_k=5000)


def test_a_model_whose_logits_are_not_finite_is_not_scored(dense, texts):
    broken = copy.deepcopy(dense)
    with torch.no_grad():
        broken.lm_head.weight[3, 3] = float("nan")
    with pytest.raises(UserError, match="logits are not finite; are its weights damaged"):
        evals.perplexity(broken, texts, K)


# parity


def test_compare_scores_every_arm_on_the_same_prompts(encode, dense, sparse, texts, task, questions):
    told = []
    arms = evals.demo_arms(dense, dense, sparse, sparse)
    scores = evals.compare(arms, encode, texts, task, questions, K, lambda *progress: told.append(progress))
    assert set(scores) == set(evals.ARMS)
    each = len(texts) + 2  # needle contexts
    names = [arm for arm in scores for _ in range(each)]
    assert told == [(name, done, 6 * each) for done, name in enumerate(names, 1)]
    assert scores["dense"].text == scores["dense_adapted"].text
    assert scores["sparse"].text == scores["untrained_indexer"].text  # here the indexer is the untrained one
    assert len({scores[arm].text.ppl for arm in ("dense", "sparse", "window", "oracle")}) == 4
    assert all([r.example for r in s.needles.records] == questions for s in scores.values())
    assert sparse.top_k == K and not sparse.model._forward_pre_hooks
    metrics = evals.metrics_of(scores)
    assert list(metrics) == [*evals.ARMS, "compared"]
    assert set(metrics["window"]) == {"ppl", "needle", "needle_interval", "estimates"}
    assert set(metrics["compared"]["needle"]) == set(metrics["compared"]["ppl"]) == set(evals.ARMS) - {"sparse"}
    of_window = metrics["compared"]["ppl"]["window"]
    assert of_window["value"] == pytest.approx(metrics["sparse"]["ppl"] / metrics["window"]["ppl"])
    assert of_window["n"] == len(texts) and metrics["compared"]["needle"]["window"]["n"] == len(questions)
    curves = evals.loss_by_position(scores)
    assert all(len(curve) == len(curves["edges"]) - 1 for curve in curves["loss"].values())


def test_arms_that_nothing_is_decided_on_may_read_fewer_prompts(encode, dense, sparse, texts, task, questions):
    arms = {
        "dense": evals.Arm(dense, "dense"),
        "sparse": evals.Arm(sparse, "indexer"),
        "window": evals.Arm(sparse, "window"),
    }
    arms["oracle"] = evals.Arm(sparse, "oracle")
    whole = evals.metrics_of(evals.compare(arms, encode, texts, task, questions, K))["compared"]
    told = []
    scores = evals.compare(
        arms, encode, texts, task, questions, K, lambda *progress: told.append(progress), other_prompts=1
    )
    assert told[-1] == ("oracle", len(told), len(told)) and len(told) == (3 + 2) + (3 + 2) + (1 + 2) + (3 + 1)
    assert [len(s.text.by_text) for s in scores.values()] == [3, 3, 1, 3]
    asked = [[record.example for record in s.needles.records] for s in scores.values()]
    assert asked[:3] == [questions] * 3 and asked[3] == questions[: len(questions) // 2]
    metrics = evals.metrics_of(scores)
    compared = metrics["compared"]
    assert compared["ppl"]["dense"] == whole["ppl"]["dense"] and compared["ppl"]["oracle"] == whole["ppl"]["oracle"]
    assert compared["needle"]["dense"] == whole["needle"]["dense"]
    assert compared["needle"]["window"] == whole["needle"]["window"]
    assert compared["ppl"]["window"]["n"] == 1 and compared["needle"]["oracle"]["n"] == len(asked[3])
    first = scores["dense"].text
    assert metrics["dense"]["ppl"] == pytest.approx(first.ppl_of(1))  # beside the window's, on the same text
    assert evals.loss_by_position(scores)["loss"]["dense"] == pytest.approx(first.loss_of(1))


def test_controls_share_the_adapted_trunk(dense, sparse):
    trained = tokensieve.sparsify(models.ours(dense.config, seed=1), top_k=K, index_heads=4, index_dim=16, seed=7)
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    control = evals.demo_arms(dense, dense, trained, sparse)["untrained_indexer"].model
    for name, tensor in control.state_dict().items():
        source = sparse.state_dict() if ".indexer." in name else before
        assert torch.equal(tensor, source[name]), name
    assert all(torch.equal(t, before[n]) for n, t in trained.state_dict().items())


def test_compare_refuses_prompts_that_test_nothing(encode, dense, texts, task, questions):
    with pytest.raises(UserError, match="not longer than k = 4096"):
        evals.compare({"dense": evals.Arm(dense, "dense")}, encode, texts, task, questions, 4096)


def test_further_selections_are_arms_beside_the_others(encode, documents, sparse):
    sizes = ParitySizes((1500,), texts=1, needle_contexts=1, recall_sequences=1, recall_queries=8)
    told = []
    figures = evals.judge_sparse(
        sparse, encode, documents, 1500, sizes, selections={"last": "window"}, on_progress=lambda *p: told.append(p)
    )
    assert list(figures)[:5] == ["dense", "sparse", "window", "oracle", "last"]
    assert figures["last"] == figures["window"] != figures["sparse"] and figures["selections"] == {"last": "window"}
    assert told[0] == ("dense", 1, 10) and told[-1] == ("recall", 1, 1) and ("last", 10, 10) in told
    for name, selection, message in (
        ("oracle", "window", "called oracle"),
        ("decode_ms", "window", "called decode_ms"),
        ("mine", "nobody", "'nobody' is unknown"),
    ):
        with pytest.raises(UserError, match=message):
            evals.judge_sparse(
                sparse,
                encode,
                documents,
                1500,
                sizes,
                selections={name: selection},
                on_progress=lambda *_: pytest.fail("it measured"),
            )


def test_sizes_follow_k():
    assert ParitySizes((2048, 4096), 1, 1).lengths(2048) == (2048, 4096)
    assert ParitySizes((2048, 16384), 1, 1, times_k=4).lengths(2048) == (8192, 16384)


def estimate(value, half, n=64):
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def metrics(**changes):
    compared = {
        "ppl": {"oracle": estimate(0.999, 0.004, 24), "dense": estimate(1.018, 0.006, 24)},
        "needle": {"dense": estimate(-0.004, 0.02), "window": estimate(0.9, 0.08)}
        | {"untrained_indexer": estimate(0.97, 0.05)},
    }
    figures = {"compared": compared, "recall": {"first": 0.1, "last": 0.96}}
    for name, change in changes.items():
        place, _, arm = name.partition("_of_")
        if arm:
            compared[place][arm] = change
        else:
            figures[name] = change
    return figures


PPL, NEEDLES = "sparse perplexity / that of selection by the true attention", "sparse needles - dense needles"


@pytest.mark.parametrize(
    ("changes", "name", "verdict"),
    [
        ({}, PPL, "holds"),
        ({"ppl_of_oracle": estimate(1.006, 0.005)}, PPL, "within noise"),
        ({"ppl_of_oracle": estimate(1.02, 0.005)}, PPL, "fails"),
        ({"ppl_of_oracle": {"value": 0.9, "low": None, "high": None, "n": 1}}, PPL, "within noise"),
        ({"needle_of_dense": estimate(-0.016, 0.04)}, NEEDLES, "within noise"),
        ({"needle_of_dense": estimate(-0.2, 0.1)}, NEEDLES, "fails"),
        ({"recall": {"first": 0.1, "last": 0.94}}, "recall of the indexer", "fails"),
        ({"recall": {"first": 0.1, "last": 0.95}}, "recall of the indexer", "holds"),
        ({"needle_of_window": estimate(0.59, 0.1)}, "dense needles - window needles", "within noise"),
        (
            {"needle_of_untrained_indexer": estimate(0.3, 0.1)},
            "dense needles - untrained_indexer needles",
            "fails",
        ),
    ],
)
def test_parity_criteria(changes, name, verdict):
    found = {c.name: c.verdict for c in evals.parity_criteria(metrics(**changes))}
    assert len(found) == 5 and found.pop(name) == verdict
    assert set(found.values()) == {"holds"}


def test_tasks_that_the_dense_arm_has_mastered_are_judged():
    def row(task, arm, difference, score=0.5):
        return {"task": task, "context": 8192, "arm": arm, "score": {"value": score}, "difference": difference}

    rows = [
        row(task, arm, difference, score)
        for task, score in (("single", 0.6), ("variables", 0.59))
        for arm, difference in (
            ("dense_adapted", None),
            ("dense", estimate(-0.2, 0.1)),
            ("sparse k=64", estimate(-0.005, 0.01, 500)),
            ("sparse k=32", estimate(-0.3, 0.1)),
            ("window k=64", estimate(-0.5, 0.1)),
            ("untrained_indexer", {"value": -0.25, "low": -0.29, "high": -0.2, "n": 100}),
        )
    ]
    found = evals.parity_criteria(metrics(long={"tasks": rows}, top_k=64))[5:]
    assert [(c.name, c.verdict, c.value, c.n) for c in found] == [
        ("single in 8,192 tokens: sparse - dense_adapted", "holds", -0.005, 500),
        ("single in 8,192 tokens: dense_adapted - window k=64", "holds", 0.5, 64),
        ("single in 8,192 tokens: dense_adapted - untrained_indexer", "fails", 0.25, 100),
    ]
    assert (found[1].low, found[1].high) == (pytest.approx(0.4), pytest.approx(0.6))


# long contexts


def test_context_gain_scores_the_same_tokens(dense, texts, monkeypatch):
    monkeypatch.setattr(longcontext, "SCORED", 100)
    monkeypatch.setattr(longcontext, "SPAN", 30)
    found = evals.context_gain(dense, texts[:1], short=64)
    ids = texts[0]
    long = evals.token_losses(dense, ids)[-100:].mean()
    # Token by token: bos, and what comes before the token from where its span's context begins.
    short = []
    for t in range(CONTEXT - 100, CONTEXT):
        begin = CONTEXT - 100 + (t - CONTEXT + 100) // 30 * 30
        seen = torch.cat((ids[:1], ids[begin - 63 : t + 1]))
        assert 64 <= len(seen) - 1 < 64 + 30
        short.append(evals.token_losses(dense, seen)[-1])
    assert found["tokens"] == 100 and found["long"] == CONTEXT and found["short"] == 64
    assert found["loss_long"] == pytest.approx(float(long), abs=1e-4)
    assert found["loss_short"] == pytest.approx(float(torch.stack(short).mean()), abs=1e-4)
    assert found["gain"] == pytest.approx(found["loss_short"] - found["loss_long"], abs=1e-6)


@pytest.mark.parametrize("needles", [1, 8])
def test_every_decile_gets_its_questions(dense, encode, documents, needles):
    found = longcontext.needles_by_decile(dense, encode, documents, 2048, needles, 1)
    assert min(found["counts"]) >= 1 and len(found["by_depth"]) == 10
    assert found["accuracy"] == 0  # of a model with random weights


def test_questions_that_share_a_context_get_the_answers_they_get_alone(sparse, encode, documents, monkeypatch):
    task = Needles(encode, Documents(test=documents), needles=8)
    examples = task.examples("test", 8, 1024)
    together = evals.evaluate(sparse, encode, task, examples)
    monkeypatch.setattr(evaluation, "TOGETHER", 1)
    alone = evals.evaluate(sparse, encode, task, examples)
    assert together.records == alone.records and len({record.answer for record in alone.records}) > 1


def test_heat_asks_only_what_is_not_known(dense, encode, documents):
    asked = NeedleExample(name="n", prompt=(1,), depth=0.35, key="key", value="1")
    known = evals.Evaluation((evals.Record(asked, Answer("1"), Score(1.0)),))
    told = []
    say = lambda *progress: told.append(progress)  # noqa: E731
    found = evals.needle_heat(dense, encode, documents, (1024, 512), needles=4, known={1024: known}, on_progress=say)
    assert found["lengths"] == [512, 1024] and told == [("needles in 512 tokens", 1, 1)]
    assert found["accuracy"][1] == [None] * 3 + [1.0] + [None] * 6 and sum(found["counts"][0]) == 4


def test_acceptance_runs_small(dense, encode, documents):
    sizes = AcceptanceSizes((512,), (1,), 1, 400, 64, 1, 2, 2, 4)
    figures = evals.acceptance(dense, encode, documents, sizes)
    criteria = evals.acceptance_criteria(figures)
    assert [c.relation for c in criteria] == [">="] * 4
    assert not criteria[0].holds and figures["completions"]["count"] == figures["chat"]["count"] == 2
    few = evals.acceptance(dense, encode, documents, replace(sizes, completions=0, answers=0))
    assert few["needles"] == figures["needles"] and not {"completions", "chat"} & set(few)


# bytes


def test_bytes_read_count_the_index_keys(sparse):
    c, k = sparse.config, sparse.top_k
    entry, key = (4 * c.num_hidden_layers * n for n in (c.kv_lora_rank + c.qk_rope_head_dim, c.index_head_dim))
    contexts = (k // 2, 4 * k)
    short, long = map(str, contexts)
    assert evals.cache_reads(shape_of(c), contexts, "float32") == {
        "dense": {short: k // 2 * entry, long: 4 * k * entry},
        "sparse": {short: k // 2 * entry, long: k * entry + 4 * k * key},
        "index_keys": {short: 0, long: 4 * k * key},
    }
