"""index_topk_blocks: the best blocks of keys, then the best keys of these blocks."""

import math

import pytest
import torch
from torch import Tensor

from tests.support import oracle
from tests.support.cases import CASES, Case, make
from tokensieve import ops
from tokensieve.ops.quant import quantize_e4m3

# block, blocks, k: the most keys that the blocks are sure to hold, or fewer
SETTINGS = [(16, 2, 2), (16, 4, 34), (16, 9, 50), (32, 5, 98), (64, 3, 7), (128, 4, 100)]


def exact_inputs(S: int, T: int, heads: int = 3, width: int = 16, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Normals of which every product, of a key or of a mean of keys, is exact in float32 in any order."""
    g = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(*shape, generator=g).mul(16).round() / 16 for shape in ((S, heads, width), (T, width)))
    return q, k, torch.randn(S, heads, generator=g) / 8


def spans(S: int, T: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ranges anywhere, a third of them from one start, as a document's are; some are empty, some end at a border."""
    g = torch.Generator().manual_seed(seed)
    starts, ends = torch.randint(0, T + 1, (S, 2), generator=g).sort(1).values.int().unbind(1)
    starts, ends = starts.clone(), ends.clone()
    starts[: S // 3] = T // 10
    ends[: S // 3] = torch.linspace(T // 10, T, S // 3).int()
    starts[-5:] = starts[-5:] // 128 * 128
    ends[-8:] = ends[-8:] // 64 * 64
    ends[S // 2] = starts[S // 2]
    return starts, ends


def least_blocks(k: int, block: int) -> int:
    """The fewest that are sure to hold k keys."""
    return max(2, math.ceil((k - 2) / block) + 2)


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize(("block", "blocks", "k"), SETTINGS)
def test_equals_the_oracle(block: int, blocks: int, k: int, dtype: str) -> None:
    q, keys, w = exact_inputs(40, 1000)
    q, keys = (x.to(getattr(torch, dtype)) for x in (q, keys))
    given = q, keys, w.double() if dtype == "float64" else w, k, *spans(40, 1000)
    actual = ops.index_topk_blocks(*given, block=block, blocks=blocks)
    assert actual.dtype == torch.int32
    assert torch.equal(actual, oracle.index_topk_blocks(*given, None, block, blocks))
    assert not torch.equal(actual, ops.index_topk(*given))


@pytest.mark.parametrize("scale_format", ["ue8m0", "float32"])
@pytest.mark.parametrize(("block", "blocks", "k"), SETTINGS)
def test_quantized_keys(block: int, blocks: int, k: int, scale_format: str) -> None:
    q, keys, w = exact_inputs(40, 1000, seed=1)
    keys = keys * torch.rand(1000, 1, generator=torch.Generator().manual_seed(2)).exp()
    q, q_scale = quantize_e4m3(q, 16, scale_format)
    keys, k_scale = quantize_e4m3(keys, 16, scale_format)
    given = q, keys, w * q_scale[..., 0], k, *spans(40, 1000, seed=1), k_scale[:, 0]
    actual = ops.index_topk_blocks(*given, block=block, blocks=blocks)
    assert torch.equal(actual, oracle.index_topk_blocks(*given, block, blocks))


def test_scales_of_other_keys() -> None:
    """Keys that are not quantized may have scales too; their mean then has none."""
    q, keys, w = exact_inputs(20, 400)
    scale = torch.exp2(torch.arange(400) % 5 - 2.0)
    given = q, keys, w, 20, *spans(20, 400), scale
    actual = ops.index_topk_blocks(*given, block=16, blocks=4)
    assert torch.equal(actual, oracle.index_topk_blocks(*given, 16, 4))
    assert not torch.equal(actual, ops.index_topk_blocks(*given[:-1], block=16, blocks=4))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_case(case: Case) -> None:
    x = make(case)
    given = x.q_SID, x.k_TD, x.w_SI, x.k, x.starts_S, x.ends_S
    blocks = least_blocks(x.k, 16)
    actual = ops.index_topk_blocks(*given, block=16, blocks=blocks)
    assert torch.equal(actual, oracle.index_topk_blocks(*given, None, 16, blocks))


def test_ties_go_to_the_smaller_block_and_the_smaller_position() -> None:
    equal = torch.ones(1, 2, 16), torch.ones(200, 16), torch.ones(1, 2)
    start, end = torch.tensor([5]), torch.tensor([190])
    for w in (equal[2], -equal[2], torch.tensor([[1.0, -1.0]])):
        chosen = ops.index_topk_blocks(*equal[:2], w, 34, start, end, block=16, blocks=4)
        assert chosen.tolist() == [list(range(5, 39))]
        chosen = ops.index_topk_blocks(*equal[:2], w, 2, start, end, block=64, blocks=2)
        assert chosen.tolist() == [[5, 6]]
    few = torch.randint(-1, 2, (300, 4), generator=torch.Generator().manual_seed(3)).float()
    q = torch.randint(-1, 2, (30, 2, 4), generator=torch.Generator().manual_seed(4)).float()
    given = q, few, torch.tensor([1.0, -0.5]).expand(30, 2), 30, *spans(30, 300)
    for blocks in (4, 6):
        expected = oracle.index_topk_blocks(*given, None, 16, blocks)
        assert torch.equal(ops.index_topk_blocks(*given, block=16, blocks=blocks), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("heads", "width"), [(3, 16), (64, 128), (5, 24), (1, 8)])
def test_few_blocks_select_as_one_level_does(heads: int, width: int, dtype: torch.dtype) -> None:
    """To the bit, though scores are full of rounding: a range of so many blocks has no others."""
    g = torch.Generator().manual_seed(5)
    S, T = 37, 700
    q, keys = (torch.randn(*shape, generator=g).to(dtype) for shape in ((S, heads, width), (T, width)))
    w = torch.randn(S, heads, generator=g, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    starts, ends = spans(S, T)
    for block, blocks in ((16, 9), (64, 4), (256, 2)):
        last = (starts // block + blocks) * block  # of the last block that may be one of them
        given = q, keys, w, 30, starts, torch.minimum(ends, last)
        if blocks == 2:
            given = *given[:3], 2, *given[4:]
        assert torch.equal(ops.index_topk_blocks(*given, block=block, blocks=blocks), ops.index_topk(*given))


def test_however_a_prompt_is_cut() -> None:
    """In chunks the later keys do not exist yet, or their room holds anything."""
    g = torch.Generator().manual_seed(6)
    S, T = 300, 300
    q, keys, w = torch.randn(S, 3, 16, generator=g), torch.randn(T, 16, generator=g), torch.randn(S, 3, generator=g)
    ends = torch.arange(1, S + 1)
    starts = torch.where(ends > 77, 77, 0)  # a second document
    whole = ops.index_topk_blocks(q, keys, w, 20, starts, ends, block=16, blocks=4)
    for chunk in (1, 7, 64, 100):
        for a in range(0, S, chunk):
            part, seen = slice(a, min(a + chunk, S)), min(a + chunk, S)
            for buffer in (keys[:seen], torch.cat((keys[:seen], torch.full((40, 16), math.nan)))):
                alone = ops.index_topk_blocks(
                    q[part], buffer, w[part], 20, starts[part], ends[part], block=16, blocks=4
                )
                assert torch.equal(alone, whole[part]), (a, chunk)


def test_a_query_gets_as_many_keys_as_of_one_level() -> None:
    q, keys, w = exact_inputs(40, 1000)
    starts, ends = spans(40, 1000)
    for block, blocks, k in SETTINGS:
        chosen = ops.index_topk_blocks(q, keys, w, k, starts, ends, block=block, blocks=blocks)
        assert ((chosen >= 0).sum(1) == (ends - starts).clamp(0, k)).all()


def test_nan_is_refused_only_where_it_may_be_seen() -> None:
    q, keys, w = exact_inputs(4, 200)
    starts, ends = torch.tensor([0, 0, 20, 100]), torch.tensor([100, 0, 90, 200])
    clean = ops.index_topk_blocks(q, keys, w, 20, starts, ends, block=16, blocks=4)
    for value in (math.nan, math.inf):
        outside = keys.clone()
        outside[[16, 17, 19, 95]] = value  # in the blocks of query 2's first and last key, but not in its range
        actual = ops.index_topk_blocks(q[1:], outside, w[1:], 20, starts[1:], ends[1:], block=16, blocks=4)[:2]
        assert torch.equal(actual, clean[1:3])
    for s in (20, 40, 89):
        inside = keys.clone()
        inside[s] = math.nan
        with pytest.raises(ValueError, match="query 2 contain NaN"):
            ops.index_topk_blocks(q[[1, 3, 2]], inside, w[[1, 3, 2]], 20, starts[[1, 3, 2]], ends[[1, 3, 2]], block=16)
    broken = keys.to(torch.float8_e4m3fn), torch.ones(200)
    broken[1][50] = math.inf  # no mean in E4M3, of a block that only query 0 and 2 may see
    part = slice(3, 4)
    ops.index_topk_blocks(q[part], broken[0], w[part], 20, starts[part], ends[part], broken[1], block=16, blocks=4)
    with pytest.raises(ValueError, match="query 0 contain NaN"):
        ops.index_topk_blocks(q, broken[0], w, 20, starts, ends, broken[1], block=16, blocks=4)


def test_what_is_refused() -> None:
    q, keys, w = exact_inputs(4, 200)
    starts, ends = torch.zeros(4, dtype=torch.int32), torch.full((4,), 200, dtype=torch.int32)

    def message(k: int = 20, ends: Tensor = ends, **levels: int) -> str:
        with pytest.raises(ValueError, match="index_topk_blocks: ") as raised:
            ops.index_topk_blocks(q, keys, w, k, starts, ends, **levels)
        return str(raised.value)

    for block in (0, 8, 24, 100, -16):
        assert message(block=block).endswith(f"of at least 16 keys, got {block}")
    assert message(blocks=1).endswith("got 1") and message(k=0).endswith("got 0")
    assert "201" in message(ends=ends + 1)
    for k, block, blocks in ((3, 16, 2), (35, 16, 4), (8000, 128, 64)):
        assert message(k, block=block, blocks=blocks).endswith(f"take at least {least_blocks(k, block)} blocks")
        ops.index_topk_blocks(q, keys, w, k, starts, ends, block=block, blocks=least_blocks(k, block))
    with pytest.raises(ValueError, match="wide"):
        ops.index_topk_blocks(q, keys[:, 1:], w, 20, starts, ends)
