"""Tokens back to text as they come, and the strings at which an answer ends."""

from typing import Any

from tokenizers.decoders import DecodeStream


class TextStream:
    """Turns an answer's tokens into text. Gives out only what is certain: whole characters, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        """tokenizer: a fast one of transformers."""
        self._tokenizer, self._stop = tokenizer, stop
        self._stream = DecodeStream(skip_special_tokens=True)
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        self._ids: list[int] = []
        self._decoded = 0  # characters so far, given out or held
        self._held = ""
        self._begins = [0] * len(stop)  # in what is held: the first place at which each stop string may begin
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain. `stopped` is set once a stop string is complete, and nothing follows it."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        given = "" if piece is None else self._give(piece)
        if token in self._special and not self.stopped:
            # It is left out of the text, but its place in it is known: what is before is not held back past it.
            given, self._held, self._begins = given + self._held, "", [0] * len(self._stop)
        return given

    def finish(self) -> str:
        """What was held back, at the answer's end: an incomplete character too, as the tokenizer writes it."""
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        given = self._give(whole[self._decoded :])
        rest, self._held = ("", "") if self.stopped else (self._held, "")
        return given + rest

    def _give(self, piece: str) -> str:
        self._decoded += len(piece)
        text = self._held + piece
        # Where a string did not begin it never will: every place is looked at once.
        self._begins = [_begin(text, stop, at) for stop, at in zip(self._stop, self._begins, strict=True)]
        ends = [at for stop, at in zip(self._stop, self._begins, strict=True) if at + len(stop) <= len(text)]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        certain = min(self._begins, default=len(text))
        self._begins = [at - certain for at in self._begins]
        self._held = text[certain:]
        return text[:certain]


def _begin(text: str, stop: str, at: int) -> int:
    """The first place from `at` on at which `text` holds all of `stop`, or ends with a beginning of it; the end of `text` is one."""
    while not stop.startswith(text[at : at + len(stop)]):
        at += 1
    return at
