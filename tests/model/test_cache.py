"""Chunked prefill, decode, crop, packed documents, padding and generation all compute the full forward's function."""

from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support.models import INDEXER, config, difference, margins, ours, pair, tokens
from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM, ForwardOptions, LatentCache, with_options
from tokensieve.model.selection import window

TOLERANCE = 2e-5
K, LENGTH = INDEXER["index_topk"], 90  # beyond k
SINGLE = [1] * (K + 8) + [LENGTH - K - 8]  # from the first token to some past k
KINDS: dict[str, Any] = {
    "dense": config("v3"),
    "dense v2": config("v2", q_lora_rank=None),
    "sparse": config("v32"),
    "sparse without a latent": config("v32", q_lora_rank=None),
    "sparse softmax router": config("v32", scoring_func="softmax", norm_topk_prob=False),
    "sparse fp8": config("v32", index_dtype="fp8"),
}


RARE = pytest.param("sparse softmax router", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[RARE if kind in RARE.values else kind for kind in KINDS])
def model(request: pytest.FixtureRequest) -> DecoderForCausalLM:
    return ours(KINDS[request.param], seed=1)


@pytest.fixture(scope="module")
def sparse() -> DecoderForCausalLM:
    return ours(KINDS["sparse"], seed=1)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def in_chunks(model: DecoderForCausalLM, ids: Tensor, sizes: list[int], **kwargs: Any) -> tuple[Tensor, LatentCache]:
    """The logits of `ids` (B, S) passed in pieces; arguments of shape (B, S) are cut along, the mask grows."""
    assert sum(sizes) == ids.shape[1]
    cache, parts, a = kwargs.pop("cache", None) or LatentCache(), [], 0
    past = cache.get_seq_length()
    for size in sizes:
        piece = {k: v[:, : past + a + size] if k == "attention_mask" else v[:, a : a + size] for k, v in kwargs.items()}
        out = model(ids[:, a : a + size], past_key_values=cache, use_cache=True, **piece)
        assert out.past_key_values is cache
        parts.append(out.logits)
        a += size
    assert cache.get_seq_length() == past + a
    return torch.cat(parts, dim=1), cache


def clear(gaps: list[float]) -> None:
    assert min(gaps, default=1.0) > 1e-6, "a choice hangs on rounding: take another seed"


def pieces(sizes: list[int]) -> str:
    return "+".join(map(str, sizes)) if len(sizes) < 20 else f"{len(sizes)} single tokens"


# prefill and decode


@pytest.mark.parametrize("sizes", [[LENGTH], SINGLE, [7, 33, 1, 1, 13, 35], [K, 1, LENGTH - K - 1]], ids=pieces)
@pytest.mark.parametrize("rows", [1, 3])
def test_chunks_give_the_full_forward(model: DecoderForCausalLM, rows: int, sizes: list[int]) -> None:
    if rows == 3 and sizes is SINGLE:
        sizes = [80] + [1] * 10
    ids = tokens(rows, LENGTH, seed=1)
    with margins(model) as gaps:
        want = model(ids).logits
    clear(gaps)
    got, cache = in_chunks(model, ids, sizes)
    fp8 = getattr(model.config, "index_dtype", "bf16") == "fp8"
    assert difference(got, want) < TOLERANCE or (fp8 and mostly_equal(got, want))
    assert not cache.entries_BTW[0].isnan().any()


