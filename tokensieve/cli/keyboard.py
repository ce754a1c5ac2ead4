"""Messages that are typed at a terminal, or pasted into it."""

import readline
import select
import sys

PASTE_SECONDS = 0.02  # in which the rest of a long paste follows


def read_message(prompt: str = ">>> ") -> str:
    """A message: the line that is typed, or all lines that are pasted at once. The arrow keys edit and recall.

    Ctrl-C drops what was typed, and the message is empty. EOFError at the end of the input (Ctrl-D).
    """
    # The terminal then marks a paste, whose lines stay together and can be edited. libedit, and text that came while
    # nobody read, know no marks: there the lines that wait already belong together.
    readline.parse_and_bind("set enable-bracketed-paste on")
    try:
        lines = [input(prompt)]
        while select.select([sys.stdin], [], [], PASTE_SECONDS)[0]:
            lines.append(input())
    except KeyboardInterrupt:
        print("\n/exit or Ctrl-D ends", file=sys.stderr)
        return ""
    return "\n".join(lines)
