"""What goes with the weights: every file of a tokenizer, by save, sparsify and convert, and from the hub."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.utils import filter_repo_objects

import tokensieve
from tests.support.models import config, ours
from tokensieve import checkpoint
from tokensieve.model import model_path

ALONG = {
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("chat_template.jinja", "additional_chat_templates/rag.jinja", "generation_config.json", "LICENSE"),
    *("tokenizer.model", "vocab.json", "merges.txt", "tiktoken.model", "tokenization_kimi.py", "qwen.tiktoken"),
    *("encoding/encoding_dsv32.py", "encoding/test_input.json"),
}
STAYS = {
    *("README.md", "model.gguf", "pytorch_model.bin", "model.safetensors.index.json.bak.index.json", "logo.png"),
    *("optimizer.safetensors", "state.json", "trainer_state.json", "optimizer.pt", "metrics.jsonl", ".gitattributes"),
    *("adapter_config.json", "adapter_model.safetensors", "encoding/__pycache__/encoding_dsv32.pyc"),
    *("checkpoint-500/tokenization.py", "checkpoint-500/model.safetensors", "runs/events.out.tfevents.1"),
}


def fill(folder: Path) -> None:
    for name in ALONG | STAYS:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_whole_tokenizer_goes_along(tmp_path: Path) -> None:
    dense = ours(config("v3"))
    tokensieve.save(dense, tmp_path / "a")
    fill(tmp_path / "a")
    dense.folder = tmp_path / "a"
    written = {"config.json", "model.safetensors", "README.md"}
    assert (tmp_path / "a" / "README.md").read_text() == "README.md"  # the user's own
    written |= {"README-base.md"}
    sparse = tokensieve.sparsify(dense, index_heads=2, index_dim=8)
    for name in ("b", "b"):  # the second time onto itself, with its folders
        tokensieve.save(sparse, tmp_path / name)
        assert names(tmp_path / name) == ALONG | written
    sparse.save_pretrained(tmp_path / "c")
    assert names(tmp_path / "c") == ALONG | written
    assert (tmp_path / "b" / "README-base.md").read_text() == "README.md"
    written -= {"README.md", "README-base.md"}
    checkpoint.write_shards(tmp_path / "b", tmp_path / "shards", 2)
    checkpoint.join_shards(tmp_path / "shards", tmp_path / "back")
    assert names(tmp_path / "back") == ALONG | written
    assert (tmp_path / "back" / "encoding" / "encoding_dsv32.py").read_text() == "encoding/encoding_dsv32.py"


def test_a_source_that_is_gone_costs_no_weights(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = ours(config("v3"))
    model.folder = tmp_path / "gone"
    tokensieve.save(model, tmp_path / "a")
    assert names(tmp_path / "a") == {"config.json", "model.safetensors", "README.md"}
    assert "gone is gone; copy the tokenizer" in caplog.text


def test_the_hub_gives_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot(repository: str, **patterns: Any) -> str:
        asked.update(patterns)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert model_path("owner/name") == tmp_path
    files = ALONG | {"model-00001-of-00002.safetensors", "config.json", "original/consolidated.00.pth", "model.gguf"}
    wanted = set(filter_repo_objects(files, **asked))
    assert files - wanted == {"original/consolidated.00.pth", "model.gguf"}
