"""The suites: every arm on the same prompts, intervals over contexts, differences to the first arm, and refusals."""

import copy
import math
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from rich.console import Console

import tokensieve
from tests.support import models, stdlib
from tokensieve import evals
from tokensieve.config import LONG_TASKS, LongSizes, ShortSizes, UserError
from tokensieve.evals import choices, suites
from tokensieve.report import show_long, show_short
from tokensieve.tasks import Answer, Document, PlainEncoder
from tokensieve.tasks.short import ChoiceExample, Choices

VOCABULARY, K = 512, 40
LONG = LongSizes((500, 700), prompts=4, keys=4, together=2, values=2, chains=2, common=2, often=4, rarely=1, texts=2)
LONG = replace(LONG, buckets=3, asked=4)
SHORT = ShortSizes(prompts=6, texts=2, tokens=200)


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return stdlib.documents("argparse", "random")


@pytest.fixture(scope="module")
def tokenizer(documents, tmp_path_factory):
    return stdlib.tokenizer(documents, tmp_path_factory.mktemp("tokenizer"), VOCABULARY)


@pytest.fixture(scope="module")
def encode(tokenizer):
    return PlainEncoder(tokenizer)


@pytest.fixture(scope="module")
def dense():
    config = models.config("v3", vocab_size=VOCABULARY, num_hidden_layers=1, max_position_embeddings=800)
    return models.ours(config)


@pytest.fixture(scope="module")
def sparse(dense):
    return tokensieve.sparsify(dense, top_k=K, index_heads=4, index_dim=16)


def test_prompts_may_reach_the_last_position(dense, tokenizer, documents):
    """Rooms for an answer differ by context, and each prompt leaves its own."""
    sizes = replace(LONG, contexts=(800,), tasks=("common_words", "variables"), prompts=8, texts=0)
    figures = evals.judge_long(evals.long_arms(dense), tokenizer, documents, sizes)
    assert [row["score"]["n"] for row in figures["tasks"]] == [8, 8]


def test_the_arms_of_a_model(dense, sparse):
    assert {name: (a.selection, a.top_k) for name, a in evals.long_arms(dense).items()} == {"dense": ("dense", None)}
    arms = evals.long_arms(sparse, (16, K), {"mine": "oracle"})
    assert list(arms) == ["dense"] + [
        f"{name} k={k}" for k in (16, K) for name in ("sparse", "window", "sinks", "mine")
    ]
    assert arms["sinks k=16"].selection == "sinks" and arms["mine k=16"].top_k == 16
    assert list(evals.long_arms(sparse))[1] == f"sparse k={K}"
    with pytest.raises(UserError, match="a dense model selects nothing: leave out long.top_k"):
        evals.long_arms(dense, (16,))
    with pytest.raises(UserError, match="long.top_k: 4 keys are too few"):
        evals.long_arms(sparse, (4,))
    with pytest.raises(UserError, match="'best' is unknown"):
        evals.long_arms(sparse, (), {"mine": "best"})
    for name in ("dense", "sparse", "window", "sinks"):
        with pytest.raises(UserError, match=f"cannot be called {name}"):
            evals.long_arms(sparse, (), {name: "oracle"})


def test_what_is_measured_is_told_after_every_arm(sparse, tokenizer, documents):
    arms = {"dense": evals.Arm(sparse, "dense"), "few": evals.Arm(sparse, "window", K)}
    told = []
    sizes = replace(LONG, tasks=("single",), contexts=(500,), prompts=1, texts=1)
    found = evals.judge_long(arms, tokenizer, documents, sizes, on_figures=lambda f: told.append(copy.deepcopy(f)))
    assert [[row["arm"] for row in figures["tasks"]] for figures in told] == [["dense"], ["dense", "few"]]
    assert told[0]["positions"] == found["positions"] and told[-1] == found


