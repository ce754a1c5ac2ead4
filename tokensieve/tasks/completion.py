"""Completing held-out functions: does what the model writes after a signature parse?"""

import ast
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tokensieve.config import UserError
from tokensieve.tasks import Document, PlainEncoder, parse_python


@dataclass(frozen=True)
class CompletionExample:
    """`before` is the module up to the function, `head` its signature and docstring, ending in a newline each."""

    name: str
    before: str
    head: str

    @property
    def indent(self) -> int:
        return len(self.head) - len(self.head.lstrip())


@dataclass(frozen=True)
class CompletionScore:
    """`parsed`: share of examples whose completion, as `finish` cuts it, parses and has at least one statement."""

    parsed: float
    completions: tuple[str, ...]


def examples(documents: Iterable[Document]) -> Iterator[CompletionExample]:
    """Functions that have a docstring or at least three lines of body, from documents that are Python."""
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
            yield CompletionExample(f"{document.name}.{node.name}", before, head)


def _signature_end(lines: list[str], node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """The line (from 1) on which the signature ends, 0 if the body begins on it."""
    for end in range(node.lineno, node.body[0].lineno):
        head = "\n".join(lines[node.lineno - 1 : end]) + "\n"
        if parses(head, " " * (len(head) - len(head.lstrip()) + 1) + "pass"):
            return end
    return 0


def finish(example: CompletionExample, completion: str, complete: bool) -> str:
    """The part of a completion that is judged: what belongs to the function, and of that what the model had time for.

    What belongs to it ends before the first line that is indented no more than the `def`. A model that wrote such a
    line, or the end marker (`complete`), ended the function itself: all that it wrote is judged. Where the budget of
    tokens cut it off instead, it is judged on its last whole statement: on the longest prefix of whole lines that parses
    as the function with at least one statement beside the docstring. Where no prefix does, nothing is left, which does
    not parse: a loop inside the brackets of the very first statement still fails.
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

    Nothing is forgiven here: what a cut-off completion is judged on, `finish` decides.
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
    room = prompt_tokens - 1 - len(head)
    before = example.before[-8 * prompt_tokens :]  # no token of ours is that long on average
    if len(before) < len(example.before):
        before = before[before.find("\n") + 1 :]
    kept: list[list[int]] = []
    for line in reversed(encode.batch(before.splitlines(keepends=True))):
        room -= len(line)
        if room < 0:
            break
        kept.append(line)
    return [encode.markers.bos, *(token for line in reversed(kept) for token in line), *head]


def evaluate(
    model: Any,
    tokenizer: Any,
    cases: Sequence[CompletionExample],
    max_new_tokens: int = 160,
    prompt_tokens: int = 1024,
    batch_size: int = 16,
) -> CompletionScore:
    """Greedy completions of held-out functions; rows of a batch are padded on the left and masked.

    Raises:
        UserError: no examples.
    """
    import torch

    if not cases:
        raise UserError("no functions to complete; the held-out documents have none with a docstring or three lines")
    encode = tokenizer if isinstance(tokenizer, PlainEncoder) else PlainEncoder(tokenizer)
    marks = encode.markers
    device = next(model.parameters()).device
    prompts = [prompt_ids(encode, case, prompt_tokens) for case in cases]
    order = sorted(range(len(cases)), key=lambda i: len(prompts[i]))
    completions = [""] * len(cases)
    with torch.inference_mode():
        for begin in range(0, len(order), batch_size):
            rows = order[begin : begin + batch_size]
            width = max(len(prompts[i]) for i in rows)
            ids = torch.tensor([[marks.pad] * (width - len(prompts[i])) + prompts[i] for i in rows], device=device)
            mask = torch.tensor([[0] * (width - len(prompts[i])) + [1] * len(prompts[i]) for i in rows], device=device)
            output = model.generate(
                ids,
                attention_mask=mask if len(rows) > 1 else None,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=marks.eos,
                pad_token_id=marks.pad,
            )
            for i, row in zip(rows, output[:, width:].tolist(), strict=True):
                complete = marks.eos in row
                text = encode.decode(row[: row.index(marks.eos)] if complete else row)
                completions[i] = finish(cases[i], text, complete)
    good = sum(parses(case.head, text) for case, text in zip(cases, completions, strict=True))
    return CompletionScore(good / len(cases), tuple(completions))
