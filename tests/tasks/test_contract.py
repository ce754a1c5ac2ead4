"""The promises of every task: examples depend on their arguments alone, splits share nothing, scores are in [0, 1]."""

import random

import pytest
import torch

import tokensieve
from tests.support import models, stdlib
from tokensieve.config import UserError
from tokensieve.evals import evaluate, evaluation
from tokensieve.tasks import Answer, Document, Documents, Example, PlainEncoder, Score, dialogue
from tokensieve.tasks.completion import Completion
from tokensieve.tasks.dialogue import Chat
from tokensieve.tasks.documents import is_held_out
from tokensieve.tasks.retrieval import Needles
from tokensieve.tasks.ruler import CommonWords, Pairs, Variables

MODULES = "argparse ast inspect textwrap typing random shutil enum pathlib tarfile zipfile pprint".split()
TASKS = ("needles", "completion", "chat")
LONG = ("pairs", "variables", "common_words")  # their splits and difficulty: test_ruler.py


@pytest.fixture(scope="module")
def documents() -> Documents:
    return Documents.divide(stdlib.documents(*MODULES), 0.5)


@pytest.fixture(scope="module")
def encode(documents, tmp_path_factory) -> PlainEncoder:
    return stdlib.encoder(documents.train, tmp_path_factory.mktemp("tokenizer"), 1024)


@pytest.fixture(scope="module")
def tasks(documents, encode) -> dict:
    made = [Needles(encode, documents, needles=4, context=600), Completion(encode, documents), Chat(documents)]
    around = {"tokenizer": encode, "documents": documents, "context": 800}
    made += [Pairs(**around, keys=4, asked=4), Variables(**around, chains=2), CommonWords(**around, common=3, often=9)]
    return {task.name: task for task in made}


def test_documents_are_divided_by_their_names_alone(documents):
    assert {d.name for d in documents.test} == {name for name in MODULES if is_held_out(name, 0.5)}
    assert {d.name for d in documents.train} == {name for name in MODULES if not is_held_out(name, 0.5)}
    assert is_held_out("pip._vendor.requests", 0.5) == is_held_out("requests", 0.5)
    with pytest.raises(UserError, match="document a is in the train and in the test split"):
        Documents([Document("a", "x")], [Document("b", "x"), Document("a", "y")])


@pytest.mark.parametrize("name", TASKS + LONG)
def test_examples_depend_on_the_arguments_alone(tasks, name):
    task = tasks[name]
    first, again, other = (task.examples("test", 8, seed=seed) for seed in (3, 3, 4))
    assert first == again != other and 0 < len(first) <= 8
    assert all(isinstance(example, Example) and example.name for example in first)


@pytest.mark.parametrize("name", TASKS)
def test_the_splits_share_nothing(tasks, encode, documents, name):
    """No example, no document: the text of every example is that of its own split's documents."""
    task = tasks[name]
    train, test = (task.examples(split, 60, seed=1) for split in ("train", "test"))
    assert train and test and not {e.name for e in train} & {e.name for e in test}
    if name == "needles":
        assert not {e.value for e in train} & {e.value for e in test}
        assert not {e.key for e in train} & {e.key for e in test}
        for examples, others in ((train, documents.test), (test, documents.train)):
            foreign = {line for d in others for line in d.text.splitlines() if len(line) > 60}
            own = {
                line
                for d in documents.of("train" if others is documents.test else "test")
                for line in d.text.splitlines()
            }
            texts = {id(e.context): encode.decode(e.context) for e in examples}
            assert not {line for text in texts.values() for line in text.splitlines()} & (foreign - own)
    else:
        for examples, split in ((train, "train"), (test, "test")):
            assert {e.name.split(".")[0] for e in examples} <= {d.name for d in documents.of(split)}


def test_small_talk_is_in_both_splits_only_if_it_is_asked_for(documents):
    for talk in (False, True):
        kinds = {e.kind for e in Chat(documents, talk).examples("test", 10_000)}
        assert ("talk" in kinds) == talk and {"explain", "write"} <= kinds
    train, test = ({e.name for e in Chat(documents, True).examples(split, 99, 0)} for split in ("train", "test"))
    assert train & test  # the exception to the splits' promise


