"""A bound on what a JSON body holds, checked before it is parsed.

To parse 16 MiB of brackets takes seconds in which no other answer is sent, in whatever thread: the parser does not give
the interpreter's lock away. Text is cheap, so strings are not looked into.
"""

import re

# Prompts of token ids have many commas. Nothing has many fields, objects and lists.
MOST = {b",": 2**20, b":": 2**17, b"{": 2**15, b"[": 2**15}
ANYTHING = min(MOST.values())  # bytes: so short a body is bounded, whatever it holds
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def is_bounded(body: bytes) -> bool:
    """Whether no sign of `MOST` is outside of strings more often than it may be."""
    if all(body.count(sign) <= most for sign, most in MOST.items()):
        return True
    counts, end = dict.fromkeys(MOST, 0), 0
    for string in STRING.finditer(body):
        for sign in counts:
            counts[sign] += body.count(sign, end, string.start())
        end = string.end()
        if any(counts[sign] > most for sign, most in MOST.items()):
            return False
    return all(counts[sign] + body.count(sign, end) <= most for sign, most in MOST.items())
