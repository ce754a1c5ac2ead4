"""Decode steps on caches in pages beside DeepGEMM and FlashMLA: parts of benchmarks/gpu.py, which runs them.

One new token of each sequence at the 671B shapes, pages in random order. The peers' plans of a step
(`get_paged_mqa_logits_metadata`, FlashMLA's scheduler) are made before the clock runs; ours makes none. FlashMLA is
also given places in the pool; through our backend it has to find them, and the row counts that. Both are captured in a
CUDA graph and replayed, as an engine does: launched one by one, steps as short as these measure the host. Own results
are compared with the reference on a few sequences.
"""

from collections.abc import Callable, Iterator

import torch
from gpu import (
    HEADS,
    INDEX_DIM,
    INDEX_HEADS,
    KEY,
    SCALE,
    VALUE,
    K,
    Row,
    difference,
    milliseconds,
    normal,
    peer,
    replayed,
)
from torch import Tensor

from tokensieve import ops
from tokensieve.ops import quant

DISTINCT = 1024  # pages with content of their own; the others repeat it, at their own addresses
DECODES = ((128, 32768), (16, 131072), (1, 131072))  # sequences, tokens of each
STEPS = tuple((B, T) for T in (4096, 8192, 32768, 131072) for B in (1, 16, 64))
SIDES = ((8, 131072), (4, 131072))  # on either side of where `auto` goes over to FlashMLA


