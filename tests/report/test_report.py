"""The report: one file, nothing fetched, both faces of the page, and words that match the figures."""

import html
import io
import math
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from tokensieve.config import UserError
from tokensieve.evals import ARMS
from tokensieve.report import environment, plots, show, write_report, write_run

CONTEXTS = ("2048", "16384")
VOID = {"meta", "br", "hr", "img", "link", "input"}


def history():
    rows = [{"stage": "warm-up", "step": 0, "recall": 0.1}]
    rows += [{"stage": "warm-up", "step": i, "kl": 3.7 / i, "recall": 1 - 0.9 / i} for i in range(1, 6)]
    return [*rows, {"stage": "adaptation", "step": 1, "kl": 0.2}, {"stage": "adaptation", "step": 2, "kl": 0.1}]


def metrics():
    scores = zip(ARMS, (4.0, 3.95, 4.01, 140.0, 5.0, 4.0), (1.0, 1.0, 0.984, 0.0, 0.05, 1.0), strict=True)

    def estimate(value, half, n):
        return {"value": value, "low": value - half, "high": value + half, "n": n}

    compared = {
        "ppl": {"dense": estimate(1.0025, 0.004, 24), "dense_adapted": estimate(1.015, 0.004, 24)}
        | {"oracle": estimate(1.0025, 0.001, 24)},
        "needle": {"dense": estimate(-0.016, 0.04, 64), "window": estimate(0.95, 0.06, 64)}
        | {"untrained_indexer": estimate(1.0, 0.05, 64)},
    }
    return {
        **{arm: {"ppl": ppl, "needle": needle, "needle_interval": [0.9, 1.0]} for arm, ppl, needle in scores},
        "compared": compared,
        "bytes_read_fraction": 0.46,
        "kl": {"first": 3.7, "last": 0.74},
        "recall": {"first": 0.1, "last": 0.961},
        "decode_ms": {"dense": dict(zip(CONTEXTS, (5.0, 20.0))), "sparse": dict(zip(CONTEXTS, (6.0, 8.0)))},
        "chunk_ms": {"dense": dict(zip(CONTEXTS, (90.0, 800.0))), "sparse": dict(zip(CONTEXTS, (80.0, 400.0)))},
        "kv_read_fraction": 0.0625,
        "top_k": 128,
        "context": 2048,
        "seconds": 241.0,
    }


def details(**changes):
    edges = [0, 128, 512, 2047]
    losses = {arm: [math.log(figures["ppl"])] * 3 for arm, figures in metrics().items() if arm in ARMS}
    heat = {"lengths": [1024, 2048], "accuracy": [[1.0] * 9 + [None], [0.2, *[0.75] * 9]], "counts": [[2] * 10] * 2}
    reads = {"dense": (2 << 20, 16 << 20), "sparse": (1 << 20, 7 << 20), "index_keys": (1 << 19, 6 << 20)}
    figures = {
        "base": "base",
        "parameters": 10.7e6,
        "questions": 64,
        "texts": {"all": 24, "shared": 4},
        "loss_by_position": {"edges": edges, "loss": losses},
        "heat": {"dense": heat, "sparse": heat},
        "cache_reads": {name: dict(zip(CONTEXTS, counts)) for name, counts in reads.items()},
        "recall": {"by_layer": [0.91, 0.99], "held": [0.5, 0.9], "best": [0.55, 0.91]},
        "run": environment("tokensieve demo"),
    }
    return figures | changes


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    return write_report(metrics(), history(), tmp_path_factory.mktemp("run") / "report.html", details()).read_text()


