"""`--selection module:function` and `eval --arm NAME=module:function`: a user's selector on the command line."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support import commands
from tokensieve.model.selection import indexer, join, window

NAME = "tests.cli.test_selection:with_recent"


def with_recent(c):
    return join(indexer(c), window(c, 16))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("home"))


def test_generate_in_both_ways(home: Path, run: Any) -> None:
    """With transformers' generation and, from a file of prompts, with the engine."""
    text = "def parse_arguments(argv):\n" * 12
    answers = {}
    for who in (NAME, "window", "indexer", "oracle"):
        ended = run("generate", home / "sparse", "--prompt", text, "--selection", who, "--max-new-tokens", 12)
        assert ended.status == 0, ended.err
        answers[who] = ended.out
    assert len(set(answers.values())) >= 2
    (home / "prompts.txt").write_text("Who are you?\n")
    ended = run("generate", home / "dense", "--input-file", home / "prompts.txt", "--selection", "window")
    assert ended.status in (0, 2) and "Traceback" not in ended.err


def test_adaptation_by_it(home: Path, run: Any, tmp_path: Path) -> None:
    arguments = commands.tiny(
        home, "adapt", tmp_path / "run", "--set", f'selection="{NAME}"', "--set", "phases.0.steps=1"
    )
    ended = run(*arguments)
    assert ended.status == 0, ended.err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["selection"] == NAME


def test_bad_names_are_refused(home: Path, run: Any) -> None:
    refused = commands.refusal(run)
    refused(("best", "module:function"), "generate", home / "sparse", "--prompt", "x", "--selection", "best")
    refused(("no module nowhere",), "generate", home / "sparse", "--prompt", "x", "--selection", "nowhere:f")
    refused(("no module nowhere",), "serve", home / "sparse", "--selection", "nowhere:f")
    refused(("has no absent",), "eval", home / "sparse", "--quick", "--arm", "mine=tests.cli.test_selection:absent")
