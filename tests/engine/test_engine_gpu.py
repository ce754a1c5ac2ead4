"""The engine on a GPU: quantized pages, chunks on fused kernels, and the decode step in CUDA graphs."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

import tokensieve
from tests.support.models import config, ours
from tokensieve.engine.runner import Chunk, Runner, is_quantized
from tokensieve.model import DecoderForCausalLM

pytestmark = pytest.mark.gpu
# The widths that the kernels and the quantized layouts are made for.
WIDTHS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 512,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "kv_lora_rank": 512,
    "q_lora_rank": 256,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "max_position_embeddings": 16384,
}
SPARSE = {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 256}
LENGTHS = (1, 63, 64, 65, 700, 1500, 1023)


def on_gpu(family: str, **changes: Any) -> DecoderForCausalLM:
    return ours(config(family, **(WIDTHS | changes)), seed=3).to("cuda", torch.bfloat16)


# Values are compared without experts: a rounding would choose others.
@pytest.fixture(scope="module", params=["sparse fp8", "sparse bf16", "dense"])
def model(request: pytest.FixtureRequest) -> DecoderForCausalLM:
    if request.param == "dense":
        return on_gpu("v3", first_k_dense_replace=3)
    return on_gpu("v32", first_k_dense_replace=3, index_dtype=request.param.split()[1], **SPARSE)


@pytest.fixture(scope="module")
def with_experts() -> DecoderForCausalLM:
    return on_gpu("v32", index_dtype="fp8", **SPARSE)


def fill(
    runner: Runner, lengths: tuple[int, ...], selection: str = "indexer"
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts in chunks of 512; tokens and pages of each. The last token is left to decode."""
    draw = random.Random(1)
    tokens, pages, free = [], [], iter(range(1000))
    for length in lengths:
        tokens.append([draw.randrange(16, 512) for _ in range(length)])
        pages.append([next(free) for _ in range(-(-length // 64))])
        for a in range(0, length - 1, 512):
            runner.chunk(tokens[-1][a : min(a + 512, length - 1)], a, pages[-1], selection)
    return tokens, pages


@pytest.mark.parametrize("selection", ["indexer", "dense", "window", "oracle"])
def test_decoding_agrees_with_the_whole_forward(model: DecoderForCausalLM, selection: str) -> None:
    assert is_quantized(model)[0]
    runner = Runner(model, 64)
    tokens, pages = fill(runner, LENGTHS, selection)
    with torch.inference_mode(), tokensieve.selecting(model, selection):
        whole = [model(torch.tensor([t], device="cuda")).logits[0, -1].float() for t in tokens]
    for a in range(0, len(tokens), 3):
        some = slice(a, a + 3)
        logits = runner.step([t[-1] for t in tokens[some]], list(LENGTHS[some]), pages[some], selection).float()
        for got, expected in zip(logits, whole[some], strict=True):
            # Three layers on entries that E4M3 rounds by up to a 16th. The oracle also ranks rounded keys, so that some
            # of those near the k-th place change.
            rounding = 0.4 if selection == "oracle" else 0.25
            assert float((got - expected).norm()) < rounding * float(expected.norm())


@pytest.mark.parametrize("selection", ["indexer", "dense", "window"])
def test_prompts_that_share_a_pass(model: DecoderForCausalLM, selection: str) -> None:
    """Whole prompts, then their next chunks beside a whole one: as in passes of their own."""
    draw, free = random.Random(4), iter(range(1000))
    lengths = (1, 63, 600, 700, 1100, 64, 900)
    whole = [
        Chunk([draw.randrange(16, 512) for _ in range(n)], 0, [next(free) for _ in range(-(-n // 64))]) for n in lengths
    ]
    rests = [Chunk(chunk.tokens[512:], 512, chunk.pages) for chunk in whole[:-1] if len(chunk.tokens) > 512]
    together, alone = Runner(model, 64), Runner(model, 64)
    for chunks in ([replace(chunk, tokens=chunk.tokens[:512]) for chunk in whole[:-1]], [*rests, whole[-1]]):
        logits = together.chunks(chunks, selection).float()
        for chunk, got in zip(chunks, logits, strict=True):
            expected = alone.chunk(chunk.tokens, chunk.past, chunk.pages, selection).float()
            # bfloat16's rounding of three layers, from which entries of E4M3 and keys near the k-th place may change.
            assert float((got - expected).norm()) < 0.1 * float(expected.norm())


def test_a_float32_model_with_experts_decodes() -> None:
    """Without a CUDA graph, since its experts run one by one."""
    model = on_gpu("v32", index_dtype="bf16", **SPARSE).float()
    runner = Runner(model, 64)
    tokens, pages = fill(runner, (300,))
    with torch.inference_mode():
        whole = model(torch.tensor(tokens, device="cuda")).logits[0, -1]
    logits = runner.step([tokens[0][-1]], [300], pages, "indexer")[0]
    assert float((logits - whole).norm()) < 0.25 * float(whole.norm())  # E4M3 entries, as above


@pytest.mark.parametrize("selection", ["indexer", "dense"])
def test_a_graph_has_the_bits_of_its_kernels(with_experts: DecoderForCausalLM, selection: str) -> None:
    runner = Runner(with_experts, 64)
    tokens, pages = fill(runner, LENGTHS)
    with torch.inference_mode():
        for rows in (range(7), range(2), range(4, 7), range(7)):
            lens = [LENGTHS[b] for b in rows]
            logits = runner.step([tokens[b][-1] for b in rows], lens, [pages[b] for b in rows], selection).clone()
            graphs = runner._graphs
            assert graphs is not None
            inputs = next(x for size, x in graphs._inputs.items() if size[0] == 1 << (len(lens) - 1).bit_length())
            eager = runner._run_step(inputs, selection)[: len(lens)]
            assert torch.equal(logits, eager)


def test_a_sequence_grows_through_pages_and_graphs(model: DecoderForCausalLM) -> None:
    """Token by token across a page's end and a larger graph, beside one that stays short: as a chunk of the same tokens
    stores it.
    """
    runner, draw = Runner(model, 80), random.Random(2)
    tokens = [draw.randrange(16, 512) for _ in range(1100)]
    growing, short, whole = list(range(16)), [20], list(range(30, 48))
    for a in (0, 512):
        runner.chunk(tokens[a : min(a + 512, 1000)], a, growing, "indexer")
        runner.chunk(tokens[a : a + 512], a, whole, "indexer")
    for n in range(1001, 1101):
        if n > 64 * len(growing):
            growing.append(50 + len(growing))
        logits = runner.step([tokens[n - 1], 5], [n, 1], [growing, short], "indexer")
    expected = runner.chunk(tokens[1024:], 1024, whole, "indexer").float()
    assert {size[1] for size in runner._graphs._inputs} == {16, 32}
    assert float((logits[0].float() - expected).norm()) < 0.25 * float(expected.norm())


def test_an_adapter_is_recorded_with_the_step(with_experts: DecoderForCausalLM) -> None:
    """kv_b_proj with a hook is no plain matrix: it acts in the graph as in the chunk of the same tokens."""
    runner, row = Runner(with_experts, 64), list(range(16, 116))
    plain = runner.chunk(row, 0, [0, 1], "indexer").clone()
    hooks = [
        layer.self_attn.kv_b_proj.register_forward_hook(lambda _, args, out: 2 * out)
        for layer in with_experts.model.layers
    ]
    try:
        expected = runner.chunk(row, 0, [2, 3], "indexer").float()
        fresh = Runner(with_experts, 64)
        fresh.chunk(row[:-1], 0, [0, 1], "indexer")
        logits = fresh.step([row[-1]], [len(row)], [[0, 1]], "indexer")[0].float()
    finally:
        for hook in hooks:
            hook.remove()
    assert float((expected - plain.float()).norm()) > 0.3 * float(expected.norm())
    assert float((logits - expected).norm()) < 0.25 * float(expected.norm())


def test_a_copied_page_is_the_page() -> None:
    """Entries, index keys and kept selections, which come to the CPU in memory from where they go back fast."""
    model = on_gpu("v32", first_k_dense_replace=3, index_dtype="fp8", **SPARSE)
    runner = Runner(model, pages=40, keep_selection=True)
    tokens, (pages,) = fill(runner, (700,))
    twin = [*pages[:-1], 39]
    runner.copy_page(pages[-1], [38, 39])
    assert runner.selected is not None
    kept = [runner.selected.read(own, 699, 650) for own in (pages, twin, [*pages[:-1], 38])]
    assert all(x.is_pinned() and torch.equal(x, kept[0]) for x in kept) and bool((kept[0] >= 0).any())
    logits = [runner.step([tokens[0][-1]], [700], [own], "indexer").clone() for own in (pages, twin)]
    assert torch.equal(*logits)
