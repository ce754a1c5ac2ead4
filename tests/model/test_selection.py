"""Who selects: replay, the arms of an evaluation, one's own functions; scores that are the same however asked for."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import tokensieve
from tests.support.models import INDEXER, attention_of, config, difference, index_of, ours, tokens
from tokensieve import ops
from tokensieve.config import UserError
from tokensieve.model import DecoderForCausalLM, LatentCache, SelectionContext
from tokensieve.model.selection import indexer, oracle, window

K = INDEXER["index_topk"]
LENGTH = 80
TOLERANCE = 2e-5


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module", params=["bf16", "fp8"])
def any_dtype(request: pytest.FixtureRequest) -> DecoderForCausalLM:
    return ours(config("v32", index_dtype=request.param), seed=5)


@pytest.fixture(scope="module")
def sparse() -> DecoderForCausalLM:
    return ours(config("v32"), seed=5)


@pytest.fixture(scope="module")
def trunk() -> DecoderForCausalLM:
    """A dense model: nothing to select with."""
    return ours(config("v3"), seed=5)


def padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[1, :30] = 0
    return mask


# replay


def test_what_is_returned(any_dtype: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    mask = padded(ids)
    chosen = any_dtype(ids, attention_mask=mask, return_selection=True).selection
    assert len(chosen) == 3
    for indices_BSK in chosen:
        assert indices_BSK.shape == (2, LENGTH, K) and indices_BSK.dtype == torch.int32
        for row, first in ((0, 0), (1, 30)):
            for t in range(LENGTH):
                kept = indices_BSK[row, t][indices_BSK[row, t] >= 0]
                visible = max(0, t + 1 - first)
                assert len(kept) == min(K, visible)
                assert bool((indices_BSK[row, t, len(kept) :] == -1).all())
                if visible:
                    assert first <= int(kept[0]) and int(kept[-1]) <= t and bool((kept.diff() > 0).all())
    assert any_dtype(ids).selection is None


@pytest.mark.parametrize("length", [K - 4, LENGTH])
def test_a_replayed_selection_gives_the_same_bits(any_dtype: DecoderForCausalLM, length: int) -> None:
    ids = tokens(2, length)
    for extra in ({}, {"attention_mask": padded(ids)}, {"position_ids": torch.arange(length)[None] % 37}):
        first = any_dtype(ids, return_selection=True, **extra)
        again = any_dtype(ids, selection=first.selection, return_selection=True, **extra)
        assert torch.equal(again.logits, first.logits)
        assert all(torch.equal(a, b) for a, b in zip(again.selection, first.selection, strict=True))
        assert difference(any_dtype(ids, **extra).logits, first.logits) < TOLERANCE
        if length > K:
            others = [torch.arange(K, dtype=torch.int32).expand(2, length, K).tril() for _ in first.selection]
            others = [torch.where(o <= torch.arange(length)[:, None], o, -1) for o in others]
            if not extra:
                assert difference(any_dtype(ids, selection=others).logits, first.logits) > 0.1


def test_replay_token_by_token(any_dtype: DecoderForCausalLM) -> None:
    """What a trainer does with the rollout's selection: one pass over what was chosen step by step."""
    ids = tokens(2, LENGTH)
    cache, steps, logits = LatentCache(), [], []
    for a, b in [(0, 60), *((t, t + 1) for t in range(60, LENGTH))]:
        out = any_dtype(ids[:, a:b], past_key_values=cache, use_cache=True, return_selection=True)
        steps.append(out.selection)
        logits.append(out.logits)
    rollout = [torch.cat(layer, dim=1) for layer in zip(*steps, strict=True)]
    trained = any_dtype(ids, selection=rollout).logits
    assert difference(trained, torch.cat(logits, dim=1)) < TOLERANCE


# a score does not depend on how it is asked for


def recorded(model: DecoderForCausalLM, calls: Callable[[], Any], layer: int = 1) -> list[SelectionContext]:
    seen: list[SelectionContext] = []

    def record(c: SelectionContext) -> Tensor:
        if c.layer == layer:
            seen.append(c)
            index_of(c), c.scores()  # computed now: the cache's buffers change later
        return indexer(c)

    with tokensieve.selecting(model, record):
        calls()
    return seen


