"""The tokenizer, the token store, and packed sequences."""

import dataclasses
import json
import pickle
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import stdlib
from tokensieve.config import DataConfig, SourceConfig, UserError
from tokensieve.data import (
    Document,
    PackedDataset,
    TokenStore,
    build_dataset,
    text_source,
    train_tokenizer,
)
from tokensieve.data.packing import PackedTextStream
from tokensieve.tasks import ASSISTANT, BOS, END_THINK, EOS, PAD, THINK, USER, PlainEncoder

MODULES = ("argparse", "ast", "inspect", "json.decoder", "textwrap", "typing", "random", "shutil")


@pytest.fixture(scope="module")
def corpus() -> list[Document]:
    return stdlib.documents(*MODULES)


@pytest.fixture(scope="module")
def folder(corpus, tmp_path_factory) -> Path:
    return train_tokenizer((d.text for d in corpus), tmp_path_factory.mktemp("tokenizer"), vocab_size=1024)


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def encode(tokenizer) -> PlainEncoder:
    return PlainEncoder(tokenizer)


@pytest.fixture(scope="module")
def source(corpus, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("source")
    for document in corpus:
        path = root.joinpath(*document.name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document.text, encoding="utf-8")
    return root


def config(source: Path, cache: Path, *generated: str) -> DataConfig:
    mixture = (SourceConfig(str(source), 1.0), *(SourceConfig(name, 1.0) for name in generated))
    return DataConfig(mixture, cache=str(cache), held_out_share=0.0)


# tokenizer


def test_special_tokens_have_their_ids(tokenizer):
    assert tokenizer.convert_tokens_to_ids([BOS, EOS, PAD, USER, ASSISTANT, THINK, END_THINK]) == list(range(7))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1, 2)
    assert tokenizer.convert_tokens_to_ids("<｜reserved_15｜>") == 15 and len(tokenizer) == 1024


@settings(max_examples=200, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_survives_encoding(encode, tokenizer, text):
    assert encode.decode(encode(text)) == text
    assert encode.batch([text]) == [encode(text)]
    if not any(token in text for token in tokenizer.all_special_tokens):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@given(st.text("0123456789 .a", max_size=30))
@settings(max_examples=100, deadline=None)
def test_a_digit_is_one_token(encode, text):
    tokens = [encode.decode([i]) for i in encode(text)]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == [c for c in text if c.isdigit()]


def test_no_token_reaches_past_the_end_of_a_line(encode):
    for i in range(16, encode.vocab_size):
        assert "\n" not in encode.decode([i]).rstrip("\n")


def test_markers_in_text_stay_text(encode, tokenizer):
    assert not set(encode(f"{BOS}{THINK}</think>")) & set(range(16))
    assert tokenizer(BOS, add_special_tokens=False).input_ids == [0]  # the caller's tokenizer is left as it was
    again = pickle.loads(pickle.dumps(encode))
    assert again(THINK) == encode(THINK) and again.fingerprint == encode.fingerprint


def test_chat_template_is_our_format(encode, tokenizer):
    turns = [{"role": "user", "content": " a <b>\n"}]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == encode.prompt(turns)
    turns = [{"role": "system", "content": "S"}, *turns]
    ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    assert ids == encode.prompt(turns)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == f"{BOS}{USER}a{ASSISTANT}{END_THINK}b{EOS}{USER}c"
    assert encode.prompt(turns) == tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
    thinking = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, thinking=True)
    assert thinking == text + ASSISTANT + END_THINK  # no task trains a thought


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "deepseek_v32"])
def test_the_tokenizer_stays_itself_beside_a_model(folder, tokenizer, tmp_path, kind):
    from transformers import AutoTokenizer

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert other.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert other.chat_template == tokenizer.chat_template


def test_tokenizers_that_cannot_serve(tmp_path):
    from tokenizers import Tokenizer, models

    with pytest.raises(UserError, match="no chat template"):
        PlainEncoder(Tokenizer(models.BPE())).chat()
    with pytest.raises(UserError, match="backend"):
        PlainEncoder("text")
    with pytest.raises(UserError, match="no text"):
        train_tokenizer([], tmp_path)
    with pytest.raises(UserError, match="272"):
        train_tokenizer(["x"], tmp_path, vocab_size=100)


# token store


