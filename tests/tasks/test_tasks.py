"""Needles, chat and completion: what is held out, what fits, and how answers are scored."""

import importlib.util
import random
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tokensieve.config import UserError
from tokensieve.data import train_tokenizer
from tokensieve.tasks import Document, PlainEncoder, chat, completion, phrasing, retrieval

MODULES = ("argparse", "ast", "inspect", "textwrap", "typing", "random", "shutil")


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    found = []
    for name in MODULES:
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        found.append(Document(name, Path(spec.origin).read_text(encoding="utf-8")))
    return found


@pytest.fixture(scope="module")
def encode(corpus, tmp_path_factory) -> PlainEncoder:
    from tokenizers import Tokenizer

    folder = train_tokenizer((d.text for d in corpus), tmp_path_factory.mktemp("tokenizer"), vocab_size=1024)
    return PlainEncoder(Tokenizer.from_file(str(folder / "tokenizer.json")))


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


@pytest.mark.parametrize(("context", "needles"), [(1024, 1), (2048, 16)])
def test_every_answer_is_in_the_context_once_and_everything_fits(encode, corpus, context, needles):
    for item in retrieval.needle_contexts(encode, corpus, context, needles, count=4, seed=2):
        text = encode.decode(item.context_ids)
        assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>") and len(item.questions) == needles
        for ask in item.questions:
            assert text.count(ask.value) == 1 and ask.key in text
            assert encode.decode(ask.answer_ids) == ask.value + "<｜end▁of▁sentence｜>"
            asked = encode.decode(ask.question_ids)
            asked, _, begun = asked.partition("<｜Assistant｜></think>")
            assert asked.startswith("\n\n") and ask.value not in asked
            assert begun.endswith(": ") and begun[:-2] in ask.key and begun[:-2] in asked
            at = len(encode(text[len("<｜begin▁of▁sentence｜><｜User｜>") : text.index(ask.value)])) + 2
            assert 0 <= at / len(item.context_ids) - ask.depth < 60 / len(item.context_ids)
            assert context * 0.9 < len(item.context_ids) + len(ask.question_ids) + len(ask.answer_ids) <= context


def test_a_needle_lies_in_the_tenth_it_was_put_in(encode, corpus):
    for depth in range(10):
        for item in retrieval.needle_contexts(encode, corpus[3:5], 1500, 1, count=5, depth=depth):
            assert int(item.questions[0].depth * 10) == depth


def test_needles_spread_over_all_depths(encode, corpus):
    contexts = retrieval.needle_contexts(encode, corpus, 4096, 16, count=6)
    tenths = {int(q.depth * 10) for item in contexts for q in item.questions}
    assert tenths == set(range(10))


def test_contexts_depend_on_the_seed_alone(encode, corpus):
    first, again, other = (retrieval.needle_contexts(encode, corpus, 1024, 4, count=2, seed=s) for s in (1, 1, 2))
    assert first == again and first != other


def test_contexts_that_cannot_be_made(encode, corpus):
    with pytest.raises(UserError, match="do not fit"):
        retrieval.needle_contexts(encode, corpus, 256, 16)
    with pytest.raises(UserError, match="no held-out documents"):
        retrieval.needle_contexts(encode, [], 1024)
    with pytest.raises(UserError, match="no lines"):
        retrieval.needle_contexts(encode, [Document("x", "word " * 5000)], 1024, 1)


class FakeCache:
    def __init__(self):
        self.ids: tuple[int, ...] = ()
        self.rows = 1

    def batch_repeat_interleave(self, rows: int) -> None:
        self.rows = rows


class Reader(torch.nn.Module):
    """Answers from `answers` (question ids -> answer ids), and checks that it is shown context and question."""

    def __init__(self, contexts, answers, vocab):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.contexts, self.answers, self.vocab = contexts, answers, vocab
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
        (context,) = [c for c in self.contexts if tuple(c.context_ids) == past_key_values.ids]
        best = torch.stack([self.row(context, row) for row in ids])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(best, self.vocab).float())

    def row(self, context, ids):
        """The answer at its own positions, something else everywhere else."""
        for ask in context.questions:
            turn = ask.question_ids + ask.answer_ids[:-1]
            if ids[: len(turn)].tolist() == turn:
                best = torch.full_like(ids, 7)
                best[len(ask.question_ids) - 1 : len(turn)] = torch.tensor(self.answers(ask))
                return best
        raise AssertionError("a question without its context")


