"""Needles: what is held out, what fits, and how answers are scored."""

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.models import TakesOptions
from tokensieve.config import UserError
from tokensieve.evals import evaluate, evaluation
from tokensieve.evals.longcontext import depths, needle_results
from tokensieve.tasks import Answer, Document, Documents, phrasing, retrieval
from tokensieve.tasks.retrieval import Needles

# phrasings, keys and values


@pytest.mark.parametrize(
    "pool",
    ["NOUNS", "OPENINGS", "CONNECTIVES", "VERBS", "CLAUSES", "ENDINGS", "FORMS", "QUESTION_OPENINGS", "CLOSINGS"],
)
def test_held_out_phrasings_are_never_trained_on(pool):
    split = getattr(phrasing, pool)
    bare = {""} if pool in ("QUESTION_OPENINGS", "CLOSINGS") else set()
    assert set(split.train) & set(split.held_out) == bare  # to open or close with nothing is no phrasing
    assert len(set(split.train)) >= 10 and len(set(split.held_out)) >= 4


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_training_and_evaluation_share_no_key_and_no_value(seed):
    for held_out in (False, True):
        needles = retrieval.draw_needles(random.Random(seed), 16, held_out)
        assert all(phrasing.is_held_out_key(n.key.words) == held_out for n in needles)
        assert all(phrasing.is_held_out_value(n.value) == held_out for n in needles)
        assert all((n.noun in phrasing.NOUNS.held_out) == held_out for n in needles)
        assert len({n.value for n in needles}) == len({n.key.words[-2:] for n in needles}) == 16
        for needle in needles:
            assert needle.line.endswith("\n") and needle.line.count("\n") == 1
            assert needle.line.count(needle.value) == 1 and needle.key.render() in needle.line
            asked = phrasing.question(random.Random(seed), needle.key, needle.noun, held_out)
            assert needle.value not in asked and "\n" not in asked and "{" not in asked + needle.line
            if held_out:
                assert needle.key.render() in asked


def test_phrasings_are_many():
    rng = random.Random(0)
    key = phrasing.Key(("amber", "falcon"), "-", "{}")
    lines = {phrasing.statement(rng, key, "code", "123456", held_out=False) for _ in range(2000)}
    asked = {phrasing.question(rng, key, "code", held_out=False) for _ in range(2000)}
    assert len(lines) > 1500 and len(asked) > 1000


@pytest.mark.parametrize(
    ("style", "text"),
    [
        ("-", "the amber-falcon lab"),
        ("_", "the amber_falcon lab"),
        ("`", "the `amber-falcon` lab"),
        (" ", "the amber falcon lab"),
    ],
)
def test_key_styles(style, text):
    key = phrasing.Key(("amber", "falcon"), style, "the {} lab")
    assert style in phrasing.STYLES and key.render() == text
    assert phrasing.answer(key, "4938") == text.removeprefix("the ").removesuffix(" lab") + ": 4938"


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_word_salad_keeps_key_and_value_and_nothing_else_that_counts(seed):
    rng = random.Random(seed)
    (needle,) = retrieval.draw_needles(rng, 1, held_out=False)
    words = phrasing.salad(rng, 0, 9).split()
    assert len(words) <= 9 and all(word.isalpha() and word.islower() for word in words)
    lines = [phrasing.statement(rng, needle.key, needle.noun, needle.value, held_out=False) for _ in range(40)]
    asked = [phrasing.question(rng, needle.key, needle.noun, held_out=False) for _ in range(40)]
    assert all(line.count(needle.value) == 1 and needle.key.render() in line for line in lines)
    assert all(needle.key.render(framed=False) in question and needle.value not in question for question in asked)


# training sequences


def taker(encode, corpus):
    tokens = np.array([t for d in corpus for t in encode(d.text)])
    return lambda rng, length: tokens[rng.randrange(0, len(tokens) - length) :][:length]


