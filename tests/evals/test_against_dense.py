"""The suite "parity": its figures beside plain ones, resumption, and that nothing is parity that was not tested."""

from dataclasses import replace
from itertools import takewhile
from typing import Any

import pytest
import torch
from rich.console import Console

import tokensieve
from tests.support import models, stdlib
from tokensieve import evals
from tokensieve.config import LongSizes, UserError
from tokensieve.evals import against_dense, parity_verdict
from tokensieve.evaluate_config import AgainstDenseSizes
from tokensieve.model import selecting
from tokensieve.report import show_suite

VOCABULARY, K = 512, 40
SIZES = AgainstDenseSizes(
    context=400, top_k=(12, K), texts=2, written=6, buckets=3, recall_queries=8, tasks=("multikey",), prompts=2
)
LONG = LongSizes(keys=2, asked=2)


@pytest.fixture(scope="module")
def documents() -> list[Any]:
    return stdlib.documents("argparse", "random")


@pytest.fixture(scope="module")
def tokenizer(documents, tmp_path_factory):
    return stdlib.tokenizer(documents, tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="module")
def sparse():
    config = models.config("v3", vocab_size=VOCABULARY, num_hidden_layers=2, max_position_embeddings=500)
    return tokensieve.sparsify(models.ours(config), top_k=K, index_heads=4, index_dim=16)


@pytest.fixture(scope="module")
def figures(sparse, tokenizer, documents) -> dict[str, Any]:
    return evals.judge_parity(sparse, tokenizer, documents, SIZES, LONG)


def test_perplexity_and_recall_are_those_of_their_functions(figures, sparse, tokenizer, documents):
    """Equal to the bit but for the longer passes, of text and continuation together: hence the tolerance."""
    sequences = evals.text_sequences(tokenizer, documents, 400, 2)
    rows = {row["arm"]: row for row in figures["texts"]}
    assert list(rows) == ["dense"] + [f"{kind} k={k}" for k in (12, K) for kind in against_dense.KINDS]
    found = {}
    for name, selection, k in (
        ("dense", "dense", None),
        ("sparse k=12", "indexer", 12),
        (f"window k={K}", "window", K),
    ):
        with selecting(sparse, selection, k):
            found[name] = evals.perplexity(sparse, sequences, K)
        assert rows[name]["ppl"]["value"] == pytest.approx(found[name].ppl, rel=1e-4)
    assert rows["dense"]["ratio"] is None and rows["sparse k=12"]["ratio"]["n"] == 2
    ratio = found["sparse k=12"].ppl / found["dense"].ppl
    assert rows["sparse k=12"]["ratio"]["value"] == pytest.approx(ratio, rel=1e-4)
    held = {row["arm"]: row for row in figures["recall"]}["sparse k=12"]
    assert held["overall"]["value"] == pytest.approx(evals.recall(sparse, sequences, 12, 8).overall, rel=1e-6)
    assert len(held["by_layer"]) == len(held["best"]) == 2
    assert [row["arm"] for row in figures["tasks"]] == ["dense", *held_arms(figures)]


def held_arms(figures: dict[str, Any]) -> list[str]:
    return [row["arm"] for row in figures["recall"]]


def test_agreement_is_that_of_greedy_decoding(figures, sparse, tokenizer, documents):
    sequences = evals.text_sequences(tokenizer, documents, 400, 2)
    agreed = []
    for ids in sequences:
        answers = []
        for selection, k in (("dense", None), ("indexer", 12)):
            with selecting(sparse, selection, k), torch.inference_mode():
                output = sparse.generate(ids[None], max_new_tokens=6, min_new_tokens=6, do_sample=False)
            answers.append(output[0, 400:].tolist())
        agreed.append(len(list(takewhile(lambda pair: pair[0] == pair[1], zip(*answers, strict=True)))))
    rows = {row["arm"]: row for row in figures["texts"]}
    assert rows["sparse k=12"]["first"]["value"] == sum(agreed) / 2
    assert rows["dense"]["same"]["value"] == 1 and rows["dense"]["first"]["value"] == 6


def test_a_stopped_run_goes_on(figures, sparse, tokenizer, documents, tmp_path):
    """It stops in the middle of the arms; the second run measures the rest alone, and the figures are the same."""
    path, asked = tmp_path / "measured.json", {"sizes": 1}

    def stop(what: str, done: int, total: int) -> None:
        if what == "texts, window k=12":
            raise KeyboardInterrupt

    finished = evals.Finished.of(path, asked, resume=False)
    with pytest.raises(KeyboardInterrupt):
        evals.judge_parity(sparse, tokenizer, documents, SIZES, LONG, on_progress=stop, finished=finished)
    with pytest.raises(UserError, match="stopped after 3 measurements; add --resume to go on with it"):
        evals.Finished.of(path, asked, resume=False)
    told = []
    finished = evals.Finished.of(path, asked, resume=True)
    again = evals.judge_parity(
        sparse, tokenizer, documents, SIZES, LONG, on_progress=lambda *line: told.append(line), finished=finished
    )
    assert told[0][:2] == ("texts, window k=12", 7) and again == figures
    steps = [done for _, done, _ in told]
    assert steps == sorted(steps) and told[-1][1] == told[-1][2]
    finished.end()
    assert "continuations" not in evals.Finished.of(path, asked, resume=False)
    with pytest.raises(
        UserError, match="--resume: sizes differ from those of .*measured.json; repeat the same command"
    ):
        evals.Finished.of(path, {"sizes": 2}, resume=True)
    with pytest.raises(UserError, match="nothing can be resumed; leave --resume out"):
        evals.Finished.of(tmp_path / "none.json", asked, resume=True)
    path.write_text("{}")
    with pytest.raises(UserError, match="cannot be read; remove it"):
        evals.Finished.of(path, asked, resume=True)


