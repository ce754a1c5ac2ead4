"""Retrieval-augmented generation with many documents in context.

The documents are functions of Python's standard library. For a question ("What does `move` do?") the context is filled
with the function of this name, those that mention it, and others, in this order from its end. The answer is the first
line of the function's own docstring. An answer is right if it begins with the line's first words. The log probability
of the line is compared too, since it can be measured with models that answer nothing.
"""

import ast
import inspect
import random
import re
from collections.abc import Iterator

from arms import Case, Local, Part, Reader, Remote, main

MODULES = "argparse calendar cmd configparser copy difflib glob inspect netrc shutil sched textwrap tokenize trace"
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


def questions(model: Local | Remote, tokens: int, count: int, rng: random.Random) -> list[Case]:
    documents = list(functions())
    sizes = {source: model.size(f"{source}\n") for _, _, source in documents}
    cases = []
    for name, first, _ in rng.sample(documents, min(count, len(documents))):
        shuffled = rng.sample(documents, len(documents))
        found = sorted(shuffled, key=lambda d: (d[0] == name, bool(re.search(rf"\b{name}\b", d[2]))), reverse=True)
        chosen, left = [], tokens
        for _, _, source in found:
            if sizes[source] <= left:
                left -= sizes[source]
                chosen.append(source)
        cases.append(Case("\n".join(reversed(chosen)), f"What does `{name}` do?", first))
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
