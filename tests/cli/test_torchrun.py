"""Commands under torchrun, as processes: one conversation, one server, one line where the input is bad, and an end for
all.
"""

import signal
import time
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from tests.support.torchrun import ended, ranks_of, started
from tokensieve import checkpoint
from tokensieve.model import model_path


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "two"
    checkpoint.write_shards(model_path("sparse"), folder, 2)
    return folder


@pytest.mark.slow
def test_a_conversation(run: Any, shards: Path) -> None:
    """The answers are those of one process that has the whole checkpoint."""
    question = "Who are you?"
    process = started("generate", shards, "--interactive", "--max-new-tokens", 12)
    out, err = ended(process, f"{question}\n/clear\n{question}\n")
    expected = run("generate", "sparse", "--chat", question, "--max-new-tokens", 12)
    assert process.returncode == 0, err
    assert out == expected.out.rstrip("\n") + "\n" + expected.out.rstrip("\n") + "\n"
    assert err.count("/exit ends") == 1 and "Traceback" not in err


@pytest.mark.slow
def test_a_server_finishes_its_answers(shards: Path) -> None:
    process = started("serve", shards, "--port", 0, "--pages", 64, "--running", 2)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        at = line.split("/v1 ")[0]
        asked = {"model": shards.name, "prompt": "def ", "max_tokens": 60, "seed": 3, "stream": True}
        with httpx.stream("POST", at + "/v1/completions", json=asked, timeout=60) as answer:
            lines = answer.iter_lines()
            next(lines)
            for rank in ranks_of(process):  # as torchrun sends it on
                rank.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        _, err = ended(process)
    finally:
        process.kill()
    assert process.returncode == 0 and "Traceback" not in err, err


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["leader", "follower", "all"])
def test_whoever_dies_ends_all(shards: Path, whom: str) -> None:
    process = started("generate", shards, "--interactive")
    try:
        assert process.stderr is not None
        while "/exit ends" not in process.stderr.readline():
            assert process.poll() is None
        some = ranks_of(process)
        if whom == "all":  # in order
            for rank in some:
                rank.send_signal(signal.SIGTERM)
        else:
            some[whom == "follower"].kill()
        begin = time.monotonic()
        _, err = ended(process)
        assert time.monotonic() - begin < 60 and not any(rank.is_running() for rank in some)
    finally:
        process.kill()
    assert (process.returncode == 0) == (whom == "all"), err


@pytest.mark.slow
def test_one_line_says_what_is_wrong(shards: Path, tmp_path: Path) -> None:
    four = tmp_path / "four"
    checkpoint.write_shards(model_path("sparse"), four, 4)
    (tmp_path / "file").write_text(" \n")
    for words, arguments in (
        (("for 4 ranks", "started 2", "--nproc-per-node 4", "--model-parallel 2"), ("generate", four, "--interactive")),
        (("--interactive and --input-file only",), ("generate", shards, "--prompt", "x")),
        (("holds no prompt",), ("generate", shards, "--input-file", tmp_path / "file")),
    ):
        process = started(*arguments)
        _, err = ended(process)
        lines = [line for line in err.splitlines() if line.startswith("tokensieve: error: ")]
        assert process.returncode != 0 and len(lines) == 1, err
        assert all(word in lines[0] for word in words), lines[0]
        assert "exitcode  : 2" in err and "Root Cause" in err


@pytest.mark.slow
def test_a_plain_checkpoint_and_a_file_of_prompts(tmp_path: Path, run: Any) -> None:
    file = tmp_path / "prompts"
    file.write_text("Who are you?\n\nWhat is 7?\n")
    arguments = ("generate", "sparse", "--input-file", file, "--max-new-tokens", 6)
    out, err = ended(process := started(*arguments))
    assert process.returncode == 0 and out == run(*arguments).out, err
