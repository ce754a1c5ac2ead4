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
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain. `stopped` is set once a stop string is complete, and nothing follows it."""
        self._ids.append(token)
        piece = self._stream.step(self._tokenizer.backend_tokenizer, token)
        given = "" if piece is None else self._give(piece)
        if token in self._special and not self.stopped:
            # It is left out of the text, but its place in it is known: what is before is not held back past it.
            given, self._held = given + self._held, ""
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
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)
