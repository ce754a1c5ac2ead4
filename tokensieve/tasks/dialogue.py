"""Short turns about real functions, sums, and who is speaking: enough to teach a base model its chat format.

With DeepSeek's markers: bos <User> question <Assistant></think> answer eos
"""

import ast
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from tokensieve.config import UserError
from tokensieve.tasks.contract import Answer, Example, Score
from tokensieve.tasks.documents import Document, Documents, Split, parse_python, stable_fraction
from tokensieve.tasks.encoder import PlainEncoder

Kind = Literal["talk", "explain", "write"]  # from the easiest to the hardest

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
MAX_SOURCE = 800  # characters of a function that has to be written
TALK_EVERY = 12  # examples about functions to one of small talk or a sum


@dataclass(frozen=True, kw_only=True)
class ChatExample(Example):
    """A question (`prompt` is the one message) and an answer of the training data."""

    kind: Kind
    question: str
    answer: str


def _example(name: str, kind: Kind, question: str, answer: str) -> ChatExample:
    prompt = ({"role": "user", "content": question},)
    return ChatExample(name=name, prompt=prompt, kind=kind, question=question, answer=answer)


def _first_line(docstring: str) -> str:
    return docstring.strip().split("\n")[0].strip()


def function_examples(document: Document) -> Iterator[ChatExample]:
    """One example for each documented function; none from a text that is not Python."""
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
                question = WRITE[int(draw * 1e6) % len(WRITE)].format(sig=signature, doc=line)
                yield _example(name, "write", question, ast.unparse(node))
                continue
        yield _example(name, "explain", EXPLAIN[int(draw * 1e6) % len(EXPLAIN)].format(node.name), line)


def talk_example(number: int) -> ChatExample:
    """The `number`-th example of small talk: half about itself, half sums of numbers up to 99."""
    rng = random.Random(number)
    if number % 2:
        question, answer = rng.choice(TALK)
        return _example(f"talk.{number}", "talk", question, answer)
    first, second = rng.randint(0, 99), rng.randint(0, 99)
    return _example(f"sum.{number}", "talk", rng.choice(SUMS).format(first, second), str(first + second))


def conversations(documents: Iterable[Document]) -> Iterator[ChatExample]:
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


def encoded_examples(documents: Iterable[Document], encode: PlainEncoder) -> Iterator[tuple[str, list[int]]]:
    """(name, ids) of every example as a whole document, bos and the end of the answer included.

    Raises:
        UserError: the tokenizer has no chat format.
    """
    turns = encode.chat()
    for example in conversations(documents):
        question, answer = encode(example.question), encode(example.answer)
        yield example.name, [*turns.open, *question, *turns.reply, *answer, *turns.close]


@dataclass(frozen=True)
class Chat:
    """Questions about documented functions (a `Task`).

    Difficulty: 0 is small talk and sums alone, which takes `talk`; 1 adds functions to explain, 2 functions to write;
    None is 2.

    talk: with small talk and sums, which are the same in both splits: a model knows who it is from training alone.
    """

    documents: Documents
    talk: bool = False
    name: str = "chat"

    def examples(self, split: Split, count: int, difficulty: int | None = None, seed: int = 0) -> list[ChatExample]:
        lowest = 0 if self.talk else 1
        if count < 1:
            raise UserError(f"{count} examples of {self.name} were asked for; ask for at least one")
        if difficulty is not None and difficulty < lowest:
            remedy = "" if self.talk else ", or Chat(talk=True), whose difficulty 0 is small talk and sums"
            raise UserError(f"{self.name} has no examples of difficulty {difficulty}; use {lowest} to 2{remedy}")
        kinds = get_args(Kind)[lowest : 3 if difficulty is None else difficulty + 1]
        cases = [example for example in conversations(self.documents.of(split)) if example.kind in kinds]
        if not cases:
            which = "held-out" if split == "test" else "training"
            raise UserError(f"no chat prompts to score; the {which} documents have no documented functions")
        return random.Random(seed).sample(cases, min(count, len(cases)))

    def score(self, example: ChatExample, answer: Answer) -> Score:
        """1 if the answer is not empty, ended in time, and parses if a function was asked for.

        Parts: "ended"; and "parsed" of functions, which is 1 if the score is.
        """
        good = answer.ended and bool(answer.text.strip()) and (example.kind != "write" or parses(answer.text))
        parts = {"ended": float(answer.ended)} | ({"parsed": float(good)} if example.kind == "write" else {})
        return Score(float(good), parts)

    def reward(self, example: ChatExample, answer: Answer) -> float:
        """The score's value."""
        return self.score(example, answer).value


def parses(text: str) -> bool:
    """Whether the text is Python with at least one statement."""
    tree = parse_python(text)
    return tree is not None and bool(tree.body)
