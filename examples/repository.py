"""Code completion and debugging with a repository in context.

The repository is tokensieve itself. Completion: the log probability of a function's last lines, behind the files that
its own file imports, this file, and the function up to there; further files stand before them if there is room.
Debugging: a function's last line as it is, and with one of its names replaced by another name of these files. Right is
to find the true line likelier.
"""

import ast
import keyword
import random
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from arms import AROUND, Case, Local, Part, Reader, Remote, continued, main, source

PACKAGE = Path(__file__).resolve().parents[1] / "tokensieve"
FURTHER = 24  # files, of which the end of all is taken


@dataclass(frozen=True)
class Bug(Case):
    wrong: str = ""


@cache
def imported(path: Path) -> list[Path]:
    """The files of the package that a file imports."""
    modules = [n.module for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.ImportFrom) and n.module]
    files = [PACKAGE.parent / (module.replace(".", "/") + ".py") for module in modules]
    return [file for file in files if file.is_file() and file.is_relative_to(PACKAGE)]


def places(model: Local | Remote, tokens: int, count: int, rng: random.Random, lines: int) -> list[Case]:
    """The last lines of functions, the functions up to there (of long ones the end), and what stands before them and in
    the imported files.
    """
    paths = sorted(PACKAGE.rglob("*.py"))
    cases: list[Case] = []
    while len(cases) < count:
        path = rng.choice(paths)
        source = path.read_text().splitlines(keepends=True)
        tree = ast.parse("".join(source))
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and len(n.body) > 3]
        if functions and imported(path):
            function = rng.choice(functions)
            first, end = function.lineno - 1, function.end_lineno or 0
            read = imported(path)
            others = [file for file in rng.sample(paths, len(paths)) if file not in {path, *read}]
            files = [file.read_text() for file in [*others[:FURTHER], *read]]
            before = "\n".join(files) + "".join(source[:first])
            begin, rest = "".join(source[first : end - lines]), "".join(source[end - lines : end])
            begin = model.fit(begin, AROUND // 2, end=True)
            cases.append(Case(model.fit(before, tokens, end=True), begin, rest, str(path)))
    return cases


def completions(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    return places(model, tokens, count, rng, lines=3)


def bugs(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Bug]:
    found: list[Bug] = []
    while len(found) < count:
        for case in places(model, tokens, count, rng, lines=1):
            known = [n for n in set(re.findall(r"\b[a-z_]{4,}\b", case.text)) if not keyword.iskeyword(n)]
            used = [n for n in re.findall(r"\b[a-z_]{4,}\b", case.answer) if n in known]
            if used and len(found) < count:
                name = rng.choice(used)
                other = rng.choice(sorted(set(known) - {name}))
                wrong = re.sub(rf"\b{name}\b", other, case.answer)
                found.append(Bug(case.text, case.question, case.answer, case.about, wrong))
    return found


def noticed(reader: Reader, case: Bug) -> float:
    return float(continued(reader, case) > reader.nats(case.text, case.question, case.wrong))


if __name__ == "__main__":
    main(
        str(__doc__),
        Part("code completion in a repository", completions, continued, "nats", source),
        Part("noticing a wrong name", bugs, noticed, cluster=source),
    )
