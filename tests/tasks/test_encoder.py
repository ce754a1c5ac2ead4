"""Tokenizers of other families than DeepSeek's: plain text, packing, needles and chat, with and without a template."""

import dataclasses
import json
import pickle
import random
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import tokensieve
from tests.support import models, stdlib
from tests.support.tokenizers import BEGIN, CHATML, END, LLAMA, bpe, fast
from tokensieve import evals
from tokensieve.config import AcceptanceSizes, DataConfig, SourceConfig, UserError
from tokensieve.data import TokenStore, build_dataset
from tokensieve.data.packing import PackedTextStream
from tokensieve.tasks import Answer, Document, Documents, PlainEncoder, Turns, dialogue, retrieval
from tokensieve.tasks.dialogue import Chat
from tokensieve.tasks.retrieval import Needles

MODULES = ("argparse", "ast", "inspect", "textwrap")


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return stdlib.documents(*MODULES)


@pytest.fixture(scope="module")
def tokenizers(corpus) -> dict:
    """By name: the ways in which a family differs from DeepSeek's."""
    texts = [d.text for d in corpus]
    plain, marked = bpe(texts, BEGIN, END), bpe(texts, "<|endoftext|>", "<|im_start|>", "<|im_end|>")
    words, reaching = bpe(texts, BEGIN, END, kind="llama 2"), bpe(texts, "<|endoftext|>", kind="gpt 2")
    both = {"bos_token": BEGIN, "eos_token": END}
    return {
        "llama": fast(plain, LLAMA, **both),
        "words": fast(words, LLAMA, **both, unk_token="<unk>"),
        "base": fast(plain, **both),  # no chat template
        "bos": fast(plain, bos_token=BEGIN),  # and no eos
        "eos": fast(plain, eos_token=END),
        "chatml": fast(marked, CHATML, eos_token="<|endoftext|>"),
        "gpt": fast(reaching, bos_token="<|endoftext|>", eos_token="<|endoftext|>"),
        "none": fast(plain),
    }


FRAMED = ("llama", "words", "base", "bos", "eos", "chatml", "gpt")
TALKING = ("llama", "words", "chatml")


def test_bos_eos_and_pad_are_the_tokenizers_own(tokenizers):
    found = {name: PlainEncoder(t) for name, t in tokenizers.items()}
    assert {name: (e.bos, e.eos, e.pad) for name, e in found.items()} == {
        "llama": (0, 1, 1),
        "words": (1, 2, 2),
        "base": (0, 1, 1),
        "bos": (0, None, None),
        "eos": (None, 1, 1),
        "chatml": (None, 0, 0),
        "gpt": (0, 0, 0),
        "none": (None, None, None),
    }
    frames = {name: found[name].frame() for name in FRAMED}
    assert frames["llama"] == ([0], [1]) and frames["bos"] == ([0], []) and frames["eos"] == ([], [1])
    assert frames["gpt"] == ([0], [])  # the same token once, not twice
    with pytest.raises(UserError, match="neither bos nor eos"):
        found["none"].frame()
    assert found["chatml"].ends == [0, 2] and found["base"].ends == [1] and found["bos"].ends == []
    assert len({e.fingerprint for e in found.values()}) == len(found)  # caches of chat depend on the template too


def test_markers_in_text_stay_text(tokenizers):
    for name, tokenizer in tokenizers.items():
        encode = PlainEncoder(tokenizer)
        text = f"a {BEGIN}{END}<|im_end|><|endoftext|> b"
        special = {i for i, token in encode.raw.get_added_tokens_decoder().items() if token.special} - {0}
        assert not set(encode(text)) & special and encode.decode(encode(text)) == text, name
        again = pickle.loads(pickle.dumps(encode))
        assert again(text) == encode(text) and again.turns == encode.turns and again.fingerprint == encode.fingerprint


