"""Costs of a token: against counts by hand, the laws of growth, and what bounds it."""

from dataclasses import replace

import pytest

from tokensieve import cost
from tokensieve.config import UserError
from tokensieve.cost.paper import published_shape
from tokensieve.cost.serving import exchange_bytes, reduced_bytes, smallest
from tokensieve.cost.token_cost import SCORE_BYTES

H200 = cost.gpu_of("H200")
SPARSE = published_shape()
DENSE = cost.without_indexer(SPARSE)
SERVING = cost.Serving(H200, gpus=32)
LAYERS, PAIR_MHA, PAIR_MQA, SCORE = 61, 2 * 128 * 320, 2 * 128 * 1088, 2 * 64 * 129


def part(token: cost.TokenCost, name: str) -> cost.Part:
    return next(p for p in token.parts if p.name == name)


def names(token: cost.TokenCost) -> list[str]:
    return [p.name for p in token.parts]


def test_flops_of_prefill_are_those_of_the_forward_pass() -> None:
    """Up to k keys and for dense attention the same formulas give a forward pass over one more token."""
    for shape, position in ((DENSE, 5000), (SPARSE, 5000), (SPARSE, 60000)):
        token = cost.prefill_cost(shape, SERVING, cost.ROOFLINE, position)
        # forward_flops takes one token for a decode step, so that the form has to be named.
        mode = "mqa" if "gathered attention" in names(token) else "mha"
        assert token.flops == cost.forward_flops(shape, 1, position, mode=mode, logits=0)


def test_prefill_takes_the_faster_form() -> None:
    """MHA over all keys has fewer FLOPs than MQA over k of them up to 1088 / 320 k = 6963 keys."""
    assert names(cost.prefill_cost(SPARSE, SERVING, cost.ROOFLINE, 2047))[1:] == ["dense attention"]
    for position, name in ((2048, "masked attention"), (6961, "masked attention"), (6963, "gathered attention")):
        assert names(cost.prefill_cost(SPARSE, SERVING, cost.ROOFLINE, position))[1] == name
    slower = replace(cost.ROOFLINE, masked=cost.Rate(0.5, "given"))
    assert names(cost.prefill_cost(SPARSE, SERVING, slower, 3500))[1] == "gathered attention"


def test_parts_by_hand() -> None:
    c = 65536
    rates = replace(cost.ROOFLINE, index=cost.Rate(0.5, "given"), memory=cost.Rate(0.5, "given"))
    read = cost.prefill_cost(SPARSE, SERVING, rates, c - 1)
    index = part(read, "index scores")
    assert index.seconds == pytest.approx(LAYERS * c * SCORE / (0.5 * 1979e12)) and index.bound == "compute"
    assert part(read, "gathered attention").flops == LAYERS * 2048 * PAIR_MQA
    assert part(read, "selection").bytes == LAYERS * c * SCORE_BYTES
    written = cost.decode_cost(SPARSE, replace(SERVING, batch=4), rates, c - 1)
    index = part(written, "index scores")
    assert index.bytes == LAYERS * c * 132 and index.bound == "memory"
    assert index.seconds == pytest.approx(index.bytes / (0.5 * 4.8e12))
    assert part(written, "gathered attention").bytes == LAYERS * 2048 * 656
    dense = cost.decode_cost(DENSE, replace(SERVING, batch=4), rates, c - 1)
    assert part(dense, "dense attention").flops == LAYERS * c * PAIR_MQA
    assert part(dense, "dense attention").bytes == LAYERS * c * 656
    assert dense.seconds == pytest.approx(sum(p.seconds for p in dense.parts))
    assert dense.usd_per_million(3.6) == pytest.approx(dense.seconds * 1000)


def test_up_to_k_keys_decode_reads_no_index_key() -> None:
    assert "index scores" not in names(cost.decode_cost(SPARSE, SERVING, cost.ROOFLINE, 2047))
    assert "index scores" in names(cost.decode_cost(SPARSE, SERVING, cost.ROOFLINE, 2048))


def test_shared_indexers_and_two_levels_score_less() -> None:
    def scores(shape: cost.Shape, serving: cost.Serving) -> cost.Part:
        return part(cost.prefill_cost(shape, serving, cost.ROOFLINE, 131071), "index scores")

    full = scores(SPARSE, SERVING)
    assert scores(replace(SPARSE, index_layers=16), SERVING).flops == full.flops * 16 / 61
    two = scores(SPARSE, replace(SERVING, two_level=cost.TwoLevel(64, 128)))
    assert two.flops == full.flops * 9216 / 131072  # 1024 means and 64 blocks of 128 keys
    assert cost.scored_keys(8192, cost.TwoLevel(64, 128)) == 8192