def test_a_stopped_suite_of_long_contexts_goes_on(sparse, tokenizer, documents):
    sizes = replace(LONG, contexts=(300,), tasks=("single", "multikey"), prompts=2, texts=1, buckets=2)
    finished, told = evals.Finished(), []
    arms = evals.long_arms(sparse)
    first = evals.judge_long(arms, tokenizer, documents, sizes, finished=finished)
    again = evals.judge_long(arms, tokenizer, documents, sizes, lambda *line: told.append(line), finished=finished)
    assert again == first and not told
    del finished._record["measured"][f"multikey in 300 tokens, sparse k={K}"]
    again = evals.judge_long(arms, tokenizer, documents, sizes, lambda *line: told.append(line), finished=finished)
    assert again == first and {what for what, _, _ in told} == {f"multikey in 300 tokens, sparse k={K}"}


def test_refusals(sparse, tokenizer, documents):
    def judged(context: int | None = None, **changes: Any) -> None:
        evals.judge_parity(sparse, tokenizer, documents, replace(SIZES, **changes), LONG, context)

    for context in (K, K + 1):
        with pytest.raises(UserError, match=f"prompts of {context} tokens are not longer than k = {K}.*nothing can be"):
            judged(context)
    with pytest.raises(UserError, match="4 keys are too few"):
        judged(top_k=(4,))
    with pytest.raises(UserError, match="prompts of 498 tokens and 6 more are"):
        judged(498)
    dense = models.ours(models.config("v3", vocab_size=VOCABULARY, num_hidden_layers=1))
    with pytest.raises(UserError, match="this one is dense; sparsify it first"):
        evals.judge_parity(dense, tokenizer, documents, SIZES, LONG)
    with pytest.raises(UserError, match="parity.texts is 0"):
        replace(SIZES, texts=0)
    with pytest.raises(UserError, match="losses that parity allows"):
        replace(SIZES, task_loss=-0.1)


def test_a_sweep_is_of_parts_of_the_models_k(sparse):
    assert against_dense.swept(sparse, replace(SIZES, top_k=())) == (10, 20, 40)
    assert against_dense.swept(sparse, replace(SIZES, top_k=(16, 8))) == (8, 16)


def estimate(value: float, half: float, n: int = 64) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def measured(
    sparse_ppl: float = 1.0, half: float = 0.001, task: float = 0.0, window: float = -0.5, **changes: Any
) -> dict[str, Any]:
    rows = [{"task": "single", "arm": "dense", "score": {"value": 0.9}, "difference": None, "shortest": 2000}]
    for arm, less in (("sparse k=128", task), ("window k=128", window)):
        rows.append({"task": "single", "arm": arm, "difference": estimate(less, 0.01), "shortest": 2000} | changes)
    texts = [
        {"arm": "sparse k=128", "ratio": estimate(sparse_ppl, half)},
        {"arm": "window k=128", "ratio": estimate(1.0, 0.001)},
    ]
    return {"context": 2048, "top_k": [128], "texts": texts, "tasks": rows}


@pytest.mark.parametrize(
    ("given", "verdict", "reason"),
    [
        ({}, "parity", "all 2 intervals lie within their bounds"),
        ({"sparse_ppl": 1.02}, "no parity", "worse than allowed in perplexity"),
        ({"task": -0.2}, "no parity", "worse than allowed in single"),
        ({"half": 0.05}, "undecided", "too few prompts to tell in perplexity"),
        ({"window": 0.0}, "undecided", "the last k keys are not clearly worse"),
        ({"shortest": 128}, "undecided", "no task could be judged"),
    ],
)
def test_verdicts(given, verdict, reason):
    (found,) = parity_verdict.verdicts(measured(**given), 0.01, 0.03)
    assert found["verdict"] == verdict and reason in found["reason"]


def test_what_was_not_tested_is_never_parity():
    """Prompts of at most k + 1 tokens select nothing for any token that they predict."""
    for context in (100, 129):
        (found,) = parity_verdict.verdicts(measured() | {"context": context}, 0.01, 0.03)
        assert found["verdict"] == "undecided" and "not longer than k = 128" in found["reason"]
    (found,) = parity_verdict.verdicts(measured(shortest=128), 0.01, 0.03)
    assert found["left_out"] == ["single: a prompt of 128 tokens is not longer than k"]
    figures = measured()
    figures["tasks"][0]["score"]["value"] = 0.1
    (found,) = parity_verdict.verdicts(figures, 0.01, 0.03)
    assert found["left_out"] == ["single: not measurable with this model, dense scores 10%"]
    assert [c["name"] for c in found["criteria"]] == ["perplexity"]
    assert found["verdict"] == "undecided" and "no task could be judged" in found["reason"]


def test_the_terminal_shows_all_parts(figures):
    console = Console(width=200, record=True)
    show_suite(console, "parity", figures)
    text = console.export_text()
    for part in ("perplexity over dense's", "recall of the mass by layer", "multikey", f"k = {K}:", "not judged"):
        assert part in text, part
