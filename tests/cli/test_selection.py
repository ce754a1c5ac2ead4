"""`--selection module:function` and `eval --arm NAME=module:function`: a user's selector on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import commands
from tokensieve.model.selection import indexer, join, window

NAME = "tests.cli.test_selection:with_recent"


TEXT = "def parse_arguments(argv): " * 12

lengths_seen: list[int] = []  # of each selection by `with_recent`


def with_recent(c):
    indices = join(indexer(c), window(c, 16))
    lengths_seen.append(indices.shape[1])
    return indices


def without_queries(c):
    return indexer(c)[1:]


def with_a_key_twice(c):
    return torch.cat((indexer(c)[:, :1], indexer(c)), 1)


def past_the_end(c):
    return indexer(c) + 100_000


def of_the_future(c):
    return c.ends_N[:, None]


def of_no_keys(c):
    return c.topk(0)


def by_row(c):
    """A row of the call taken for a position: right in a whole pass, and in no other."""
    return torch.minimum(torch.arange(len(c), dtype=torch.int32), c.ends_N - 1)[:, None]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("home"))


def test_generate_in_both_ways(home: Path, run: Any) -> None:
    """With transformers' generation and, from a file of prompts, with the engine: the function is what selects."""
    (home / "prompts.txt").write_text(TEXT)
    answers = {}
    for selection in (NAME, "indexer"):
        for source in ("--prompt", "--input-file"):
            value = TEXT if source == "--prompt" else home / "prompts.txt"
            lengths_seen.clear()
            ended = run("generate", home / "sparse", source, value, "--selection", selection, "--max-new-tokens", 12)
            assert ended.status == 0, ended.err
            assert bool(lengths_seen) == (selection == NAME)
            answers[selection, source] = ended.out
    assert answers[NAME, "--prompt"] != answers["indexer", "--prompt"]
    assert answers[NAME, "--input-file"] != answers["indexer", "--input-file"]


def test_the_page_can_be_followed(home: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file of docs/selection.md, as it stands there, is found, selects and is measured."""
    page = (Path(__file__).parents[2] / "docs" / "selection.md").read_text(encoding="utf-8")
    (tmp_path / "mine.py").write_text(page.split("```python\n")[1].split("```")[0])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("tokensieve.data.sources.is_held_out", lambda name, share: True)
    ended = run("generate", home / "sparse", "--prompt", TEXT, "--selection", "mine:with_recent", "--max-new-tokens", 3)
    assert ended.status == 0, ended.err
    arm = ("--arm", "recent=mine:with_recent", "--set", "sparse.needle_contexts=1", "--set", "sparse.texts=1")
    data = ("--data", home / "text" / "*.py", "--context", "1500", "--out", tmp_path)
    ended = run("eval", home / "sparse", "--quick", *arm, *data)
    assert ended.status == 0 and "recent" in ended.out, ended.err
    figures = json.loads((tmp_path / "metrics.json").read_text())
    assert figures["selections"] == {"recent": "mine:with_recent"}
    assert set(figures["recent"]) == set(figures["sparse"]) and figures["recent"] != figures["sparse"]


def test_adaptation_by_it(home: Path, run: Any, tmp_path: Path) -> None:
    arguments = commands.tiny(
        home, "adapt", tmp_path / "run", "--set", f'selection="{NAME}"', "--set", "phases.0.steps=1"
    )
    ended = run(*arguments)
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["selection"] == NAME
    assert ended.out.splitlines()[-1].endswith(f"--arm trained={NAME}")


def test_adaptation_by_a_broken_one(home: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first step; and warm-up, which would ignore a selector, takes none."""
    monkeypatch.setattr("tokensieve.train.loop.Run.step", lambda *_: pytest.fail("it trained"))
    refused, broken = commands.refusal(run), 'selection="tests.cli.test_selection:by_row"'
    adapt = commands.tiny(home, "adapt", tmp_path / "adapt", "--set", broken)
    refused(("by_row gave queries of layer 0 other keys",), *adapt)
    warmup = commands.tiny(home, "warmup", tmp_path / "warmup", "--set", f'selection="{NAME}"')
    refused((f"selection is {NAME}, and warmup attends to every key",), *warmup)


def test_bad_names_are_refused(home: Path, run: Any) -> None:
    refused = commands.refusal(run)
    refused(("best", "module:function"), "generate", home / "sparse", "--prompt", "x", "--selection", "best")
    refused(("no module nowhere",), "generate", home / "sparse", "--prompt", "x", "--selection", "nowhere:f")
    (home / "prompts.txt").write_text(TEXT)
    dense = ("generate", home / "dense", "--input-file", home / "prompts.txt")
    refused(("no indexer to select with", "sparsify"), *dense, "--selection", NAME)
    refused(("no module nowhere",), "serve", home / "sparse", "--selection", "nowhere:f")
    refused(("has no absent",), "eval", home / "sparse", "--quick", "--arm", "mine=tests.cli.test_selection:absent")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("without_queries", "return (146, K) int32 positions"),
        ("with_a_key_twice", "a key twice"),
        ("past_the_end", "a key that its query may not see"),
        ("of_the_future", "a key that its query may not see"),
        ("of_no_keys", "k = 0 keys"),
    ],
)
def test_a_broken_selector_is_refused_in_one_line(name: str, words: str, home: Path, run: Any) -> None:
    refused, selection = commands.refusal(run), f"tests.cli.test_selection:{name}"
    refused((words,), "generate", home / "sparse", "--prompt", TEXT, "--selection", selection)
    (home / "prompts.txt").write_text(TEXT)
    served = (words.replace("146", "149"), "prompt 1 has no answer")  # with what stands around a prompt
    refused(served, "generate", home / "sparse", "--input-file", home / "prompts.txt", "--selection", selection)


