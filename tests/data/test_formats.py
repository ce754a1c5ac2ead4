"""The formats that text comes in: all of them say the same documents, and what is left out is named."""

import bz2
import gzip
import json
import logging
import lzma
import sys
from pathlib import Path

import datasets
import pyarrow
import pytest
from pyarrow import feather, parquet

from tokensieve.config import DataConfig, SourceConfig, UserError
from tokensieve.data import Document, build_dataset, read_documents, store, train_tokenizer
from tokensieve.tasks import ASSISTANT, BOS, END_THINK, EOS, USER, PlainEncoder

TEXTS = ["one\nline more", 'täxt, with "quotes"', "three"]
ROWS = [{"id": number, "text": text} for number, text in enumerate(TEXTS)]
LINES = "\n".join(map(json.dumps, ROWS)).encode()
CSV = "id,text\n" + "".join(f'{row["id"]},"{row["text"].replace(chr(34), chr(34) * 2)}"\n' for row in ROWS)


def _zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


def texts(source: object, split: str = "all") -> list[str]:
    return [document.text for document in read_documents(str(source), split)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl", b"\xef\xbb\xbf" + LINES),  # with a byte-order mark, as some editors write it
        ("x.ndjson", LINES),
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)),  # without the time, which would enter the test's name
        ("x.jsonl.bz2", bz2.compress(LINES)),
        ("x.jsonl.xz", lzma.compress(LINES)),
        ("x.jsonl.zst", _zstd(LINES)),
        ("x.json", LINES),
        ("x.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("x.csv", CSV.encode()),
        ("x.tsv", CSV.replace(",", "\t", 1).replace(',"', '\t"').encode()),
    ],
)
def test_every_format_says_the_same(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert texts(tmp_path / name) == TEXTS


def test_arrow_and_parquet(tmp_path: Path) -> None:
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "x.parquet")
    feather.write_feather(table, tmp_path / "x.arrow")  # the format with an index; `datasets` writes the other
    assert texts(tmp_path / "x.parquet") == texts(tmp_path / "x.arrow") == TEXTS


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": rows, "test": rows}).save_to_disk(folder / "both")
    (folder / "both" / "train" / "cache-1.arrow").write_bytes(b"left by an earlier map")
    return folder / "both"


def test_a_saved_dataset_is_its_rows(saved: Path) -> None:
    assert texts(saved / "train") == TEXTS
    with pytest.raises(UserError, match=r"several splits \(test, train\); name one"):
        texts(saved)
    (saved / "train" / "state.json").unlink()
    assert texts(saved / "train") == TEXTS  # and dataset_info.json is still none of them


def test_a_row_field_may_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("id,body\n1,first\n2,second\n")
    assert texts(f"{tmp_path}/x.csv#body") == ["first", "second"]
    for source, words in (
        ("x.csv", r'no "text" field \(it has id, body\)'),
        ("x.csv#b", 'no "b" field'),
        ("x.csv#", "#"),
    ):
        with pytest.raises(UserError, match=words):
            texts(f"{tmp_path}/{source}")
    (tmp_path / "odd#name.txt").write_text("a file of this name wins")
    assert texts(tmp_path / "odd#name.txt") == ["a file of this name wins"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl.gz", gzip.compress(LINES, mtime=0)[:30]),
        ("x.csv.gz", b"no gzip"),
        ("x.txt.zst", b"no zstd at all"),
        ("x.parquet", b"PAR1, once"),
        ("x.arrow", b"\xff\xff\xff\xff\x10\x00\x00\x00"),
        ("x.csv", b'id,text\n1,"never closed'),
    ],
)
def test_damaged_files_are_named(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name} is (damaged|not CSV)") as caught:
        texts(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_what_is_left_out_is_counted_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_text("read")
    for name in ("latin-1", "utf-16"):
        (tmp_path / f"{name}.txt").write_bytes("é".encode(name))
    (tmp_path / "rows.jsonl").write_text('{"text": " "}\n{"text": null}\n{"text": "row"}')
    with caplog.at_level(logging.WARNING, "tokensieve"):
        assert texts(tmp_path) == ["read", "row"]
    assert "left out 2 not UTF-8 text (latin-1.txt, utf-16.txt), 2 blank (rows.jsonl:1, rows.jsonl:2)" in caplog.text


def test_without_pyarrow_one_line_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    for name in ("x.parquet", "x.arrow", "x.jsonl.zst"):
        (tmp_path / name).write_bytes(b"anything")
        with pytest.raises(UserError, match=rf"{name} needs the package pyarrow; pip install pyarrow"):
            texts(tmp_path / name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    from transformers import AutoTokenizer

    text = "".join(f"value_{n} = {n}\n    return {n * n}  # words and words\n" for n in range(300))
    return AutoTokenizer.from_pretrained(train_tokenizer([text], tmp_path_factory.mktemp("t"), vocab_size=320))


def test_messages_become_the_models_own_chat_format(tokenizer, tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I.", "tool_calls": None}]
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": talk}))
    config = DataConfig((SourceConfig(str(tmp_path / "x.jsonl")),), cache=str(tmp_path / "cache"), held_out_share=0.0)
    encode = PlainEncoder(tokenizer)
    whole = f"{BOS}{USER}Who?{ASSISTANT}{END_THINK}I.{EOS}"
    length = len(encode.conversation(talk))
    item = build_dataset(config, tokenizer, length, 1, 0)[0]
    assert encode.decode(item["input_ids"].tolist()) == whole == tokenizer.apply_chat_template(talk, tokenize=False)
    (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [*talk, {"role": "tool", "content": "3"}]}))
    with pytest.raises(UserError, match=r"x.jsonl:1: messages are of the roles .*, not tool; convert them"):
        build_dataset(config, tokenizer, length, 1, 0)
    for message in ({"role": "user", "content": "x", "tool_calls": [1]}, {"content": "x"}, "x"):
        (tmp_path / "x.jsonl").write_text(json.dumps({"messages": [message]}))
        with pytest.raises(UserError, match="line 1: a message must hold a role and a content"):
            texts(tmp_path / "x.jsonl")


def test_a_long_text_is_encoded_in_pieces(tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same tokens, whether it has lines or not. In one piece a line of 50 MB took 7.6 GB."""
    encode = PlainEncoder(tokenizer)
    lines = "".join(f"value_{n} = {n}\n\n    return {n * n}\n" for n in range(200))
    documents = [Document("lines", lines), Document("line", lines.replace("\n", " ")), Document("short", "x = 1\n")]
    whole = [encode(document.text) for document in documents]
    seen: list[str] = []
    real = PlainEncoder.__call__
    monkeypatch.setattr(store, "CHARS", 100)
    monkeypatch.setattr(PlainEncoder, "__call__", lambda self, text: seen.append(text) or real(self, text))
    found = list(store.encoded(documents, encode))
    assert [(name, ids.tolist()) for name, ids in found] == list(zip(("lines", "line", "short"), whole, strict=True))
    assert len(seen) > 50 and max(map(len, seen)) <= 100
