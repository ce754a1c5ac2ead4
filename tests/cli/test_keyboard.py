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
Typed = Callable[[bytes, str], None]


@pytest.fixture
def typed() -> Iterator[Typed]:
    """Types keys at a terminal once it asks, and waits until it shows a text."""
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", CODE])

    shown = bytearray()

    def until(text: bytes) -> None:
        while text not in shown:
            assert select.select([terminal], [], [], 20)[0], f"{text!r} is not in {shown!r}"
            shown.extend(os.read(terminal, 4096))
        del shown[: shown.index(text) + len(text)]

    def keys(pressed: bytes, text: str) -> None:
        until(b">>> ")
        os.write(terminal, pressed)
        until(text.encode())

    yield keys
    os.close(terminal)
    os.waitpid(child, 0)


def test_what_is_pasted_is_one_message(typed: Typed) -> None:
    typed(b"\x1b[200~def f():\n\treturn 1\x1b[201~\r", r"message 'def f():\n\treturn 1'")  # as terminals mark a paste
    typed(b"one\ntwo\nthree\n", r"message 'one\ntwo\nthree'")  # without marks
    typed(b"one\r", "message 'one'")


def test_ctrl_c_drops_the_line_and_goes_on(typed: Typed) -> None:
    typed(b"half a line\x03", "/exit or Ctrl-D ends")
    typed(b"one\r", "message 'one'")
    typed(b"\x04", "EOFError")