@pytest.mark.parametrize("suite", [(), ("--suite", "long", "--set", "long.contexts=[500]", "--set", "long.prompts=1")])
def test_a_broken_arm_is_refused_before_the_others_are_measured(
    suite: tuple[str, ...], home: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may take an hour, and what they have measured would be lost."""
    monkeypatch.setattr("tokensieve.data.sources.is_held_out", lambda name, share: True)
    for measures in ("judge.compare", "suites.perplexity", "suites.answering"):
        monkeypatch.setattr(f"tokensieve.evals.{measures}", lambda *_, **__: pytest.fail("it was measured"))
    suite = (*suite, "--set", 'long.tasks=["single"]') if suite else ()
    options = (*suite, "--data", home / "text" / "*.py", "--out", tmp_path)
    arms = ("--arm", "good=window", "--arm", "bad=tests.cli.test_selection:with_a_key_twice")
    quick = ("--set", "sparse.needle_contexts=1", "--set", "sparse.texts=1", "--context", "1500") if not suite else ()
    commands.refusal(run)(("a key twice",), "eval", home / "sparse", *arms, *quick, *options)


@pytest.mark.parametrize(
    ("selection", "words"),
    [
        ("tests.cli.test_selection:by_row", "other keys when it was asked for half of them"),
        ("tests.cli.test_selection:with_a_key_twice", "a key twice"),
        ("tokensieve.selectors:PerLayer([3])", "PerLayer has k for 1 layers, and the model has 2"),
    ],
)
def test_a_broken_selector_is_not_served(selection: str, words: str, home: Path, run: Any) -> None:
    """One line at the start, instead of an error for every request."""
    commands.refusal(run)((words,), "serve", home / "sparse", "--port", 0, "--selection", selection)


def test_an_arm_that_looks_at_rows_is_refused(
    home: Path, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Perplexity, of whole passes, and needles, which are read from a cache, would be of two selections."""
    monkeypatch.setattr("tokensieve.data.sources.is_held_out", lambda name, share: True)
    monkeypatch.setattr("tokensieve.evals.judge.compare", lambda *_, **__: pytest.fail("it was measured"))
    sizes = ("--set", "sparse.needle_contexts=1", "--set", "sparse.texts=1", "--context", "1500")
    arm = ("--arm", "mine=tests.cli.test_selection:by_row", "--data", home / "text" / "*.py", "--out", tmp_path)
    commands.refusal(run)(("by_row gave queries of layer 0 other keys",), "eval", home / "sparse", *arm, *sizes)
