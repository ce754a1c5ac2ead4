"""Generated answers to questions that share a context: read once, and the answers that each question gets alone."""

import logging

import pytest
import torch

import tokensieve
from tests.support import models, stdlib
from tokensieve.config import UserError
from tokensieve.evals import Arm, evaluate
from tokensieve.evals.answers import Answering, answering
from tokensieve.model.selection import indexer, join, window
from tokensieve.tasks import Example, PlainEncoder, Score
from tokensieve.tasks.ruler import LongExample


class Anything:
    name = "anything"

    def score(self, example, answer):
        return Score(float(answer.ended))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return stdlib.tokenizer(stdlib.documents("textwrap", "random"), tmp_path_factory.mktemp("tokenizer"), 512)


@pytest.fixture(scope="module", params=["v3", "v32"])
def model(request):
    return models.ours(models.config(request.param, vocab_size=512))


def examples_of(encode, contexts, rooms=(6,)):
    prompts = [encode(words) for words in ("def f(", "def g(", "import os, sys\n", "x")]
    shared = {"expected": ("1",), "form": "1", "depth": None, "length": 0}
    return [
        LongExample(name="x", prompt=prompt, context=context, room=rooms[i % len(rooms)], **shared)
        for context, few in zip(contexts, (prompts, prompts[:2], prompts[1:]), strict=True)
        for i, prompt in enumerate(few)
    ]


def chunks_of(answer, monkeypatch):
    """The lengths of the chunks that will be read."""
    lengths, chunk = [], answer._engine.runner.chunk
    monkeypatch.setattr(
        answer._engine.runner, "chunk", lambda ids, *rest: lengths.append(len(ids)) or chunk(ids, *rest)
    )
    return lengths


def test_answers_are_those_that_each_prompt_gets_alone(model, tokenizer, monkeypatch):
    """Of more contexts than run at once; a context is read once, and only the rest of it by its other questions."""
    encode = PlainEncoder(tokenizer)
    contexts = [tuple(encode(stdlib.documents(name)[0].text)[:900]) for name in ("textwrap", "random", "argparse")]
    examples = examples_of(encode, contexts, (6, 3))
    expected = []
    for example in examples:
        ids = torch.tensor([[*example.context, *example.prompt]])
        answer = model.generate(ids, max_new_tokens=example.room, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(encode.decode(answer[0, ids.shape[1] :]))
    monkeypatch.setattr("tokensieve.evals.answers.RUNNING", 2)
    told = []
    with answering(Arm(model, "indexer" if model.is_sparse else "dense"), tokenizer, 1000) as answer:
        read = chunks_of(answer, monkeypatch)
        found = answer(Anything(), examples, lambda *progress: told.append(progress))
    assert not hasattr(answer, "_engine")  # its cache is gone with the block
    assert [record.answer.text for record in found.records] == expected
    assert [record.example for record in found.records] == examples
    assert told == [("anything", n, 9) for n in range(1, 10)]
    assert read.count(512) == 3 and len(read) == 3 + 9  # a whole chunk of each context, and nine ends
    assert evaluate(model, encode, Anything(), examples[:1], 6).records == found.records[:1]  # what a caller gets alone


def test_an_arm_answers_by_its_own_selection(tokenizer):
    model, encode = models.ours(models.config("v32", vocab_size=512)), PlainEncoder(tokenizer)
    context = tuple(encode(stdlib.documents("textwrap")[0].text)[:400])
    example = examples_of(encode, [context] * 3, (12,))[0]

    def with_recent(c):
        return join(indexer(c), window(c, 8))

    texts = {}
    for selection, k in (("indexer", None), ("window", None), ("dense", None), ("sinks", 16), (with_recent, 16)):
        arm = Arm(model, selection, k)
        texts[str(selection), k] = Answering(arm, tokenizer, 500)(Anything(), [example]).records[0].answer.text
        with tokensieve.selecting(model, selection, k):
            assert evaluate(model, encode, Anything(), [example], 12).records[0].answer.text == texts[str(selection), k]
    assert len(set(texts.values())) > 2


def test_what_cannot_be_answered_says_why(model, tokenizer):
    encode = PlainEncoder(tokenizer)
    (example, *_), (long, *_) = (examples_of(encode, [tuple(encode("x = 1\n" * n))] * 3) for n in (99, 999))
    with pytest.raises(UserError, match="have room for"):
        Answering(Arm(model, "dense"), tokenizer, 500)(Anything(), [long])
    broken = models.ours(model.config)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="x: the model's logits are not finite"):
        Answering(Arm(broken, "dense"), tokenizer, 500)(Anything(), [example])


def test_as_many_contexts_are_in_work_as_the_cache_has_room_for(model, tokenizer, monkeypatch):
    """Otherwise a context's pages would be gone before its second question is asked."""
    encode = PlainEncoder(tokenizer)
    contexts = [tuple(encode(stdlib.documents(name)[0].text)[:900]) for name in ("textwrap", "random", "argparse")]
    arm = Arm(model, "indexer" if model.is_sparse else "dense")
    monkeypatch.setattr("tokensieve.evals.answers.default_pages", lambda *_: 20)
    with answering(arm, tokenizer, 1000) as answer:
        read = chunks_of(answer, monkeypatch)
        assert len(answer(Anything(), examples_of(encode, contexts)).records) == 9
    assert read.count(512) == 3 and len(read) == 3 + 9
    monkeypatch.setattr("tokensieve.evals.answers.default_pages", lambda *_: 15)
    with (
        pytest.raises(UserError, match="memory for a cache of 960 tokens, not of 1000"),
        answering(arm, tokenizer, 1000),
    ):
        pass


def test_an_arms_engine_writes_nothing(model, tokenizer, caplog):
    """Its lines would come between progress bars; the size of its cache is of interest to servers only. An op tells
    its backend once a process, whoever comes first.
    """
    caplog.set_level(logging.INFO, logger="tokensieve")
    with answering(Arm(model, "dense"), tokenizer, 300) as answer:
        answer(Anything(), examples_of(PlainEncoder(tokenizer), [(5, 6), (7, 8), (9,)], (2,)))
    assert not [record for record in caplog.records if record.name != "tokensieve.ops"]


def test_a_context_without_a_target_is_read_by_each_of_its_questions(model, tokenizer):
    encode = PlainEncoder(tokenizer)
    context = encode("import os\n" * 30)
    both = [Example(name="x", prompt=prompt, context=context) for prompt in (encode("def f("), ())]
    whole = [Example(name="x", prompt=(*context, *example.prompt)) for example in both]
    found, expected = (evaluate(model, encode, Anything(), asked, 5, 2) for asked in (both, whole))
    assert [r.answer for r in found.records] == [r.answer for r in expected.records]
