"""GGUF files as a source: the weights and tokenizer of the model they were made from, and one line for all else."""

import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import tokensieve
from tests.support import commands, gguf_files, stdlib
from tests.support.models import difference, randomize
from tests.support.tokenizers import LLAMA_3, LLAMA_3_MARKERS, bpe, fast
from tokensieve import checkpoint, files
from tokensieve.config import UserError
from tokensieve.model import load_tokenizer

TEXT = "def f(x):\n    return x + 12345\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    texts = [document.text for document in stdlib.documents("argparse", "textwrap")]
    raw = bpe(texts, *LLAMA_3_MARKERS)
    return fast(raw, LLAMA_3, bos_token=LLAMA_3_MARKERS[0], eos_token=LLAMA_3_MARKERS[1])


@pytest.fixture(scope="module")
def model(tokenizer: Any) -> LlamaForCausalLM:
    return gguf_files.llama(len(tokenizer))


@pytest.fixture(scope="module")
def file(model: LlamaForCausalLM, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In Q8_0, with a stranger's tokenizer beside it."""
    path = tmp_path_factory.mktemp("gguf") / "tiny-q8.gguf"
    gguf_files.write(path, model, tokenizer, Kind.Q8_0, tokenizer__ggml__eot_token_id=4, general__license="apache-2.0")
    (path.parent / "tokenizer.json").write_text("{}")
    (path.parent / "config.json").write_text("{}")
    return path


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.Q8_0, Kind.Q4_1])
def test_the_logits_are_the_source_models(model: Any, tokenizer: Any, kind: Kind, tmp_path: Path) -> None:
    tied = kind != Kind.F16
    model = model if tied else gguf_files.llama(len(tokenizer), tie_word_embeddings=False, num_key_value_heads=4)
    read = gguf_files.write(tmp_path / "m.gguf", model, tokenizer, kind)
    ours = tokensieve.load(tmp_path / "m.gguf")
    source = LlamaForCausalLM(model.config).eval()
    source.load_state_dict(read | ({"lm_head.weight": read["model.embed_tokens.weight"]} if tied else {}))
    ids = torch.randint(5, len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert float((ours(ids).logits - source(ids).logits).abs().max()) < 1e-4
        lost = float((ours(ids).logits - model(ids).logits).abs().max())
    assert lost < 1e-4 if kind == Kind.F32 else lost > 0
    assert checkpoint.read_config(tmp_path / "m.gguf")["dtype"] == {"F32": "float32", "F16": "float16"}.get(
        kind.name, "bfloat16"
    )
    assert {t.dtype for t in tokensieve.load(tmp_path / "m.gguf", torch.bfloat16).parameters()} == {torch.bfloat16}


# Heads of a width, and experts of a size, that are no default of transformers'.
SHAPE = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
FAMILIES: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
}


@pytest.mark.parametrize("kind", [Kind.F32, Kind.Q8_0])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_every_family(family: str, kind: Kind, tokenizer: Any, tmp_path: Path) -> None:
    """With the sizes of the file, also those that transformers does not read from it."""
    config, changes = FAMILIES[family]
    built = config(**SHAPE | changes, vocab_size=len(tokenizer))
    source = randomize(AutoModelForCausalLM.from_config(built, dtype=torch.float32), 3)
    read = gguf_files.write(tmp_path / "m.gguf", source, tokenizer, kind)
    ours = tokensieve.load(tmp_path / "m.gguf")
    assert ours.config.model_type == family
    tied = {"lm_head.weight": read["model.embed_tokens.weight"]} if built.tie_word_embeddings else {}
    source.load_state_dict(read | tied)
    ids = torch.randint(5, len(tokenizer), (1, 40), generator=torch.Generator().manual_seed(0))
    assert difference(ours(ids).logits, source(ids).logits) < 1e-4


def test_its_tokenizer_and_end_tokens(file: Path, tokenizer: Any) -> None:
    read = load_tokenizer(file)
    assert read(TEXT, add_special_tokens=False).input_ids == tokenizer(TEXT, add_special_tokens=False).input_ids
    assert len(read) == len(tokenizer) and read.get_vocab() == tokenizer.get_vocab()
    assert read.chat_template == LLAMA_3 and read.bos_token == LLAMA_3_MARKERS[0]
    loaded = tokensieve.load(file)
    assert loaded.end_tokens(read) == {1, 4} and loaded.config.bos_token_id == 0