@pytest.mark.parametrize("right", [True, False])
def test_evaluation_reads_a_context_once_and_asks_from_its_cache(encode, corpus, monkeypatch, right):
    monkeypatch.setattr(retrieval, "PREFILL_CHUNK", 2048)
    monkeypatch.setattr(retrieval, "TOGETHER", 3 * 4096)
    monkeypatch.setitem(sys.modules, "tokensieve.model", SimpleNamespace(LatentCache=FakeCache))
    contexts = retrieval.needle_contexts(encode, corpus, 4096, 8, count=2)
    model = Reader(contexts, lambda ask: ask.answer_ids if right else [*ask.answer_ids[:-1], 5], encode.vocab_size)
    seen = []
    result = retrieval.evaluate(model, contexts, on_context=lambda *progress: seen.append(progress))
    assert result.accuracy == float(right) and len(result.records) == sum(result.counts) == 16
    assert model.prefilled == sum(len(c.context_ids) for c in contexts)  # once, in chunks
    assert model.together == [3, 3, 2] * 2  # as many as fit
    assert seen == [(1, 2), (2, 2)]
    assert all(share in (None, float(right)) for share in result.by_depth)


def test_scores_by_depth():
    record = [retrieval.NeedleRecord(0, "k", depth, "1", "1", good) for depth, good in ((0.05, True), (0.07, False))]
    result = retrieval.score(record)
    assert result.by_depth == (0.5, *[None] * 9) and result.counts == (2, *[0] * 9)
    with pytest.raises(UserError, match="no needle questions"):
        retrieval.score([])


@pytest.mark.parametrize(
    ("completion_text", "value"),
    [("493817", 1.0), (" The code is 493817.", 1.0), ("493817 or 493818", 0.0), ("49381", 0.0), ("", 0.0)],
)
def test_reward(completion_text, value):
    assert retrieval.reward(completion_text, "493817") == value


# chat

SOURCE = '''
def add(first, second=1):
    """Add two numbers and say so."""
    print("adding")
    return first + second

class Box:
    def open(self):
        """Open the box without a sound."""
        return self

def undocumented():
    return 1
'''


def test_chat_examples_come_from_documented_functions():
    made = list(chat.examples([Document("box", SOURCE), Document("prose", "not python at all {")]))
    functions = [e for e in made if e.kind != "talk"]
    assert [e.name for e in functions] == ["box.add", "box.open"]
    for example in functions:
        if example.kind == "explain":
            assert example.answer in ("Add two numbers and say so.", "Open the box without a sound.")
        else:
            assert "add(first, second=1)" in example.prompt and chat.parses(example.answer)
    assert len(made) > 30 and all(e.prompt and e.answer for e in made)


def test_chat_examples_are_framed(encode):
    for name, ids in chat.encoded_examples([Document("box", SOURCE)], encode):
        assert name and ids[:2] == [0, 3] and ids[-1] == 1 and ids.count(1) == 1 and ids.count(4) == 1


class Writer(torch.nn.Module):
    """Generates fixed ids after every prompt, padded to one width."""

    def __init__(self, answers, pad=2):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.answers, self.pad, self.prompts = answers, pad, []

    def generate(self, ids, attention_mask=None, **_):
        rows = []
        for place, row in enumerate(ids.tolist()):
            real = row if attention_mask is None else [t for t, m in zip(row, attention_mask[place], strict=True) if m]
            self.prompts.append(real)
            rows.append(self.answers(real))
        width = max(map(len, rows))
        return torch.cat([ids, torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])], dim=1)


def test_chat_evaluation_counts_whole_answers(encode):
    prompts = [chat.ChatExample("a", "explain", "What?", ""), chat.ChatExample("b", "write", "Write.", "")]
    assert chat.evaluate(Writer(lambda _: [*encode("x = 1"), 1]), encode, prompts).good == 1.0
    broken = chat.evaluate(Writer(lambda _: [*encode("def ("), 1]), encode, prompts)
    assert (broken.good, broken.ended, broken.parsed) == (0.5, 1.0, 0.0)
    assert chat.evaluate(Writer(lambda _: encode("endless")), encode, prompts).good == 0.0
    with pytest.raises(UserError, match="no chat prompts"):
        chat.evaluate(Writer(lambda _: [1]), encode, [])


# completion

MODULE = '''"""A module."""
LIMIT = 3


def documented(
    first: int,
    second: dict[str, int] = {},
) -> int:
    """Say what it does.

    At length.
    """
    return first


class Thing:
    def long(self):
        # a comment of the body
        a = 1
        b = 2
        return a + b

    def short(self):
        return 1

    def one_line(self): return """x"""
'''


