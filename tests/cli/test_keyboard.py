"""Messages at a terminal: what is pasted at once is one message, and Ctrl-C does not end the session."""

import os
import pty
import select
import sys
from collections.abc import Callable, Iterator

import pytest

CODE = """
from tokensieve.cli.keyboard import read_message
while True:
    print("message", repr(read_message()), flush=True)
"""
Typed = Callable[..., None]


@pytest.fixture
def typed() -> Iterator[Typed]:
    """Types keys at a terminal once it shows a text (by default that it asks), and waits until it shows another."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CODE])

    shown = bytearray()

    def until(text: bytes, again: bytes = b"") -> None:
        seconds = 0
        while text not in shown:
            if select.select([terminal], [], [], 1)[0]:
                shown.extend(os.read(terminal, 4096))
            else:
                seconds += 1
                assert seconds < 20, f"{text!r} is not in {shown!r}"
                os.write(terminal, again)
        del shown[: shown.index(text) + len(text)]

    def keys(pressed: bytes, text: str, after: bytes = b">>> ") -> None:
        until(after)
        os.write(terminal, pressed)
        # input() notices a signal that comes in the middle of another key only with the next one
        until(text.encode(), again=pressed if pressed == b"\x03" else b"")

    yield keys
    os.close(terminal)
    os.waitpid(child, 0)


def test_what_is_pasted_is_one_message(typed: Typed) -> None:
    typed(b"\x1b[200~def f():\n\treturn 1\x1b[201~\r", r"message 'def f():\n\treturn 1'")  # as terminals mark a paste
    typed(b"one\ntwo\nthree\n", r"message 'one\ntwo\nthree'")  # without marks
    typed(b"one\r", "message 'one'")


def test_ctrl_c_drops_the_line_and_goes_on(typed: Typed) -> None:
    typed(b"half a line", "half a line")
    typed(b"\x03", "/exit or Ctrl-D ends", after=b"")
    typed(b"one\r", "message 'one'")
    typed(b"\x04", "EOFError")