def test_one_token_passes_the_experts_as_many_do(model: DecoderForCausalLM) -> None:
    moe = model.model.layers[-1].mlp
    x = torch.randn(20, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([moe(row)[0] for row in x.split(1)])
    assert difference(alone, moe(x)[0]) < TOLERANCE
    with torch.enable_grad():  # one token, but the path of many
        assert difference(alone, torch.cat([moe(row)[0].detach() for row in x.split(1)])) < TOLERANCE


def test_a_steps_tokens_pass_the_experts_to_the_bit_as_many_do(model: DecoderForCausalLM) -> None:
    moe = model.model.layers[-1].mlp
    x = torch.randn(12, model.config.hidden_size, generator=torch.Generator().manual_seed(2))
    want, _ = moe(x)
    for real in range(1, 13):
        some = torch.cat((x[:real], x.new_zeros(-real % 4, x.shape[1])))
        got, _ = moe(some, real)
        assert got.shape == some.shape and torch.equal(got[:real], want[:real]), real


def test_one_token_is_normalized_as_many_are(sparse: DecoderForCausalLM) -> None:
    norm = sparse.model.layers[0].input_layernorm
    x = 30 * torch.randn(20, sparse.config.hidden_size, generator=torch.Generator().manual_seed(1))
    x[3] = 0.0
    assert difference(torch.cat([norm(row) for row in x.split(1)]), norm(x)) < 1e-6
    assert norm(x[:1].bfloat16()).dtype == torch.bfloat16


def mostly_equal(got: Tensor, want: Tensor) -> bool:
    """FP8: a value that rounding carries over an E4M3 boundary moves by 6%, and a key with it into the set or out."""
    return bool(((got - want).abs().amax(-1) < TOLERANCE).float().mean() > 0.9)


@pytest.mark.parametrize("length", [K, LENGTH])
def test_masked_and_gathered_forms_agree(model: DecoderForCausalLM, length: int) -> None:
    ids = tokens(2, length, seed=1)
    want = model(ids).logits
    for form in ("masked", "gathered"):
        with with_options(model, ForwardOptions(form=form)):
            assert difference(model(ids).logits, want) < TOLERANCE, form
            got, _ = in_chunks(model, ids, [length - 8, 1, 7])
            assert difference(got, want) < TOLERANCE or model.config.model_type == "deepseek_v32", form


def test_up_to_k_tokens_sparse_is_dense(sparse: DecoderForCausalLM) -> None:
    dense = DecoderForCausalLM(config("v3")).eval()
    dense.load_state_dict({n: x for n, x in sparse.state_dict().items() if ".indexer." not in n})
    ids = tokens(2, LENGTH, seed=1)
    assert torch.equal(sparse(ids[:, :K]).logits, dense(ids[:, :K]).logits)
    sizes = [K - 3, 1, 1, 1]
    assert torch.equal(in_chunks(sparse, ids[:, :K], sizes)[0], in_chunks(dense, ids[:, :K], sizes)[0])
    beyond = difference(sparse(ids).logits, dense(ids).logits)
    assert beyond > 0.1
    with tokensieve.selecting(sparse, "dense"):
        assert torch.equal(sparse(ids).logits, dense(ids).logits)
    with tokensieve.selecting(sparse, "indexer", top_k=LENGTH):
        assert torch.equal(sparse(ids).logits, dense(ids).logits)


def test_rows_of_a_batch_do_not_meet(model: DecoderForCausalLM) -> None:
    ids = tokens(3, LENGTH, seed=2)
    with margins(model) as gaps:
        together = model(ids).logits
    clear(gaps)
    if getattr(model.config, "index_dtype", "bf16") != "fp8":
        for row in range(3):
            assert difference(model(ids[row : row + 1]).logits, together[row : row + 1]) < TOLERANCE
    other = ids.clone()
    other[1] = (other[1] + 1) % 90
    changed = model(other).logits
    assert difference(changed[[0, 2]], together[[0, 2]]) < TOLERANCE and difference(changed[1], together[1]) > 0.1


# the cache itself


def test_crop_then_continue(model: DecoderForCausalLM) -> None:
    ids, other = tokens(2, LENGTH, seed=1), tokens(2, LENGTH, seed=7)
    want = model(torch.cat((ids[:, :50], other[:, 50:]), dim=1)).logits
    for to in (50, -(LENGTH - 50)):
        _, cache = in_chunks(model, ids, [60, 30])
        cache.crop(to)
        assert cache.get_seq_length() == 50
        got, _ = in_chunks(model, other[:, 50:], [11, 1, 28], cache=cache)
        assert difference(got, want[:, 50:]) < TOLERANCE or model.config.index_dtype == "fp8"
    for nothing in (1000, 0):  # transformers' generation calls crop(-n) with n = 0 as well
        cache.crop(nothing)
        assert cache.get_seq_length() == LENGTH
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    got, _ = in_chunks(model, other, [LENGTH], cache=cache)
    assert difference(got, model(other).logits) < TOLERANCE


def test_a_growing_cache_forgets_nothing(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, 700, seed=1)
    with margins(sparse) as gaps:
        want = sparse(ids, logits_to_keep=20).logits
    clear(gaps)
    sizes = [100, 90, 1, 1, 300, 188, 19, 1]  # past 256 and 512 tokens, the second time in the middle of a piece
    got, cache = in_chunks(sparse, ids, sizes)
    assert difference(got[:, -20:], want) < TOLERANCE
    reserved = LatentCache(reserve=700)
    sparse(ids[:, :1], past_key_values=reserved, use_cache=True)
    buffer = reserved.entries_BTW[0]
    got, _ = in_chunks(sparse, ids[:, 1:], [499, 200], cache=reserved)
    assert reserved.entries_BTW[0] is buffer  # what was set aside is enough
    assert difference(got[:, -20:], want) < TOLERANCE
    # One entry and one index key a token, nothing per head.
    capacity = cache.entries_BTW[0].shape[1]
    assert 700 <= capacity <= 2 * 700 and cache.bytes == 3 * 2 * capacity * (24 + 8 + 16) * 4


def test_a_failed_pass_leaves_the_cache_usable(sparse: DecoderForCausalLM) -> None:
    ids = tokens(1, LENGTH, seed=1)
    want = sparse(ids).logits
    _, cache = in_chunks(sparse, ids[:, :50], [50])

    def fails(c: Any) -> Tensor:
        if c.layer == 1:
            raise KeyError("selection")
        return window(c)

    with pytest.raises(KeyError), tokensieve.selecting(sparse, fails):
        sparse(ids[:, 50:], past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == 50
    assert difference(in_chunks(sparse, ids[:, 50:], [40], cache=cache)[0], want[:, 50:]) < TOLERANCE


# packed documents and padding


def documents(*lengths: int) -> Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("sizes", [[90], [50, 40], [30, 30, 30], [1] * 90], ids=pieces)
def test_packed_documents_equal_each_alone(sparse: DecoderForCausalLM, sizes: list[int]) -> None:
    lengths = (30, 1, 49, 10)
    ids = tokens(2, LENGTH, seed=1)
    positions = torch.cat((documents(*lengths), documents(45, 45)))
    with margins(sparse) as gaps:
        packed = sparse(ids, position_ids=positions, return_selection=True)
    clear(gaps)
    if sizes != [90]:
        assert difference(in_chunks(sparse, ids, sizes, position_ids=positions)[0], packed.logits) < TOLERANCE
        return
    for row, cuts in ((0, lengths), (1, (45, 45))):
        a = 0
        for n in cuts:
            alone = sparse(ids[row : row + 1, a : a + n], return_selection=True)
            assert difference(packed.logits[row, a : a + n], alone.logits[0]) < TOLERANCE
            for mine, own in zip(packed.selection, alone.selection, strict=True):
                inside = mine[row, a : a + n]
                inside = torch.where(inside < 0, inside, inside - a)
                assert torch.equal(inside[:, : own.shape[2]], own[0]) and bool((inside[:, own.shape[2] :] == -1).all())
            a += n


def test_packed_documents_of_a_dense_model(model: DecoderForCausalLM) -> None:
    ids = tokens(1, LENGTH, seed=1)
    packed = model(ids, position_ids=documents(40, 50)).logits
    for a, b in ((0, 40), (40, 90)):
        assert difference(packed[:, a:b], model(ids[:, a:b]).logits) < TOLERANCE or model.config.index_dtype == "fp8"


def test_crop_of_packed_documents(sparse: DecoderForCausalLM) -> None:
    ids, positions = tokens(1, LENGTH, seed=1), documents(40, 50)
    want = sparse(ids, position_ids=positions).logits
    _, cache = in_chunks(sparse, ids, [LENGTH], position_ids=positions)
    cache.crop(60)
    got, _ = in_chunks(sparse, ids[:, 60:], [30], cache=cache, position_ids=positions[:, 60:])
    assert difference(got, want[:, 60:]) < TOLERANCE
    # And without saying again where the document began.
    cache.crop(60)
    assert difference(in_chunks(sparse, ids[:, 60:], [29, 1], cache=cache)[0], want[:, 60:]) < TOLERANCE
    with pytest.raises(ValueError, match="cannot crop to 20 tokens: a row begins at 40"):
        cache.crop(20)
    assert cache.get_seq_length() == LENGTH


def left_padded(ids: Tensor, missing: list[int]) -> tuple[Tensor, Tensor]:
    """Rows of `ids` shortened by `missing` tokens at their end and shifted to the right edge."""
    out, mask = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, n in enumerate(missing):
        out[row, n:], mask[row, n:] = ids[row, : ids.shape[1] - n], 1
    return out, mask


@pytest.mark.parametrize("sizes", [[90], [50, 40], [4, 4, 60, 1, 20, 1], [1] * 90], ids=pieces)
def test_left_padded_rows_equal_the_rows_alone(sparse: DecoderForCausalLM, sizes: list[int]) -> None:
    ids, missing = tokens(3, LENGTH, seed=1), [0, 5, 61]
    padded, mask = left_padded(ids, missing)
    got, cache = in_chunks(sparse, padded, sizes, attention_mask=mask)
    for row, n in enumerate(missing):
        with margins(sparse) as gaps:
            alone = sparse(ids[row : row + 1, : LENGTH - n]).logits[0]
        clear(gaps)
        assert difference(got[row, n:], alone) < TOLERANCE
    one_more = sparse(ids[:, :1], past_key_values=cache, use_cache=True).logits  # the padding is remembered
    for row, n in enumerate(missing):
        alone = sparse(torch.cat((ids[row : row + 1, : LENGTH - n], ids[row : row + 1, :1]), dim=1), logits_to_keep=1)
        assert difference(one_more[row], alone.logits[0]) < TOLERANCE
    assert not got.isnan().any()  # padding sees nothing, and that must not poison anybody


def test_left_padding_on_a_reused_cache(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH, seed=1)
    padded, mask = left_padded(ids, [0, 40])
    for forget in (lambda c: c.crop(-LENGTH), lambda c: c.reset()):
        _, cache = in_chunks(sparse, padded, [LENGTH], attention_mask=mask)
        forget(cache)
        assert cache.get_seq_length() == 0
        assert difference(in_chunks(sparse, ids, [60, 30], cache=cache)[0], sparse(ids).logits) < TOLERANCE


def test_rows_of_a_cache_can_be_chosen_and_repeated(sparse: DecoderForCausalLM) -> None:
    """What searches do: every row keeps its own entries, index keys and padding."""
    ids, missing = tokens(3, LENGTH, seed=1), [0, 5, 61]
    padded, mask = left_padded(ids, missing)
    step = tokens(3, 1, seed=9)
    full = torch.cat((padded, step), dim=1)
    want = sparse(full, attention_mask=torch.cat((mask, torch.ones_like(step)), dim=1)).logits[:, -1]
    rows = torch.tensor([2, 0, 1])
    for change, kept in (
        (lambda c: c.reorder_cache(rows), rows),
        (lambda c: c.batch_select_indices(rows[:2]), rows[:2]),
        (lambda c: c.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2])),
    ):
        _, cache = in_chunks(sparse, padded, [LENGTH], attention_mask=mask)
        change(cache)
        got = sparse(step[kept], past_key_values=cache, use_cache=True).logits[:, -1]
        assert difference(got, want[kept]) < TOLERANCE


