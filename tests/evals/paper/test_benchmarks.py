"""The table of benchmarks: the paper's rows and figures, and harnesses that are pinned."""

from pathlib import Path

import pytest

from tokensieve.config import UserError, load_config
from tokensieve.evals.paper.benchmarks import BENCHMARKS, NEEDS
from tokensieve.evals.paper.harnesses import HARNESSES
from tokensieve.evals.paper.suite import RUN
from tokensieve.paper_config import PaperConfig

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "paper.md"

# Table 1: V3.1-Terminus and V3.2-Exp.
TABLE = {
    "General": [(85.0, 85.0), (80.7, 79.9), (21.7, 19.8)],
    "Search Agent": [(38.5, 40.1), (45.0, 47.9), (96.8, 97.1)],
    "Code": [(74.9, 74.1), (2046, 2121), (76.1, 74.5)],
    "Code Agent": [(68.4, 67.8), (57.8, 57.9), (36.7, 37.7)],
    "Math": [(88.4, 89.3), (86.1, 83.6)],
}


def test_it_is_the_papers_table() -> None:
    found: dict[str, list[tuple[float, float]]] = {}
    for benchmark in BENCHMARKS:
        found.setdefault(benchmark.group, []).append((benchmark.before, benchmark.after))
    assert found == TABLE and len({benchmark.key for benchmark in BENCHMARKS}) == 14


def test_every_row_can_be_run_and_says_what_it_needs() -> None:
    for benchmark in BENCHMARKS:
        assert benchmark.harness in RUN and (benchmark.harness == "own" or benchmark.harness in HARNESSES)
        assert benchmark.needs and set(benchmark.needs) <= NEEDS.keys(), benchmark.key


@pytest.mark.parametrize("name", HARNESSES)
def test_a_harness_is_pinned_and_gets_no_cuda(name: str) -> None:
    harness = HARNESSES[name]
    pins = dict(line.split("==") for line in harness.pins.splitlines() if not line.startswith("#"))
    assert pins["torch"].endswith("+cpu") and not any(pin.startswith("nvidia") for pin in pins)
    for requirement in harness.requirements:
        package, version = requirement.split("==")
        assert pins[package.partition("[")[0]] == version


def test_the_document_has_the_same_table() -> None:
    rows = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    for benchmark in BENCHMARKS:
        (row,) = [row for row in rows if row.startswith(f"| `{benchmark.key}` ")]
        _, _, how, _, repeats, needs, _ = row.split("|")
        assert f"`{benchmark.task}`" in how and int(repeats) == benchmark.repeats
        assert {*needs.strip().split(", ")} == {*benchmark.needs} - {"reachable"}


def test_settings_that_make_no_sense() -> None:
    for wrong in ("limit=-1", "at_once=0", "steps=0", "top_p=0", "temperature=-1", "seconds=0", "repeats=-2"):
        with pytest.raises(UserError):
            load_config(PaperConfig, "paper", (wrong,))
    with pytest.raises(UserError, match="judge_url and judge_model"):
        load_config(PaperConfig, "paper", ("judge_model=m",))
    with pytest.raises(UserError, match="unknown key"):
        load_config(PaperConfig, "paper", ("problems=3",))
