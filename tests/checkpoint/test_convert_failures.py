"""What cannot be converted: one line that names the thing and the remedy, status 2, and nothing written or damaged."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tokensieve
from tests.support import commands, grouped, models
from tests.support.checkpoints import listing, random_tensors, sparse_config, write_folder
from tokensieve import checkpoint


def four_heads(**changes: Any) -> Any:
    return sparse_config(num_attention_heads=4, num_key_value_heads=4, **changes)


def edit(folder: Path, **fields: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


FORWARD = {
    "experts": (("--n-experts", 8), lambda f: None, ("--n-experts 8", "n_routed_experts 4", "say --n-experts 4")),
    "ranks": (("--model-parallel", 3), lambda f: None, ("3 ranks", "num_attention_heads 4", "possible", "1, 2, 4")),
    "few experts": (("--model-parallel", 8), lambda f: None, ("n_routed_experts 4", "1, 2, 4")),
    "no ranks": (None, lambda f: None, ("--model-parallel",)),
    "type": ((), lambda f: edit(f, model_type="gpt2"), ("'gpt2' is not supported",)),
    "another shape": ((), lambda f: edit(f, hidden_size=64), ("config.json",)),
    "biases": ((), lambda f: edit(f, attention_bias=True), ("attention_bias", "no bias")),
    "a missing file": ((), lambda f: (f / "model.safetensors").unlink(), ("no safetensors file",)),
}


@pytest.mark.parametrize("case", FORWARD)
def test_bad_checkpoints(case: str, run, tmp_path: Path) -> None:
    options, damage, words = FORWARD[case]
    config = four_heads()
    source = write_folder(tmp_path / "hf", config, random_tensors(config))
    if case == "biases":
        biased = four_heads(attention_bias=True)
        write_folder(source, biased, random_tensors(biased))
    damage(source)
    given = () if options is None else options if "--model-parallel" in options else (*options, "--model-parallel", 2)
    commands.refusal(run)(words, "convert", source, tmp_path / "new" / "s", *given)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def rewrite(path: Path, change: Any) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


BACKWARD = {
    "a missing rank": (
        lambda f: (f / "model1-mp2.safetensors").unlink(),
        ("model1-mp2.safetensors is missing", "copy"),
    ),
    "no shards": (lambda f: [path.unlink() for path in f.glob("*.safetensors")], ("no shards", "it holds none")),
    "no config": (lambda f: (f / "config.json").unlink(), ("config.json: not found",)),
    "truncated": (lambda f: (f / "model1-mp2.safetensors").write_bytes(b"1234"), ("model1-mp2", "truncated")),
    "two conversions": (
        lambda f: rewrite(f / "model1-mp2.safetensors", lambda t: t["norm.weight"].add_(1)),
        ("model.norm.weight do not agree", "several conversions"),
    ),
    "another dtype": (
        lambda f: rewrite(f / "model0-mp2.safetensors", lambda t: t.update({"embed.weight": t["embed.weight"].half()})),
        ("model.embed_tokens.weight do not agree",),
    ),
    "a tensor too few": (
        lambda f: rewrite(f / "model0-mp2.safetensors", lambda t: t.pop("layers.0.attn.wo.weight")),
        ("1 tensor is missing", "model.layers.0.self_attn.o_proj.weight"),
    ),
    "another model": (lambda f: edit(f, q_lora_rank=None), ("layers.0.attn", "no tensor of this model")),
    "the other's experts": (
        lambda f: (f / "model1-mp2.safetensors").write_bytes((f / "model0-mp2.safetensors").read_bytes()),
        ("tensors are missing", ".mlp.experts.2."),
    ),
    "for several": (
        lambda f: (f / "model0-mp4.safetensors").write_bytes((f / "model0-mp2.safetensors").read_bytes()),
        ("for 2 and for 4 ranks", "--model-parallel"),
    ),
}


@pytest.mark.parametrize("case", BACKWARD)
def test_bad_shards(case: str, run, tmp_path: Path) -> None:
    damage, words = BACKWARD[case]
    config = four_heads()
    checkpoint.write_shards(write_folder(tmp_path / "hf", config, random_tensors(config)), tmp_path / "s", 2)
    damage(tmp_path / "s")
    before = listing(tmp_path / "s")
    commands.refusal(run)(words, "convert", tmp_path / "s", tmp_path / "back", "--reverse")
    assert listing(tmp_path / "s") == before and sorted(path.name for path in tmp_path.iterdir()) == ["hf", "s"]


def test_a_family_that_ranks_cannot_divide(run, tmp_path: Path) -> None:
    tokensieve.save(models.ours(grouped.config("llama")), tmp_path / "llama")
    refused = commands.refusal(run)
    for options in (("--model-parallel", 2), ("--reverse",)):
        refused(("type llama", "cannot be divided"), "convert", tmp_path / "llama", tmp_path / "out", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["llama"]
