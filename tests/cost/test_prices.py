"""Price lists on traffic: sums by hand, and what is refused."""

import json
from pathlib import Path

import pytest

from tokensieve.config import UserError, load_config
from tokensieve.cost import paper, prices
from tokensieve.cost.prices import (
    Curve,
    PriceList,
    PricesConfig,
    Request,
    balance,
    compare,
    falls_to,
    mean_context,
    read_traffic,
)

LIST = PriceList("now", "sparse", input_cached=1.0, input=10.0, output=100.0)
TRAFFIC = [Request(prompt=3000, cached=1000, output=500), Request(prompt=100, cached=0, output=0)]


def usage(folder: Path, *rows: object) -> Path:
    path = folder / "usage.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def test_traffic_of_both_spellings(tmp_path: Path) -> None:
    details = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 20}}
    deepseek = {"usage": {"prompt_tokens": 30, "completion_tokens": 4, "prompt_cache_hit_tokens": 10}}
    plain = {"prompt_tokens": 30, "completion_tokens": 4, "prompt_tokens_details": None}
    found = read_traffic(usage(tmp_path, details, "", deepseek, plain))
    assert found == [Request(30, 20, 4), Request(30, 10, 4), Request(30, 0, 4)]


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"prompt_tokens": 3}, "completion_tokens is null"),
        ({"completion_tokens": 3}, "prompt_tokens is null"),
        ({"prompt_tokens": "3", "completion_tokens": 1}, "prompt_tokens is"),
        ({"prompt_tokens": 3, "completion_tokens": -1}, "completion_tokens is -1"),
        ({"prompt_tokens": 3, "completion_tokens": 1, "prompt_cache_hit_tokens": 4}, "more than the 3"),
        ("{", "not JSON"),
        ([1], "not an object"),
        ({"usage": None}, "not an object"),
        ("[" * 100_000, "not JSON"),
        ({"prompt_tokens": 10**23, "completion_tokens": 1}, "prompt_tokens is 1000"),
        (
            {"prompt_tokens": 3, "completion_tokens": 1, "prompt_tokens_details": 3},
            "prompt_tokens_details is no object",
        ),
    ],
)
def test_traffic_that_is_refused(row: object, word: str, tmp_path: Path) -> None:
    good = {"prompt_tokens": 3, "completion_tokens": 1}
    with pytest.raises(UserError, match=f"line 2: .*{word}"):
        read_traffic(usage(tmp_path, good, row))
    with pytest.raises(UserError, match="its 1 requests have no tokens"):
        read_traffic(usage(tmp_path, {"prompt_tokens": 0, "completion_tokens": 0}))
    with pytest.raises(UserError, match="no requests"):
        read_traffic(usage(tmp_path, ""))
    with pytest.raises(UserError, match="cannot be read"):
        read_traffic(tmp_path / "nothing")


def test_price_lists_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "prices.toml"
    good = '[[lists]]\nname = "a"\nattention = "dense"\ninput_cached = 0\ninput = 1\noutput = 2.5\n'
    for text, word in (
        (good + "cache = 1\n", "unknown key cache"),
        (good.replace("input = 1\n", ""), "input"),
        (good.replace("2.5", "-1"), "at least 0"),
        (good.replace("2.5", '"free"'), "free"),
        (good.replace("2.5", '"2.5"'), "output"),
        (good.replace("2.5", "true"), 'output" - should be "float"'),
        (good.replace("2.5", "nan"), "output is nan"),
        (good.replace('"a"', '" "'), "empty name"),
        (good + good, "two price lists are called 'a'"),
        (good.replace("dense", "linear"), "attention"),
        ("lists = []", "no price list"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=word):
            load_config(PricesConfig, str(path))
    path.write_text(good)
    assert load_config(PricesConfig, str(path)).lists == (PriceList("a", "dense", 0.0, 1.0, 2.5),)


def test_bundled_prices_are_the_papers_cut() -> None:
    before, after = load_config(PricesConfig, "prices").lists
    assert (before.attention, after.attention) == ("dense", "sparse")
    assert after.input / before.input == pytest.approx(paper.PRICE_CUT["input"])
    assert after.output / before.output == pytest.approx(paper.PRICE_CUT["output"])


def test_curve_is_exact_for_a_straight_line() -> None:
    """Position p costs p dollars per million, so the tokens at a ... b - 1 cost (b^2 - a^2) / 2 of a million."""
    curve = Curve(lambda p: float(p), 4096)
    assert curve.between(0, 4096) == pytest.approx(4096**2 / 2 / 1e6)
    assert curve.between(1024, 3072) == pytest.approx((3072**2 - 1024**2) / 2 / 1e6)
    assert curve.between(7, 7) == 0


def test_balance_by_hand() -> None:
    flat, twice = Curve(lambda p: 4.0, 3500), Curve(lambda p: 200.0, 3500)
    found = balance(LIST, TRAFFIC, flat, twice)
    assert found["input"] == {
        "tokens": 3100,
        "income": pytest.approx((1000 * 1 + 2100 * 10) / 1e6),
        "cost": pytest.approx(2100 * 4 / 1e6),  # cached tokens are not computed
        "margin": pytest.approx(1 - 8400 / 22000),
    }
    assert found["output"]["margin"] == pytest.approx(-1.0)  # 100 dollars for what costs 200
    assert found["together"]["income"] == pytest.approx(0.022 + 0.05)
    assert found["together"]["cost"] == pytest.approx(0.0084 + 0.1)
    assert found["cached"] == pytest.approx(1000 / 3100)
    assert balance(PriceList("free", "dense", 0, 0, 0), TRAFFIC, flat, twice)["together"]["margin"] is None


def test_mean_context_is_that_of_output_tokens() -> None:
    assert mean_context(TRAFFIC) == round(3000 + 501 / 2)
    assert mean_context([Request(100, 0, 0)]) == 100


def test_compare_says_how_far_prices_and_costs_fall() -> None:
    def usd(curve: str, position: int) -> float:
        return {"prefill_dense": position + 1.0, "prefill_sparse": 5000.0}.get(curve, 10.0)

    before = PriceList("then", "dense", 1, 20, 100)
    cut = compare([LIST, before], TRAFFIC, usd)["cut"]
    assert (cut["from"], cut["to"]) == ("then", "now")
    assert cut["input"]["price"] == 0.5 and cut["input"]["position"] == 10240
    assert cut["output"] == {"price": 1.0, "cost": pytest.approx(1.0), "position": 0}
    assert compare([LIST], TRAFFIC, usd)["cut"] is None
    assert falls_to(0.1, lambda p: 1.0, lambda p: 1.0) is None
    assert compare([PriceList("free", "dense", 0, 0, 0), LIST], TRAFFIC, usd)["cut"] is None
    assert prices.LONGEST >= 131072