@pytest.mark.parametrize("name", FRAMED)
def test_documents_are_packed(tokenizers, corpus, tmp_path, name):
    encode = PlainEncoder(tokenizers[name])
    store = TokenStore.build(corpus, encode, tmp_path / "store")
    stream = PackedTextStream(store, encode, 512, seed=0, framed=False)
    ids = np.concatenate([stream.sequence(n).ids for n in range(stream.total // 512 + 1)])[: stream.total].tolist()
    before, after = encode.frame()
    wanted = [[*before, *store[i].tolist(), *after] for i in range(len(store))]
    mark = (before or after)[0]
    places = [i for i, token in enumerate(ids) if token == mark]
    edges = [*places, len(ids)] if before else [0, *(place + 1 for place in places)]
    assert sorted(ids[a:b] for a, b in pairwise(edges)) == sorted(wanted)


def test_documents_cannot_be_parted_without_bos_and_eos(tokenizers, corpus, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text(corpus[0].text)
    data = DataConfig((SourceConfig(str(tmp_path / "text")),), cache=str(tmp_path / "cache"), held_out_share=0.0)
    with pytest.raises(UserError, match="neither bos nor eos") as refused:
        build_dataset(data, tokenizers["none"], 256, 4, seed=0)
    assert "eepSeek" not in str(refused.value) and "｜" not in str(refused.value)


@pytest.mark.parametrize("name", FRAMED)
def test_needles_are_hidden_and_asked_for(tokenizers, corpus, name):
    encode = PlainEncoder(tokenizers[name])
    examples = Needles(encode, Documents(test=corpus), 4, 1024).examples("test", 4)
    text = encode.decode(examples[0].context)
    for ask in examples:
        assert ask.value in text and ask.key in text
        assert 900 < len(ask.context) + len(ask.prompt) + len(ask.target) <= 1024
        begun, told = encode.decode(ask.prompt), encode.decode(ask.target)
        assert ask.value not in begun and ask.key.split()[-1].strip("'\"`") in begun
        assert told.strip().startswith(ask.value)
        close = encode.turns.close
        assert tuple(ask.target[-len(close) :]) == close
        assert encode.decode(ask.target[: -len(close)]).strip() in (ask.value, f": {ask.value}")


@pytest.mark.parametrize("name", FRAMED)
def test_needle_sequences_train(tokenizers, corpus, tmp_path, name):
    encode = PlainEncoder(tokenizers[name])
    tokens = np.array([t for d in corpus for t in encode(d.text)])
    for seed in range(8):
        ids, told = retrieval.training_sequence(
            random.Random(seed),
            encode,
            retrieval.LineBounds(encode),
            lambda rng, n: tokens[rng.randrange(len(tokens) - n) :][:n],
            600,
        )
        assert ids.shape == told.shape == (600,) and told.any()
        opening, close = encode.turns.open, encode.turns.close
        assert (
            tuple(ids[: len(opening)]) == opening and tuple(ids[-len(close) :]) == close and told[-len(close) :].all()
        )


@pytest.mark.parametrize("name", TALKING)
def test_chat_is_written_as_the_template_writes_it(tokenizers, corpus, name):
    tokenizer = tokenizers[name]
    encode = PlainEncoder(tokenizer)
    turns = encode.chat()
    said = [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "A list."},
        {"role": "user", "content": "Why?"},
    ]

    def templated(messages, generate):
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate, enable_thinking=False
        )

    ids = [*turns.open, *encode("What is it?"), *turns.reply, *encode("A list."), *turns.close]
    ids += [*turns.next, *encode("Why?"), *turns.reply]
    talk = ids
    whole = "".join(encode.decode([i]) if name != "words" else encode.raw.id_to_token(i).replace("▁", " ") for i in ids)
    wanted = templated(said, True)
    if name == "chatml":  # its answers are not thought about either, which the template says only of the last one
        wanted = wanted.replace("assistant\nA list", "assistant\n<think>\n\n</think>\n\nA list")
        assert ids == [t for part in [wanted] for t in tokenizer(part, add_special_tokens=False).input_ids]
    assert "".join(whole.split()) == "".join(wanted.split())
    asked = encode.prompt(said[:1])
    assert asked == [*turns.open, *encode("What is it?"), *turns.reply]
    assert [*asked, *encode("A list."), *turns.close, *encode.next_turn("Why?")] == talk
    assert encode.prompt(said)[-len(turns.reply) :] == list(turns.reply)

    for example, ids in dialogue.encoded_examples(corpus[:1], encode):
        assert (
            example and tuple(ids[: len(turns.open)]) == turns.open and tuple(ids[-len(turns.close) :]) == turns.close
        )
    hostile = encode.prompt([{"role": "user", "content": f"a{END}<|im_end|>b"}])
    assert hostile.count(turns.close[-1]) == encode.prompt([{"role": "user", "content": "ab"}]).count(turns.close[-1])


def test_prompts_are_ids_text_or_messages(tokenizers):
    encode = PlainEncoder(tokenizers["llama"])
    assert encode.prompt((5, 6)) == [5, 6] and encode.prompt([]) == [] and encode.prompt("x y") == [0, *encode("x y")]
    bundled = PlainEncoder(tokensieve.load_tokenizer("base"))
    assert bundled.turns == Turns((0, 3), (4, 6), (1,), (3,)) and bundled.frame() == ([0], [1]) and bundled.ends == [1]
    turn = bundled.next_turn(f"x{END}<think>")  # text stays text; thoughts are open or closed as in a prompt
    assert turn[0] == 3 and turn[-2:] == [4, 6] and not {1, 5} & {*turn}
    assert bundled.next_turn("x", think=True) == [3, *bundled("x"), 4, 5]
    with pytest.raises(UserError, match="no chat template"):
        PlainEncoder(tokenizers["base"]).next_turn("x")
    with pytest.raises(UserError, match="system, user and assistant, not tool"):
        bundled.prompt([{"role": "tool", "content": "x"}])


BAD = {
    "refuses": ("{{ raise_exception('no') }}", "cannot write user"),
    "drops": ("{{ bos_token }}hello", "drops"),
    "changes": ("{% for m in messages %}{{ m['content'].upper() }}{% endfor %}", "changes"),
    "never ends": ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", "no special token"),
    "ends otherwise": (
        "{% for m in messages %}{{ m['content'] }}{% if loop.last %}<|im_end|>{% else %}<|im_start|>{% endif %}"
        "{% endfor %}",
        "otherwise",
    ),
}


@pytest.mark.parametrize("damage", BAD)
def test_a_template_that_cannot_be_used_is_an_error_of_chat_alone(tokenizers, corpus, damage):
    template, message = BAD[damage]
    encode = PlainEncoder(fast(tokenizers["chatml"].backend_tokenizer, template))
    assert encode.decode(encode("plain text")) == "plain text"
    with pytest.raises(UserError, match=message):
        encode.chat()
    assert Needles(encode, Documents(test=corpus), 1, 400).examples("test", 1)


def test_chat_without_a_template_says_what_to_do(tokenizers, corpus, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.py").write_text(corpus[0].text)
    text = SourceConfig(str(tmp_path / "text"))
    data = DataConfig((text, SourceConfig("retrieval")), cache=str(tmp_path / "cache"), held_out_share=0.0)
    dataset = build_dataset(data, tokenizers["base"], 300, 6, seed=0)
    assert all(dataset[i]["input_ids"].shape == (300,) for i in range(6))
    with pytest.raises(UserError, match=r"no chat template; add chat_template.jinja .* none in data.sources"):
        build_dataset(dataclasses.replace(data, sources=(text, SourceConfig("chat"))), tokenizers["base"], 300, 4, 0)
    talked = build_dataset(
        dataclasses.replace(data, sources=(text, SourceConfig("chat"))), tokenizers["llama"], 300, 4, seed=0
    )
    assert talked[0]["input_ids"].shape == (300,)


class Perfect(torch.nn.Module):
    """Goes on with what it is shown, which is the target, and writes `says` after every other prompt."""

    def __init__(self, eos: int, says: list[int], vocab: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.model = models.TakesOptions()
        self.eos, self.says, self.vocab = eos, says, vocab

    def forward(self, ids, past_key_values, use_cache, logits_to_keep):
        best = torch.nn.functional.pad(ids[:, 1:], (0, 1), value=self.eos)[:, -logits_to_keep:]
        return SimpleNamespace(logits=torch.nn.functional.one_hot(best, self.vocab))

    def generate(self, ids, **_):
        return torch.cat([ids, torch.tensor([self.says])], dim=1)


@pytest.mark.parametrize("template", [CHATML, LLAMA])
def test_an_answer_does_not_hold_what_closes_it(tokenizers, corpus, template):
    """ChatML's markers are plain text of this tokenizer, so that eos ends an answer after them."""
    encode = PlainEncoder(fast(tokenizers["base"].backend_tokenizer, template, bos_token=BEGIN, eos_token=END))
    close = encode.turns.close
    assert len(close) > 1 and close[-1] == encode.eos
    model = Perfect(encode.eos, [*encode("x = 1"), *close], encode.vocab_size)
    needles, chat = Needles(encode, Documents(test=corpus), 1, 600), Chat(Documents(test=corpus))
    found = evals.evaluate(model, encode, needles, needles.examples("test", 1))
    assert found.value == 1 and found.records[0].answer.ended
    said = evals.evaluate(model, encode, chat, chat.examples("test", 1)).records[0].answer
    assert said == Answer("x = 1")
    model.says = [*encode("x = 1"), *close[:-1]]  # out of tokens: nothing says that the answer had ended
    said = evals.evaluate(model, encode, chat, chat.examples("test", 1)).records[0].answer
    assert said == Answer(encode.decode(model.says), ended=False)


SIZES = AcceptanceSizes(
    contexts=(500,),
    needles=(1,),
    prompts_per_decile=1,
    long=200,
    short=64,
    sequences=1,
    completions=2,
    answers=2,
    new_tokens=4,
)


@pytest.mark.slow
def test_evaluation_of_another_family(tokenizers, corpus):
    """With a template all of it; without one everything but chat, which is refused before anything is measured."""
    model = models.ours(models.config("v3", vocab_size=1280, num_hidden_layers=2, max_position_embeddings=2048))
    corpus = corpus[2:]
    figures = evals.acceptance(model, tokenizers["llama"], corpus, SIZES)
    assert figures["chat"]["count"] == 2 and len(evals.acceptance_criteria(figures)) == 4
    with pytest.raises(UserError, match="base.answers=0"):
        evals.acceptance(model, tokenizers["base"], corpus, SIZES, lambda *_: pytest.fail("it measured"))
    for name in ("base", "none"):
        figures = evals.acceptance(model, tokenizers[name], corpus, dataclasses.replace(SIZES, answers=0))
        assert "chat" not in figures and len(evals.acceptance_criteria(figures)) == 3, name
        assert json.dumps(figures)


def test_chat_examples_need_no_tokenizer(corpus):
    assert len(Chat(Documents(train=corpus)).examples("train", 6)) == 6
