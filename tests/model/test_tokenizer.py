"""Tokenizers in all the formats that checkpoints are shipped with, and of several families, through the whole road."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import tokensieve
from tests.support import commands, models, stdlib
from tests.support.tokenizers import (
    CHATML,
    LLAMA,
    LLAMA_3,
    LLAMA_3_MARKERS,
    bpe,
    fast,
    write_sentencepiece,
    write_tiktoken,
    write_vocab_and_merges,
)
from tokensieve.config import DataConfig, SourceConfig, UserError
from tokensieve.data import build_dataset
from tokensieve.model.tokenizer import load_tokenizer
from tokensieve.tasks import Documents, PlainEncoder, end_tokens
from tokensieve.tasks.retrieval import Needles

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEXT = "def f(x):\n    return x + 12345  # 北京 Straße's\n"
KIMI = (
    "{% for m in messages %}<|im_{{ m['role'] }}|>{{ m['role'] }}<|im_middle|>{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_assistant|>assistant<|im_middle|>{% endif %}"
)
KIMI_NAMES = {0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>", 5: "<|im_middle|>"}
KIMI_NAMES |= {6: "<|im_system|>", 255: "[PAD]"}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [document.text for document in stdlib.documents("argparse", "textwrap", "inspect")]


@pytest.fixture(scope="module")
def folders(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By family: a folder with nothing but the tokenizer."""
    root = tmp_path_factory.mktemp("tokenizers")
    both = {"bos_token": LLAMA_3_MARKERS[0], "eos_token": LLAMA_3_MARKERS[1]}
    fast(bpe(texts, *LLAMA_3_MARKERS), LLAMA_3, **both).save_pretrained(root / "llama 3")
    write_sentencepiece(texts, root / "llama 2", LLAMA)
    added = {str(i): {"content": name, "special": True} for i, name in enumerate(QWEN)}
    write_vocab_and_merges(
        bpe(texts, *QWEN),
        root / "qwen",
        tokenizer_class="Qwen2Tokenizer",
        eos_token=QWEN[2],
        pad_token=QWEN[0],
        chat_template=CHATML,
        added_tokens_decoder=added,
    )
    names = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    write_tiktoken(bpe(texts), root / "kimi", KIMI_NAMES, chat_template=KIMI, **names)
    return {folder.name: folder for folder in root.iterdir()}


FAMILIES = ("llama 3", "llama 2", "qwen", "kimi")


@pytest.mark.parametrize("family", FAMILIES)
def test_text_comes_back(folders: dict[str, Path], family: str) -> None:
    tokenizer = load_tokenizer(folders[family])
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == TEXT and len(ids) < len(TEXT.encode())
    encode = PlainEncoder(tokenizer)
    assert encode(TEXT) == ids and not encode.no_chat