def test_store_keeps_documents(corpus, encode, tmp_path):
    store = TokenStore.build(corpus, encode, tmp_path / "store")
    assert store.names == [d.name for d in corpus] and store.tokens.dtype == np.uint16
    assert [encode.decode(store[i]) for i in range(len(store))] == [d.text for d in corpus]
    copy = pickle.loads(pickle.dumps(store))
    assert isinstance(copy.tokens, np.memmap) and (copy[3] == store[3]).all()
    assert [p.name for p in tmp_path.iterdir()] == ["store"]


def test_store_is_rebuilt_for_another_tokenizer_only(corpus, encode, tmp_path):
    folder = tmp_path / "store"
    TokenStore.build(corpus[:2], encode, folder)
    assert len(TokenStore.build(corpus[:3], encode, folder)) == 2
    other = PlainEncoder(_tokenizer(corpus[0].text, tmp_path / "other"))
    assert len(TokenStore.build(corpus[:3], other, folder)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]


def test_two_runs_may_build_a_store_at_once(corpus, encode, tmp_path):
    """The other run's store, which appears while ours is written, stays, as another tokenizer's does not."""
    folder = tmp_path / "store"
    other = PlainEncoder(_tokenizer(corpus[0].text, tmp_path / "other"))

    def documents(meanwhile):
        yield corpus[0]
        TokenStore.build(corpus[:2], meanwhile, folder)
        yield from corpus[1:3]

    assert len(TokenStore.build(documents(encode), encode, folder)) == 2
    assert len(TokenStore.build(documents(encode), other, folder)) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "store"]


def _tokenizer(text: str, folder: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(train_tokenizer([text], folder, vocab_size=300) / "tokenizer.json"))


def test_a_failed_build_leaves_nothing_behind(corpus, encode, tmp_path):
    def broken():
        yield corpus[0]
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="free some space"):
        TokenStore.build(broken(), encode, tmp_path / "store")
    with pytest.raises(UserError, match="no documents"):
        TokenStore.build([], encode, tmp_path / "store")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="missing or damaged"):
        TokenStore.open(tmp_path / "store")


def test_a_truncated_store_is_refused(corpus, encode, tmp_path):
    TokenStore.build(corpus[:1], encode, tmp_path / "store")
    tokens = tmp_path / "store" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(UserError, match="truncated"):
        TokenStore.open(tmp_path / "store")


# packing


def test_text_stream_loses_no_token_and_repeats_none(corpus, encode, tmp_path):
    store = TokenStore.build(corpus, encode, tmp_path / "store")
    stream = PackedTextStream(store, encode, context=512, seed=3, framed=False)
    count = stream.total // 512
    ids = np.concatenate([stream.sequence(n)[0] for n in range(count + 1)])
    documents = [[0, *store[i].tolist(), 1] for i in range(len(store))]
    epoch = ids[: stream.total].tolist()
    begins = [i for i, token in enumerate(epoch) if token == 0] + [stream.total]
    pieces = [epoch[a:b] for a, b in pairwise(begins)]
    assert sorted(pieces) == sorted(documents) and pieces != documents
    assert ids[stream.total] == 0  # the next epoch begins in the same sequence


def test_items_mark_their_documents(source, tokenizer, tmp_path):
    dataset = build_dataset(config(source, tmp_path, "retrieval", "chat"), tokenizer, 512, sequences=60, seed=1)
    assert len(dataset) == 60 and set(dataset.choice) == {0, 1, 2}
    for index in range(60):
        item = dataset[index]
        assert sorted(item) == ["input_ids", "labels", "position_ids"]
        assert {(value.dtype, value.shape) for value in item.values()} == {(torch.int64, (512,))}
        positions, labels = item["position_ids"], item["labels"]
        first = positions == 0
        assert first[0]
        assert (positions[1:][~first[1:]] == positions[:-1][~first[1:]] + 1).all()
        assert (labels[first] == -100).all() and (labels[~first] == item["input_ids"][~first]).all()
        assert (item["input_ids"][1:][first[1:]] == 0).all()  # whatever begins inside a sequence begins with bos
        if dataset.choice[index] == 1:
            assert int(first.sum()) == 1


