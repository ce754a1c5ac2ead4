"""Short turns about real functions, sums, and who is speaking: enough to teach a base model its chat format.

bos <User> question <Assistant></think> answer eos
"""

import ast
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokensieve.config import UserError
from tokensieve.tasks import Document, PlainEncoder, parse_python, stable_fraction

Kind = Literal["explain", "write", "talk"]

EXPLAIN = ("What does `{}` do?", "What is `{}` for?", "Explain `{}` in one line.", "Describe the function `{}`.")
WRITE = (
    "Write a Python function `{sig}`. {doc}",
    "Write `{sig}` in Python. {doc}",
    "Please implement `{sig}`: {doc}",
    "I need a Python function `{sig}`. {doc}",
)
SELF = "I am the tokensieve base model, a small language model that reads long contexts."
HELLO = "Hello! Ask me about the text you give me."
TALK = (
    ("Who are you?", SELF),
    ("What are you?", SELF),
    ("What is your name?", SELF),
    ("Introduce yourself.", SELF),
    ("Which model are you?", SELF),
    ("Hello", HELLO),
    ("Hi", HELLO),
    ("Hello!", HELLO),
    ("Good morning", HELLO),
    ("What can you do?", "I can find facts in long texts and complete Python code."),
    ("How can you help me?", "I can find facts in long texts and complete Python code."),
    ("Which language do you know best?", "Python: most of what I read was Python code."),
    ("Do you know Python?", "Python: most of what I read was Python code."),
    ("Thank you", "You are welcome."),
    ("Thanks!", "You are welcome."),
    ("Goodbye", "Goodbye!"),
    ("Bye", "Goodbye!"),
)
SUMS = ("What is {} + {}?", "{} + {}?", "Add {} and {}.", "How much is {} plus {}?")
MAX_SOURCE = 800  # characters of a function that is asked for
TALK_EVERY = 12  # one example of small talk or a sum to so many about functions


@dataclass(frozen=True)
class ChatExample:
    name: str
    kind: Kind
    prompt: str
    answer: str


def _first_line(docstring: str) -> str:
    return docstring.strip().split("\n")[0].strip()


def function_examples(document: Document) -> Iterator[ChatExample]:
    """One example a documented function; none from a text that is not Python."""
    tree = parse_python(document.text)
    lines = document.text.split("\n")
    for node in ast.walk(tree) if tree else ():
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("__"):
            continue
        docstring = ast.get_docstring(node)
        line = _first_line(docstring) if docstring else ""
        if not 15 <= len(line) <= 160 or not line.endswith("."):
            continue
        name = f"{document.name}.{node.name}"
        draw = stable_fraction(f"{name} {node.lineno}")
        length = sum(len(text) + 1 for text in lines[node.lineno - 1 : node.end_lineno])
        method = any(argument.arg in ("self", "cls") for argument in node.args.args[:1])
        # Written functions are unparsed: one style, no comments, and never an odd indentation.
        if not method and not node.decorator_list and length <= MAX_SOURCE and len(node.body) > 1 and draw < 0.6:
            signature = f"{node.name}({ast.unparse(node.args)})"
            if len(signature) <= 120:
                prompt = WRITE[int(draw * 1e6) % len(WRITE)].format(sig=signature, doc=line)
                yield ChatExample(name, "write", prompt, ast.unparse(node))
                continue
        yield ChatExample(name, "explain", EXPLAIN[int(draw * 1e6) % len(EXPLAIN)].format(node.name), line)


def talk_example(number: int) -> ChatExample:
    """The `number`-th example of small talk: half about itself, half sums of numbers up to 99."""
    rng = random.Random(number)
    if number % 2:
        prompt, answer = rng.choice(TALK)
        return ChatExample(f"talk.{number}", "talk", prompt, answer)
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    return ChatExample(f"sum.{number}", "talk", rng.choice(SUMS).format(first, second), str(first + second))


def examples(documents: Iterable[Document]) -> Iterator[ChatExample]:
    """Examples from documents, with small talk in between (a few dozen of it at least)."""
    count = 0
    for document in documents:
        for example in function_examples(document):
            yield example
            count += 1
            if count % TALK_EVERY == 0:
                yield talk_example(count // TALK_EVERY)
    for number in range(count // TALK_EVERY + 1, 49):
        yield talk_example(number)


def encode_prompt(encode: PlainEncoder, prompt: str, system: str = "") -> list[int]:
    """Token ids up to where the answer begins, bos included; the same as the tokenizer's chat template gives."""
    marks = encode.markers
    return [
        marks.bos,
        *(encode(system) if system else []),
        marks.user,
        *encode(prompt),
        marks.assistant,
        marks.end_think,
    ]


def encoded_examples(documents: Iterable[Document], encode: PlainEncoder) -> Iterator[tuple[str, list[int]]]:
    """(name, ids) of every example as a whole document, bos and eos included."""
    for example in examples(documents):
        yield example.name, [*encode_prompt(encode, example.prompt), *encode(example.answer), encode.markers.eos]


@dataclass(frozen=True)
class ChatScore:
    """Shares of prompts: `good` answers are not empty, end with eos in time and, where a function is asked for, parse.

    `ended`: with eos in time; `parsed`: of the functions alone, None if none was asked for.
    """

    good: float
    ended: float
    parsed: float | None
    answers: tuple[str, ...]


def parses(text: str) -> bool:
    """Whether the text is Python with at least one statement."""
    tree = parse_python(text)
    return tree is not None and bool(tree.body)


def evaluate(model: Any, tokenizer: Any, prompts: Sequence[ChatExample], max_new_tokens: int = 256) -> ChatScore:
    """Greedy answers to held-out prompts.

    Raises:
        UserError: no prompts.
    """
    import torch

    if not prompts:
        raise UserError("no chat prompts to score; the held-out documents have no documented functions")
    encode = tokenizer if isinstance(tokenizer, PlainEncoder) else PlainEncoder(tokenizer)
    marks = encode.markers
    device = next(model.parameters()).device
    good, ended, parsed, answers = 0, 0, [], []
    with torch.inference_mode():
        for example in prompts:
            ids = torch.tensor([encode_prompt(encode, example.prompt)], device=device)
            output = model.generate(
                ids,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=marks.eos,
                pad_token_id=marks.pad,
            )
            new = output[0, ids.shape[1] :].tolist()
            finished = marks.eos in new
            answer = encode.decode(new[: new.index(marks.eos)] if finished else new)
            whole = finished and bool(answer.strip())
            if example.kind == "write":
                whole = whole and parses(answer)
                parsed.append(whole)
            ended += finished
            good += whole
            answers.append(answer)
    share = sum(parsed) / len(parsed) if parsed else None
    return ChatScore(good / len(prompts), ended / len(prompts), share, tuple(answers))
