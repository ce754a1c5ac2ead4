"""Tasks with long contexts: what is hidden and where, how long prompts are, what the splits share, and the scores."""

import re
from collections import Counter
from dataclasses import replace

import pytest

from tests.support import stdlib
from tests.tasks.test_encoder import CHATML, bpe, fast
from tokensieve.config import LONG_TASKS, LongSizes, UserError
from tokensieve.tasks import Answer, Document, Documents, encoder
from tokensieve.tasks.ruler import CommonWords, Pairs, Variables, haystack, long_tasks
from tokensieve.tasks.ruler.question import SLACK
from tokensieve.tasks.ruler.strings import FORMS, distinct, draw, overlaps, split_of

MODULES = ("argparse", "inspect", "textwrap", "random")


@pytest.fixture(scope="module")
def documents() -> Documents:
    found = stdlib.documents(*MODULES)
    return Documents(test=found[:2], train=found[2:])


@pytest.fixture(scope="module")
def around(encode, documents) -> dict:
    return {"tokenizer": encode, "documents": documents}


@pytest.fixture(scope="module")
def all_tasks(encode, documents):
    sizes = LongSizes(keys=8, often=9)
    return {task.name: task for task in long_tasks(encode, documents, sizes)}


def test_the_suites_tasks_are_those_that_the_config_names(all_tasks, encode, documents):
    assert tuple(all_tasks) == LONG_TASKS
    assert [all_tasks[name].asked for name in ("single", "multikey", "multiquery")] == [1, 4, 2]
    assert [t.name for t in long_tasks(encode, documents, LongSizes(tasks=("variables",)))] == ["variables"]
    with pytest.raises(UserError, match="long.tasks: task 'best' is unknown; use some of single, multikey"):
        long_tasks(encode, documents, LongSizes(tasks=("single", "best")))
    with pytest.raises(UserError, match="long.tasks: no tasks"):
        long_tasks(encode, documents, LongSizes(tasks=()))


@pytest.mark.parametrize("name", LONG_TASKS)
def test_prompts_fill_the_length_and_never_more(all_tasks, name):
    for length in (700, 3000):
        examples = all_tasks[name].examples("test", 6, length)
        assert len(examples) == 6
        for example in examples:
            whole = example.length + example.room
            assert example.length == len(example.context) + len(example.prompt)
            assert length - 100 < whole <= length
            assert example.room >= SLACK + 1


@pytest.mark.parametrize("name", LONG_TASKS)
def test_the_splits_share_nothing_that_is_asked_for(all_tasks, name, encode):
    train, test = (all_tasks[name].examples(split, 12, 900) for split in ("train", "test"))
    texts = {
        split: "\n".join(sorted({encode.decode(e.context).partition("\n\n")[2] for e in found}))
        for split, found in zip("ab", (train, test), strict=True)
    }
    for examples, split, other in ((train, "train", "b"), (test, "test", "a")):
        for example in examples:
            assert all(split_of(text) == split for text in example.expected)
            assert not any(re.search(rf"\b{text}\b", texts[other]) for text in example.expected)
    keys = [set(re.findall(r"of ([a-z]+-[a-z]+) is", text)) for text in texts.values()]
    assert not keys[0] & keys[1]


@pytest.mark.parametrize("name", LONG_TASKS)
def test_an_oracle_scores_one_and_silence_nothing(all_tasks, name):
    task = all_tasks[name]
    for example in task.examples("test", 5, 900):
        oracle = Answer(f" {', '.join(example.expected).upper()}.")  # whatever the case
        assert task.score(example, oracle).value == task.reward(example, oracle) == 1.0
        assert task.score(example, Answer("")).value == task.reward(example, Answer("")) == 0.0
        half = task.score(example, Answer(example.expected[0]))
        assert half.value == pytest.approx(1 / len(example.expected))
        assert half.parts == ({} if len(example.expected) == 1 else {"all": 0.0})


def test_to_list_everything_earns_little(around):
    task = Pairs(**around, keys=8, asked=8)
    examples = task.examples("test", 8, 900)
    everything = Answer(" ".join(text for example in examples for text in example.expected))
    for example in examples:
        assert task.score(example, everything).value == 1.0  # as RULER scores
        assert task.reward(example, everything) == pytest.approx(1 / 8)


# needles


def test_questions_of_a_context_share_it_and_others_do_not(around):
    examples = Pairs(**around, keys=4, asked=4).examples("test", 10, 700)
    contexts = [id(example.context) for example in examples]
    assert [contexts.count(context) for context in dict.fromkeys(contexts)] == [4, 4, 2]
    assert len({example.expected for example in examples}) == len({e.name for e in examples}) == 10