def test_completion_examples_split_functions_before_their_body():
    made = {e.name: e for e in completion.examples([Document("m", MODULE), Document("prose", "{")])}
    assert list(made) == ["m.documented", "m.long"]
    assert made["m.documented"].head.endswith('    At length.\n    """\n')
    assert made["m.long"].head == "    def long(self):\n" and made["m.long"].indent == 4
    for example in made.values():
        assert MODULE.startswith(example.before + example.head)


def test_a_completion_ends_where_the_function_ends():
    example = next(e for e in completion.examples([Document("m", MODULE)]) if e.name == "m.long")
    text = "        a = 1\n\n        return a\n\n    def next(self):\n        pass\n"
    assert completion.finish(example, text, complete=True) == "        a = 1\n\n        return a\n"
    assert completion.finish(example, "        a = 1\n        b = (", complete=False) == "        a = 1"
    assert completion.parses(example.head, "        a = 1")
    assert not completion.parses(example.head, "        a = (")
    assert not completion.parses(example.head, "")
    assert not completion.parses('def f():\n    """Doc."""\n', "")
    assert completion.parses('def f():\n    """Doc."""\n', "    return '''\nx\n'''")


LOOP = "            'x', 'x',\n" * 20


@pytest.mark.parametrize(
    ("body", "cut"),
    [
        ("        a = 1\n        b = [\n" + LOOP, "        a = 1"),
        ("        if a:\n            b = 1\n        else:\n            c = '", "        if a:\n            b = 1"),
        ("        for a in b:\n            c()\n            d(", "        for a in b:\n            c()"),
        ("        a = 1\n        b = 2\n", "        a = 1\n        b = 2"),
        ("        return [\n" + LOOP, ""),  # the first statement never ends
        ('        """A docstring."""\n        return (\n', ""),  # no statement beside the docstring
        ("        # comments alone\n        # are nothing\n        x", ""),
        ("        return 1", ""),  # no whole line
    ],
)
def test_a_completion_that_the_budget_cut_is_judged_to_its_last_whole_statement(body: str, cut: str):
    example = next(e for e in completion.examples([Document("m", MODULE)]) if e.name == "m.long")
    assert completion.finish(example, body, complete=False) == cut
    assert completion.parses(example.head, cut) == bool(cut)


def test_a_completion_that_the_model_ended_is_judged_whole():
    example = next(e for e in completion.examples([Document("m", MODULE)]) if e.name == "m.long")
    broken = "        a = 1\n        b = (\n"
    assert completion.finish(example, broken, complete=True) == broken  # by the end marker
    assert completion.finish(example, broken + "    x = 2\n", complete=False) == broken.rstrip("\n")  # by a dedent
    assert not completion.parses(example.head, broken)


def test_real_bodies_parse(corpus):
    texts = {d.name: d.text for d in corpus}
    made = list(completion.examples(corpus))
    bodies = [(e, texts[e.name.split(".")[0]][len(e.before) + len(e.head) :]) for e in made]
    good = [completion.parses(e.head, completion.finish(e, body, complete=True)) for e, body in bodies]
    assert len(made) > 200 and sum(good) / len(good) > 0.98


def test_prompts_fit_and_begin_with_a_line(encode, corpus):
    for example in list(completion.examples(corpus))[::20]:
        ids = completion.prompt_ids(encode, example, 400)
        text = encode.decode(ids[1:])
        assert ids[0] == 0 and (example.before + example.head).endswith(text)
        assert len(ids) <= max(400, 1 + len(encode(example.head)))
        before = (example.before + example.head).removesuffix(text)
        assert not before or before.endswith("\n")


def test_completion_evaluation(encode):
    made = list(completion.examples([Document("m", MODULE)]))
    bodies = {"m.documented": "    return 2\n\n\nx = 1\n", "m.long": "        return (\n"}

    def answer(prompt: list[int]) -> list[int]:
        text = encode.decode(prompt)
        return encode(bodies["m.long" if "long" in text else "m.documented"])

    model = Writer(answer)
    result = completion.evaluate(model, encode, made, prompt_tokens=300)
    assert result.parsed == 0.5 and result.completions == ("    return 2\n\n", "        return (")
    assert sorted(model.prompts) == sorted(completion.prompt_ids(encode, e, 300) for e in made)
    with pytest.raises(UserError, match="no functions"):
        completion.evaluate(model, encode, [])
