"""Weights in FP8 blocks: the product against the equation, and models that hold them against those whose blocks are
multiplied out.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file

import tokensieve
from tests.ops.test_triton_paged import DEVICES, backend
from tests.support import oracle
from tests.support.models import config, ours
from tokensieve import ops
from tokensieve.bench import random_model
from tokensieve.config import UserError
from tokensieve.engine.runner import Runner
from tokensieve.families import family_of
from tokensieve.model import ForwardOptions, fp8
from tokensieve.model.context import ForwardContext
from tokensieve.model.entries import Fresh
from tokensieve.model.pack import make_pack
from tokensieve.model.selection import dense
from tokensieve.ops import quant

# E, M, K, rows, gated: outputs and rows that fill no tile, experts without rows, the smallest and the larger tiles
CASES = [
    (1, 200, 256, 5, False), (1, 128, 384, 70, True), (5, 96, 128, 40, False), (8, 130, 256, 33, True),
    (1, 64, 128, 1, False),
    (3, 130, 128, 199, False), (2, 64, 128, 150, True), (4, 64, 128, 0, False),
]  # fmt: skip
LARGEST = CASES[5]  # takes the interpreter seconds


def drawn(E: int, M: int, K: int, N: int, gated: bool, dtype: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(E * M + N)
    pairs = [quant.quantize_weight(torch.randn(M, K, generator=g)) for _ in range(E)]
    ends = None
    if E > 1:
        ends = torch.randint(0, N + 1, (E,), generator=g).sort().values.int()
        ends[-1] = N
    x = torch.randn(N, 2 * K if gated else K, generator=g).to(dtype)
    weight, scale = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    return {"x_NK": x, "weight_EMK": weight, "scale": scale, "ends_E": ends, "gated": gated}


def product(x_NK, weight_EMK, scale, ends_E, gated: bool) -> torch.Tensor:
    """In float64, of x as it is rounded."""
    if gated:
        gate, up = x_NK.chunk(2, -1)
        x_NK = torch.nn.functional.silu(gate) * up
    x = quant.dequantize_e4m3(*quant.quantize_e4m3(x_NK, scale_format="ue8m0")).double()
    M, K = weight_EMK.shape[1:]
    scales = scale.double().repeat_interleave(128, 1)[:, :M].repeat_interleave(128, 2)[:, :, :K]
    expert = (
        torch.zeros(len(x), dtype=torch.long)
        if ends_E is None
        else torch.searchsorted(ends_E, torch.arange(len(x)), right=True)
    )
    return torch.einsum("nk,nmk->nm", x, (weight_EMK.double() * scales)[expert])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_reference_is_the_equation(case: Any) -> None:
    given = drawn(*case, torch.float32)
    found = ops.block_linear(**given, backend="reference")
    assert found.shape == (case[3], case[1]) and found.dtype == torch.float32
    oracle.assert_close(found, product(**given), 1e-5, 1.0)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", [pytest.param(c, marks=[pytest.mark.slow] * (c == LARGEST)) for c in CASES], ids=str)
def test_the_kernel_is_the_reference(case: Any, device: str) -> None:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    given = drawn(*case, dtype)
    expected = ops.block_linear(**given, backend="reference")
    there = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in given.items()}
    found = ops.block_linear(**there, backend=backend(device)).cpu()
    # On a GPU silu may be off by a unit of bfloat16, and with it a few inputs by a step of E4M3; Hopper adds FP8 up in
    # 14 bits.
    oracle.assert_close(found, expected, 1e-5 if device == "cpu" else 2e-2, 1.0)


def test_what_is_refused() -> None:
    good = drawn(2, 64, 128, 4, False, torch.float32)
    for name, wrong, says in (
        ("weight_EMK", good["weight_EMK"].float(), "float8_e4m3fn"),
        ("weight_EMK", good["weight_EMK"][..., :100], "multiple of 128"),
        ("scale", good["scale"][:1], "does not fit"),
        ("x_NK", good["x_NK"][:, :64], "x must be"),
        ("ends_E", None, "ends must be"),
        ("ends_E", good["ends_E"].long(), "int32"),
    ):
        with pytest.raises(ValueError, match=says):
            ops.block_linear(**good | {name: wrong})
    good["x_NK"][1, 3] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        ops.block_linear(**good)


@pytest.mark.parametrize("case", CASES[1:3], ids=str)
def test_compiled_is_eager(case: Any) -> None:
    torch.compiler.reset()
    compiled = torch.compile(ops.block_linear, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (case[3], case[3] + 9):
        given = drawn(*case[:3], rows, case[4], torch.float32)
        assert torch.equal(compiled(**given), ops.block_linear(**given))


def test_the_fake_is_the_real_one() -> None:
    """(What else opcheck tests multiplies its inputs by numbers, which E4M3 does not know.)"""
    for case in (CASES[1], CASES[2]):
        given = drawn(*case, torch.float32)
        torch.library.opcheck(
            torch.ops.tokensieve.block_linear, (*given.values(), "auto"), test_utils="test_faketensor"
        )


# models

SHAPE = {
    "hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "q_lora_rank": 128, "kv_lora_rank": 64,
    "v_head_dim": 32,
    "index_head_dim": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def stored(tmp_path_factory) -> Path:
    return in_blocks(tmp_path_factory.mktemp("fp8") / "model", **SHAPE)


def in_blocks(folder: Path, **shape: int) -> Path:
    """A checkpoint whose linear layers are in FP8 blocks, as the published one's."""
    tokensieve.save(ours(config("v32", **shape), seed=5), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in list(tensors):
        linear = name.endswith(("_proj.weight", "_mqa.weight")) or ".indexer.w" in name
        if linear and "weights_proj" not in name and tensors[name].dim() == 2:
            tensors[name], tensors[f"{name}_scale_inv"] = quant.quantize_weight(tensors[name].float())
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_blocks_are_held_and_multiplied(stored: Path) -> None:
    plain, held = tokensieve.load(stored), tokensieve.load(stored, keep_fp8=True)
    assert not fp8.holds(plain) and fp8.holds(held)
    kinds = {name: x.dtype for name, x in held.state_dict().items()}
    assert kinds["model.layers.1.mlp.experts.gate_up_proj"] == torch.float8_e4m3fn
    assert kinds["model.layers.0.self_attn.q_b_proj.weight"] == torch.float8_e4m3fn
    assert kinds["model.layers.0.self_attn.kv_b_proj.weight"] == kinds["model.embed_tokens.weight"] == torch.float32
    assert kinds["model.layers.0.self_attn.indexer.weights_proj.weight"] == torch.float32
    for name, module in held.named_modules():
        if isinstance(module, fp8.BlockLinear):
            back = quant.dequantize_weight(module.weight, module.weight_scale_inv, dtype=torch.float32)
            assert torch.equal(back, plain.get_parameter(f"{name}.weight")), name
        if isinstance(module, fp8.BlockExperts):
            for own in ("gate_up_proj", "down_proj"):
                pairs = zip(getattr(module, own), getattr(module, f"{own}_scale_inv"), strict=True)
                back = torch.stack([quant.dequantize_weight(w, s, dtype=torch.float32) for w, s in pairs])
                assert torch.equal(back, plain.get_parameter(f"{name}.{own}")), name
    bytes_of = [sum(x.nbytes for x in m.state_dict().values()) for m in (held, plain)]
    assert bytes_of[0] < 0.45 * bytes_of[1]
    # Only the activations are rounded otherwise, by up to a 16th; of the experts those are compared that both choose.
    ids = torch.randint(16, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        a, b = (
            m.model.layers[0](torch.randn(4, 128, generator=torch.Generator().manual_seed(2)), _context(m))[0]
            for m in (held, plain)
        )
        assert 0 < float((a - b).norm()) < 0.1 * float(b.norm())
        assert bool(held(ids).logits.isfinite().all())


def _context(model: Any) -> ForwardContext:
    pack = make_pack(1, 4, torch.device("cpu"), None, None, None, 64)
    entries = Fresh(pack, family_of(model.config).entry(model.config), "auto")
    return model.model.context(pack, entries, ForwardOptions(selector=dense))


def test_the_engine_runs_them(stored: Path) -> None:
    model, ids = tokensieve.load(stored, keep_fp8=True), list(range(16, 86))
    runner = Runner(model, 4)
    runner.chunk(ids[:64], 0, [0, 1], "indexer")
    chunked = runner.chunk(ids[64:], 64, [0, 1], "indexer")
    runner.chunk(ids[64:69], 64, [0, 1], "indexer")
    decoded = runner.step(ids[69:], [70], [[0, 1]], "indexer")[0]
    assert float((chunked - decoded).norm()) < 1e-3 * float(chunked.norm())


def test_held_blocks_are_not_saved(stored: Path, tmp_path: Path) -> None:
    held = tokensieve.load(stored, keep_fp8=True)
    for save in (lambda: tokensieve.save(held, tmp_path / "a"), lambda: held.save_pretrained(tmp_path / "b")):
        with pytest.raises(UserError, match="load it again without keep_fp8"):
            save()
    assert not any(tmp_path.iterdir())


def test_a_checkpoint_without_blocks_is_loaded_as_it_is() -> None:
    assert not fp8.holds(tokensieve.load("base", keep_fp8=True))


def test_random_blocks() -> None:
    model = random_model(config("v32", **SHAPE), "cpu", torch.float32, in_fp8=True)
    module = model.model.layers[1].mlp.experts
    assert isinstance(module, fp8.BlockExperts)
    back = quant.dequantize_weight(module.down_proj[2], module.down_proj_scale_inv[2], dtype=torch.float32)
    assert 0.018 < float(back.std()) < 0.022
    assert type(model.model.layers[0].self_attn.indexer.weights_proj) is nn.Linear
    with torch.inference_mode():
        assert torch.isfinite(Runner(model, 1).chunk([5, 7, 9], 0, [0], "indexer")).all()
