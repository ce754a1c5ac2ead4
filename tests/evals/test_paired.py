"""Estimates of two runs: paired if both read the same prompts, and only then."""

import json
import math

import pytest
import torch

from tokensieve.evals import ArmScores, Evaluation, Record, intervals, longcontext, metrics_of
from tokensieve.evals.losses import Texts, documents_of, perplexity_of
from tokensieve.evals.paired import compared, digest, ratio_of, share_of, texts_digest
from tokensieve.tasks import Answer, Score
from tokensieve.tasks.retrieval import NeedleExample


def test_shares_of_the_same_questions_are_paired_by_context():
    first, second = share_of([[1, 0], [1, 1]], "p"), json.loads(json.dumps(share_of([[0, 0], [1, 1]], "p")))
    how, found = compared(first, second)
    assert how == "difference" and found == intervals.clustered_difference([0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 1, 1])
    assert first["value"] == 0.75 and first["n"] == 4 and found.value == -0.25


def test_perplexities_of_the_same_texts_are_paired_by_text():
    """The texts differ far more than the runs do, which only pairs show."""
    first, second = ratio_of([1.0, 2.0, 3.0], "p"), ratio_of([1.1, 2.1, 3.1], "p")
    how, found = compared(first, second)
    assert how == "ratio" and found.value == pytest.approx(math.exp(0.1)) and found.low == pytest.approx(found.high)
    assert first["high"] - first["low"] > 10 and first["value"] == pytest.approx(math.exp(2))


def test_other_prompts_are_not_paired():
    share, ratio = share_of([[1], [0]], "p"), ratio_of([1.0, 2.0], "p")
    assert compared(share, share_of([[1], [0]], "q")) is None
    assert compared(ratio, {key: value for key, value in ratio.items() if key != "prompts"}) is None
    assert compared({"value": 1.0, "low": None, "high": None, "n": 1}, ratio) is None


def test_a_digest_is_of_every_token_and_of_what_is_measured():
    texts = [torch.tensor([1, 2, 3]), torch.tensor([4])]
    same = texts_digest([text.clone() for text in texts], [0, 8])
    assert same == texts_digest(texts, [0, 8]) and len(same) == 16
    others = [
        texts_digest(texts, [0, 9]),
        texts_digest(texts[:1], [0, 8]),
        texts_digest([torch.tensor([1, 2]), torch.tensor([3, 4])], [0, 8]),
        digest(["1, 2, 3", "4"]),
    ]
    assert len({same, *others}) == 5


def test_an_evaluation_keeps_what_its_figures_are_made_of():
    """Two runs can be compared by what `metrics_of` returns, as two arms of one run are."""
    contexts = [(1, 2), (1, 3)]
    examples = [
        NeedleExample(name="", prompt=[number], context=contexts[number // 2], target=[5], depth=0.5, key="", value="")
        for number in range(4)
    ]

    def scores(nats: float, *right: int) -> ArmScores:
        losses = torch.tensor([[1.0, 1.0, 2.0], [1.0, 2.0, 5.0]]) + nats
        records = tuple(Record(e, Answer(""), Score(float(x))) for e, x in zip(examples, right, strict=True))
        return ArmScores(perplexity_of(losses, 1), Evaluation(records), texts_digest([torch.arange(4)], [1]))

    arms = {"dense": scores(0.0, 1, 1, 1, 0), "sparse": scores(0.2, 1, 0, 1, 1)}
    metrics = json.loads(json.dumps(metrics_of(arms)))
    dense, sparse = (metrics[arm]["estimates"] for arm in arms)
    assert (
        sparse["needle"]["by_context"] == [[1, 0], [1, 1]] and sparse["needle"]["value"] == metrics["sparse"]["needle"]
    )
    both = intervals.clustered_share([1, 0, 1, 1], [0, 0, 1, 1])  # of two contexts, not of four questions
    assert (sparse["needle"]["low"], sparse["needle"]["high"]) == (both.low, both.high)
    assert metrics["sparse"]["needle_interval"] == [both.low, both.high]
    of_arms = metrics["compared"]["needle"]["dense"]
    assert (of_arms["n"], of_arms["clusters"]) == (4, 2)
    how, ratio = compared(dense["ppl"], sparse["ppl"])
    assert how == "ratio" and vars(ratio) == pytest.approx(metrics["compared"]["ppl"]["dense"])
    how, difference = compared(dense["needle"], sparse["needle"])
    assert how == "difference" and difference.value == metrics["compared"]["needle"]["dense"]["value"] == 0
    assert difference == intervals.clustered_difference([1, 0, 1, 1], [1, 1, 1, 0], [0, 0, 1, 1])
    assert vars(difference) == of_arms


def test_texts_of_one_document_are_no_texts_of_their_own():
    """A document's texts differ from others' alike: of two documents there are two values, however they are cut."""
    nats, documents = [0.0, 0.01, 0.0, 0.01, 0.1, 0.11, 0.1, 0.11], (0, 0, 0, 0, 1, 1, 1, 1)
    alone, cut = ratio_of(nats, "p"), ratio_of(nats, "p", (*documents, 2))
    assert cut["documents"] == list(documents) and (cut["n"], cut["clusters"]) == (8, 2)
    assert cut["high"] - cut["low"] > 5 * (alone["high"] - alone["low"])
    _, found = compared(ratio_of([0.0] * 8, "p", documents), cut)
    assert (found.low, found.high, found.clusters) == pytest.approx((cut["low"], cut["high"], 2))

    def scores(nats: float) -> ArmScores:
        losses = torch.tensor([[0.0, 1.0], [0.0, 1.1], [0.0, 3.0]]) + nats
        return ArmScores(perplexity_of(losses, 0, 2, (0, 1, 0)), None, "p")

    metrics = metrics_of({"dense": scores(0.0), "sparse": scores(0.1)})
    assert metrics["compared"]["ppl"]["dense"]["clusters"] == metrics["dense"]["estimates"]["ppl"]["clusters"] == 2


def test_tenths_of_a_context_have_intervals_over_contexts():
    """Both questions of a context about one tenth are right or wrong together: 4 contexts, not 8 questions."""
    contexts = [[(0.05, right), (0.08, right), (0.95, 1.0)] for right in (1.0, 0.0, 1.0, 1.0)]
    first, *between, last = longcontext._estimates(contexts)
    assert (first["value"], first["n"], first["clusters"]) == (0.75, 8, 4)
    assert first["low"] < intervals.share(6, 8).low and between == [None] * 8 and last["clusters"] == last["n"] == 4


def test_losses_know_the_documents_of_their_texts():
    texts = Texts(tuple(torch.arange(4) for _ in range(3)), (0, 1, 0))
    assert documents_of(texts[1:]) == (1, 0) and len(texts[1:]) == 2 and torch.equal(texts[2], torch.arange(4))
    assert documents_of([torch.arange(4)] * 2) == (0, 1)