def test_scores_have_the_same_bits_in_prefill_and_decode_and_in_any_batch(any_dtype: DecoderForCausalLM) -> None:
    """From equal q_I, k_I and w: hidden states round differently in prefill and decode, so decode's inputs are used."""
    ids, cache = tokens(2, LENGTH), LatentCache()

    def decode() -> None:
        for t in range(LENGTH):
            any_dtype(ids[:, t : t + 1], past_key_values=cache, use_cache=True)

    steps = recorded(any_dtype, decode)
    steps = steps[-(LENGTH - K) :]  # the first k tokens select everything and ask for no score
    stride = index_of(steps[-1])[1].shape[0] // 2  # keys from one row to the next, capacity included
    for row in range(2):
        q = torch.stack([index_of(c)[0][row] for c in steps])
        w = torch.stack([index_of(c)[2][row] for c in steps])
        k = index_of(steps[-1])[1][row * stride :][:LENGTH]
        starts = torch.zeros(len(steps), dtype=torch.int32)
        ends = torch.arange(K + 1, LENGTH + 1, dtype=torch.int32)
        prefill = ops.index_scores(q, k, w, starts, ends)
        chosen = ops.index_topk(q, k, w, K, starts, ends)
        for i, c in enumerate(steps):
            n = K + 1 + i
            at = row * (index_of(c)[1].shape[0] // 2)
            in_decode = c.scores()[row, at : at + n]
            assert torch.equal(prefill[i, :n], in_decode)
            own = indexer(c)[row]
            assert torch.equal(torch.where(own < 0, own, own - at), chosen[i])


def test_decode_selects_as_prefill_does_but_for_rounding(sparse: DecoderForCausalLM) -> None:
    ids, cache = tokens(1, LENGTH), LatentCache()
    full = recorded(sparse, lambda: sparse(ids))[0]
    steps = recorded(
        sparse, lambda: [sparse(ids[:, t : t + 1], past_key_values=cache, use_cache=True) for t in range(LENGTH)]
    )
    want, scores = indexer(full), full.scores()
    for t, c in zip(range(K, LENGTH), steps[-(LENGTH - K) :], strict=True):
        assert difference(c.scores()[0, : t + 1], scores[t, : t + 1]) < 1e-5
        differ = set(indexer(c)[0].tolist()) ^ set(want[t].tolist())
        kth = scores[t, : t + 1].topk(K).values[-1]
        assert all(abs(float(scores[t, s] - kth)) < 1e-5 for s in differ)


def test_selection_is_repeatable(any_dtype: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    first, second = (any_dtype(ids, return_selection=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.selection, second.selection, strict=True))
    assert torch.equal(first.logits, second.logits)


def test_fp8_scores_are_close_and_rounded(sparse: DecoderForCausalLM) -> None:
    fp8 = DecoderForCausalLM(config("v32", index_dtype="fp8")).eval()
    fp8.load_state_dict(sparse.state_dict())
    ids = tokens(1, LENGTH)
    exact, coarse = (recorded(m, lambda m=m: m(ids), layer=0)[0] for m in (sparse, fp8))
    seen = torch.ones(LENGTH, LENGTH).tril().bool()
    a, b = exact.scores()[seen], coarse.scores()[seen]
    assert 1e-4 < difference(a, b) < 0.1 * float(a.abs().max())
    q, k, _ = index_of(coarse)
    for x in (q, k):  # every value is an E4M3 number times a power of two
        scale = 2.0 ** torch.ceil(torch.log2(x.abs().amax(-1, keepdim=True) / 448))
        assert torch.equal((x / scale).to(torch.float8_e4m3fn).float() * scale, x)


@torch.enable_grad()
def test_fp8_rounding_passes_the_gradient() -> None:
    """Straight through the rounding and back through the rotation: nearly the gradient of unrounded scores."""
    gradients = []
    for index_dtype in ("bf16", "fp8"):
        model = ours(config("v32", index_dtype=index_dtype, num_hidden_layers=2), seed=5)
        with tokensieve.training(model, "warmup"):
            model(tokens(2, LENGTH)).loss.backward()
        assert all((".indexer." in name) == (x.grad is not None) for name, x in model.named_parameters())
        gradients.append({name: x.grad for name, x in model.named_parameters() if ".indexer." in name})
    assert len(gradients[1]) == 2 * 5
    for name, exact in gradients[0].items():
        coarse = gradients[1][name]
        assert bool(coarse.isfinite().all()), name
        assert float(torch.cosine_similarity(coarse.flatten(), exact.flatten(), dim=0)) > 0.95, name


# the arms


def test_the_arms_by_name(sparse: DecoderForCausalLM, trunk: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    logits = {"indexer": sparse(ids).logits}
    for name in ("window", "sinks", "oracle", "dense"):
        with tokensieve.selecting(sparse, name):
            logits[name] = sparse(ids).logits
            cache = LatentCache()
            sparse(ids[:, :-3], past_key_values=cache, use_cache=True)
            for t in range(LENGTH - 3, LENGTH):
                step = sparse(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits
                assert difference(step[:, 0], logits[name][:, t]) < TOLERANCE, name
    names = list(logits)
    assert all(difference(logits[a], logits[b]) > 0.1 for i, a in enumerate(names) for b in names[:i])
    trunk.load_state_dict({n: x for n, x in sparse.state_dict().items() if ".indexer." not in n})
    assert torch.equal(trunk(ids).logits, logits["dense"])
    for name in ("window", "sinks", "oracle"):  # on a model without indexers too
        with tokensieve.selecting(trunk, name, top_k=K):
            assert torch.equal(trunk(ids).logits, logits[name]), name
    with tokensieve.selecting(trunk, "indexer"):  # nothing to select with is nothing to leave out
        assert torch.equal(trunk(ids).logits, logits["dense"])


def test_window_and_oracle_are_what_they_say(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    mask = padded(ids)
    with tokensieve.selecting(sparse, "window", top_k=5):
        chosen = sparse(ids, attention_mask=mask, return_selection=True).selection[0]
    assert chosen[0, 50].tolist() == [46, 47, 48, 49, 50] and chosen[1, 50].tolist() == [46, 47, 48, 49, 50]
    assert chosen[0, 2].tolist() == [0, 1, 2, -1, -1] and chosen[1, 31].tolist() == [30, 31, -1, -1, -1]
    assert chosen[1, 29].tolist() == [-1] * 5

    seen: list[SelectionContext] = []
    with tokensieve.selecting(sparse, lambda c: (seen.append(c), indexer(c))[1]):
        sparse(ids, attention_mask=mask)
    for c in seen:
        mass = c.head_mass()
        valid = (c.ends_N > c.starts_N).float()
        assert difference(mass.sum(-1), valid) < 1e-5  # probabilities; 0 for padding
        share = {arm: held(mass, arm(c)) for arm in (indexer, window, oracle)}
        assert difference(share[oracle], mass.topk(K, dim=-1).values.sum(-1)) < 1e-6
        assert bool((share[oracle] >= torch.maximum(share[window], share[indexer]) - 1e-6).all())
        assert float(share[oracle].mean()) > float(share[window].mean()) + 0.01
        rows, visible = slice(85, 89), slice(80, 85)
        assert difference(c.rows(rows).head_mass(), mass[rows]) < 1e-6
        assert torch.equal(c.rows(rows).scores()[:, visible], c.scores()[rows, visible])
        some = c.rows(torch.tensor([3, 60, 85]))
        assert torch.equal(some.rows(slice(1, 3)).topk(), c.topk()[[60, 85]]) and len(some) == 3


def test_sinks_are_the_first_four_keys_and_the_last(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    with tokensieve.selecting(sparse, "sinks", top_k=6):
        chosen = sparse(ids, attention_mask=padded(ids), return_selection=True).selection[0]
    assert chosen[0, 50].tolist() == [0, 1, 2, 3, 49, 50] and chosen[1, 50].tolist() == [30, 31, 32, 33, 49, 50]
    assert chosen[0, 5].tolist() == [0, 1, 2, 3, 4, 5] and chosen[0, 6].tolist() == [0, 1, 2, 3, 5, 6]
    assert chosen[1, 31].tolist() == [30, 31, -1, -1, -1, -1] and chosen[1, 29].tolist() == [-1] * 6
    with pytest.raises(UserError, match="k = 4 is too few"), tokensieve.selecting(sparse, "sinks", top_k=4):
        sparse(ids)


def held(mass_NT: Tensor, indices_NK: Tensor) -> Tensor:
    return mass_NT.gather(1, indices_NK.clamp_min(0).long()).masked_fill(indices_NK < 0, 0.0).sum(-1)


def test_a_function_of_ones_own(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    layers: list[int] = []

    def last(c: SelectionContext) -> Tensor:
        queries = len(c)
        assert c.k == K and index_of(c)[0].shape == (queries, 32, 16)
        assert attention_of(c)[0].shape == (queries, 4, 32)
        layers.append(c.layer)
        return window(c)

    with tokensieve.selecting(sparse, "window"):
        want = sparse(ids).logits
    with tokensieve.selecting(sparse, last):
        assert torch.equal(sparse(ids).logits, want) and layers == [0, 1, 2]
        generated = sparse.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (2, LENGTH + 3)


def test_a_function_that_returns_none_leaves_attention_dense(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    with tokensieve.selecting(sparse, "dense"):
        want = sparse(ids, return_selection=True)
    assert want.selection == [None, None, None]
    assert torch.equal(sparse(ids, selection=want.selection).logits, want.logits)
    with tokensieve.selecting(sparse, lambda c: None if c.layer < 2 else window(c)):
        mixed = sparse(ids, return_selection=True)
    assert mixed.selection[:2] == [None, None] and mixed.selection[2].shape == (2, LENGTH, K)
    assert torch.equal(sparse(ids, selection=mixed.selection).logits, mixed.logits)


def test_a_selection_that_belongs_elsewhere_is_refused(sparse: DecoderForCausalLM) -> None:
    ids = tokens(2, LENGTH)
    good = sparse(ids, return_selection=True).selection
    with pytest.raises(ValueError, match="selection has 2 layers and the model 3"):
        sparse(ids, selection=good[:2])
    with pytest.raises(ValueError, match="keys that their query may not see"):
        sparse(ids, selection=[s.flip(1) for s in good])  # the future
    with pytest.raises(ValueError, match="keys that their query may not see"):
        sparse(ids, selection=[s + LENGTH for s in good])  # another row
    with pytest.raises(ValueError, match="keys that their query may not see"):
        sparse(ids, selection=good, attention_mask=padded(ids))


def test_a_function_of_ones_own_is_asked_however_short_the_context(
    sparse: DecoderForCausalLM, trunk: DecoderForCausalLM
) -> None:
    """It may select less than k, so k tokens and fewer are no reason to pass it over; nor is a model without top_k."""

    def itself(c: SelectionContext) -> Tensor:
        return (c.ends_N - 1)[:, None]

    for model in (sparse, trunk):
        ids = tokens(1, K - 2)
        with tokensieve.selecting(model, itself):
            alone = model(ids).logits
        position_ids = torch.zeros(1, K - 2, dtype=torch.long)  # every token a document of its own
        assert difference(alone, model(ids, position_ids=position_ids).logits) < TOLERANCE


def test_top_k_can_be_overridden_and_comes_back(sparse: DecoderForCausalLM) -> None:
    ids = tokens(1, LENGTH)
    want = sparse(ids).logits
    assert (sparse.top_k, sparse.config.index_topk) == (K, K)
    with tokensieve.selecting(sparse, "indexer", top_k=7):
        assert sparse(ids, return_selection=True).selection[2].shape[-1] == 7
        assert difference(sparse(ids).logits, want) > 0.1
        with tokensieve.selecting(sparse, "window"):  # the inner block says who, the outer one how many
            inner = sparse(ids, return_selection=True).selection[0]
        assert inner.shape[-1] == 7 and inner[0, -1].tolist() == list(range(LENGTH - 7, LENGTH))
    with pytest.raises(KeyError), tokensieve.selecting(sparse, "dense", top_k=3):
        raise KeyError("anything")
    for wrong, complaint in (
        (("best",), "'best' is unknown; use one of indexer, window"),
        (("oracle", 0), "at least 1"),
    ):
        with pytest.raises(UserError, match=complaint), tokensieve.selecting(sparse, *wrong):
            raise AssertionError("not reached")
    assert sparse.top_k == K and torch.equal(sparse(ids).logits, want)


def test_index_scores_of_a_dense_model_are_refused(trunk: DecoderForCausalLM) -> None:
    with tokensieve.selecting(trunk, lambda c: (c.scores(), window(c))[1], top_k=4):
        with pytest.raises(UserError, match="no indexer to select with; make it sparse first"):
            trunk(tokens(1, 8))
