"""The documents keep their word: commands in them run, and the files, functions and tests that they name exist.

A ```console block is a session: lines that begin with "$ " are commands, the others what they printed. After the marker
`<!-- fast -->` its commands run here, one after the other in an empty folder, and must end with status 0. Of other
blocks the commands and their options must exist.
"""

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from tests.support import commands
from tokensieve import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SESSION = re.compile(r"^(<!-- fast -->\n+)?```console\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:tokensieve|tests|benchmarks)/[\w./-]+)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:|#)([^)#]+)")


def sessions(fast: bool) -> list[tuple[str, list[str]]]:
    found = []
    for path in DOCUMENTS:
        for number, (marker, text) in enumerate(SESSION.findall(path.read_text(encoding="utf-8")), 1):
            if bool(marker) == fast:
                joined = text.replace("\\\n", " ")
                lines = [line[2:] for line in joined.splitlines() if line.startswith("$ ")]
                found.append((f"{path.name} {number}", lines))
    return found


def known_options(name: str, part: str = "") -> set[str]:
    """Of a command, or of a part of one that has several."""
    command = get_command(cli.app).commands[name]
    command = getattr(command, "commands", {}).get(part, command)
    return {option for p in command.params for option in p.opts} | {"--help"}


@pytest.mark.parametrize(("where", "lines"), sessions(fast=True))
def test_fast_sessions_run(where: str, lines: list[str], tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run = commands.runner(capsys)
    assert lines, f"{where}: a session without commands"
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "tokensieve", f"{where}: {line}: only tokensieve's commands can be marked fast"
        ended = run(*arguments)
        assert ended.status == 0, f"{where}: {line}: {ended}"


@pytest.mark.parametrize(("where", "lines"), [*sessions(fast=False), *sessions(fast=True)])
def test_commands_and_options_exist(where: str, lines: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line in lines:
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert set(arguments) <= set(targets), f"{where}: {line}"
        elif program == "tokensieve":
            given = {a.partition("=")[0] for a in arguments[1:] if a.startswith("--")}
            assert given <= known_options(*arguments[:2]), f"{where}: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_what_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, function in NAMED.findall(text):
        file = ROOT / name
        assert file.exists(), f"{path.name}: there is no {name}"
        if function:
            tree = ast.parse(file.read_text(encoding="utf-8"))
            defined = {
                n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            }
            assert function in defined, f"{path.name}: {name} has no {function}"
    for target in LINK.findall(text):
        assert (path.parent / target).exists(), f"{path.name}: there is no {target}"


def test_the_tree_is_the_package() -> None:
    """The README's annotated tree names every module and folder of the package, and nothing else."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    inside = block[1].split("tokensieve/\n", 1)[1]
    named = {m for line in inside.splitlines() if line.startswith("  ") for m in re.findall(r"^  ([\w.]+)", line)}
    hidden = {"__pycache__", "py.typed", "__init__.py"}
    assert named == {p.name for p in (ROOT / "tokensieve").iterdir()} - hidden