@pytest.mark.parametrize("context", [256, 512, 4096])
def test_training_sequences_fill_the_context_and_hold_their_answers(encode, corpus, context):
    take, bounds = taker(encode, corpus), retrieval.LineBounds(encode)
    for seed in range(20):
        ids, told = retrieval.training_sequence(random.Random(seed), encode, bounds, take, context)
        assert told.shape == ids.shape == (context,) and told.dtype == bool
        assert ids[:2].tolist() == [0, 3] and ids[-1] == 1 and (ids == 0).sum() == 1
        turns = encode.decode(ids).split("<｜Assistant｜></think>")
        text, answers = turns[0], [turn.split("<｜end▁of▁sentence｜>")[0] for turn in turns[1:]]
        assert 1 <= len(answers) <= 16
        values = [answer.rpartition(": ")[2] for answer in answers]
        assert all(value.isdigit() and value in text for value in values)
        assert all(answer.removesuffix(": " + value) in text for answer, value in zip(answers, values, strict=True))
        # Only the value and the end of the turn are what the context alone can tell: the key stands in the question.
        assert encode.decode(ids[told]) == "".join(value + "<｜end▁of▁sentence｜>" for value in values)
        assert (ids == 4).sum() == len(answers) and (ids == 3).sum() == len(answers)


def test_a_context_too_short_for_a_needle(encode, corpus):
    with pytest.raises(UserError, match="too short"):
        retrieval.training_sequence(
            random.Random(0), encode, retrieval.LineBounds(encode), taker(encode, corpus), context=32
        )


def test_lines_are_spliced_between_lines(encode):
    text = "def f():\n    return 1\n\n\nclass A:\n    x = 2\n"
    ids = np.array(encode(text))
    starts = retrieval.LineBounds(encode)(ids)
    prefixes = [encode.decode(ids[:p]) for p in starts]
    assert prefixes == ["def f():\n", "def f():\n    return 1\n\n\n", "def f():\n    return 1\n\n\nclass A:\n"]


# evaluation contexts


def needles(encode, documents, context, count, per_context=16, **options) -> list[list[retrieval.NeedleExample]]:
    """`count` contexts' questions."""
    seed = options.pop("seed", 0)
    task = Needles(encode, Documents(test=documents), per_context, **options)
    examples = task.examples("test", count * per_context, context, seed)
    assert len(examples) == count * per_context
    contexts = [examples[i : i + per_context] for i in range(0, len(examples), per_context)]
    assert all(example.context is asked[0].context for asked in contexts for example in asked)
    return contexts


@pytest.mark.parametrize(("context", "per_context"), [(1024, 1), (2048, 16)])
def test_every_answer_is_in_the_context_once_and_everything_fits(encode, corpus, context, per_context):
    for questions in needles(encode, corpus, context, 4, per_context, seed=2):
        text = encode.decode(questions[0].context)
        assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>") and len(questions) == per_context
        for ask in questions:
            assert text.count(ask.value) == 1 and ask.key in text
            assert encode.decode(ask.target) == ask.value + "<｜end▁of▁sentence｜>"
            asked = encode.decode(ask.prompt)
            asked, _, begun = asked.partition("<｜Assistant｜></think>")
            assert asked.startswith("\n\n") and ask.value not in asked
            assert begun.endswith(": ") and begun[:-2] in ask.key and begun[:-2] in asked
            at = len(encode(text[len("<｜begin▁of▁sentence｜><｜User｜>") : text.index(ask.value)])) + 2
            assert 0 <= at / len(ask.context) - ask.depth < 60 / len(ask.context)
            assert context * 0.9 < len(ask.context) + len(ask.prompt) + len(ask.target) <= context


def test_a_needle_lies_in_the_tenth_it_was_put_in(encode, corpus):
    for depth in range(10):
        for (ask,) in needles(encode, corpus[3:5], 1500, 5, 1, depth=depth):
            assert int(ask.depth * 10) == depth


def test_needles_spread_over_all_depths(encode, corpus):
    tenths = {int(ask.depth * 10) for questions in needles(encode, corpus, 4096, 6) for ask in questions}
    assert tenths == set(range(10))


def test_contexts_depend_on_the_seed_alone(encode, corpus):
    first, again, other = (needles(encode, corpus, 1024, 2, 4, seed=s) for s in (1, 1, 2))
    assert first == again and first != other


def test_contexts_that_cannot_be_made(encode, corpus):
    with pytest.raises(UserError, match="do not fit"):
        needles(encode, corpus, 256, 1)
    with pytest.raises(UserError, match="no held-out documents"):
        needles(encode, [], 1024, 1)
    with pytest.raises(UserError, match="no lines"):
        needles(encode, [Document("x", "word " * 5000)], 1024, 1, 1)


class FakeCache:
    def __init__(self):
        self.ids: tuple[int, ...] = ()
        self.rows = 1

    def batch_repeat_interleave(self, rows: int) -> None:
        self.rows = rows


