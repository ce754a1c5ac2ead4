"""The documents keep their word: commands in them run, and the files, functions, tests and places that they name exist.

A ```console block is a session: lines that begin with "$ " are commands, the others what they printed. The comment
before it says where its commands are run:

    <!-- fast -->                 here, one after the other in an empty folder
    <!-- slow -->                 here, among the slow tests, in one folder with the page's fast ones
    <!-- tested: FILE::TEST -->   there, in a smaller form: they take hours, do not end, or need what only a user has
    <!-- not run: REASON -->      nowhere

They end with status 0, or with 2 if they printed an error. The commands and options of every session must exist. A
```python block after <!-- fast --> runs too.
"""

import ast
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.main import get_command

from tests.support import commands
from tokensieve import cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
RECORDS = ROOT / "docs" / "results"  # the commands of figures, run once, many of them on other machines
BLOCK = re.compile(r"^(?:<!-- ([^\n]+) -->\n+)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"`((?:tokensieve|tests|benchmarks|examples)/[\w./-]+)(?:::(\w+))?`")
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)")
COMMAND = re.compile(r"(tokensieve|make|torchrun|python) ")


@dataclass(frozen=True)
class Session:
    """A block of commands: its page and number there, the comment before it, each command with what it printed."""

    page: Path
    number: int
    marker: str
    commands: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        return f"{self.page.name} {self.number}"


def blocks(page: Path, language: str) -> list[tuple[str, str]]:
    """The comment before each block of the language, and its text."""
    return [
        (marker, text) for marker, kind, text in BLOCK.findall(page.read_text(encoding="utf-8")) if kind == language
    ]


def sessions(*markers: str) -> list[Session]:
    """All sessions, or those behind one of these comments."""
    found = []
    for page in DOCUMENTS:
        for number, (marker, text) in enumerate(blocks(page, "console"), 1):
            parts = re.split(r"^\$ ", text.replace("\\\n", " "), flags=re.MULTILINE)[1:]
            commands = tuple((command, shown) for command, _, shown in (part.partition("\n") for part in parts))
            found.append(Session(page, number, marker, commands))
    return [session for session in found if not markers or session.marker in markers]


def run_session(session: Session, run: commands.Run) -> None:
    assert session.commands, f"{session}: a session without commands"
    for line, shown in session.commands:
        program, *arguments = shlex.split(line)
        assert program == "tokensieve", f"{session}: {line}: only tokensieve's commands can be run"
        ended = run(*arguments)
        assert ended.status == (2 if shown.startswith("tokensieve: error: ") else 0), f"{session}: {line}: {ended}"


def known_options(name: str, part: str = "") -> set[str]:
    """Of a command, or of a part of one that has several."""
    command = get_command(cli.app).commands[name]
    command = getattr(command, "commands", {}).get(part, command)
    return {option for p in command.params for option in p.opts} | {"--help"}


def defined(file: Path) -> set[str]:
    """The names of a source's functions and classes."""
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return {node.name for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, kinds)}


def anchors(page: Path) -> set[str]:
    """The places of a page that a link can name: its headings, as repositories and the site write them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("session", sessions("fast"), ids=str)
def test_fast_sessions_run(session: Session, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    run_session(session, commands.runner(capsys))


@pytest.mark.slow
@pytest.mark.parametrize("page", sorted({s.page for s in sessions("slow")}), ids=lambda p: p.name)
def test_whole_pages_run(page: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    for session in sessions("fast", "slow"):
        if session.page == page:
            run_session(session, commands.runner(capsys))


PYTHON = [(page, text) for page in DOCUMENTS for marker, text in blocks(page, "python") if marker == "fast"]


@pytest.mark.parametrize(("page", "text"), PYTHON, ids=[page.name for page, _ in PYTHON])
def test_fast_python_runs(page: Path, text: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(text, page.name, "exec"), {})


IMPORTS = [(page, text) for page in DOCUMENTS for marker, text in blocks(page, "python") if marker != "fast"]


@pytest.mark.parametrize(("page", "text"), IMPORTS, ids=[page.name for page, _ in IMPORTS])
def test_python_imports_what_there_is(page: Path, text: str) -> None:
    """Of blocks that would take too long to run; `mine` is a module of the reader's own."""
    for node in ast.parse(text).body:
        own = isinstance(node, ast.ImportFrom) and node.module == "mine"
        if isinstance(node, ast.Import | ast.ImportFrom) and not own:
            exec(compile(ast.Module([node], []), page.name, "exec"), {})


@pytest.mark.parametrize("session", [s for s in sessions() if not s.page.is_relative_to(RECORDS)], ids=str)
def test_every_session_is_run_somewhere(session: Session) -> None:
    kind, _, where = session.marker.partition(": ")
    assert kind in ("fast", "slow", "tested", "not run"), f"{session}: say in a comment before it where it is run"
    if kind == "tested":
        name, _, test = where.partition("::")
        assert (ROOT / name).is_file(), f"{session}: there is no {name}"
        assert not test or test in defined(ROOT / name), f"{session}: {name} has no {test}"
    assert kind != "not run" or where, f"{session}: say why it is not run"


@pytest.mark.parametrize("page", [p for p in DOCUMENTS if not p.is_relative_to(RECORDS)], ids=lambda p: p.name)
def test_commands_are_in_sessions(page: Path) -> None:
    """A command in another kind of block would be run nowhere."""
    text = page.read_text(encoding="utf-8")
    others = [line for _, kind, block in BLOCK.findall(text) if kind in ("sh", "bash") for line in block.splitlines()]
    others += [
        line[4:] for line in re.sub(r"^```.*?^```", "", text, flags=re.M | re.S).splitlines() if line[:4] == " " * 4
    ]
    assert not [line for line in others if COMMAND.match(line)], f"{page.name}: make it a ```console block"


@pytest.mark.parametrize("session", sessions(), ids=str)
def test_commands_and_options_exist(session: Session) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for line, _ in session.commands:
        program, *arguments = shlex.split(line, comments=True)
        if program == "make":
            assert set(arguments) <= set(targets), f"{session}: {line}"
        elif program == "tokensieve":
            given = {a.partition("=")[0] for a in arguments[1:] if a.startswith("--")}
            assert given <= known_options(*arguments[:2]), f"{session}: {line}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_what_is_named_exists(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name, function in NAMED.findall(text):
        file = ROOT / name
        assert file.exists(), f"{path.name}: there is no {name}"
        assert not function or function in defined(file), f"{path.name}: {name} has no {function}"
    for target, place in LINK.findall(text):
        there = path.parent / target if target else path
        assert there.exists(), f"{path.name}: there is no {target}"
        assert not place or place in anchors(there), f"{path.name}: {target} has no heading #{place}"


def test_the_site_has_every_page() -> None:
    named = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text(encoding="utf-8")))
    assert named == {str(page.relative_to(ROOT / "docs")) for page in DOCUMENTS if page.parent != ROOT}


def test_the_tree_is_the_package() -> None:
    """The README's annotated tree names every module and folder of the package, and nothing else."""
    block = re.search(r"```text\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert block
    inside = block[1].split("tokensieve/\n", 1)[1]
    named = {m for line in inside.splitlines() if line.startswith("  ") for m in re.findall(r"^  ([\w.]+)", line)}
    hidden = {"__pycache__", "py.typed", "__init__.py"}
    assert named == {p.name for p in (ROOT / "tokensieve").iterdir()} - hidden
