"""Figure 3 of the DeepSeek-V3.2-Exp report, and the price cut, by the same model of time."""

import pytest

from tokensieve import cost
from tokensieve.cost import paper
from tokensieve.cost.prices import falls_to

CASES = [
    (name, p, usd) for name, curve in paper.FIGURE_3.items() for p, usd in zip(paper.POSITIONS, curve, strict=True)
]


@pytest.mark.parametrize(("curve", "position", "usd"), CASES)
def test_within_fifteen_percent_of_the_report(curve: str, position: int, usd: float) -> None:
    found = paper.paper_cost(curve, position).usd_per_million(paper.PRICE)
    assert abs(found / usd - 1) < 0.15
    # The bound that docs/cost.md states.
    assert abs(found / usd - 1) < 0.07


@pytest.mark.parametrize(("curve", "position", "usd"), CASES)
def test_nothing_fitted_is_within_fifteen_percent_too(curve: str, position: int, usd: float) -> None:
    """Shares measured on an H200 in place of the four parameters."""
    rates = cost.known_rates(paper.PREFILL, paper.published_shape())
    assert abs(paper.paper_cost(curve, position, rates).usd_per_million(paper.PRICE) / usd - 1) < 0.15


def test_parameters_are_shares_of_named_operations() -> None:
    assert len(paper.PARAMETERS) <= 4
    assert all(0 < p.value <= 1 and p.reason for p in paper.PARAMETERS.values())
    operations = [op for p in paper.PARAMETERS.values() for op in p.operations]
    assert len(operations) == len(set(operations))
    fitted = {name for name, rate in vars(paper.paper_rates()).items() if rate.label == "fitted"}
    assert fitted == set(operations)


def test_every_parameter_moves_a_curve() -> None:
    """A parameter that none of the sixteen points depends on would be one in name only."""
    from dataclasses import replace

    before = {case[:2]: paper.paper_cost(*case[:2]).seconds for case in CASES}
    for parameter in paper.PARAMETERS.values():
        rates = replace(paper.paper_rates(), **{op: cost.Rate(0.1, "given") for op in parameter.operations})
        assert any(paper.paper_cost(*key, rates).seconds > 1.05 * seconds for key, seconds in before.items())


def test_memory_gives_a_batch_of_hundreds() -> None:
    """At the published mean of 4989 tokens, with dense attention's bf16 cache and sparse attention's FP8 one."""
    for curve in ("decode_dense", "decode_sparse"):
        assert 100 < (paper.paper_cost(curve, 131071).batch or 0) < 300


def test_where_costs_fall_as_far_as_the_prices() -> None:
    def usd(curve: str):
        return lambda position: paper.paper_cost(curve, position).usd_per_million(paper.PRICE)

    assert falls_to(paper.PRICE_CUT["input"], usd("prefill_dense"), usd("prefill_sparse")) == 45056
    assert falls_to(paper.PRICE_CUT["output"], usd("decode_dense"), usd("decode_sparse")) == 36864
