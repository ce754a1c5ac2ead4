"""The engine in a terminal: a conversation that goes on, and the prompts of a file."""

import signal
from typing import Any

import pytest
import torch

import tokensieve
from tokensieve.cli import terminal
from tokensieve.config import UserError
from tokensieve.engine import Engine, EngineConfig, Sampling
from tokensieve.model.selection import SelectionContext, indexer


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(
        tokensieve.load("sparse", torch.float32), tokensieve.load_tokenizer("sparse"), EngineConfig(pages=40, running=4)
    )


def talk(engine: Engine, *lines: str, tokens: int = 8, selector: str = "indexer") -> tuple[str, list[str]]:
    """What was written, and what was said beside it."""
    coming, written, said = iter(lines), [], []

    def read() -> str:
        for line in coming:
            return line
        raise EOFError

    terminal.converse(engine, Sampling(max_tokens=tokens), selector, read, written.append, said.append)
    assert not engine.busy and engine.scheduler.pool.used == 0
    return "".join(written), said


def test_what_has_no_answer_is_said(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    run_chunk = engine.runner.chunk
    monkeypatch.setattr(engine.runner, "chunk", lambda *of: run_chunk(*of) * torch.nan)
    written, said = talk(engine, "Who are you?")
    assert written == "" and "not finite" in said[1]
    with pytest.raises(UserError, match=r"prompt 1 .*not finite"):
        list(terminal.answer_all(engine, ["Who are you?"], Sampling(max_tokens=6), "dense"))
    assert not engine.busy


def test_a_conversation_goes_on_until_it_is_cleared(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[dict[str, str]]] = []
    known = terminal.prompt_of

    def kept(tokenizer: Any, messages: Any) -> tuple[int, ...]:
        asked.append(list(messages))
        return known(tokenizer, messages)

    monkeypatch.setattr(terminal, "prompt_of", kept)
    written, said = talk(
        engine, "Who are you?", "", "/what", "And then?", "/clear", "/help", "Who are you?", "/exit", "never"
    )
    answers = written.split("\n")
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"] and asked[1][1]["content"] in written
    assert len(asked) == 3 and asked[2] == asked[0] and answers[-2] == answers[0] != ""
    assert said[0] == terminal.HELP and "/what is unknown" in said[1] and said[2:] == ["forgotten", terminal.HELP]


def test_interrupted_answers_stay(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, whole = [0], engine.step

    def interrupted() -> Any:
        steps[0] += 1
        if steps[0] == 4:
            signal.raise_signal(signal.SIGINT)
        return whole()

    monkeypatch.setattr(engine, "step", interrupted)
    written, _ = talk(engine, "Who are you?", tokens=40)
    assert 0 < len(written.strip()) < 40 and steps[0] == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_paste_that_begins_with_a_slash_is_a_message(engine: Engine) -> None:
    written, said = talk(engine, "/* a comment */\nint x;")
    assert written.strip() and said == [terminal.HELP]


def test_a_conversation_that_is_too_long_goes_on(engine: Engine) -> None:
    written, said = talk(engine, "word " * 4000, "Who are you?")
    assert any("shorten" in line for line in said) and written.strip()


calls: list[int] = []  # the layers that `wrong_at_first` was asked for


def wrong_at_first(c: SelectionContext) -> torch.Tensor:
    calls.append(c.layer)
    return indexer(c) if len(calls) > 1 else indexer(c).flip(1)


def test_a_conversation_goes_on_after_a_selector_has_failed(engine: Engine) -> None:
    name = "tests.cli.test_terminal:wrong_at_first"
    written, said = talk(engine, "Who are you?", "Who are you?", selector=name)
    assert len(said) == 2 and "selection wrong_at_first gave query" in said[1]
    assert written == talk(engine, "Who are you?")[0] != ""


def test_prompts_of_a_file(engine: Engine) -> None:
    assert terminal.prompts_in("a\nb\n\n  \nc\n") == ["a\nb", "c"]
    with pytest.raises(UserError, match="holds no prompt"):
        terminal.prompts_in(" \n\n")
    prompts = [f"What is {i}?" for i in range(7)]  # more than run at once
    found = list(terminal.answer_all(engine, prompts, Sampling(max_tokens=6), "dense"))
    assert [prompt for prompt, _ in found] == prompts and all(answer for _, answer in found)
    assert list(terminal.answer_all(engine, prompts[3:4], Sampling(max_tokens=6), "dense")) == found[3:4]


def test_no_chat_template() -> None:
    tokenizer = tokensieve.load_tokenizer("sparse")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        terminal.prompt_of(tokenizer, [])
