"""Every reason why vLLM or SGLang could not serve a checkpoint, one by one: one line each that names the thing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import grouped
from tests.support.deployments import (
    FP8,
    INDEXER,
    SCALE,
    Damage,
    config,
    edit,
    edit_tensors,
    make,
    make_home,
    no_tokenizer,
    quantize,
    reasons,
)
from tokensieve.deploy import plan
from tokensieve.deploy.planning import LABELS
from tokensieve.families import FAMILIES
from tokensieve.families.grouped import Grouped
from tokensieve.model import model_path
from tokensieve.tasks import turns

BOTH = ("vllm", "sglang")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return make_home(tmp_path_factory.mktemp("deploy"))


# what is refused, one by one


def _drop(name: str) -> Damage:
    return edit_tensors(lambda tensors: tensors.__delitem__(name))


def _put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    return edit_tensors(lambda tensors: tensors.update({name: change(tensors[name])}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _elsewhere(folder: Path) -> None:
    names = load_file(folder / "model.safetensors")
    other = folder.parent / "elsewhere"
    other.mkdir()
    (folder / "model.safetensors").rename(other / "model.safetensors")
    where = dict.fromkeys(names, "../elsewhere/model.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
REFUSED: dict[str, tuple[str, Damage, tuple[str, ...], tuple[str, ...]]] = {
    # config
    "no index_n_heads": ("sparse", edit(index_n_heads=...), BOTH, ("lacks index_n_heads",)),
    "no routing": ("dense", edit(scoring_func=..., topk_method=...), BOTH, ("lacks scoring_func, topk_method",)),
    "no rope_theta": ("sparse", edit(rope_theta=...), BOTH, ("rope_theta",)),
    "another architecture": (
        "sparse",
        edit(architectures=["DeepseekV3ForCausalLM"]),
        BOTH,
        ("DeepseekV32ForCausalLM",),
    ),
    "no architecture": ("sparse", edit(architectures=None), BOTH, ("None", "DeepseekV32ForCausalLM")),
    "greedy routing": ("dense", edit(topk_method="greedy"), BOTH, ("topk_method is greedy", "noaux_tc")),
    "k of 1024": ("sparse", edit(index_topk=1024), ("sglang",), ("index_topk 2048 (here 1024)",)),
    "k of 1000": ("sparse", edit(index_topk=1000), BOTH, ("index_topk", "(here 1000)")),
    "halves are rotated": ("dense", edit(rope_interleave=False), BOTH, ("rope_interleave is false",)),
    # tensors
    "a missing tensor": ("sparse", _drop("model.layers.1.self_attn.indexer.k_norm.bias"), BOTH, ("missing", "k_norm")),
    "an unknown tensor": ("dense", _put("model.norm.weight", lambda t: t[:7].clone()), BOTH, ("model.norm", "(7,)")),
    "no weights": ("sparse", _no_weights, BOTH, ("no safetensors file",)),
    "weights of another folder": ("sparse", _elsewhere, BOTH, ("elsewhere/model.safetensors", "tokensieve.save")),
    # quantization
    "unknown quantization": ("sparse", edit(quantization_config={"quant_method": "awq"}), BOTH, ("awq",)),
    "FP8 unsaid": ("fp8", edit(quantization_config=...), BOTH, ("no quantization_config",)),
    "FP8 without scale": ("fp8", _drop(SCALE), BOTH, ("o_proj", "missing")),
    "FP8 of other scales": ("fp8", _put(SCALE, lambda t: torch.ones(3, 3)), BOTH, ("o_proj", "(3, 3)")),
    "FP8 scales not float32": ("fp8", _put(SCALE, lambda t: t.bfloat16()), BOTH, ("BF16", "float32")),
    "FP8 by tensor": ("fp8", edit(quantization_config=FP8 | {"weight_block_size": None}), BOTH, ("[128, 128]",)),
    "FP8 static": ("fp8", edit(quantization_config=FP8 | {"activation_scheme": "static"}), BOTH, ("dynamic",)),
    # tokenizer
    "no tokenizer": ("sparse", no_tokenizer, BOTH, ("tokenizer.json",)),
    "no chat template": ("dense", edit("tokenizer_config.json", chat_template=...), BOTH, ("no chat template",)),
    "a broken chat template": ("dense", edit("tokenizer_config.json", chat_template="{% if %}"), BOTH, ("not render",)),
    "a wrong chat template": ("dense", edit("tokenizer_config.json", chat_template="{{ 1 // 0 }}"), BOTH, ("zero",)),
    "an endless chat template": ("dense", edit("tokenizer_config.json", chat_template=ENDLESS), BOTH, ("not end",)),
}


def small(kind: str, **changes: Any) -> Any:
    """A config of any family, with the widths that the engines' sparse kernels are built for if it has latents."""
    if isinstance(FAMILIES[kind], Grouped):
        return grouped.config(kind, vocab_size=4096, **changes)
    return config(FAMILIES[kind].config, **(INDEXER if FAMILIES[kind].sparse else {}) | changes)


