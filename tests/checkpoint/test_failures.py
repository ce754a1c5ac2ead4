"""Checkpoints that are ill: bad files are named with a remedy, and a failed save damages nothing."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tests.support.checkpoints import assert_same, listing, loaded, random_tensors, save, sparse_config, write_folder
from tokensieve import checkpoint
from tokensieve.checkpoint import folder as folder_module
from tokensieve.checkpoint import writing
from tokensieve.config import UserError

# bad input


def test_bad_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        checkpoint.read_config(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"config.json: not found"):
        checkpoint.read_config(tmp_path)
    for text, complaint in [
        (b"{", "not readable as JSON"),
        (b"\xff\xfe\x00", "not readable as JSON"),
        (b"[]", "no JSON object"),
        (b'{"model_type": "gpt2"}', "'gpt2' is not supported; use a checkpoint of type deepseek_v2"),
        (b"{}", "None is not supported"),
    ]:
        (tmp_path / "config.json").write_bytes(text)
        with pytest.raises(UserError, match=complaint) as caught:
            checkpoint.read_config(tmp_path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files(tmp_path: Path) -> None:
    config = sparse_config()
    path = write_folder(tmp_path / "m", config, random_tensors(config)) / "model.safetensors"
    good = path.read_bytes()
    for bad in (b"", good[:4], good[:100], good[:-1], b"\xff" * len(good), good[:8] + b"[" + good[9:], good + b"\0"):
        path.write_bytes(bad)
        with pytest.raises(UserError, match=r"model.safetensors: truncated or corrupt .*again") as caught:
            checkpoint.load_tensors(tmp_path / "m", config, torch.float32)
        assert "\n" not in str(caught.value)
    (tmp_path / "m" / "state.json").write_text("{}")  # a training run wrote it, so there is nothing to download
    with pytest.raises(UserError, match=r"truncated or corrupt .*; remove .*m to resume from the checkpoint before it"):
        checkpoint.load_tensors(tmp_path / "m", config, torch.float32)
    (tmp_path / "m" / "state.json").unlink()
    path.unlink()
    with pytest.raises(UserError, match="no safetensors file"):
        checkpoint.load_tensors(tmp_path / "m", config, torch.float32)
    torch.save({}, tmp_path / "m" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model.bin is a pickle, .* never loaded; .*convert"):
        checkpoint.load_tensors(tmp_path / "m", config, torch.float32)
    for name in ("a", "b"):
        (tmp_path / "m" / f"{name}.safetensors").write_bytes(good)
    with pytest.raises(UserError, match=r"2 safetensors files and no model.safetensors.index.json"):
        checkpoint.load_tensors(tmp_path / "m", config, torch.float32)


def test_bad_shards(tmp_path: Path) -> None:
    config = sparse_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    folder = tmp_path / "m"
    save(folder, config, source, shard_bytes=20_000)
    shard, index = sorted(folder.glob("*.safetensors"))[1], folder / "model.safetensors.index.json"
    whole, good = shard.read_bytes(), index.read_text()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{shard.name}: truncated or corrupt"):
        checkpoint.load_tensors(folder, config, torch.float32)
    shard.unlink()
    with pytest.raises(UserError, match=f"{shard.name}: missing though the index names it"):
        checkpoint.load_tensors(folder, config, torch.float32)
    save_file({"x": torch.zeros(1)}, shard)
    with pytest.raises(UserError, match=f"{shard.name}: lacks model.* promises"):
        checkpoint.load_tensors(folder, config, torch.float32)
    shard.write_bytes(whole)
    for text, complaint in [("{", "not readable as JSON"), ("{}", "no weight_map"), (good[:-40], "not readable")]:
        index.write_text(text)
        with pytest.raises(UserError, match=complaint):
            checkpoint.load_tensors(folder, config, torch.float32)


def test_missing_surplus_and_misshapen_tensors(tmp_path: Path) -> None:
    config = sparse_config()
    tensors = random_tensors(config)
    name = "model.layers.2.mlp.experts.1.down_proj.weight"
    for changed, complaint in [
        ({k: v for k, v in tensors.items() if k != name}, f"1 tensor is missing: {name}; complete the download"),
        ({k: v for k, v in tensors.items() if "norm" not in k}, r"19 tensors are missing: .* and 16 more; .*config"),
        (tensors | {"model.extra.weight": torch.zeros(1)}, "1 tensor is unknown: model.extra.weight; "),
        (tensors | {"lm_head.weight_scale_inv": torch.zeros(1)}, "unknown: lm_head.weight_scale_inv; "),
        (
            tensors | {name: torch.zeros(24, 32)},
            rf"safetensors: {name} is \(24, 32\), but config.json makes it \(32, 24",
        ),
    ]:
        folder = write_folder(tmp_path / "m", config, changed)
        with pytest.raises(UserError, match=complaint) as caught:
            checkpoint.load_tensors(folder, config, torch.float32)
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}  # old writers kept the buffer
    assert_same(loaded(write_folder(tmp_path / "m", config, tensors | frequencies), config), loaded(folder, config))


# a save that fails


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_follow_the_umask(mask: int, mode: int, tmp_path: Path) -> None:
    """safetensors alone would make them 0600, and a colleague could not read the checkpoint."""
    config = sparse_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    before = os.umask(mask)
    try:
        save(tmp_path / "m", config, source, shard_bytes=20_000)
    finally:
        os.umask(before)
    files = list((tmp_path / "m").iterdir())
    assert len([f for f in files if f.suffix == ".safetensors"]) > 1
    assert {f.stat().st_mode & 0o777 for f in files} == {mode}


def test_other_files_stay_and_old_shards_go(tmp_path: Path) -> None:
    config = sparse_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    folder = tmp_path / "m"
    save(folder, config, source, shard_bytes=4000)
    (folder / "tokenizer.json").write_text("{}")
    save(folder, config, source)
    assert sorted(listing(folder)) == ["config.json", "model.safetensors", "tokenizer.json"]
    (tmp_path / "link").symlink_to(folder)
    save(tmp_path / "link", config, source)
    assert (tmp_path / "link").is_symlink() and "tokenizer.json" in listing(folder)
    (folder / "runs").mkdir()
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match="holds folders, so it is no checkpoint to replace; save elsewhere"):
        save(folder, config, source)
    with pytest.raises(UserError, match="is a file"):
        save(source / "config.json", config, source)
    assert sorted(folder.iterdir()) == before


def test_any_failure_leaves_the_old_checkpoint_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sparse_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    folder = tmp_path / "m"
    save(folder, config, source)
    before = listing(folder)

    class Killed(BaseException):
        pass

    def killed(*_: Any) -> None:
        raise Killed

    def half_a_model() -> Any:
        yield from list(checkpoint.load_tensors(source, config, torch.float32))[:5]
        raise Killed

    with pytest.raises(Killed):
        checkpoint.save_tensors(folder, config.to_dict(), half_a_model(), shard_bytes=1000)
    for name in ("_swap", "sync"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(folder_module, name, killed)
            save(folder, config, source, shard_bytes=1000)
    with pytest.raises(ValueError, match="tensors are missing"):
        checkpoint.save_tensors(
            folder, config.to_dict(), list(checkpoint.load_tensors(source, config, torch.float32))[:5]
        )
    with pytest.raises(ValueError, match="not a tensor of this deepseek_v32"):
        checkpoint.save_tensors(folder, config.to_dict(), [("x", torch.zeros(1))])
    with pytest.raises(ValueError, match="does not make up"):
        checkpoint.save_tensors(folder, config.to_dict(), [("model.norm.weight", torch.zeros(1))])
    assert listing(folder) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]
    # kill -9 cannot clean up; the next save does.
    (tmp_path / ".m.saving").mkdir()
    (tmp_path / ".m.saving" / "0.part").write_bytes(b"half")
    save(folder, config, source)
    assert listing(folder) == before and sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]


def test_without_an_exchange_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sparse_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    monkeypatch.setattr(folder_module, "_exchange", lambda a, b: False)
    save(tmp_path / "m", config, source, shard_bytes=4000)
    save(tmp_path / "m", config, source)
    assert sorted(listing(tmp_path / "m")) == ["config.json", "model.safetensors"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]
    (tmp_path / "m").rename(tmp_path / ".m.previous")  # killed between the two renames
    with pytest.raises(UserError, match=r"interrupted save left it in .*\.m\.previous: rename that"):
        checkpoint.read_config(tmp_path / "m")


@pytest.mark.parametrize("how", ["disk_usage", "safetensors", "fsync"])
def test_a_full_disk(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = sparse_config()
    source = write_folder(tmp_path / "source", config, random_tensors(config))
    folder = tmp_path / "m"
    save(folder, config, source)
    before = listing(folder)

    def no_space(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_space_in_rust(*_: Any, **__: Any) -> None:  # the words of safetensors 0.8 on a file system that ran full
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    if how == "disk_usage":
        monkeypatch.setattr(writing.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    elif how == "safetensors":
        monkeypatch.setattr(writing, "save_file", no_space_in_rust)
    else:
        monkeypatch.setattr(folder_module, "sync", no_space)
    with pytest.raises(UserError, match=r"m: cannot write the checkpoint \(.*the disk is full; free space") as caught:
        save(folder, config, source)
    assert "\n" not in str(caught.value)
    if how == "disk_usage":
        assert "GB are needed" in str(caught.value)
    assert listing(folder) == before and sorted(path.name for path in tmp_path.iterdir()) == ["m", "source"]
