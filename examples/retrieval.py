"""Retrieval-augmented generation with many documents in context.

The documents are functions of Python's standard library. For a question ("What does `move` do?") those that share most
words with it are put into the context, the best ones last, until it is full. The answer is the first line of the
function's own docstring. An answer is right if it begins with the line's first words. The log probability of the line
is compared too, since it can be measured with models that answer nothing.
"""

import ast
import inspect
import random
import re
from collections.abc import Iterator

from arms import Case, Local, Part, Reader, Remote, main

MODULES = (
    "argparse calendar cmd configparser copy difflib glob inspect netrc shutil sched textwrap tokenize turtle trace"
)
WORDS = 4  # of an answer that have to be right


def functions() -> Iterator[tuple[str, str, str]]:
    """Names, first lines of docstrings and sources, of the functions that have all three."""
    for module in map(__import__, MODULES.split()):
        source = inspect.getsource(module)
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if len(first.split()) > WORDS:
                    yield node.name, first, ast.get_source_segment(source, node) or ""


def words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.lower()))


def questions(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    documents = list(functions())
    cases = []
    for name, first, _ in rng.sample(documents, min(count, len(documents))):
        question = f"What does `{name}` do?"
        found = sorted(documents, key=lambda d: (len(words(question) & words(d[2])), d[0] == name), reverse=True)
        chosen, left = [], tokens * 3  # characters: fewer than the tokens allow
        for document in found:
            if len(document[2]) <= left:
                left -= len(document[2])
                chosen.append(document[2])
        cases.append(Case("\n".join(reversed(chosen)), question, first))
    return cases


def repeated(reader: Reader, case: Case) -> float:
    said = reader.ask(case.text, case.question).lower().split()
    return float(said[:WORDS] == case.answer.lower().split()[:WORDS])


def likely(reader: Reader, case: Case) -> float:
    return reader.nats(case.text, f"{case.question} ", case.answer)


if __name__ == "__main__":
    main(
        str(__doc__),
        Part("answers from retrieved functions", questions, repeated),
        Part("the right answer's likelihood", questions, likely, "nats"),
    )