class Reader(torch.nn.Module):
    """Answers from `answers` (example -> ids), and checks that it is shown context and question."""

    def __init__(self, examples, answers, vocab):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.model = TakesOptions()
        self.examples, self.answers, self.vocab = examples, answers, vocab
        self.prefilled = 0
        self.together: list[int] = []

    def forward(self, ids, past_key_values, use_cache, logits_to_keep=0):
        if logits_to_keep == 1:
            assert ids.shape[0] == 1 and ids.shape[1] <= 2048
            past_key_values.ids += tuple(ids[0].tolist())
            self.prefilled += ids.shape[1]
            return SimpleNamespace(logits=torch.zeros(1, 1, self.vocab))
        assert len(ids) == past_key_values.rows
        self.together.append(len(ids))
        best = torch.stack([self.row(past_key_values.ids, row) for row in ids])[:, -logits_to_keep:]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(best, self.vocab).float())

    def row(self, context, ids):
        """The answer at its own positions, something else everywhere else."""
        for ask in self.examples:
            turn = [*ask.prompt, *ask.target[:-1]]
            if ask.context == context and ids[: len(turn)].tolist() == turn:
                best = torch.full_like(ids, 7)
                best[len(ask.prompt) - 1 : len(turn)] = torch.tensor(self.answers(ask))
                return best
        raise AssertionError("a question without its context")


@pytest.mark.parametrize("right", [True, False])
def test_evaluation_reads_a_context_once_and_asks_from_its_cache(encode, corpus, monkeypatch, right):
    monkeypatch.setattr(evaluation, "PREFILL_CHUNK", 2048)
    monkeypatch.setattr(evaluation, "TOGETHER", 3 * 4096)
    monkeypatch.setattr(evaluation, "LatentCache", FakeCache)
    task = Needles(encode, Documents(test=corpus), 8, 4096)
    examples = task.examples("test", 16)
    model = Reader(examples, lambda ask: ask.target if right else [*ask.target[:-1], 5], encode.vocab_size)
    seen = []
    result = evaluate(model, encode, task, examples, on_progress=lambda *progress: seen.append(progress))
    assert result.value == float(right) and [record.example for record in result.records] == examples
    assert model.prefilled == len(examples[0].context) + len(examples[8].context)  # once each, in chunks
    assert model.together == [3, 3, 2] * 2  # as many as fit
    assert seen == [("needles", 1, 2), ("needles", 2, 2)]
    table = depths(needle_results(result))
    assert all(share in (None, float(right)) for share in table.by_depth) and sum(table.counts) == 16
    with pytest.raises(UserError, match="no examples of needles"):
        evaluate(model, encode, task, [])


def test_an_answer_that_only_begins_right_is_wrong(encode, corpus):
    task = Needles(encode, Documents(test=corpus), 1, 1024)
    (ask,) = task.examples("test", 1)
    assert task.score(ask, Answer(ask.value)).value == task.score(ask, Answer(" " + ask.value)).value == 1
    for wrong in (Answer(ask.value, ended=False), Answer(ask.value + "1"), Answer(ask.value[:-1]), Answer("")):
        assert task.score(ask, wrong).value == 0


def test_scores_by_depth(encode, corpus):
    task = Needles(encode, Documents(test=corpus), 1, 1024)
    (ask,) = task.examples("test", 1)
    records = []
    for depth, text in ((0.05, ask.value), (0.07, "")):
        placed = replace(ask, depth=depth)
        records.append(evaluation.Record(placed, Answer(text), task.score(placed, Answer(text))))
    results = needle_results(evaluation.Evaluation(tuple(records)))
    assert results == [(0.05, 1.0), (0.07, 0.0)]
    assert depths(results).by_depth == (0.5, *[None] * 9) and depths(results).counts == (2, *[0] * 9)


@pytest.mark.parametrize(
    ("completion_text", "value"),
    [("493817", 1.0), (" The code is 493817.", 1.0), ("493817 or 493818", 0.0), ("49381", 0.0), ("", 0.0)],
)
def test_reward(completion_text, value):
    example = retrieval.NeedleExample(name="n", prompt=(1,), depth=0.5, key="falcon 42", value="493817")
    task = Needles(None, Documents())
    assert task.reward(example, Answer(completion_text)) == value
    assert task.reward(example, Answer("falcon 42: " + completion_text)) == value  # a key may hold a number