def pool(B: int, T: int, page: Callable[[int], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of B sequences of T tokens, their table in random order, and their lengths."""
    pages = B * T // quant.PAGE_TOKENS
    held = page(min(pages, DISTINCT))
    repeated = held.repeat(-(-pages // len(held)), *[1] * (held.dim() - 1))[:pages]
    table = torch.randperm(pages, device="cuda").to(torch.int32).view(B, -1)
    return repeated, table, torch.full((B,), T, dtype=torch.int32, device="cuda")


def few(B: int) -> Tensor:
    return torch.tensor(sorted({0, B // 2, B - 1}), device="cuda")


def paged_scores(size: tuple[int, int], quick: bool) -> Iterator[Row]:
    (B, T), deep_gemm = size, peer("deep_gemm")
    pages, table, lengths = pool(B, T, lambda n: quant.pack_index_page(normal(n, quant.PAGE_TOKENS, INDEX_DIM)))
    q, q_scale = quant.quantize_e4m3(normal(B, INDEX_HEADS, INDEX_DIM), INDEX_DIM, "ue8m0")
    w = torch.randn(B, INDEX_HEADS, device="cuda") * (INDEX_HEADS * INDEX_DIM) ** -0.5 * q_scale.squeeze(-1)

    def own() -> Tensor:
        return ops.index_scores_paged(q, pages, w, table, lengths, backend="triton")

    row = Row("paged scores fp8", f"{B} x {T // 1024}K", replayed(own, quick))
    row.tflop, row.gb = B * T * INDEX_HEADS * INDEX_DIM * 2 / 1e12, B * T * (INDEX_DIM + 4 + 4) / 1e9
    some = few(B)
    expected = ops.index_scores_paged(q[some].float(), pages, w[some], table[some], lengths[some], backend="reference")
    row.error = difference(own()[some], expected)
    if deep_gemm is not None:
        cache, ends = pages.view(-1, quant.PAGE_TOKENS, 1, INDEX_DIM + 4), lengths[:, None]
        plan = deep_gemm.get_paged_mqa_logits_metadata(ends, quant.PAGE_TOKENS, deep_gemm.get_num_sms())
        row.peer = "DeepGEMM"
        row.peer_ms = replayed(
            lambda: deep_gemm.fp8_paged_mqa_logits(q[:, None], cache, w, ends, table, plan, T, clean_logits=False),
            quick,
        )
    yield row


def paged_attention(size: tuple[int, int], quick: bool) -> Iterator[Row]:
    (B, T), flash_mla = size, peer("flash_mla")

    def page(n: int) -> Tensor:
        parts = normal(n, quant.PAGE_TOKENS, KEY).split((VALUE, KEY - VALUE), -1)
        return quant.pack_latent_page(*parts)

    pages, table, lengths = pool(B, T, page)
    q = normal(B, HEADS, KEY)
    indices = torch.stack([torch.randperm(T, device="cuda")[:K].sort().values for _ in range(B)]).to(torch.int32)

    from tokensieve.ops.hopper.decode import beats_pieces  # here: a machine without a GPU may have no Triton

    ours = "hopper" if beats_pieces(B, HEADS, K) else "triton"

    def own(how: str = ours) -> tuple[Tensor, Tensor]:
        return ops.sparse_attention_paged(q, pages, indices, table, lengths, SCALE, backend=how)

    row = Row("sparse decode fp8", f"{B} x {T // 1024}K, k {K}, {HEADS} heads", replayed(own, quick))
    row.tflop = B * K * HEADS * (KEY + VALUE) * 2 / 1e12
    row.gb = B * (K * quant.LATENT_TOKEN_BYTES + HEADS * (KEY + VALUE) * 2) / 1e9
    some = few(B)
    expected = ops.sparse_attention_paged(
        q[some], pages, indices[some], table[some], lengths[some], SCALE, backend="reference"
    )
    row.error = difference(own()[0][some], expected[0])
    if flash_mla is not None:
        cache = pages.view(torch.float8_e4m3fn).unsqueeze(2)
        positions = indices.long()
        places = table.gather(1, positions // quant.PAGE_TOKENS).long() * quant.PAGE_TOKENS
        places = (places + positions % quant.PAGE_TOKENS).to(torch.int32)[:, None]
        plan = flash_mla.get_mla_metadata()[0]
        row.peer = "FlashMLA"
        row.peer_ms = replayed(
            lambda: flash_mla.flash_mla_with_kvcache(
                q[:, None], cache, None, None, VALUE, plan, softmax_scale=SCALE, is_fp8_kvcache=True, indices=places
            ),
            quick,
        )
        for how, name in (("vendor", "the same as its backend has it"), ("auto", "the same as auto has it")):
            yield row
            through = replayed(lambda how=how: own(how), quick)
            row = Row(name, row.shape, through, "FlashMLA", row.peer_ms, row.tflop, row.gb)
            row.error = difference(own(how)[0][some], expected[0])
    yield row


def decode_step(size: tuple[int, int], quick: bool) -> Iterator[Row]:
    """What a sparse layer's attention does for one token of each sequence: score, select, attend. Beside attention to
    every key.

    FlashMLA's dense kernel reads bfloat16 pages, the other one is what the engine runs for a dense layer: every key of
    the quantized ones.
    """
    (B, T), flash_mla = size, peer("flash_mla")

    def page(n: int) -> Tensor:
        return quant.pack_latent_page(*normal(n, quant.PAGE_TOKENS, KEY).split((VALUE, KEY - VALUE), -1))

    keys, table, lengths = pool(B, T, lambda n: quant.pack_index_page(normal(n, quant.PAGE_TOKENS, INDEX_DIM)))
    latent = pool(B, T, page)[0]
    q = normal(B, HEADS, KEY)
    q_I, scale = quant.quantize_e4m3(normal(B, INDEX_HEADS, INDEX_DIM), INDEX_DIM, "ue8m0")
    w = torch.randn(B, INDEX_HEADS, device="cuda") * (INDEX_HEADS * INDEX_DIM) ** -0.5 * scale.squeeze(-1)
    starts = torch.zeros_like(lengths)

    def select() -> Tensor:
        return ops.select_topk(ops.index_scores_paged(q_I, keys, w, table, lengths), K, starts, lengths)

    def own() -> Tensor:
        return ops.sparse_attention_paged(q, latent, select(), table, lengths, SCALE)[0]

    everything = torch.arange(T, dtype=torch.int32, device="cuda").expand(B, T).contiguous()
    row = Row("sparse decode step", f"{B} x {T // 1024}K, k {K}", replayed(own, quick), "every key, quantized")
    some = few(B)  # of what was selected: scores have rows of their own
    where = select()[some], table[some], lengths[some]
    expected = ops.sparse_attention_paged(q[some], latent, *where, SCALE, backend="reference")[0]
    row.error = difference(own()[some], expected)
    row.peer_ms = replayed(lambda: ops.sparse_attention_paged(q, latent, everything, table, lengths, SCALE), quick)
    yield row
    if flash_mla is not None:
        cache = pool(B, T, lambda n: normal(n, quant.PAGE_TOKENS, 1, KEY))[0]
        plan = flash_mla.get_mla_metadata()[0]
        again = Row(row.op, row.shape, row.own_ms, "FlashMLA's dense", error=row.error)
        again.peer_ms = replayed(
            lambda: flash_mla.flash_mla_with_kvcache(
                q[:, None], cache, table, lengths, VALUE, plan, softmax_scale=SCALE
            ),
            quick,
        )
        yield again


def write(N: int, quick: bool) -> Iterator[Row]:
    """N new tokens into both caches; compared with the reference to the byte."""
    pages = -(-N // quant.PAGE_TOKENS) + 8
    tokens = normal(N, VALUE), normal(N, KEY - VALUE), normal(N, INDEX_DIM)
    both = [torch.zeros(pages, *tail, dtype=torch.uint8, device="cuda") for tail in ((64, 656), (8448,))]
    expected = [x.clone() for x in both]
    slots = torch.randperm(pages * quant.PAGE_TOKENS, device="cuda")[:N]

    def own() -> None:
        ops.write_caches(*tokens, *both, slots)

    row = Row("write caches fp8", f"{N} tokens", replayed(own, quick), "the reference", allowed=0.0)
    row.gb = N * (2 * (KEY + INDEX_DIM) + quant.LATENT_TOKEN_BYTES + INDEX_DIM + 4) / 1e9
    row.peer_ms = milliseconds(lambda: ops.write_caches(*tokens, *expected, slots, backend="reference"), quick)
    row.error = float(sum(int((a != e).sum()) for a, e in zip(both, expected, strict=True)))
    yield row


PARTS: dict[str, tuple[Callable[..., Iterator[Row]], tuple]] = {
    "paged-scores": (paged_scores, DECODES),
    "paged-attention": (paged_attention, DECODES + SIDES),
    "decode-step": (decode_step, STEPS),
    "write": (write, (128, 8192)),
}
