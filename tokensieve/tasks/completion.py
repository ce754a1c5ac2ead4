"""Completing held-out functions: does what the model writes after a signature parse?"""

import ast
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from tokensieve.config import UserError
from tokensieve.tasks.contract import Answer, Example, Score
from tokensieve.tasks.documents import Document, Documents, Split, parse_python
from tokensieve.tasks.encoder import PlainEncoder, encoder


@dataclass(frozen=True, kw_only=True)
class CompletionExample(Example):
    """`before` is the module up to the function, `head` its signature and docstring; both end in a newline.

    `lines`: of the body that really stands there.
    """

    before: str
    head: str
    lines: int

    @property
    def indent(self) -> int:
        return len(self.head) - len(self.head.lstrip())


def functions(documents: Iterable[Document]) -> Iterator[CompletionExample]:
    """Functions that have a docstring or at least three lines of body, from documents that are Python.

    Their prompts are the whole text up to the body, whatever its length.
    """
    for document in documents:
        tree = parse_python(document.text)
        lines = document.text.split("\n")
        for node in ast.walk(tree) if tree else ():
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            documented = ast.get_docstring(node, clean=False) is not None
            end = node.body[0].end_lineno or 0 if documented else _signature_end(lines, node)
            body = node.body[1:] if documented else node.body
            if not body or body[0].lineno <= end or not end:
                continue  # nothing to write, or it begins on the line of the signature or docstring
            if not documented and (node.end_lineno or 0) - end < 3:
                continue
            head = "\n".join(lines[node.lineno - 1 : end]) + "\n"
            before = "".join(line + "\n" for line in lines[: node.lineno - 1])
            yield CompletionExample(
                name=f"{document.name}.{node.name}",
                prompt=before + head,
                before=before,
                head=head,
                lines=(node.end_lineno or 0) - end,
            )


def _signature_end(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The line (counted from 1) on which the signature ends; 0 if the body begins on it."""
    for end in range(node.lineno, node.body[0].lineno):
        head = "\n".join(lines[node.lineno - 1 : end]) + "\n"
        if parses(head, " " * (len(head) - len(head.lstrip()) + 1) + "pass"):
            return end
    return 0


def finish(example: CompletionExample, completion: str, complete: bool) -> str:
    """The part of a completion that is judged: what belongs to the function, up to where the tokens ran out.

    The function ends before the first line that is indented no more than its `def`. A model that wrote such a line, or
    the end marker (`complete`), ended the function itself, and all that it wrote is judged. If the budget of tokens cut
    it off instead, it is judged up to its last whole statement: on the longest prefix of whole lines that parses as the
    function with at least one statement beside the docstring. If no prefix does, nothing is left, which does not parse:
    a loop inside the brackets of the very first statement still fails.
    """
    lines = completion.split("\n")
    for number, line in enumerate(lines):
        if line.strip() and len(line) - len(line.lstrip()) <= example.indent:
            return "\n".join(lines[:number])
    if complete:
        return completion
    prefixes = ("\n".join(lines[:end]) for end in range(len(lines) - 1, 0, -1))
    return next((prefix for prefix in prefixes if parses(example.head, prefix)), "")


def parses(head: str, body: str) -> bool:
    """Whether head + body is one function with at least one statement beside its docstring.

    Nothing is forgiven here: `finish` decides what a completion that was cut off is judged on.
    """
    # A block around a method makes its indentation legal and leaves multi-line strings as they are.
    tree = parse_python(("if True:\n" if head[:1].isspace() else "") + head + body)
    if tree is None:
        return False
    top = tree.body[0]
    function = top.body[0] if isinstance(top, ast.If) else top
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    return len(function.body) > (ast.get_docstring(function, clean=False) is not None)


def prompt_ids(encode: PlainEncoder, example: CompletionExample, prompt_tokens: int) -> list[int]:
    """bos, as much of the module before the function as fits (whole lines), and the function's head."""
    head = encode(example.head)
    room = prompt_tokens - len(encode.begin) - len(head)
    before = example.before[-8 * prompt_tokens :]  # no token of ours is that long on average
    if len(before) < len(example.before):
        before = before[before.find("\n") + 1 :]
    whole_lines: list[list[int]] = []
    for line in reversed(encode.batch(before.splitlines(keepends=True))):
        room -= len(line)
        if room < 0:
            break
        whole_lines.append(line)
    return [*encode.begin, *(token for line in reversed(whole_lines) for token in line), *head]


@dataclass(frozen=True)
class Completion:
    """Bodies of functions after their module up to there (a `Task`): does what the model writes parse?

    Difficulty: lines of the body that really stands there, at most; None takes functions of any length.

    tokenizer: or an encoder.
    prompt_tokens: of a prompt, at most, unless the function's head alone is longer.
    """

    tokenizer: Any
    documents: Documents
    prompt_tokens: int = 1024
    name: str = "completion"

    def examples(
        self, split: Split, count: int, difficulty: int | None = None, seed: int = 0
    ) -> list[CompletionExample]:
        if count < 1:
            raise UserError(f"{count} examples of {self.name} were asked for; ask for at least one")
        encode = encoder(self.tokenizer)
        cases = [c for c in functions(self.documents.of(split)) if difficulty is None or c.lines <= difficulty]
        if not cases:
            which = "held-out" if split == "test" else "training"
            raise UserError(
                f"no functions to complete; the {which} documents have none with a docstring or three lines"
            )
        drawn = random.Random(seed).sample(cases, min(count, len(cases)))
        return [replace(case, prompt=prompt_ids(encode, case, self.prompt_tokens)) for case in drawn]

    def score(self, example: CompletionExample, answer: Answer) -> Score:
        """1 if the completion, as `finish` cuts it, parses and has at least one statement, else 0."""
        return Score(float(parses(example.head, finish(example, answer.text, answer.ended))))

    def reward(self, example: CompletionExample, answer: Answer) -> float:
        """The score's value."""
        return self.score(example, answer).value