@pytest.mark.parametrize("kind", ["words", "numbers", "uuids"])
def test_a_needle_of_every_kind_is_in_the_context_once(around, encode, kind):
    (example,) = Pairs(**around, key="uuids" if kind == "uuids" else "words", value=kind).examples("test", 1, 900)
    (value,) = example.expected
    assert re.fullmatch(FORMS[kind], value) and example.form == FORMS[kind]
    text, asked = encode.decode(example.context), encode.decode(example.prompt)
    assert text.count(value) == 1 and value not in asked
    begun = asked.partition("</think>")[2]
    assert begun.startswith("The ") and text.count(f"{begun} {value}.") == 1
    assert text.startswith("<｜begin▁of▁sentence｜><｜User｜>Remember every ")


def test_the_depth_is_where_the_line_begins(around, encode):
    for tenth in (0, 5, 9):
        for example in Pairs(**around, depth=tenth).examples("test", 3, 3000):
            assert example.depth == pytest.approx((tenth + 0.5) / 10, abs=0.06)
            place = round(example.depth * len(example.context))
            assert encode.decode(example.context[place:]).lstrip().startswith("The access code of")
    spread = Pairs(**around, keys=10, asked=10).examples("test", 10, 3000)
    assert all(any(abs(e.depth - (i + 0.5) / 10) < 0.07 for e in spread) for i in range(10))


def test_keys_with_several_values_and_questions_for_several_keys(around, encode):
    (example,) = Pairs(**around, values=3).examples("test", 1, 900)
    text = encode.decode(example.context)
    assert len(example.expected) == 3 and example.depth is None
    assert all(len(re.findall(rf"One access code of [a-z-]+ is {value}\.", text)) == 1 for value in example.expected)
    assert "What are the 3 access codes of" in encode.decode(example.prompt)
    first, second = Pairs(**around, keys=5, together=2, asked=2).examples("test", 2, 900)
    assert first.context is second.context and not set(first.expected) & set(second.expected)
    asked = re.search(r"codes of (\S+) and (\S+) in the text", encode.decode(first.prompt))
    text = encode.decode(first.context)
    assert [f"of {k} is {v}." in text for k, v in zip(asked.groups(), first.expected, strict=True)] == [True, True]
    for wrong in ({"asked": 2}, {"values": 0}, {"keys": 3, "together": 2, "asked": 2}):
        with pytest.raises(UserError, match="cannot be asked of"):
            Pairs(**around, **wrong).examples("test", 1)
    with pytest.raises(UserError, match="keys and values are words, numbers, uuids"):
        Pairs(**around, value="variables").examples("test", 1)


# haystacks


def test_every_haystack(around, encode):
    (pairs,) = Pairs(**around, haystack="pairs").examples("test", 1, 700)
    lines = encode.decode(pairs.context).strip().splitlines()[2:]
    assert len(lines) > 20 and all(re.fullmatch(r"The access code of [a-z]+-[a-z]+ is \d{7}\.", line) for line in lines)
    (filler,) = Pairs(tokenizer=encode, haystack="filler").examples("test", 1, 700)
    assert encode.decode(filler.context).count(haystack.FILLER[1]) > 5
    (real,) = Pairs(**around).examples("train", 1, 3000)
    own = "".join(d.text for d in around["documents"].train)
    long = [line for line in encode.decode(real.context).splitlines() if len(line) > 30 and "access code" not in line]
    assert len(long) > 20 and all(line in own for line in long)


def test_text_around_a_needle_holds_no_secret():
    pieces = iter(["a b", "A-B c", "d"] * 2)
    assert list(haystack.without(pieces, ["a-b"])) == ["a b", "d", "a b", "d"]
    with pytest.raises(UserError, match="every piece of the haystack holds"):
        next(haystack.without(iter(lambda: "a-b", None), ["a-b"]))


def test_documents_that_hold_nothing_are_refused(encode):
    for documents in (Documents(), Documents(test=[Document("blank", " \n")])):
        with pytest.raises(UserError, match="no held-out documents to hide lines in"):
            Pairs(tokenizer=encode, documents=documents).examples("test", 1)
    with pytest.raises(UserError, match="no training documents"):
        Pairs(tokenizer=encode, documents=Documents(test=[Document("a", "b")])).examples("train", 1)