def test_every_arm_is_asked_the_same_in_every_cell(sparse, tokenizer, documents):
    told = []
    arms = {name: evals.Arm(sparse, "window", k) for name, k in (("few", K), ("many", 550))}
    arms = {"dense": evals.Arm(sparse, "dense")} | arms
    sizes = replace(LONG, tasks=("multikey", "multivalue"), prompts=2)
    found = evals.judge_long(arms, tokenizer, documents, sizes, lambda *progress: told.append(progress))
    asked = {500: ["dense", "few"], 700: list(arms)}  # 500 tokens are all within k = 550
    expected = [(task, context, arm) for context in asked for task in sizes.tasks for arm in asked[context]]
    assert [(row["task"], row["context"], row["arm"]) for row in found["tasks"]] == expected
    for row in found["tasks"]:
        assert row["score"]["n"] == 2 and (row["difference"] is None) == (row["arm"] == "dense")
        assert row["contexts"] == (1 if row["task"] == "multikey" else 2)
        assert (row["score"]["low"] is None) == (row["contexts"] == 1)
        assert sum(row["counts"]) == (2 if row["task"] == "multikey" else 0)
        assert [len(values) for values in row["score"]["by_context"]] == [2 // row["contexts"]] * row["contexts"]
    positions = found["positions"]
    assert positions["edges"] == [0, 233, 466, 699] and list(positions["ppl"]) == list(arms)
    assert all(len(rows) == 3 and rows[0]["n"] == 2 for rows in positions["ppl"].values())
    few, dense = (positions["ppl"][name] for name in ("few", "dense"))
    for ratio, a, b in zip(positions["ratio"]["few"], few, dense, strict=True):
        assert ratio["value"] == pytest.approx(a["value"] / b["value"])
    assert few[0]["value"] == pytest.approx(math.exp(sum(few[0]["nats"]) / 2))
    asked = {(row["task"], row["context"], row["score"]["prompts"]) for row in found["tasks"]}
    assert len(asked) == 4 and len({digest for *_, digest in asked}) == 4  # the same for every arm of a cell
    steps = [done for _, done, _ in told]
    assert steps == sorted(steps) and told[-1][1] == told[-1][2] and told[0][0] == "perplexity, dense"
    console = Console(width=200, record=True)
    show_long(console, found)
    text = console.export_text()
    assert "perplexity after tokens" in text and "score by depth" in text and "many" in text


@pytest.mark.parametrize("name", LONG_TASKS)
def test_a_real_model_is_asked_every_task(dense, tokenizer, documents, name):
    sizes = replace(LONG, contexts=(500,), tasks=(name,), prompts=2, texts=0)
    (row,) = evals.judge_long(evals.long_arms(dense), tokenizer, documents, sizes)["tasks"]
    assert row["task"] == name and row["score"]["n"] == 2 and 0 <= row["score"]["value"] < 1


def test_scores_and_differences_are_those_of_the_answers(sparse, tokenizer, documents, monkeypatch):
    """One arm answers all, the other every second question: the whole table without a model's luck."""

    @contextmanager
    def answering(arm, tokenizer, longest):
        def answer(task, examples, on_progress=None):
            said = [
                Answer(", ".join(e.expected) if arm.selection == "dense" or i % 2 else "")
                for i, e in enumerate(examples)
            ]
            pairs = zip(examples, said, strict=True)
            return evals.Evaluation(tuple(evals.Record(e, a, task.score(e, a)) for e, a in pairs))

        yield answer

    monkeypatch.setattr(suites, "answering", answering)
    sizes = replace(LONG, contexts=(700,), tasks=("single",), prompts=24, other_prompts=6, texts=0)
    arms = {"dense": evals.Arm(sparse, "dense"), "other": evals.Arm(sparse, "window", K)}
    found = evals.judge_long(arms, tokenizer, documents, sizes)
    first, second = found["tasks"]
    assert first["score"]["value"] == 1 and first["score"]["high"] == 1 and first["score"]["low"] < 0.9
    assert second["score"]["value"] == 0.5 and second["difference"]["value"] == -0.5
    assert second["difference"]["low"] < -0.5 < second["difference"]["high"] < 0 and "positions" not in found
    nearest = [share for share in second["by_depth"] if share is not None]
    assert sum(c * s for c, s in zip((c for c in second["counts"] if c), nearest, strict=True)) == pytest.approx(12)
    found = evals.judge_long(arms, tokenizer, documents, sizes, judged=("dense",))
    assert [row["score"]["n"] for row in found["tasks"]] == [24, 6] and found["tasks"][1]["difference"]["n"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": (900,)}, "prompts of 900 tokens are past the model's 800 positions"),
        ({"contexts": ()}, "at least one question in at least one context"),
        ({"prompts": 0}, "at least one question"),
        ({"other_prompts": 0}, "at least one question"),
        ({"tasks": ("best",)}, "'best' is unknown"),
        ({"contexts": (700, 60)}, "do not fit in 60 tokens"),
        ({"texts": 10_000}, "not 10000"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_is_measured(sparse, tokenizer, documents, changes, message):
    with pytest.raises(UserError, match=message):
        evals.judge_long(
            evals.long_arms(sparse),
            tokenizer,
            documents,
            replace(LONG, **changes),
            lambda *_: pytest.fail("it measured"),
        )


def test_ratios_by_position_are_of_the_same_texts(dense, encode, documents):
    texts = evals.text_sequences(encode, documents, 200, 3)
    one, fewer = evals.perplexity(dense, texts, 0, 4), evals.perplexity(dense, texts[:2], 0, 4)
    losses = torch.stack([evals.token_losses(dense, t) for t in texts]).double()
    assert one.by_position()[0] == pytest.approx(losses[:, : one.edges[1]].mean(1).tolist())
    assert one.less(one) == [[0.0] * 3] * 4
    with pytest.raises(ValueError, match="not those of the same texts"):
        one.less(fewer)


# short prompts


@pytest.mark.parametrize("name", ["sums", "copying", "sequences", "lookup"])
def test_short_items(name, encode):
    task = Choices(name)
    train, test = task.examples("train", 30), task.examples("test", 30)
    assert test == task.examples("test", 30) != task.examples("test", 30, seed=1)
    assert not {e.name for e in train} & {e.name for e in test}
    for example in test:
        assert len(set(example.choices)) == 4 and example.right in example.choices
        assert len(encode.prompt(example.prompt)) + 10 < 512 and example.prompt.count("\n\n") == 3
        assert len({len(choice) for choice in example.choices}) == 1 or name == "copying"
        assert [task.score(example, Answer(c)).value for c in example.choices] == [
            c == example.right for c in example.choices
        ]
        assert task.reward(example, Answer(example.right.strip())) == 1.0 and task.score(example, Answer("")).value == 0
        *shown, asked = example.prompt.split("\n\n")
        if name == "sums":
            for line in (*shown, asked + example.right):
                a, _, b, _, c = line.split()
                assert int(a) + int(b) == int(c) and max(int(a), int(b)) <= 20
        elif name == "sequences":
            numbers = list(map(int, (asked + example.right).split()))
            assert len({b - a for a, b in pairwise(numbers)}) == 1
        elif name == "copying":
            words, _, again = asked.partition(" / ")
            assert f"{again}{example.right}" == words
        else:
            pairs, key = asked.rsplit("\n", 1)
            assert f"{key}{example.right}" in pairs.splitlines() and len(pairs.splitlines()) == 4
    places = [example.choices.index(example.right) for example in test]
    assert len(set(places)) == 4
    with pytest.raises(UserError, match="no examples of difficulty 0"):
        task.examples("test", 1, 0)


def test_an_unknown_short_task():
    with pytest.raises(UserError, match="'riddles' is unknown; use one of sums"):
        Choices("riddles").examples("test", 1)


def test_likelihoods_are_the_models_own(dense, encode):
    """Choices of different lengths, as rows after one cache of two prompts, beside one pass for each."""
    example = ChoiceExample(name="x", prompt="def f(", choices=(" a", " import os", "x = 1\n"), right=" a")
    other = replace(example, prompt=(*encode.prompt("def f(")[:-1], 7), choices=(" import os", " b", " a"))
    with torch.no_grad():
        found = choices.likelihoods(dense, encode, [example, other])
    for asked, likelihoods in zip((example, other), found, strict=True):
        for choice, likelihood in zip(asked.choices, likelihoods, strict=True):
            prompt, ids = encode.prompt(asked.prompt), encode(choice)
            with torch.no_grad():
                logs = dense(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
            expected = sum(float(logs[len(prompt) - 1 + i, token]) for i, token in enumerate(ids))
            assert likelihood == pytest.approx(expected, abs=1e-4)
    assert len({len(encode(choice)) for choice in example.choices}) > 1
    single = replace(example, prompt=(5,))
    with torch.no_grad():
        assert choices.likelihoods(dense, encode, [single]) != found[:1]  # a prompt of one token needs no cache
    told: list[int] = []
    asked = [example, single, other]  # the first and the last are read together
    evaluation = evals.choose(dense, encode, Choices("sums"), asked, lambda _, done, all: told.append(done))
    assert evaluation.records[0].answer.text == example.choices[found[0].index(max(found[0]))]
    assert evaluation.records[2].answer.text == other.choices[found[1].index(max(found[1]))]
    assert [record.example for record in evaluation.records] == asked and told == [2, 3]
    with pytest.raises(UserError, match="no examples of sums"):
        evals.choose(dense, encode, Choices("sums"), [])


def test_short_prompts_of_a_model_and_of_what_it_was(dense, sparse, encode, documents):
    told = []
    other = models.ours(dense.config, seed=4)
    arms = evals.short_arms(sparse, other)
    found = evals.judge_short(arms, encode, documents, SHORT, lambda *progress: told.append(progress))
    assert list(arms) == ["before", "model"] and told[-1][1] == told[-1][2] == 2 * (4 * 6 + 2)
    assert [(r["task"], r["arm"]) for r in found["tasks"][:3]] == [
        ("sums", "before"),
        ("sums", "model"),
        ("copying", "before"),
    ]
    before, model = found["texts"]
    assert before["ratio"] is None and before["ppl"]["n"] == 2
    assert model["ratio"]["value"] == pytest.approx(model["ppl"]["value"] / before["ppl"]["value"])
    assert all((row["difference"] is None) == (row["arm"] == "before") for row in found["tasks"])
    assert list(evals.short_arms(sparse)) == ["dense", "sparse"] and list(evals.short_arms(dense)) == ["dense"]
    console = Console(width=200, record=True)
    show_short(console, found)
    assert "chance is 25%" in console.export_text()
    same = evals.judge_short(evals.short_arms(dense, dense), encode, documents, SHORT)
    assert [row["difference"]["value"] for row in same["tasks"][1::2]] == [0.0] * 4
    for changes in ({"prompts": 0}, {"texts": 0}, {"tokens": 801}):
        with pytest.raises(UserError, match="at least one prompt|past the model's 800 positions"):
            evals.judge_short(arms, encode, documents, replace(SHORT, **changes))
