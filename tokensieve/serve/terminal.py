"""Talking to a model in a terminal, and answering a file of prompts: the engine without a server."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tokensieve.config import UserError
from tokensieve.engine import Engine, Request, Sampling

Message = dict[str, str]
Selects = str
ID = "conversation"
HELP = "/exit ends, /clear forgets what was said, Ctrl-C stops an answer"


def prompt_of(tokenizer: Any, messages: Sequence[Message]) -> tuple[int, ...]:
    """The conversation as the model was taught to read it. UserError where its tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise UserError("the model's tokenizer has no chat template; use --prompt, or add chat_template.jinja")
    return tuple(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False))


def converse(
    engine: Engine,
    sampling: Sampling,
    selection: Selects,
    read: Callable[[], str],
    write: Callable[[str], None],
    say: Callable[[str], None],
) -> None:
    """Reads messages and writes answers as they come, with all that was said before, until /exit or the input's end.

    read gives a line, or raises EOFError; write takes parts of an answer, say whole lines that are not part of one.
    """
    messages: list[Message] = []
    say(HELP)
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line == "/clear":
            messages.clear()
            say("forgotten")
        elif line.startswith("/"):
            say(f"{line.split()[0]} is unknown; {HELP}")
        elif line:
            asked = [*messages, {"role": "user", "content": line}]
            try:
                answer = "".join(
                    _stream(engine, Request(ID, prompt_of(engine.tokenizer, asked), sampling, selection), write)
                )
            except UserError as error:  # too long a conversation ends no session
                say(str(error))
                continue
            messages = [*asked, {"role": "assistant", "content": answer}]


def _stream(engine: Engine, request: Request, write: Callable[[str], None]) -> Iterator[str]:
    """The parts of one answer, each written as it comes. Ctrl-C ends it, and what came stays. UserError where the engine gives up."""
    engine.add(request)
    try:
        while engine.busy:
            for output in engine.step():
                if output.finish == "error":
                    raise UserError(f"no answer: {output.error}")
                write(output.text)
                yield output.text
    except KeyboardInterrupt:
        last = engine.abort(request.id)
        if last is not None:
            write(last.text)
            yield last.text
    write("\n")


def prompts_in(text: str) -> list[str]:
    """Prompts are set apart by blank lines, as in the official demo's files."""
    parts = itertools.groupby(text.splitlines(), key=lambda line: bool(line.strip()))
    found = ["\n".join(lines) for some, lines in parts if some]
    if not found:
        raise UserError("--input-file holds no prompt; write one or more, with blank lines between them")
    return found


def answer_all(
    engine: Engine, prompts: Sequence[str], sampling: Sampling, selection: Selects
) -> Iterator[tuple[str, str]]:
    """(prompt, answer) in the order of the prompts, each as soon as it and all before it are done. All run together.

    UserError where one has no answer.
    """
    for i, prompt in enumerate(prompts):
        tokens = prompt_of(engine.tokenizer, [{"role": "user", "content": prompt}])
        engine.add(Request(str(i), tokens, sampling, selection))
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