@pytest.mark.parametrize("engine", BOTH)
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_has_a_plan_or_a_remedy(kind: str, engine: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", small(kind))
    label, by_hand = LABELS[engine], {"vllm": "vllm serve", "sglang": "python -m sglang.launch_server --model"}
    if FAMILIES[kind].engine_fields:
        assert plan(engine, str(folder), gpus=1)
        return
    (reason,) = reasons(engine, folder)
    assert f"tokensieve serve {folder}" in reason
    if kind == "kimi_k2":
        assert label in reason and 'write "model_type": "deepseek_v3" in config.json' in reason
        edit(model_type="deepseek_v3")(folder)
        assert plan(engine, str(folder), gpus=1)
    elif kind.endswith("_dsa") and isinstance(FAMILIES[kind], Grouped):
        assert label in reason and "no grouped-query attention with an indexer" in reason
    else:
        assert f"DeepSeek models only so far, not {kind}; try {by_hand[engine]} {folder}, or" in reason


@pytest.mark.parametrize("kind", ["deepseek_v32", "glm_moe_dsa"])
def test_other_widths_have_a_remedy(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", small(kind, index_topk=16, index_head_dim=64))
    for engine in BOTH:
        widths, topk = reasons(engine, folder, gpus=1)
        assert "index_head_dim 128 (here 64)" in widths and "(here 16)" in topk
        assert all(reason.endswith(f"; tokensieve serve {folder} serves it as it is") for reason in (widths, topk))


def test_a_gguf_file_is_refused(tmp_path: Path) -> None:
    (file := tmp_path / "model.gguf").write_bytes(b"GGUF")
    (reason,) = reasons("vllm", file)
    assert reason.startswith(f"{file}: a GGUF file, and deploy plans for folders; write one")
    assert reason.endswith(f"or tokensieve serve {file}")


@pytest.mark.parametrize("damage", REFUSED)
def test_refused(home: Path, tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "LONGEST", 1.0)
    of, hurt, engines, words = REFUSED[damage]
    folder = shutil.copytree(home / of, tmp_path / "model")
    hurt(folder)
    for engine in BOTH:
        if engine not in engines:
            assert plan(engine, str(folder), gpus=2)
            continue
        found = reasons(engine, folder, gpus=2)
        assert len(found) == 1, found
        assert all(word in found[0] for word in words), found


def test_a_layer_that_is_not_quantized(home: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(home / "fp8", tmp_path / "model")
    name = SCALE.removesuffix("_scale_inv")

    def leave(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[SCALE]
        tensors[name] = tensors[name].to(torch.bfloat16)

    edit_tensors(leave)(folder)
    (reason,) = reasons("vllm", folder, gpus=2)
    assert reason.startswith(f"{name} is BF16")

    def spread(tensors: dict[str, torch.Tensor]) -> None:
        quantize(tensors)
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
        tensors["lm_head.weight_scale_inv"] = torch.ones(32, 1)

    shutil.copy(home / "sparse" / "model.safetensors", folder)
    edit_tensors(spread)(folder)
    (reason,) = reasons("vllm", folder, gpus=2)
    assert reason.startswith("lm_head.weight is F8_E4M3")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"index_head_dim": 64}, "index_head_dim 128 (here 64)"),
        ({"index_n_heads": 16}, "index_n_heads 32 or 64 (here 16)"),
        ({"kv_lora_rank": 256}, "kv_lora_rank 512 (here 256)"),
        ({"qk_rope_head_dim": 32}, "qk_rope_head_dim 64 (here 32)"),
        ({"q_lora_rank": None}, "q_lora_rank is null"),
        ({"scoring_func": "softmax"}, "softmax"),
        ({"tie_word_embeddings": True}, "tied"),
        ({"attention_bias": True}, "attention_bias is true"),
        ({"vocab_size": 64}, "vocabulary is 64"),
    ],
)
def test_refused_models(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    folder = make(tmp_path / "model", config(**changes))
    for engine in BOTH:
        (reason,) = reasons(engine, folder)
        assert words in reason


def test_refused_splits(home: Path) -> None:
    names = [reason.split(" is ")[0] for reason in reasons("vllm", home / "sparse", gpus=3)]
    assert names == ["moe_intermediate_size", "intermediate_size", "num_attention_heads"]
    assert len(reasons("sglang", home / "sparse", gpus=3)) == 2  # every device has all heads
    found = reasons("vllm", home / "fp8", gpus=4)
    assert "moe_intermediate_size is 256" in found[0] and "4 parts of whole FP8 blocks of 128" in found[0]
    assert any("one machine, which has 8 H200" in reason for reason in reasons("vllm", home / "sparse", gpus=16))
    assert any(
        "one machine, which has 8 A2 NPU" in r for r in reasons("sglang", home / "sparse", gpus=16, hardware="npu-a2")
    )


def test_refused_together(home: Path, tmp_path: Path) -> None:
    """If one file cannot be read, the others are still checked: three faults are three reasons."""
    folder = shutil.copytree(home / "sparse", tmp_path / "model")
    for hurt in (_no_weights, no_tokenizer, edit(index_topk=512)):
        hurt(folder)
    assert len(reasons("sglang", folder)) == 3
    assert reasons("sglang", model_path("sparse"))[0].count("(here ") == 4  # the bundled one names every width


def test_refused_asks(home: Path, tmp_path: Path) -> None:
    sparse = home / "sparse"
    assert "vLLM is set up for h200 and b200" in reasons("vllm", sparse, hardware="mi350")[0]
    assert "'tgi' is not known" in reasons("tgi", sparse)[0]
    assert "have no FP8" in reasons("sglang", home / "fp8", hardware="npu-a2", gpus=2)[0]
    assert "4096 positions" in reasons("vllm", sparse, context=4097)[0]
    grouped = shutil.copytree(sparse, tmp_path / "gqa")
    edit(model_type="gemma3", architectures=["Gemma3ForCausalLM"])(grouped)
    assert "'gemma3' is not supported" in reasons("vllm", grouped)[0]
