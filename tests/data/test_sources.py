"""Where text comes from, which of it is held out, and what bad sources say."""

import json
from email.message import Message
from pathlib import Path

import pytest

from tokensieve.config import UserError
from tokensieve.data import canonical_name, is_held_out, licences, read_documents, sources


def names(*arguments, **keywords) -> list[str]:
    return [document.name for document in read_documents(*arguments, **keywords)]


def write_tree(root: Path, modules: dict[str, str]) -> Path:
    for name, text in modules.items():
        path = root.joinpath(*name.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return root


def unlike(number: int) -> str:
    return "".join(f"value_{number}_{line} = compute({number} * {line})\n" for line in range(5))


def test_the_split_depends_on_the_module_name_alone(tmp_path):
    modules = {f"package{i % 7}.module{i}": unlike(i) for i in range(60)}
    here = write_tree(tmp_path / "lib" / "python3.11", modules)
    there = write_tree(tmp_path / "elsewhere" / "python3.12", modules | {"package1.added": unlike(999)})
    first, second = (names(str(root), split="test", held_out_share=0.3) for root in (here, there))
    assert 5 < len(first) < 40
    assert set(first) == set(second) - {"package1.added"}
    train = names(str(here), split="train", held_out_share=0.3)
    assert set(train) == set(modules) - set(first) and train == sorted(train)
    assert names(str(here), split="all") == sorted(modules)


def test_the_split_is_the_same_on_every_machine():
    pinned = {name: is_held_out(name, 0.02) for name in ("json.decoder", "argparse", "_pyio", "turtle")}
    assert pinned == {name: sources.stable_fraction(name) < 0.02 for name in pinned}
    assert sources.stable_fraction("json.decoder") == pytest.approx(PINNED_FRACTION, abs=1e-12)


PINNED_FRACTION = 0.22106416299084494


@pytest.mark.parametrize(
    ("copy", "original"),
    [
        ("pip._vendor.requests.sessions", "requests.sessions"),
        ("setuptools._vendor.packaging.version", "packaging.version"),
        ("a.vendored.b._vendor.c.d", "c.d"),
        ("black.third_party.blib2to3.driver", "blib2to3.driver"),
        ("requests.sessions", "requests.sessions"),
        ("package._vendor", "package._vendor"),
    ],
)
def test_a_vendored_copy_goes_where_its_original_goes(copy, original):
    assert canonical_name(copy) == original
    assert all(is_held_out(copy, share / 10) == is_held_out(original, share / 10) for share in range(11))


def test_training_drops_near_duplicates_of_held_out_files(tmp_path):
    modules = {f"module{i}": unlike(i) for i in range(40)}
    held_out = [name for name in modules if is_held_out(name, 0.3)]
    kept = [f"copy{i}" for i in range(60) if not is_held_out(f"copy{i}", 0.3)]
    lines = modules[held_out[0]].splitlines(keepends=True)
    modules[kept[0]] = "# another header comment line\n" + "".join(lines[:4]) + "something_else = other(thing)\n"
    modules[kept[1]] = "".join(lines[:2]) + unlike(1000)
    train = names(str(write_tree(tmp_path, modules)), split="train", held_out_share=0.3)
    assert kept[0] not in train and kept[1] in train
    assert names(str(tmp_path), split="all", held_out_share=0.3) == sorted(modules)


def test_the_default_source_is_the_python_around_us():
    documents = list(read_documents("python", split="test", held_out_share=0.002))
    assert documents == sorted(documents, key=lambda d: d.name) and documents
    for document in documents:
        assert is_held_out(document.name, 0.002) and 400 <= len(document.text) <= 400_000
        assert max(map(len, document.text.split("\n"))) <= 1000
    files = sources.source_files("python")
    top = {file.name.split(".")[0] for file in files}
    assert {"argparse", "json", "torch", "numpy"} <= top
    assert not top & {"tokensieve", "hypothesis", "tqdm"}  # ourselves, and MPL
    assert not any(sources.VENDORED & set(file.name.split(".")) for file in files if file.name.startswith("pip."))


@pytest.mark.parametrize(
    ("fields", "fine"),
    [
        ({"License-Expression": "MIT"}, True),
        ({"License-Expression": "Apache-2.0 WITH LLVM-exception AND (MIT OR GPL-3.0-only)"}, True),
        ({"License-Expression": "MPL-2.0 AND MIT"}, False),
        ({"License": "BSD 3-Clause"}, True),
        ({"License": "NVIDIA Proprietary Software"}, False),
        ({"License": "GPLv3"}, False),
        ({"License": "x" * 80}, False),
        ({"Classifier": "License :: OSI Approved :: Apache Software License"}, True),
        ({"Classifier": "License :: OSI Approved :: Mozilla Public License 2.0 (MPL 2.0)"}, False),
        ({"Classifier": "License :: OSI Approved", "License": "ISC"}, True),
        ({"Name": "nvidia-ml-py", "License-Expression": "BSD-3-Clause"}, False),
        ({}, False),
    ],
)
def test_only_stated_permissive_licences_count(fields, fine):
    metadata = Message()
    for name, value in ({"Name": "package"} | fields).items():
        metadata[name] = value
    assert (sources._permissive(metadata) is not None) == fine


def test_licences_name_what_is_read():
    found = licences()
    assert found["python"] == "PSF-2.0" and "torch" in found and not any(n.startswith("nvidia") for n in found)


def test_file_glob_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two\r\n")
    (tmp_path / "blank.md").write_text(" \n")
    (tmp_path / "binary.md").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\nx = 'é'\n".encode("latin-1"))
    (tmp_path / "undeclared.py").write_bytes("x = 'é'\n".encode("latin-1"))
    rows = [{"text": "first"}, {"text": ""}, {"text": "bad \ud800"}, {"text": "second"}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    whole = {d.name: d.text for d in read_documents(str(tmp_path), split="all")}
    assert whole == {
        "a.txt": "one",
        "b.md": "two\n",
        "c.jsonl:1": "first",
        "c.jsonl:4": "second",
        "latin": "# -*- coding: latin-1 -*-\nx = 'é'\n",
    }
    assert names(str(tmp_path / "*.md"), split="all") == ["b.md"]
    assert names(str(tmp_path / "**" / "[ab].*"), split="all") == ["a.txt", "b.md"]
    assert names(str(tmp_path / "a.txt")) == ["a.txt"]  # one file is all training text, whatever its name hashes to
    assert names(str(tmp_path / "c.jsonl"), held_out_share=0.0) == ["c.jsonl:1", "c.jsonl:4"]


def test_limit_bytes_takes_a_stable_sample(tmp_path):
    write_tree(tmp_path, {f"module{i}": unlike(i) for i in range(40)})
    some = names(str(tmp_path), split="all", limit_bytes=2000)
    more = names(str(tmp_path), split="all", limit_bytes=4000)
    assert 5 < len(some) < len(more) < 40 and set(some) < set(more)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda root: str(root / "missing"), "does not exist"),
        (lambda root: str(root / "*.txt"), "holds no files"),
        (lambda root: str(root), "holds no files"),
        (lambda root: _file(root, "blank.txt", " "), "no readable text"),
        (lambda root: _file(root, "x.jsonl", '{"text": 1}'), 'no "text" string or messages, but int'),
        (lambda root: _file(root, "x.jsonl", "{"), "line 1 is not JSON"),
        (lambda root: _file(root, "x.jsonl", b"\xff"), "not UTF-8"),
        (lambda root: _file(root, "x.bin", b"\xff"), "1 not UTF-8 text"),
    ],
)
def test_bad_sources_say_what_and_how(tmp_path, make, words):
    with pytest.raises(UserError, match=words) as caught:
        list(read_documents(make(tmp_path)))
    assert "\n" not in str(caught.value)


def _file(root: Path, name: str, content: str | bytes) -> str:
    (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(root / name)


def test_a_hugging_face_name_that_cannot_be_opened(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def refuse(*_, **__):
        raise ConnectionError("no network\nmore")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match=r"hf:someone/thing.*no network"):
        list(read_documents("hf:someone/thing"))
    rows = [{"text": f"text {i}"} for i in range(5)]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config, split, streaming: iter(rows))
    assert names("hf:someone/thing:small:test", split="all", limit_bytes=12) == ["someone/thing:0", "someone/thing:1"]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: iter([{"content": "x"}]))
    with pytest.raises(UserError, match='no "text" field .it has content.'):
        list(read_documents("hf:someone/thing"))


def test_too_few_documents_to_hold_any_out(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"text {i}"}) for i in range(3)))
    with pytest.raises(UserError, match=r"too few for a share of 0.02; raise held_out_share \(1 takes all of them\)"):
        names(str(path), split="test")
    assert len(names(str(path), split="test", held_out_share=1.0)) == 3
