"""Log lines: whole in a pipe, and never between the words of an answer."""

import contextlib
import io
import logging
import re
from pathlib import Path
from typing import Any

import pytest
from rich.table import Table

from tests.support import commands
from tokensieve import cli
from tokensieve.cli import program
from tokensieve.model.selection import SelectionContext, indexer

log = logging.getLogger("tokensieve.tests")
NAME = "tests.cli.test_log:that_logs"


def that_logs(c: SelectionContext) -> Any:
    log.info("chosen in layer %d", c.layer)
    return indexer(c)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return commands.make_home(tmp_path_factory.mktemp("home"))


def test_a_line_in_a_pipe_is_one_line(capsys: pytest.CaptureFixture) -> None:
    program.setup()
    log.info("word " * 60)
    assert capsys.readouterr().err == "word " * 60 + "\n"


def test_a_tables_row_in_a_pipe_is_one_line(capsys: pytest.CaptureFixture) -> None:
    table = Table(box=None, show_header=False)
    table.add_row("arm", "a description of many words " * 10)
    program.stdout().print(table)
    program.stdout().print("word " * 60)
    assert capsys.readouterr().out.count("\n") == 2


@pytest.mark.parametrize("way", ["--prompt", "--interactive"])
def test_no_line_comes_between_the_words(home: Path, run: Any, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    def generate(selection: str) -> str:
        """What a terminal would show, where standard output and standard error are one."""
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        source = ("--prompt", "def parse(") if way == "--prompt" else ("--interactive",)
        arguments = ("generate", home / "sparse", *source, "--max-new-tokens", 6, "--selection", selection)
        with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.redirect_stderr(shown):
            with pytest.raises(SystemExit) as ended:
                cli.main([str(a) for a in arguments])
        assert ended.value.code == 0, shown.getvalue()
        return shown.getvalue()

    lines = generate(NAME).splitlines()
    after = lines[lines.index("chosen in layer 0") :]
    assert len(after) >= 12 and all(re.fullmatch(r"chosen in layer \d|\w+ on cpu: .*", line) for line in after), lines
    assert not any("chosen in" in line for line in lines[: -len(after)])
