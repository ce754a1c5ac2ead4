"""A conversation with a model in a terminal, and answers to a file of prompts. Both use the engine without a server."""

import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tokensieve.cli.program import held_log
from tokensieve.config import UserError
from tokensieve.engine import Engine, Request, Sampling
from tokensieve.tasks.turns import prompt_ids

Message = dict[str, str]
ID = "conversation"
HELP = "/exit ends, /clear forgets the conversation, /help shows this, Ctrl-C stops an answer"


def prompt_of(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The conversation in the model's chat format. UserError without a chat template that can write it."""
    return tuple(prompt_ids(tokenizer, messages))


def _request(engine: Engine, id: str, messages: Sequence[Message], sampling: Sampling, selector: str) -> Request:
    return Request(id, prompt_of(engine.tokenizer, messages), sampling, selector)


def converse(
    engine: Engine,
    sampling: Sampling,
    selector: str,
    read: Callable[[], str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Read messages and write their answers as they come, until /exit or the end of the input.

    Every prompt holds the whole conversation so far. read returns a message, or raises EOFError; write takes parts of
    an answer; say takes whole lines that belong to no answer. A message of one line that begins with / is a command.
    """
    messages: list[Message] = []
    say(HELP)
    while True:
        try:
            message = read().strip()
        except EOFError:
            return
        if message == "/exit":
            return
        if message == "/clear":
            messages.clear()
            say("forgotten")
        elif message == "/help":
            say(HELP)
        elif message.startswith("/") and "\n" not in message:
            say(f"{message.split()[0]} is unknown; {HELP}")
        elif message:
            question = [*messages, {"role": "user", "content": message}]
            try:
                with held_log(), _ctrl_c() as pressed:
                    request = _request(engine, ID, question, sampling, selector)
                    answer = _answer(engine, request, write, pressed)
            except UserError as error:  # a conversation that is too long does not end the session
                say(str(error))
                continue
            messages = [*question, {"role": "assistant", "content": answer}]


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Ctrl-C sets an event instead of raising, so that no step of the engine is left half done."""
    pressed = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: pressed.set())
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(engine: Engine, request: Request, write: Callable[[str], None], stop: threading.Event) -> str:
    """An answer, each part of which is written as it comes. If `stop` is set meanwhile, it is the answer's beginning.

    UserError if the engine or a selector fails; the engine then holds no request, and can take the next one.
    """
    engine.add(request)
    parts: list[str] = []
    try:
        while engine.busy and not stop.is_set():
            for output in engine.step():
                if output.finish == "error":
                    raise UserError(f"no answer: {output.error}")
                parts.append(output.text)
                write(output.text)
    except UserError as error:
        engine.fail_all(str(error))
        if parts:
            write("\n")
        raise
    if (last := engine.abort(request.id)) is not None:
        parts.append(last.text)
        write(last.text)
    write("\n")
    return "".join(parts)


def prompts_in(text: str) -> list[str]:
    """The prompts in a text, separated by blank lines as in the official demo's files. UserError if there are none."""
    groups = itertools.groupby(text.splitlines(), key=lambda line: bool(line.strip()))
    prompts = ["\n".join(lines) for is_prompt, lines in groups if is_prompt]
    if not prompts:
        raise UserError("--input-file holds no prompt; write one or more, with blank lines between them")
    return prompts


def answer_all(engine: Engine, prompts: Sequence[str], sampling: Sampling, selector: str) -> Iterator[tuple[str, str]]:
    """(prompt, answer) in the order of the prompts, each as soon as its answer and all before it are complete.

    All prompts run together. UserError if the engine fails at one.
    """
    for i, prompt in enumerate(prompts):
        engine.add(_request(engine, str(i), [{"role": "user", "content": prompt}], sampling, selector))
    texts, done, given = [""] * len(prompts), [False] * len(prompts), 0
    while engine.busy:
        for output in engine.step():
            if output.finish == "error":
                raise UserError(f"prompt {int(output.id) + 1} has no answer: {output.error}")
            texts[int(output.id)] += output.text
            done[int(output.id)] = output.finish is not None
        while given < len(prompts) and done[given]:
            yield prompts[given], texts[given]
            given += 1
