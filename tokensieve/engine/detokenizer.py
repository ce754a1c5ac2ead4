"""Tokens back to text as they come, and the strings at which an answer ends."""

from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # what half a character is decoded to


class Pieces:
    """Turns tokens into text one by one. Half a character waits for its other half, for as long as what follows may be it.

    A token's text depends on those before it (where a word begins, which bytes make a character), so the last piece's tokens are decoded
    once more with what is new.
    """

    def __init__(self, tokenizer: Any, skip_special: bool):
        """tokenizer: a fast one of transformers."""
        self._tokenizer, self._skip_special = tokenizer.backend_tokenizer, skip_special
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(id for id, token in added.items() if token.special)
        self._ids: list[int] = []  # of the last piece, then those whose text is not given yet
        self._given = 0  # of them, those of the last piece

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        if self._skip_special and token in self.special:
            return ""
        self._ids.append(token)
        before, now = self._decoded(self._ids[: self._given]), self._decoded(self._ids)
        if len(now) <= len(before) or now.endswith(UNFINISHED):
            return ""
        self._ids = self._ids[self._given :]
        self._given = len(self._ids)
        return now[len(before) :]

    def _decoded(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


class Detokenizer:
    """Turns an answer's tokens into text. Gives out only what is certain: whole characters, and nothing that may begin a stop string."""

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        """tokenizer: a fast one of transformers."""
        self._tokenizer, self._stop = tokenizer, stop
        self._pieces = Pieces(tokenizer, skip_special=True)
        self._ids: list[int] = []
        self._decoded = 0  # characters so far, given out or held
        self._held = ""
        self._begins = [0] * len(stop)  # in what is held: the first place at which each stop string may begin
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain. `stopped` is set once a stop string is complete, and nothing follows it."""
        self._ids.append(token)
        piece = self._pieces.push(token)
        given = self._give(piece) if piece else ""
        if token in self._pieces.special and not self.stopped:
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