@pytest.mark.parametrize("family", FAMILIES)
def test_every_kind_of_data(folders: dict[str, Path], family: str, texts: list[str], tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folders[family])
    (tmp_path / "text").mkdir()
    for number, text in enumerate(texts):
        (tmp_path / "text" / f"{number}.py").write_text(text)
    for source in (str(tmp_path / "text"), "retrieval", "chat"):
        sources = (SourceConfig(str(tmp_path / "text"), 0.0 if source in ("retrieval", "chat") else 1.0),)
        sources += (SourceConfig(source),) if source in ("retrieval", "chat") else ()
        data = DataConfig(sources, cache=str(tmp_path / "cache"), held_out_share=0.0)
        item = build_dataset(data, tokenizer, 512, 2, seed=0)[0]
        assert item["input_ids"].shape == (512,) and int(item["input_ids"].max()) < len(tokenizer), source
        assert "�" not in tokenizer.decode(item["input_ids"][:-8]) or source != "retrieval"
    needles = Needles(PlainEncoder(tokenizer), Documents(test=stdlib.documents("argparse", "inspect")), 2, 800)
    assert len(needles.examples("test", 2)) == 2


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_there_and_back(
    folders: dict[str, Path], family: str, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    """`generate --chat` stops where the template ends an answer, and the prompt is the template's own."""
    tokenizer = load_tokenizer(folders[family])
    model = models.ours(models.config("v3", vocab_size=len(tokenizer), num_hidden_layers=2))
    model.folder = folders[family]
    tokensieve.save(model, tmp_path / "model")
    encode, answer = PlainEncoder(tokenizer), "Yes: 42."
    assert encode.turns.close[-1] in end_tokens(model, tokenizer)  # where the engine stops too
    script = [*encode(answer), encode.turns.close[-1], *encode("never")]
    asked: list[list[int]] = []

    def scripted(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        ids = input_ids[0].tolist()
        asked.append(ids)
        ends = kwargs["eos_token_id"]
        stop = next(place for place, token in enumerate(script) if token in ends)
        kwargs["streamer"].put(input_ids)
        for token in script[: stop + 1]:
            kwargs["streamer"].put(torch.tensor([token]))
        kwargs["streamer"].end()
        return input_ids

    monkeypatch.setattr("tokensieve.model.DecoderForCausalLM.generate", scripted)
    ended = commands.runner(capsys)("generate", tmp_path / "model", "--chat", "Is it so?")
    assert ended.status == 0, ended
    assert ended.out.strip() == answer
    said = [{"role": "user", "content": "Is it so?"}]
    wanted = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert asked == [list(wanted)]


def test_kimis_vocabulary_as_tiktoken_reads_it(texts: list[str], tmp_path: Path) -> None:
    """Against byte pairs merged by rank, one piece after the other."""
    vocabulary = write_tiktoken(bpe(texts), tmp_path, KIMI_NAMES, bos_token="[BOS]", eos_token={"content": "[EOS]"})
    rank = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = load_tokenizer(tmp_path)
    first = len(vocabulary)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == first + 2 and len(tokenizer) == first + 256
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (first, first + 1)
    assert tokenizer.convert_ids_to_tokens(first + 9) == f"<|reserved_token_{first + 9}|>"

    def merged(piece: bytes) -> list[int]:
        parts = [bytes([byte]) for byte in piece]
        while len(parts) > 1:
            best = min(range(len(parts) - 1), key=lambda i: rank.get(parts[i] + parts[i + 1], len(rank)))
            if parts[best] + parts[best + 1] not in rank:
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        return [rank[part] for part in parts]

    pieces = [
        "def",
        " f",
        "(x",
        "):\n",
        "   ",
        " return",
        " x",
        " +",
        " ",
        "123",
        "45",
        " ",
        " #",
        " ",
        "北京",
        " Straße's",
        "\n",
    ]
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(TEXT)
    assert [TEXT[a:b] for _, (a, b) in cut] == pieces
    assert tokenizer(TEXT).input_ids == [token for piece in pieces for token in merged(piece.encode())]
    camel = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("aBcDE")
    assert [piece for piece, _ in camel] == ["a", "Bc", "DE"]
    assert tokenizer("<|im_end|>").input_ids == [first + 2]


def test_what_is_refused(texts: list[str], tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(UserError, match=match) as error:
            load_tokenizer(tmp_path)
        assert "\n" not in str(error.value)

    refused(r"no tokenizer.json; copy the tokenizer files")
    (tmp_path / "qwen.tiktoken").write_text("")
    refused(r"its tokenizer is qwen.tiktoken, read by Python code of its own, which is never run")
    write_tiktoken(bpe(texts), tmp_path / "k", {0: "[BOS]"})
    (tmp_path / "k" / "tiktoken.model").write_text("not base64 at all !\n")
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path / "k")
    vocabulary = write_tiktoken(bpe(texts), tmp_path / "k", {0: "[BOS]", 257: "<|im_end|>"})
    whole = (tmp_path / "k" / "tiktoken.model").read_bytes()
    assert len(load_tokenizer(tmp_path / "k")) == len(vocabulary) + 258
    for cut in (whole[: len(whole) // 2], b"".join(whole.splitlines(keepends=True)[:300])):
        (tmp_path / "k" / "tiktoken.model").write_bytes(cut)
        with pytest.raises(UserError, match="the tokenizer cannot be read"):
            load_tokenizer(tmp_path / "k")
    with pytest.raises(
        UserError, match=f"holds 300 tokens, .* a special token {len(vocabulary)}, far from its end: trunc"
    ):
        load_tokenizer(tmp_path / "k")
    (tmp_path / "k" / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Other"}))
    with pytest.raises(UserError, match=r"its tokenizer is tiktoken.model, read by Python code"):
        load_tokenizer(tmp_path / "k")


def test_a_tokenizer_json_beside_code_needs_none_of_it(texts: list[str], tmp_path: Path) -> None:
    fast(bpe(texts, "<s>"), bos_token="<s>").save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["tokenization_x.X", None]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).bos_token == "<s>"


def test_no_template_refuses_chat_alone(texts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tokenizer = fast(bpe(texts, "<s>", "</s>"), bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "t")
    model = models.ours(models.config("v3", vocab_size=len(tokenizer), num_hidden_layers=2))
    model.folder = tmp_path / "t"
    tokensieve.save(model, tmp_path / "m")
    run = commands.runner(capsys)
    refused = commands.refusal(run)
    refused(("no chat template", "--prompt", "chat_template.jinja"), "generate", tmp_path / "m", "--chat", "x")
    assert run("generate", tmp_path / "m", "--prompt", "x", "--max-new-tokens", "2").status == 0
    assert re.search("plain text works", run("sparsify", tmp_path / "m", tmp_path / "s").err)