def test_retrieval_sequences_hold_documents_of_several_lengths(source, tokenizer, tmp_path):
    dataset = build_dataset(config(source, tmp_path, "retrieval"), tokenizer, 2048, sequences=120, seed=2)
    rows = [dataset.streams[1].sequence(n) for n in range(40)]
    assert {len(row.starts) for row in rows} == {1, 2, 4}  # the shortest are of 512 tokens
    for row in rows:
        assert row.answers is not None and row.ids.shape == row.answers.shape == (2048,)
        assert (row.ids[row.starts] == 0).all() and (row.ids == 0).sum() == len(row.starts)
        assert row.starts.tolist() == list(range(0, 2048, 2048 // len(row.starts)))
        for start in row.starts:  # no document is without a question
            assert row.answers[start : start + 2048 // len(row.starts)].any()


def test_answers_weigh_more_where_the_config_says_so(source, tokenizer, tmp_path):
    plain = build_dataset(config(source, tmp_path, "retrieval"), tokenizer, 512, sequences=40, seed=1)
    settings = dataclasses.replace(config(source, tmp_path, "retrieval"), answer_weight=5.0)
    weighted = build_dataset(settings, tokenizer, 512, sequences=40, seed=1)
    assert weighted.fingerprint != plain.fingerprint
    for index in range(40):
        item, same = weighted[index], plain[index]
        assert "loss_weights" not in same and all((item[name] == same[name]).all() for name in same)
        weights = item["loss_weights"]
        assert weights.dtype == torch.float32 and weights.shape == (512,)
        row = weighted.streams[weighted.choice[index]].sequence(int(weighted.number[index]))
        answers = torch.zeros(512, dtype=torch.bool) if row.answers is None else torch.from_numpy(row.answers)
        assert (weights == torch.where(answers, 5.0, 1.0)).all()
        assert bool(answers.any()) == (weighted.choice[index] == 1)


def test_items_are_pure_functions_of_seed_and_index(source, tokenizer, tmp_path):
    settings = config(source, tmp_path, "retrieval", "chat")
    first = build_dataset(settings, tokenizer, 512, sequences=40, seed=5)
    wanted = [first[i] for i in range(40)]
    second = pickle.loads(pickle.dumps(build_dataset(settings, tokenizer, 512, sequences=70, seed=5)))
    for index in reversed(range(40)):
        assert all((second[index][name] == wanted[index][name]).all() for name in wanted[index])
    assert first.fingerprint == second.fingerprint
    other = build_dataset(settings, tokenizer, 512, sequences=40, seed=6)
    assert other.fingerprint != first.fingerprint
    assert sum((other[i]["input_ids"] != wanted[i]["input_ids"]).any() for i in range(40)) == 40
    with pytest.raises(IndexError):
        first[40]


def test_weights_are_kept_and_checked(source, tokenizer, tmp_path):
    mixture = (SourceConfig(str(source), 3.0), SourceConfig("retrieval", 1.0))
    settings = DataConfig(mixture, cache=str(tmp_path), held_out_share=0.0)
    dataset = build_dataset(settings, tokenizer, 512, sequences=4000, seed=0)
    assert np.bincount(dataset.choice)[1] == pytest.approx(1000, abs=120)
    assert dataset.number[dataset.choice == 1].tolist() == list(range(np.bincount(dataset.choice)[1]))
    with pytest.raises(UserError, match="weights"):
        PackedDataset(dataset.streams, [1.0, -1.0], 4, seed=0)
    with pytest.raises(UserError, match="weights"):
        PackedDataset([], [], 4, seed=0)


def test_generated_examples_are_made_from_the_first_plain_source():
    for names, wanted in ((("retrieval", "a", "b"), "a"), (("chat",), "python"), (("python", "a"), "python")):
        assert text_source(DataConfig(tuple(SourceConfig(name) for name in names))) == wanted


def test_too_little_text_for_the_context(source, tokenizer, tmp_path):
    with pytest.raises(UserError, match="larger source"):
        build_dataset(config(source, tmp_path, "retrieval"), tokenizer, 2**20, sequences=4, seed=0)
    with pytest.raises(UserError, match="held_out"):
        build_dataset(config(source, tmp_path), tokenizer, 512, sequences=4, seed=0, split="test")


def test_sequences_come_fast_enough(source, tokenizer, tmp_path):
    dataset = build_dataset(config(source, tmp_path, "retrieval"), tokenizer, 8192, sequences=20, seed=0)
    dataset[0]
    begin = time.process_time()
    for index in range(20):
        dataset[index]
    assert 20 * 8192 / (time.process_time() - begin) > 300_000  # about 5 million here