def test_pieces_are_the_text(documents):
    for text in (documents.test[0].text, "One. Two? Three", "x" * 1000, "a\n\n\nb. c\n", "word " * 200):
        found = haystack.pieces(text)
        assert "".join(found) == text and max(map(len, found)) <= haystack.PIECE + 3 and all(found)
    assert haystack.pieces("One. Two? Three\n") == ["One. ", "Two? ", "Three\n"]


def test_what_does_not_fit_is_refused(around):
    with pytest.raises(UserError, match="single: what is hidden and its question do not fit in 60 tokens"):
        Pairs(**around, name="single").examples("test", 1, 60)
    with pytest.raises(UserError, match="do not fit in 500 tokens"):
        CommonWords(**around).examples("test", 1, 500)


# variables


def test_chains_stand_in_their_order(around, encode):
    examples = Variables(**around, chains=3, hops=2).examples("test", 3, 1200)
    text = encode.decode(examples[0].context)
    assert len({id(example.context) for example in examples}) == 1
    for example in examples:
        a, b, c = example.expected
        (value,) = re.findall(r"value (\d{7}) in", encode.decode(example.prompt))
        places = [text.index(line) for line in (f"Let {a} = {value}.", f"Let {b} = {a}.", f"Let {c} = {b}.")]
        assert places == sorted(places) and len(re.findall(r"Let [A-Z]{5} = ", text)) == 9
    (one,) = Variables(**around, hops=0, depth=2).examples("test", 1, 3000)
    assert len(one.expected) == 1 and one.depth == pytest.approx(0.25, abs=0.06)
    with pytest.raises(UserError, match="at least 1 chain and 0 hops, not 1 and -1"):
        Variables(**around, hops=-1).examples("test", 1)


# common words


def test_words_come_as_often_as_they_should(around, encode):
    for length in (700, 6000):
        (example,) = CommonWords(**around, common=3, often=8, rarely=2).examples("test", 1, length)
        text = encode.decode(example.context).partition("\n\n")[2]
        counts = Counter(text.rstrip(".").split(", "))
        assert {word for word, count in counts.items() if count == 8} == set(example.expected)
        assert set(counts.values()) == {8, 2} and len(counts) > 30
        assert all(not overlaps(word, example.expected) for word in set(counts) - set(example.expected))
    for wrong in ({"common": 0}, {"rarely": 30}, {"rarely": 0}):
        with pytest.raises(UserError, match="more often than rarely"):
            CommonWords(**around, **wrong).examples("test", 1)
    with pytest.raises(UserError, match="leave out haystack and depth"):
        CommonWords(**around, haystack="filler")


# strings, knobs, tokenizers


def test_strings_are_no_part_of_each_other():
    import random

    rng = random.Random(0)
    for kind, form in FORMS.items():
        found = distinct(rng, kind, "test", 20, ["amber-falcon"])
        assert all(re.fullmatch(form, text.lower()) and split_of(text) == "test" for text in found)
        assert not any(overlaps(a, [b for b in found if b != a]) for a in found)
        assert split_of(draw(rng, kind, "train")) == "train"


def test_every_knob_changes_the_examples(around):
    task = Pairs(**around, keys=4, asked=2, context=900)
    plain = [e.context for e in task.examples("test", 2)]
    assert plain == [e.context for e in replace(task, context=500).examples("test", 2, 900)]
    for knob in (
        {"keys": 5},
        {"values": 2},
        {"depth": 4},
        {"value": "uuids"},
        {"key": "uuids"},
        {"haystack": "filler"},
    ):
        assert [e.context for e in replace(task, **knob).examples("test", 2)] != plain, knob


@pytest.mark.parametrize("template", [CHATML, None])
def test_other_tokenizers(documents, template):
    """Through a chat template, and without one as plain text that the model continues."""
    raw = bpe([d.text for d in documents.test], "<|endoftext|>", "<|im_start|>", "<|im_end|>", kind="gpt 2")
    encode = encoder(fast(raw, template, bos_token="<|endoftext|>", eos_token="<|endoftext|>"))
    (example,) = Pairs(tokenizer=encode, documents=documents, value="words").examples("test", 1, 900)
    text = encode.decode((*example.context, *example.prompt))
    question = (
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nThe password of"
        if template
        else "?\nThe password of"
    )
    begin = "<|im_start|>user\nRemember" if template else "<|endoftext|>Remember"
    assert text.startswith(begin) and text.count(question) == 1 and text.endswith(" is")
    assert example.length + example.room <= 900
