"""indexer_kl_dense and sparse_attention_kl: equations (3) and (4), and which gradient reaches what."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from tests.support import oracle
from tests.support.cases import CASES, Case, Document, Inputs, causal, make
from tokensieve import ops

# As in test_attention.py. A divergence subtracts a score from the scores' logsumexp, so its error is that of a
# score; bf16 inputs are exact in float32, where the whole loss is computed: only the gradients are rounded to 8 bits
# at the end.
TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1.5e-2}
KL_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 1e-5}

RAGGED = Case(
    "ragged",
    causal(3, 1, 5),
    keys=9,
    k=3,
    heads=4,
    groups=2,
    entry=7,
    d_k=5,
    v_start=3,
    d_v=4,
    index_heads=3,
    index_dim=5,
)


def size(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.detach().clone().requires_grad_() for tensor in tensors)


def index_tensors(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x.q_SID, x.k_TD, x.w_SI


def attention_lse(x: Inputs) -> Tensor:
    return oracle.dense_attention(x.q_SHD, x.k_TGD, x.v_TGV, x.starts_S, x.ends_S, x.scale)[1]


def kl_dense(x: Inputs, q_SID: Tensor, k_TD: Tensor, w_SI: Tensor) -> Tensor:
    lse_SH = attention_lse(x)
    lse_SH = lse_SH if x.q_SHD.dtype == torch.float64 else lse_SH.float()
    return ops.indexer_kl_dense(x.q_SHD, x.k_TGD, lse_SH, x.scale, q_SID, k_TD, w_SI, x.starts_S, x.ends_S)


def kl_sparse(x: Inputs, q_SID: Tensor, k_TD: Tensor, w_SI: Tensor) -> Tensor:
    return ops.sparse_attention_kl(x.q_SHD, x.kv_TGE, x.indices_SK, x.scale, **x.parts, q_I=q_SID, k_I=k_TD, w=w_SI)[2]


def oracle_kl_dense(x: Inputs, q_SID: Tensor, k_TD: Tensor, w_SI: Tensor) -> Tensor:
    return oracle.indexer_kl_dense(x.q_SHD, x.k_TGD, x.scale, q_SID, k_TD, w_SI, x.starts_S, x.ends_S)


def oracle_kl_sparse(x: Inputs, q_SID: Tensor, k_TD: Tensor, w_SI: Tensor) -> Tensor:
    return oracle.sparse_attention_kl(
        x.q_SHD, x.kv_TGE, x.indices_SK, x.scale, **x.parts, q_SID=q_SID, k_TD=k_TD, w_SI=w_SI
    )[2]


KINDS = {"dense": (kl_dense, oracle_kl_dense), "sparse": (kl_sparse, oracle_kl_sparse)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_oracle(case: Case, kind: str) -> None:
    """kl_S, and its gradients under a different weight per query."""
    op, reference = KINDS[kind]
    weights_S = torch.exp2(torch.randint(-3, 1, (case.queries,), generator=torch.Generator().manual_seed(1)).double())
    for rounded, dtypes in (("float32", ("float32", "float64")), ("bfloat16", ("bfloat16",))):
        x = make(dataclasses.replace(case, dtype=rounded))
        q64, k64, w64 = leaves(*(tensor.double() for tensor in index_tensors(x)))
        expected = reference(x, q64, k64, w64)
        expected_gradients = torch.autograd.grad(expected, (q64, k64, w64), weights_S)
        floors = {"d q_I": size(w64) * size(k64), "d k_I": size(w64) * size(q64), "d w": size(q64) * size(k64)}
        # Both the attention's and the indexer's probabilities are exponentials of differences from an lse.
        scores_ST = oracle.index_scores(*index_tensors(x)) * x.visible_ST()
        for dtype in dtypes:
            y = x.to(getattr(torch, dtype))
            lost = max(oracle.lse_rounding(z, y.q_SHD.dtype) for z in (attention_lse(y), scores_ST))
            q, k, w = leaves(*index_tensors(y))
            actual = op(y, q, k, w)
            assert actual.dtype == (torch.float64 if dtype == "float64" else torch.float32)
            gradients = torch.autograd.grad(actual, (q, k, w), weights_S.to(actual.dtype))
            if lost > 0.25:
                assert all(z.isfinite().all() for z in (actual, *gradients)), dtype
                continue
            oracle.assert_close(actual, expected, max(KL_TOLERANCE[dtype], 2 * lost), 1.0, f"kl in {dtype}")
            for (what, floor), a, e in zip(floors.items(), gradients, expected_gradients, strict=True):
                oracle.assert_close(a, e, max(TOLERANCE[dtype], 2 * lost), floor, f"{what} in {dtype}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sparse_attention_kl_is_sparse_attention(case: Case) -> None:
    """out, lse and their gradients are those of sparse_attention; the divergence adds nothing to q and kv, nor they
    to it."""
    x = make(dataclasses.replace(case, dtype="float64"))
    q, kv = leaves(x.q_SHD, x.kv_TGE)
    q_I, k_I, w = leaves(*index_tensors(x))
    out, lse, kl_S = ops.sparse_attention_kl(q, kv, x.indices_SK, x.scale, **x.parts, q_I=q_I, k_I=k_I, w=w)
    plain_q, plain_kv = leaves(x.q_SHD, x.kv_TGE)
    plain = ops.sparse_attention(plain_q, plain_kv, x.indices_SK, x.scale, **x.parts)
    cotangents = [torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).double() for y in plain]
    expected = torch.autograd.grad(plain, (plain_q, plain_kv), cotangents)
    ones_S = torch.ones_like(kl_S)

    def gradients(outputs: tuple, inputs: tuple, grad_outputs: list) -> list[Tensor]:
        computed = torch.autograd.grad(outputs, inputs, grad_outputs, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(i) if g is None else g for i, g in zip(inputs, computed, strict=True)]

    for a, e in zip((out, lse), plain, strict=True):
        oracle.assert_close(a, e, 1e-12)
    for actual in (
        gradients((out, lse), (q, kv), cotangents),
        gradients((out, lse, kl_S), (q, kv), [*cotangents, ones_S]),
    ):
        for a, e in zip(actual, expected, strict=True):
            oracle.assert_close(a, e, 1e-11)
    for stray in gradients((kl_S,), (q, kv), [ones_S]) + gradients((out, lse), (q_I, k_I, w), cotangents):
        assert torch.equal(stray, torch.zeros_like(stray)), "a gradient crossed from one loss to the other's parameters"
    alone = gradients((kl_S,), (q_I, k_I, w), [ones_S])
    for a, e in zip(gradients((out, lse, kl_S), (q_I, k_I, w), [*cotangents, ones_S]), alone, strict=True):
        oracle.assert_close(a, e, 1e-12)


def test_the_dense_divergence_sends_nothing_to_the_attention() -> None:
    x = make(dataclasses.replace(RAGGED, dtype="float64"))
    q, k, lse = leaves(x.q_SHD, x.k_TGD, attention_lse(x))
    q_I, k_I, w = leaves(*index_tensors(x))
    kl_S = ops.indexer_kl_dense(q, k, lse, x.scale, q_I, k_I, w, x.starts_S, x.ends_S)
    for stray in torch.autograd.grad(kl_S.sum(), (q, k, lse), allow_unused=True, retain_graph=True):
        assert stray is None or torch.equal(stray, torch.zeros_like(stray))
    no_index = ops.indexer_kl_dense(q, k, lse, x.scale, *index_tensors(x), x.starts_S, x.ends_S)
    assert torch.equal(no_index, kl_S)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "case",
    [RAGGED, dataclasses.replace(RAGGED, name="chunk", documents=(Document(1, 8, 4), Document(0, 0, 1)))],
    ids=str,
)
def test_gradcheck(case: Case, kind: str) -> None:
    x = make(dataclasses.replace(case, dtype="float64"))
    dots = torch.einsum("sid,td->sit", x.q_SID, x.k_TD)
    assert dots.abs().min() > 1e-4, "too near the ReLU's kink for differences: name the case otherwise"
    op, _ = KINDS[kind]
    assert gradcheck(lambda *tensors: op(x, *tensors), leaves(*index_tensors(x)))


def test_gradcheck_of_the_attention_in_sparse_attention_kl() -> None:
    x = make(dataclasses.replace(RAGGED, dtype="float64"))
    q_I, k_I, w = index_tensors(x)
    assert gradcheck(
        lambda q, kv: ops.sparse_attention_kl(q, kv, x.indices_SK, x.scale, **x.parts, q_I=q_I, k_I=k_I, w=w)[:2],
        leaves(x.q_SHD, x.kv_TGE),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_query_with_no_key_or_one_key(kind: str) -> None:
    """No key: 0. One key: both distributions are certain, so 0 too. No gradient either way, and none is NaN."""
    op, _ = KINDS[kind]
    for case in (
        Case("nothing", (Document(0, 0, 3), Document(4, 0, 2)), keys=6, k=4),
        Case("one each", causal(1, 1, 1, 1), keys=4, k=4),
        Case("no key tokens", (Document(0, 0, 3),), keys=0, k=4),
    ):
        q, k, w = leaves(*index_tensors(x := make(case)))
        kl_S = op(x, q, k, w)
        assert kl_S.shape == (case.queries,)
        oracle.assert_close(kl_S, torch.zeros_like(kl_S), 1e-6, what=case.name)
        if case.name != "one each":
            assert torch.equal(kl_S, torch.zeros_like(kl_S))
        for gradient in torch.autograd.grad(kl_S.sum(), (q, k, w)):
            oracle.assert_close(gradient, torch.zeros_like(gradient), 1e-5, what=case.name)


@pytest.mark.parametrize("kind", KINDS)
def test_an_indexer_that_agrees_with_the_attention_has_no_divergence(kind: str) -> None:
    """One attention head and one index head with the same logits (all positive, so ReLU is silent): p = softmax(I)."""
    op, _ = KINDS[kind]
    case = Case(
        "agreement",
        causal(9, 14),
        keys=23,
        k=6,
        heads=1,
        entry=8,
        d_k=8,
        d_v=8,
        index_heads=1,
        index_dim=8,
        dtype="float64",
    )
    x = make(case)
    q_SHD, kv_TGE = x.q_SHD.abs(), x.kv_TGE.abs()
    q, k, w = leaves(q_SHD, kv_TGE[:, 0], torch.full((23, 1), x.scale))
    x = dataclasses.replace(x, q_SHD=q_SHD, kv_TGE=kv_TGE)
    kl_S = op(x, q, k, w.double())
    oracle.assert_close(kl_S, torch.zeros_like(kl_S), 1e-12)
    for gradient in torch.autograd.grad(kl_S.sum(), (q, k, w)):
        oracle.assert_close(gradient, torch.zeros_like(gradient), 1e-12)


def test_the_dense_target_is_over_all_keys() -> None:
    """Mass that the indexer does not rank among its first is still in the target: the two divergences differ when k <
    keys and agree when everything is selected."""
    x = make(dataclasses.replace(CASES[0], dtype="float64"))
    few = kl_sparse(x, *index_tensors(x))
    full = kl_dense(x, *index_tensors(x))
    assert (few[x.k :] - full[x.k :]).abs().min() > 1e-3
    oracle.assert_close(few[: x.k], full[: x.k], 1e-12)
    everything = ops.select_topk(torch.zeros(48, 48), 48, x.starts_S, x.ends_S)
    oracle.assert_close(kl_sparse(dataclasses.replace(x, indices_SK=everything), *index_tensors(x)), full, 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_is_the_same_alone_and_in_a_pack(kind: str) -> None:
    """Per query and per gradient: packing only moves positions."""
    op, _ = KINDS[kind]
    x = make(dataclasses.replace(CASES[1], dtype="float64"))
    q, k, w = leaves(*index_tensors(x))
    packed = op(x, q, k, w)
    packed_gradients = torch.autograd.grad(packed.sum(), (q, k, w))
    for start, end in ((0, 1), (1, 38), (38, 40), (40, 104), (104, 105), (106, 131)):
        rows = slice(start, end)
        alone = dataclasses.replace(
            x,
            q_SHD=x.q_SHD[rows],
            kv_TGE=x.kv_TGE[rows],
            starts_S=x.starts_S[rows] - start,
            ends_S=x.ends_S[rows] - start,
            indices_SK=torch.where(x.indices_SK[rows] < 0, -1, x.indices_SK[rows] - start).int(),
        )
        q1, k1, w1 = leaves(*(tensor[rows] for tensor in index_tensors(x)))
        kl_S = op(alone, q1, k1, w1)
        oracle.assert_close(kl_S, packed[rows], 1e-12)
        for a, e in zip(torch.autograd.grad(kl_S.sum(), (q1, k1, w1)), packed_gradients, strict=True):
            oracle.assert_close(a, e[rows], 1e-12)


def test_past_every_block_size() -> None:
    """Ranges anywhere in a long pack, against the whole S x T matrix in float64."""
    S, T, H, D = 500, 2100, 2, 8
    g = torch.Generator().manual_seed(0)
    q, k = (torch.randn(n, H, D, generator=g).double() for n in (S, T))
    q_I, k_I, w = leaves(*(torch.randn(shape, generator=g).double() for shape in ((S, 3, D), (T, D), (S, 3))))
    bounds = torch.randint(0, T, (S // 20, 2), generator=g).sort(1).values.repeat_interleave(20, 0).int()
    starts = bounds[:, 0].contiguous()
    ends = torch.minimum(bounds[:, 1] + torch.arange(S) % 20, torch.tensor(T)).int()
    positions = torch.arange(T)
    hidden_ST = (positions < starts[:, None]) | (positions >= ends[:, None])
    rows = ~hidden_ST.all(1)
    logits = (0.3 * torch.einsum("shd,thd->sht", q, k)).masked_fill(hidden_ST[:, None], -torch.inf)
    actual = ops.indexer_kl_dense(q, k, torch.logsumexp(logits, -1), 0.3, q_I, k_I, w, starts, ends)
    scores = torch.einsum("si,sit->st", w, torch.relu(torch.einsum("sid,td->sit", q_I, k_I)))
    p = torch.softmax(logits[rows], -1).mean(1)
    log_q = torch.log_softmax(scores.masked_fill(hidden_ST, -torch.inf)[rows], -1).masked_fill(hidden_ST[rows], 0.0)
    expected = (torch.xlogy(p, p) - p * log_q).sum(-1)
    oracle.assert_close(actual[rows], expected, 1e-10, what="kl")
    weights = torch.randn(expected.shape, generator=g).double()
    for what, a, e in zip(
        ("q_I", "k_I", "w"),
        torch.autograd.grad(actual[rows], (q_I, k_I, w), weights),
        torch.autograd.grad(expected, (q_I, k_I, w), weights),
        strict=True,
    ):
        oracle.assert_close(a, e, 1e-10, what=f"d {what}")


def test_bad_input_is_refused() -> None:
    x = make(RAGGED)
    q_I, k_I, w = index_tensors(x)
    lse_SH = attention_lse(x).float()
    beyond = x.indices_SK.clone()
    beyond[2, 0] = 9
    dense = {
        "q_SHD": x.q_SHD,
        "k_TGD": x.k_TGD,
        "lse_SH": lse_SH,
        "scale": x.scale,
        "q_I": q_I,
        "k_I": k_I,
        "w": w,
        "starts_S": x.starts_S,
        "ends_S": x.ends_S,
    }
    sparse = {
        "q_SHD": x.q_SHD,
        "kv_TGE": x.kv_TGE,
        "indices_SK": x.indices_SK,
        "scale": x.scale,
        **x.parts,
        "q_I": q_I,
        "k_I": k_I,
        "w": w,
    }
    for op, arguments, wrong, named in (
        (ops.indexer_kl_dense, dense, {"lse_SH": lse_SH[:, :3]}, "lse"),
        (ops.indexer_kl_dense, dense, {"q_SHD": x.q_SHD[:, :3]}, "3"),
        (ops.indexer_kl_dense, dense, {"k_I": k_I[:7]}, "k_I|7"),
        (ops.indexer_kl_dense, dense, {"q_I": q_I[:7]}, "q_I|7"),
        (ops.indexer_kl_dense, dense, {"w": w[:, :2]}, "w"),
        (ops.indexer_kl_dense, dense, {"k_I": k_I[:, :3]}, "3"),
        (ops.indexer_kl_dense, dense, {"ends_S": x.ends_S + 1}, "10"),
        (ops.indexer_kl_dense, dense, {"starts_S": x.starts_S[1:]}, "starts"),
        (ops.sparse_attention_kl, sparse, {"indices_SK": beyond}, "9"),
        (ops.sparse_attention_kl, sparse, {"indices_SK": x.indices_SK[1:]}, "indices"),
        (ops.sparse_attention_kl, sparse, {"k_I": k_I[:7]}, "k_I|7"),
        (ops.sparse_attention_kl, sparse, {"q_I": q_I[:7]}, "q_I|7"),
        (ops.sparse_attention_kl, sparse, {"w": w[:, :2]}, "w"),
        (ops.sparse_attention_kl, sparse, {"d_k": 8}, "8"),
    ):
        op(**arguments)
        with pytest.raises(ValueError, match=named):
            op(**{**arguments, **wrong})


def test_the_sum_is_the_weighted_kl_and_gives_its_gradient_once() -> None:
    x = make(RAGGED, "cpu").to(torch.float32)
    weight_S = torch.linspace(-1, 2, len(x.starts_S))
    given, apart = leaves(*index_tensors(x)), leaves(*index_tensors(x))
    total = ops.indexer_kl_dense_sum(
        x.q_SHD, x.k_TGD, attention_lse(x).float(), x.scale, *given, x.starts_S, x.ends_S, weight_S
    )
    expected = (weight_S * kl_dense(x, *apart)).sum()
    assert abs(total - expected) <= KL_TOLERANCE["float32"] * abs(expected)
    # 3: what a loss is multiplied by on its way, as by a gradient scaler
    actual = torch.autograd.grad(3 * total, given, retain_graph=True)
    for a, e in zip(actual, torch.autograd.grad(3 * expected, apart), strict=True):
        assert size(a - e) <= TOLERANCE["float32"] * size(e)
    with pytest.raises(RuntimeError, match="gradient can be taken once"):
        torch.autograd.grad(total, given)
