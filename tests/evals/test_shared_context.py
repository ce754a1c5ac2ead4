"""Generated answers to questions that share a context: read once, and the answers that each question gets alone."""

from functools import wraps

import pytest
import torch

import tokensieve
from tests.support import models, stdlib
from tokensieve.config import UserError
from tokensieve.evals import evaluate, evaluation
from tokensieve.tasks import Example, Score


class Anything:
    name = "anything"

    def score(self, example, answer):
        return Score(float(answer.ended))


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    return stdlib.encoder(stdlib.documents("textwrap", "random"), tmp_path_factory.mktemp("tokenizer"), 512)


@pytest.fixture(scope="module", params=["v3", "v32"])
def model(request):
    return models.ours(models.config(request.param, vocab_size=512))


def test_answers_are_those_that_each_prompt_gets_alone(model, encode, monkeypatch):
    contexts = [tuple(encode(stdlib.documents(name)[0].text)[:150]) for name in ("textwrap", "random")]
    prompts = [encode(words) for words in ("def f(", "def g(", "import os, sys\n", "x")]
    examples = [
        Example(name="x", prompt=prompt, context=context)
        for context, few in zip(contexts, (prompts, prompts[:2]), strict=True)
        for prompt in few
    ]
    read, forward = [], model.forward

    @wraps(forward)  # transformers looks which arguments it takes
    def counted(*args, **options):
        read.append(tuple((args[0] if args else options["input_ids"]).shape))
        return forward(*args, **options)

    expected = []
    for example in examples:
        ids = torch.tensor([[*example.context, *example.prompt]])
        answer = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
        expected.append(encode.decode(answer[0, ids.shape[1] :]))
    monkeypatch.setattr(model, "forward", counted)
    told = []
    found = evaluate(model, encode, Anything(), examples, 6, on_progress=lambda *progress: told.append(progress))
    assert [record.answer.text for record in found.records] == expected
    assert [shape for shape in read if shape[1] >= 150] == [(1, 150)] * 2 and told[-1] == ("anything", 2, 2)
    assert len(prompts[0]) == len(prompts[1]) and (2, len(prompts[0])) in read  # as rows after one cache
    monkeypatch.setattr(evaluation, "TOGETHER", 1)
    assert evaluate(model, encode, Anything(), examples, 6).records == found.records


def test_an_empty_prompt_is_refused(model, encode):
    with pytest.raises(UserError, match="x has a context and an empty prompt"):
        evaluate(model, encode, Anything(), [Example(name="x", prompt=(), context=(1, 2))])


def test_selection_is_on_after_the_context(encode):
    model = models.ours(models.config("v32", vocab_size=512))
    context = tuple(encode(stdlib.documents("textwrap")[0].text)[:400])
    examples = [Example(name="x", prompt=encode("def f("), context=context)]
    texts = set()
    for selector in ("indexer", "window", "dense"):
        with tokensieve.selecting(model, selector):
            texts.add(evaluate(model, encode, Anything(), examples, 12).records[0].answer.text)
    assert len(texts) > 1