def test_commands_read_it(
    file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    run = commands.runner(capsys)
    ended = run("sparsify", file, tmp_path / "sparse", *commands.SMALL)
    assert ended.status == 0, ended
    assert "GGUF" not in ended.err + caplog.text  # transformers warns of weights that stay packed, which these do not
    sparse, dense = tokensieve.load(tmp_path / "sparse"), tokensieve.load(file, torch.bfloat16)
    assert sparse.model.embed_tokens.weight.equal(dense.model.embed_tokens.weight.float())
    assert json.loads((tmp_path / "sparse" / "config.json").read_text())["eos_token_id"] == [1, 4]
    assert AutoTokenizer.from_pretrained(tmp_path / "sparse", config=sparse.config).chat_template == LLAMA_3
    card = (tmp_path / "sparse" / "README.md").read_text()
    assert "- Base: tiny-q8.gguf\n- Licence: apache-2.0\n" in card and "\nlicense: apache-2.0\n" in card
    for name in (file, tmp_path / "sparse"):
        ended = run("generate", name, "--prompt", "import os", "--max-new-tokens", "3")
        assert ended.status == 0, ended


REFUSED = {
    "architecture": (
        {"architecture": "plamo2"},
        "architecture 'plamo2' is not read from GGUF; use safetensors of a model of type deepseek_v2, .*; the nearest "
        "family is llama",
    ),
    "of another name": ({"architecture": "deepseek2"}, "'deepseek2' is not read from GGUF; .* family is deepseek_v2"),
    "another family": ({"architecture": "starcoder2"}, "model_type 'starcoder2' is not supported.* family is llama"),
    "scaled": ({"llama__rope__scaling__type": "yarn"}, r"its positions are scaled \(llama.rope.scaling.type\)"),
    "split": ({"split__count": 3}, "one part of a split model; join them first"),
    "partly rotated": (
        {"llama__attention__key_length": 32},
        r"16 of the 32 dims of a head are rotated \(rope.dimension_count\)",
    ),
    "window": ({"llama__attention__sliding_window": 128}, "an attention window of 128"),
    "experts": ({"llama__block_count": 1}, r"blk.1.attn_k.weight is no tensor of a llama model"),
    "shapes": ({"llama__feed_forward_length": 64}, r"6 tensors are missing or misshapen, model.layers.0.mlp.down_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, model: Any, tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    changes, match = REFUSED[case]
    gguf_files.write(tmp_path / "m.gguf", model, tokenizer, **changes)
    with pytest.raises(UserError, match=match) as error:
        tokensieve.load(tmp_path / "m.gguf")
    assert "\n" not in str(error.value) and str(tmp_path / "m.gguf") in str(error.value)
    commands.refusal(commands.runner(capsys))((), "generate", tmp_path / "m.gguf", "--prompt", "x")


@pytest.mark.parametrize("size", [0, 3, 20, 700, -5000, -100])
def test_a_damaged_file(file: Path, size: int, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "m.gguf").write_bytes(file.read_bytes()[:size])
    refused = commands.refusal(commands.runner(capsys))
    refused((str(tmp_path / "m.gguf"), "truncated or corrupt"), "generate", tmp_path / "m.gguf", "--prompt", "x")
    with pytest.raises(UserError, match="truncated or corrupt"):
        tokensieve.load(tmp_path / "m.gguf")


def test_an_unknown_quantization(file: Path, tmp_path: Path) -> None:
    data = bytearray(file.read_bytes())
    place = bytes(data).index(b"token_embd.weight") + len(b"token_embd.weight") + 4 + 16
    assert data[place] == Kind.Q8_0
    data[place] = 250
    (tmp_path / "m.gguf").write_bytes(data)
    with pytest.raises(UserError, match="m.gguf") as error:
        tokensieve.load(tmp_path / "m.gguf")
    assert "\n" not in str(error.value)


def test_tensors_that_are_missing(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    """transformers would draw them at random."""
    less = gguf_files.llama(len(tokenizer))
    state = less.state_dict
    less.state_dict = lambda: {n: t for n, t in state().items() if "layers.1.mlp.up_proj" not in n}
    gguf_files.write(tmp_path / "m.gguf", less, tokenizer)
    with pytest.raises(UserError, match=r"1 tensors are missing or misshapen, model.layers.1.mlp.up_proj.weight"):
        tokensieve.load(tmp_path / "m.gguf")


def test_tensors_that_are_not_the_models(tokenizer: Any, tmp_path: Path) -> None:
    """Biases, which transformers would leave out."""
    biased = gguf_files.llama(len(tokenizer), attention_bias=True)
    gguf_files.write(tmp_path / "m.gguf", biased, tokenizer)
    with pytest.raises(UserError, match=r"blk.0.attn_k.bias is no tensor of a llama model; use the safetensors"):
        tokensieve.load(tmp_path / "m.gguf")


def test_a_missing_package(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs gguf and accelerate; pip install 'tokensieve\[gguf\]'"):
        tokensieve.load(file)


def test_where_safetensors_are_needed(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    refused = commands.refusal(commands.runner(capsys))
    refused(("cannot be divided",), "convert", file, tmp_path / "shards", "--model-parallel", "2")
    with pytest.raises(UserError, match="a GGUF file, and safetensors are needed here; write them"):
        checkpoint.open_shards(file)
    refused(("safetensors are needed",), "convert", file, tmp_path / "shards", "--fp8")
    refused(("holds GGUF files; name the one to read", file.name), "generate", _alone(file, tmp_path), "--prompt", "x")


def _alone(file: Path, folder: Path) -> Path:
    (folder / "repository").mkdir()
    (folder / "repository" / file.name).symlink_to(file)
    return folder / "repository"


def test_a_model_that_a_package_brings(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(files.PACKAGED, "smollm2", "llm-tiny")  # the real one may be installed
    with pytest.raises(UserError, match=r"llm-tiny, which brings it, is not installed; pip install 'tokensieve\["):
        tokensieve.load("smollm2")
    (tmp_path / "llm_tiny").mkdir()
    (tmp_path / "llm_tiny" / "__init__.py").write_text("raise SystemExit('the package was imported')")
    (tmp_path / "llm_tiny" / "tiny.gguf").symlink_to(file)
    metadata = tmp_path / "llm_tiny-0.1.2.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.2\nName: llm-tiny\nVersion: 0.1.2\n")
    (metadata / "RECORD").write_text("llm_tiny/__init__.py,,\nllm_tiny/tiny.gguf,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tokensieve.load("smollm2").config.model_type == "llama"
    assert load_tokenizer("smollm2").chat_template == LLAMA_3
    (tmp_path / "llm_tiny" / "tiny.gguf").unlink()
    with pytest.raises(UserError, match="holds no GGUF file; install it again"):
        tokensieve.load("smollm2")