@pytest.mark.parametrize(("name", "easy", "hard"), [("needles", 400, 900), ("completion", 3, 30), ("chat", 1, 2)])
def test_difficulty_is_a_bound(tasks, encode, name, easy, hard):
    task = tasks[name]
    few, many = (task.examples("test", 4 if name == "needles" else 60, d) for d in (easy, hard))
    if name == "needles":
        assert [len(e.context) // 100 for e in (few[0], many[0])] < [easy // 100, hard // 100]
        assert len(few[0].context) < easy < len(many[0].context) < hard
    elif name == "completion":
        assert max(e.lines for e in few) <= easy < max(e.lines for e in many) <= hard
    else:
        assert {e.kind for e in few} == {"explain"} and {e.kind for e in many} == {"explain", "write"}


ANSWERS = ("", "x = 1", "    return 1\n", "12345", "def (", "a\n" * 50)


@pytest.mark.parametrize("name", TASKS + LONG)
def test_scores_and_rewards_are_shares(tasks, name):
    task, draw = tasks[name], random.Random(0)
    for example in task.examples("test", 12):
        for text in ANSWERS:
            answer = Answer(text, draw.random() < 0.5)
            score = task.score(example, answer)
            assert 0 <= score.value <= 1 and all(0 <= share <= 1 for share in score.parts.values())
            assert 0 <= task.reward(example, answer) <= 1


class Sums:
    """A task as somebody else would write it: no base class, messages for prompts."""

    name = "sums"

    def examples(self, split, count, difficulty=None, seed=0):
        draw = random.Random(f"{split} {seed}")
        pairs = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(count)]
        return [
            Example(name=f"{a}+{b}", prompt=({"role": "user", "content": f"{a} + {b}?"},), target=()) for a, b in pairs
        ]

    def score(self, example, answer):
        return Score(self.reward(example, answer), {"ended": float(answer.ended)})

    def reward(self, example, answer):
        return float(answer.text.strip() == str(sum(map(int, example.name.split("+")))))


def test_a_task_of_ones_own_is_asked_on_a_real_model(encode):
    model = models.ours(models.config("v3", vocab_size=1024))
    task, seen = Sums(), []
    examples = task.examples("test", 5)
    result = evaluate(model, encode, task, examples, 4, 2, lambda *progress: seen.append(progress))
    assert [record.example for record in result.records] == examples and 0 <= result.value <= 1
    assert seen == [("sums", 1, 3), ("sums", 2, 3), ("sums", 3, 3)]
    alone = evaluate(model, encode, task, examples, 4)
    assert [r.answer for r in alone.records] == [r.answer for r in result.records]


class Endings(Sums):
    def reward(self, example, answer):
        return float(answer.ended)


def test_a_target_is_what_greedy_decoding_gives(encode, documents):
    """With and without a target the answer is judged alike: one pass over it, or as many as it has tokens."""
    model = models.ours(models.config("v3", vocab_size=1024))
    sparse = tokensieve.sparsify(model, top_k=64, index_heads=4, index_dim=16)
    context = tuple(encode(documents.test[0].text)[:300])
    prompts = [encode(words) for words in ("def f(", "class A", "import os, sys\n")]
    for asked in (model, sparse):
        greedy = []
        for prompt in prompts:
            ids = torch.tensor([[*context, *prompt]])
            greedy.append(asked.generate(ids, max_new_tokens=4, do_sample=False)[0, ids.shape[1] :].tolist())
        targets = [tuple(ids) for ids in greedy]
        targets[1] = (*targets[1][:-1], 7)
        examples = [
            Example(name="x", prompt=prompt, context=context, target=target)
            for prompt, target in zip(prompts, targets, strict=True)
        ]
        records = evaluate(asked, encode, Endings(), examples).records
        assert [record.answer.ended for record in records] == [True, greedy[1][-1] == 7, True]
        assert [record.answer.text for record in records] == [encode.decode(ids[:-1]) for ids in greedy]
        (alone,) = evaluate(asked, encode, Endings(), [Example(name="x", prompt=prompts[0], target=targets[0])]).records
        assert isinstance(alone.answer.text, str)  # a target needs no context


def test_targets_follow_prompts_of_every_kind_and_few_logits_are_held(encode, monkeypatch):
    """Ids, texts and messages, of many lengths: each target gets the answer that it gets alone."""
    model = models.ours(models.config("v3", vocab_size=1024))
    talk = ({"role": "user", "content": "Who are you?"},)
    prompts = [encode("def f("), "class A", "import os\n" * 12, talk, "x" * 99]
    examples = [Example(name="x", prompt=prompt, target=(5, 6, 7)) for prompt in prompts]
    greedy = []
    for prompt in prompts:
        ids = torch.tensor([encode.prompt(prompt)])
        greedy.append(int(model(ids).logits[0, -1].argmax()))
    held, forward = [], model.forward

    def counted(*args, **options):
        out = forward(*args, **options)
        held.append(out.logits.shape[:2].numel())
        return out

    monkeypatch.setattr(model, "forward", counted)
    monkeypatch.setattr(evaluation, "LOGITS", 12)
    together = evaluate(model, encode, Endings(), examples)
    assert max(held) <= 12 and len(held) < len(prompts)
    monkeypatch.setattr(evaluation, "LOGITS", 1)
    alone = evaluate(model, encode, Endings(), examples)
    assert alone.records == together.records and held[-len(prompts) :] == [3] * len(prompts)
    first = [encode.decode([token]) for token in greedy]
    assert all(r.answer.text.startswith(text) for r, text in zip(alone.records, first, strict=True))
    with pytest.raises(UserError, match="x has a target and an empty prompt"):
        evaluate(model, encode, Endings(), [Example(name="x", prompt=(), target=(5,))])


def test_examples_of_chat_are_messages_that_a_trainer_reads(documents):
    for example in Chat(documents).examples("train", 5):
        assert example.prompt == ({"role": "user", "content": example.question},)
        assert isinstance(example, dialogue.ChatExample) and example.answer