def test_a_mask_of_ones_and_positions_that_continue_change_nothing(model: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH, seed=1)
    want = model(ids).logits
    positions = torch.arange(LENGTH)[None]
    for extra in (
        {"attention_mask": torch.ones_like(ids)},
        {"position_ids": positions},
        {"position_ids": positions + 7},
    ):
        tolerance = TOLERANCE if "position_ids" in extra else 0.0
        got = model(ids, **extra).logits
        assert difference(got, want) <= tolerance or model.config.index_dtype == "fp8"


# generation


@pytest.mark.parametrize("family", ["v2", "v3", "v32"])
def test_generated_tokens_are_those_of_transformers(family: str, tmp_path: Any) -> None:
    oracle, model = pair(config(family), tmp_path, seed=1)
    ids, mask = left_padded(tokens(2, 40, seed=1), [0, 9])
    settings: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = oracle.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), want)
    assert torch.equal(model.generate(ids, attention_mask=mask, use_cache=False, **settings), want)
    # Beams reorder the rows of the cache, their padding included.
    settings |= {"num_beams": 3, "max_new_tokens": 10}
    want = oracle.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), want)


def test_generation_reads_the_whole_prompt_once(sparse: DecoderForCausalLM) -> None:
    lengths: list[int] = []
    hook = sparse.model.norm.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[0]))
    sparse.generate(tokens(1, 50), max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    hook.remove()
    assert lengths == [50, 1, 1, 1]


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "top_p": 0.9, "temperature": 0.7},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
        {"num_return_sequences": 2, "do_sample": True},
        {"prompt_lookup_num_tokens": 3, "do_sample": False},
        {"prefill_chunk_size": 16, "do_sample": False},
    ],
    ids=str,
)
def test_other_ways_to_generate(sparse: DecoderForCausalLM, how: dict[str, Any]) -> None:
    ids = tokens(1, 40, seed=1)
    settings: dict[str, Any] = {"max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(0)
    out = sparse.generate(ids, **settings, **how)
    assert out.shape == (how.get("num_return_sequences", 1), 52) and torch.equal(out[0, :40], ids[0])
    greedy = sparse.generate(ids, do_sample=False, **settings)
    if "num_beams" in how and not how["do_sample"]:

        def log_probability(row: Tensor) -> float:
            logits = sparse(row[None]).logits[0, 39:-1].log_softmax(-1)
            return float(logits.gather(1, row[40:, None]).sum())

        assert log_probability(out[0]) >= log_probability(greedy[0]) - 1e-4
    elif not how["do_sample"]:
        assert torch.equal(out, greedy)


def test_a_conversation_continues_on_its_cache(sparse: DecoderForCausalLM) -> None:
    ids = tokens(1, 60, seed=1)
    settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    cache = LatentCache()
    first = sparse.generate(ids[:, :30], past_key_values=cache, **settings)
    longer = torch.cat((first, ids[:, 30:]), dim=1)
    assert torch.equal(sparse.generate(longer, past_key_values=cache, **settings), sparse.generate(longer, **settings))


# bad input


def test_what_cannot_be_meant_is_refused(sparse: DecoderForCausalLM) -> None:
    small = ours(config("v32", max_position_embeddings=64))
    with pytest.raises(UserError, match="65 tokens is past the model's 64 positions"):
        small(tokens(1, 65))
    _, cache = in_chunks(small, tokens(1, 60), [60])
    with pytest.raises(UserError, match="65 tokens is past"):
        small(tokens(1, 5), past_key_values=cache, use_cache=True)
    small(tokens(1, 4), past_key_values=cache, use_cache=True)  # and nothing was damaged
    with pytest.raises(UserError, match="past the model's 64 positions"):
        small.generate(tokens(1, 60), max_new_tokens=10, pad_token_id=0, eos_token_id=None)

    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, 3:5] = 0
    with pytest.raises(UserError, match="hole"):
        sparse(ids, attention_mask=mask)
    with pytest.raises(UserError, match="hole"):
        in_chunks(sparse, ids, [3, 5], attention_mask=mask)
    _, cache = in_chunks(sparse, ids, [8])
    with pytest.raises(UserError, match="attention_mask covers 8 tokens of 16"):
        sparse(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="attention_mask must be"):
        sparse(ids, attention_mask=torch.ones(2, 1, 8, 8))
    with pytest.raises(ValueError, match="LatentCache"):
        sparse(ids, past_key_values=((ids, ids),))
    with pytest.raises(ValueError, match="the cache holds 2 rows and the input 1"):
        sparse(ids[:1], past_key_values=cache, use_cache=True)
    with pytest.raises(UserError, match="no token"):
        sparse(ids[:, :0])
    with pytest.raises(ValueError, match="exactly one"):
        sparse()


def test_decode_never_copies_the_index_keys(monkeypatch):
    """However full the buffers are: index products read some way past the last key, and that room has to be there."""
    model = ours(config("v32", max_position_embeddings=1024))
    copies = []
    pad = torch.nn.functional.pad
    monkeypatch.setattr(
        "tokensieve.ops.reference.index.F.pad", lambda x, *rest: copies.append(x.shape) or pad(x, *rest)
    )
    cache = LatentCache()
    ids = torch.randint(3, 60, (1, 320), generator=torch.Generator().manual_seed(0))
    model(ids[:, :50], past_key_values=cache, use_cache=True)
    copies.clear()
    for token in ids[0, 50:].split(1):
        model(token[None], past_key_values=cache, use_cache=True)
    assert not [shape for shape in copies if len(shape) == 2 and shape[0] > 50]  # keys are (T, D)