class Nesting(HTMLParser):
    """Every element is closed in its turn, and ids are unique."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.seen = [], [], set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]


def test_page_is_whole_and_self_contained(page):
    found = Nesting(page)
    assert found.seen.isdisjoint({"script", "link", "iframe", "img", "object"})
    assert not re.search(r"https?:|@import|src=|<!DOCTYPE svg|<metadata", page)
    assert page.count("<svg") == 9  # seven figures and two heat maps
    links = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', page)
    assert {a or b for a, b in links} <= set(found.ids)
    # An id may come twice only where the things are the same: a marker that two figures draw alike.
    for name in {i for i in found.ids if found.ids.count(i) > 1}:
        same = re.findall(rf'<(?:path|clipPath)[^>]*id="{name}".*?(?:/>|</clipPath>)', page, re.S)
        assert len(set(same)) == 1, name


def test_every_color_has_a_light_and_a_dark_face(page):
    assert not set(re.findall(r"#0[0-9]0[0-9]0[0-9]", page)) & set(plots.VARIABLES)
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    style = page[: page.index("</style>")]
    light, dark = style.split("prefers-color-scheme: dark")
    assert used <= set(re.findall(r"--([\w-]+):", light))
    assert set(re.findall(r"--([\w-]+):", light)) == set(re.findall(r"--([\w-]+):", dark))
    figures = page[page.index("<svg") :]
    assert not re.search(r"(?:fill|stroke): #(?!ffffff)", figures)


def test_page_says_what_the_figures_say(page):
    text = " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.S)).split())
    for arm, what in ARMS.items():
        assert plots.label(arm) in text and what in text
    for sentence in (
        "4 hold, 1 within noise of 5 criteria",
        "-1.6 points -5.6 to +2.4 64 ≥ -3 points",
        "on the same texts: dense 1.002 (0.998 to 1.006, 24 texts); dense adapted 1.015",
        "46% of the bytes",
        "of 2",
        "Perplexity changed by +0.2% against dense attention's",
        "perplexity, sparse over dense: 0.998 to 1.006, 24 texts",
        "98% of the hidden facts",
        "from 3.70 to 0.74 nats",
        "weakest layer is number 0 with 0.910",
        "Sparse takes no longer than dense from 16,384 tokens on. At 16,384 tokens it takes 20 ms dense and 8 ms",
        "on this machine sparse is 2.5 times faster than dense",
        "Sparse takes no longer than dense from 2,048 tokens on. At 16,384 tokens they take 800 ms dense and 400 ms",
        "untrained indexer: 4.9 nats, above the scale",
        "in the 4 texts that every arm read (the ratios above come from all 24 where both read them)",
        "tokensieve demo",
    ):
        assert sentence in text, sentence


def test_a_criterion_that_fails_is_shown_as_failing(tmp_path):
    figures = metrics() | {"recall": {"first": 0.1, "last": 0.5}}
    text = write_report(figures, history(), tmp_path / "report.html", details()).read_text()
    assert text.count(">fails</span>") == 1 and text.count(">holds</span>") == 3 and "1 fail" in text


def test_slower_is_called_slower(tmp_path):
    figures = metrics()
    figures["decode_ms"]["sparse"]["16384"] = 30.0
    text = write_report(figures, history(), tmp_path / "r.html", details()).read_text()
    assert "sparse is slower than dense" in text
    assert "Sparse takes longer than dense up to 16,384 tokens, the most that was measured" in text


def test_names_are_escaped(tmp_path):
    text = write_report(metrics(), history(), tmp_path / "r.html", details(base="<img src=x>&co")).read_text()
    assert "<img" not in text and "&lt;img src=x&gt;&amp;co" in text


def test_run_is_written_whole_and_says_what_is_wrong(tmp_path):
    page = write_run(tmp_path / "new", metrics(), history(), details())
    assert sorted(p.name for p in page.parent.iterdir()) == ["details.json", "metrics.json", "report.html"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*cannot be written.*check the path"):
        write_run(tmp_path / "file", metrics(), history(), details())


def test_table_in_the_terminal(tmp_path):
    console = Console(width=120, record=True, file=io.StringIO())
    show(console, metrics())
    text = console.export_text()
    assert re.search(r"sparse\s+4\.010\s+98\.4%", text) and re.search(r"dense\s+5\.0\s+20\.0", text)
    assert "Sparse takes no longer than dense from 16,384 tokens on" in text and re.search(
        r"sparse\s+80\.0\s+400\.0", text
    )
    assert text.count("holds") == 4 and text.count("within noise") == 1
    assert "-0.016 (-0.056 to 0.024, 64 prompts), needed >= -0.03" in text
    assert "24 texts), needed <= 1.01" in " ".join(text.split())
    one = {"value": 0.0, "low": None, "high": None, "n": 16, "clusters": 1}
    few, console = metrics(), Console(width=120, record=True, file=io.StringIO())
    few["compared"]["needle"]["dense"] = one
    few["compared"]["ppl"]["dense"] |= {"clusters": 9}
    few["sparse"]["needle_interval"] = [None, None]
    show(console, few)
    page = write_report(few, history(), tmp_path / "few.html", details()).read_text()
    assert '<td class="n">16</td><td class="n">1</td>' in page and "(0.998 to 1.006, 24 texts of 9 documents)" in page
    of_few = console.export_text()
    assert "within noise  sparse needles - dense needles: 0.000 (16 prompts of 1 context), needed" in of_few
    assert "24 texts of 9 documents)" in of_few and re.search(r"sparse\s+4\.010\s+98\.4%\s+attends", of_few)
    assert "sparse perplexity / dense: 1.002 (0.998 to 1.006, 24 texts)" in text


def test_an_arms_name_is_no_markup():
    console = Console(width=120, record=True, file=io.StringIO())
    arms = {"[/mine]": metrics()["window"], "[red]": metrics()["oracle"]}
    show(console, metrics() | arms | {"selections": {"[/mine]": "window", "[red]": "oracle"}})
    text = console.export_text()
    assert re.search(r"\[/mine\]\s+5\.000", text) and re.search(r"\[red\]\s+4\.000", text)


def test_environment():
    found = environment("make demo")
    assert found["command"] == "make demo" and "torch" in found["versions"] and "cores" in found["machine"]