def test_drafted_tokens_share_what_they_read() -> None:
    """Two tokens go through for 1.85 that are kept; the module adds a 62nd layer."""
    serving = replace(SERVING, batch=4, draft=1, acceptance=0.85)
    token = cost.decode_cost(SPARSE, serving, cost.ROOFLINE, 65535)
    assert part(token, "index scores").bytes == pytest.approx(62 * 65536 * 132 / 1.85)
    assert part(token, "index scores").flops == pytest.approx(62 * 65536 * SCORE * 2 / 1.85)
    assert part(token, "gathered attention").bytes == pytest.approx(62 * 2048 * 656 * 2 / 1.85)
    dense = cost.decode_cost(DENSE, serving, cost.ROOFLINE, 65535)
    assert part(dense, "dense attention").bytes == pytest.approx(62 * 65536 * 656 / 1.85)


def test_batch_is_what_memory_holds() -> None:
    room = 0.9 * 141e9 - cost.weight_bytes(SPARSE, SERVING)
    assert cost.batch_size(SPARSE, SERVING, 131072) == int(room // (131072 * 61 * (656 + 132)))
    assert cost.batch_size(SPARSE, replace(SERVING, mean_context=65536), 131072) == int(room // (65536 * 61 * 788))
    assert cost.batch_size(SPARSE, SERVING, 1) == 512
    with pytest.raises(UserError, match="1000 of 131,072 tokens"):
        cost.batch_size(SPARSE, replace(SERVING, batch=1000), 131072)


def test_weights_of_one_gpu() -> None:
    """All experts of the published model are 654 of its 671 GB; 32 GPUs hold a thirty-second of them each."""
    counts = cost.parameters(DENSE)
    experts, routers, block = 58 * 256 * 3 * 7168 * 2048, 58 * 256 * 7168, 1 + 4 / 128**2
    plain = 2 * 129280 * 7168 + 7168 + 61 * (1536 + 512 + 2 * 7168) + routers
    matrices = counts.total - experts - plain - 58 * 256
    expected = block * (matrices + experts / 32) + 2 * plain + 4 * 58 * 256
    assert cost.weight_bytes(DENSE, SERVING) == pytest.approx(expected)
    assert cost.weight_bytes(DENSE, replace(SERVING, gpus=1, weights="bf16")) == 2 * counts.total + 2 * 58 * 256


def test_a_small_batch_is_bound_by_reading_weights() -> None:
    few = cost.decode_cost(DENSE, replace(SERVING, batch=1), cost.ROOFLINE, 1000)
    many = cost.decode_cost(DENSE, replace(SERVING, gpus=256, batch=512), cost.ROOFLINE, 1000)
    assert few.parts[0].bound == "memory" and few.seconds > 10 * many.seconds
    # 256 GPUs with 512 tokens each use every expert; each GPU reads its own one expert a layer.
    fixed = cost.decode_weight_bytes(DENSE, 0, "fp8")
    assert many.parts[0].bytes * 512 == pytest.approx(fixed + 58 * 3 * 7168 * 2048 * (1 + 4 / 128**2), rel=1e-6)


def test_what_goes_between_gpus() -> None:
    inside, link = exchange_bytes(DENSE, replace(SERVING, gpus=8))
    assert link == H200.link and inside == pytest.approx(58 * 7168 * 3 * 8 * (1 - (7 / 8) ** 8) * 7 / 8)
    outside, network = exchange_bytes(DENSE, SERVING)
    assert network == H200.network and outside == pytest.approx(58 * 7168 * 3 * 4 * (1 - (3 / 4) ** 8) * 3 / 4)
    assert exchange_bytes(DENSE, replace(SERVING, gpus=1))[0] == 0
    # Hidden behind the rest of a long context's work, and the bound of a first token.
    first = cost.decode_cost(DENSE, replace(SERVING, batch=256, gpus=144), cost.ROOFLINE, 0)
    late = cost.decode_cost(DENSE, replace(SERVING, batch=4, gpus=144), cost.ROOFLINE, 65535)
    assert first.bound == "interconnect" and first.seconds == first.exchange.seconds
    assert late.seconds > late.exchange.seconds > 0
    assert reduced_bytes(DENSE, replace(SERVING, tensor=8)) == (61 + 3) * 2 * 7 * 7168 * 2


def test_tensor_parallelism_repeats_indexer_and_latent_cache() -> None:
    one, four = (
        cost.decode_cost(SPARSE, replace(SERVING, gpus=8, tensor=t, batch=2), cost.ROOFLINE, 65535) for t in (1, 4)
    )
    for name in ("index scores", "selection"):
        assert (
            part(four, name).flops == 4 * part(one, name).flops and part(four, name).bytes == 4 * part(one, name).bytes
        )
    assert part(four, "gathered attention").bytes == 4 * part(one, "gathered attention").bytes
    assert part(four, "gathered attention").flops == part(one, "gathered attention").flops
    assert "sums over GPUs" in names(four) and "sums over GPUs" not in names(one)


GROUPED = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}


def test_grouped_queries() -> None:
    shape = cost.with_indexer(cost.shape_of(GROUPED), 2048)
    serving = cost.Serving(H200, gpus=4, tensor=4, weights="bf16", cache="bf16", index="bf16", batch=8)
    token = cost.decode_cost(shape, serving, cost.ROOFLINE, 65535)
    assert part(token, "gathered attention").bytes == 32 * 2048 * 2 * 2 * 8 * 128  # groups are divided, not repeated
    assert part(token, "gathered attention").flops == 32 * 2048 * 2 * 32 * 256
    assert not token.exchange.seconds
    wider = replace(serving, gpus=8, tensor=8)
    assert cost.serving.cache_copies(shape, 8) == 1
    assert cost.decode_cost(shape, wider, cost.ROOFLINE, 65535).flops > token.flops  # the indexer is repeated


def test_labels() -> None:
    def label(gpu: str, shape: cost.Shape = SPARSE, **changes: object) -> str:
        serving = cost.Serving(cost.gpu_of(gpu), gpus=32, **changes)
        return cost.prefill_cost(shape, serving, cost.known_rates(serving, shape), 65535).label

    assert label("h200") == "measured"
    assert label("H800") == label("h100") == "measured on H200"
    assert label("b200") == label("mi350") == "roofline"
    assert label("h200", weights="bf16").endswith("% roofline")  # products were measured in FP8
    assert label("h200", replace(SPARSE, attention=SPARSE.attention._replace(heads=64))) != "measured"
    assert "roofline" in label("h200", two_level=cost.TwoLevel(64, 128))


def test_measured_shares_name_a_document_that_holds_them() -> None:
    from tests.test_readme import ROOT
    from tokensieve.cost import rates

    for table in (rates.LATENT_128, rates.GROUPED_32, rates.OTHERS):
        for rate in vars(table).values():
            if rate.label == "measured":
                path, _, what = rate.source.partition(": ")
                figure = what.split()[-2] if what.split()[-1] in {"TFLOP/s", "GB/s", "ms", "us"} else "5.1"
                if "at 64K" in what:
                    figure = next(word for word in what.split() if word in {"28.9", "27.9", "224.1"})
                assert figure in (ROOT / path).read_text(encoding="utf-8"), rate.source


def test_given_rates() -> None:
    rates = cost.given_rates(cost.ROOFLINE, ["memory=0.8"])
    assert rates.memory == cost.Rate(0.8, "given") and rates.index == cost.ROOFLINE.index
    for change, word in (
        ("speed=1", "speed"),
        ("memory", "not a number"),
        ("memory=0", "share"),
        ("memory=1.1", "share"),
    ):
        with pytest.raises(UserError, match=word):
            cost.given_rates(cost.ROOFLINE, [change])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"gpus": 0}, "gpus is 0"),
        ({"gpus": 6, "tensor": 4}, "no multiple"),
        ({"gpus": 12}, "whole machines"),
        ({"gpus": 32, "tensor": 16}, "at most 8"),
        ({"weights": "int4"}, "int4"),
        ({"draft": -1}, "drafted"),
        ({"acceptance": 1.5}, "accepted"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_layouts_that_do_not_go_together(changes: dict, word: str) -> None:
    with pytest.raises(UserError, match=word):
        cost.Serving(H200, **changes)
    with pytest.raises(UserError, match="A100"):
        cost.gpu_of("A100")
    with pytest.raises(UserError, match="below 0"):
        cost.prefill_cost(DENSE, SERVING, cost.ROOFLINE, -1)


def test_smallest_deployment() -> None:
    assert smallest([DENSE, SPARSE], cost.Serving(H200), 131072).gpus == 8
    assert smallest([DENSE, SPARSE], cost.Serving(cost.gpu_of("H800")), 131072).gpus == 16
    short = cost.Serving(cost.gpu_of("H800"), mean_context=1000)  # one of its sequences still has the whole length
    found = smallest([DENSE, SPARSE], short, 1_000_000)
    assert (found.gpus, found.tensor, found.mean_context) == (32, 8, 1000)
    big = cost.shape_of(GROUPED | {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672})
    found = smallest([big], cost.Serving(cost.gpu_of("H100"), weights="bf16", cache="bf16"), 8192)
    assert (found.gpus, found.tensor) == (2, 2)
    huge = replace(big, layers=2000)
    with pytest.raises(UserError, match="no number of H100"):
        smallest([huge], cost.Serving(cost.gpu_of("H100"), weights="bf16"), 8192)
