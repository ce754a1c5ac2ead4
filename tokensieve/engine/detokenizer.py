"""Tokens to text, one at a time, and the strings at which an answer ends."""

from typing import Any

UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # the decoded form of an incomplete character


class Pieces:
    """Text of tokens, one by one. An incomplete character is held back for as long as later tokens may complete it.

    A token's text depends on the tokens before it (where a word begins, which bytes make a character), so the tokens of
    the last piece are decoded again together with the new ones.
    """

    def __init__(self, tokenizer: Any, skip_special: bool):
        """tokenizer: a fast tokenizer of transformers. skip_special: whether special tokens have no text."""
        self._tokenizer, self._skip_special = tokenizer.backend_tokenizer, skip_special
        added = self._tokenizer.get_added_tokens_decoder()
        self.special = frozenset(id for id, token in added.items() if token.special)
        self._ids: list[int] = []  # tokens of the last piece, then those whose text is held back
        self._last_piece = 0  # number of tokens of the last piece

    def push(self, token: int) -> str:
        """Text that `token` makes certain."""
        if self._skip_special and token in self.special:
            return ""
        self._ids.append(token)
        last, text = self._decode(self._ids[: self._last_piece]), self._decode(self._ids)
        if len(text) <= len(last) or text.endswith(UNFINISHED):
            return ""
        self._ids = self._ids[self._last_piece :]
        self._last_piece = len(self._ids)
        return text[len(last) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special)


class Detokenizer:
    """Text of an answer's tokens, returned as soon as it is certain.

    Certain are whole characters that cannot belong to a stop string which later tokens may complete.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...] = ()):
        """tokenizer: a fast tokenizer of transformers. stop: strings at which the answer ends."""
        self._tokenizer, self._stop = tokenizer, stop
        self._pieces = Pieces(tokenizer, skip_special=True)
        self._ids: list[int] = []
        self._decoded = 0  # characters so far, returned or held back
        self._pending = ""  # text that is held back, since a stop string may begin in it
        self._begins = [0] * len(stop)  # the first position in the pending text at which each stop string may begin
        self.stopped = False

    def push(self, token: int, may_stop: bool = True) -> str:
        """Text that `token` makes certain. Once a stop string is complete, `stopped` is set, and no text follows.

        may_stop: whether a stop string may end the answer with this token, or begin in it.
        """
        self._ids.append(token)
        piece = self._pieces.push(token)
        if not may_stop:
            self._decoded += len(piece)
            return piece
        text = self._certain(piece) if piece else ""
        if token in self._pieces.special and not self.stopped:
            # A special token has no text, but its position in the text is known: no stop string reaches across it, so
            # the text before it is not held back any longer.
            text, self._pending, self._begins = text + self._pending, "", [0] * len(self._stop)
        return text

    def finish(self) -> str:
        """Text that was held back, at the end of the answer.

        It includes an incomplete character, in the form in which the tokenizer writes it.
        """
        if self.stopped:
            return ""
        whole = self._tokenizer.decode(self._ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        text = self._certain(whole[self._decoded :])
        rest, self._pending = ("", "") if self.stopped else (self._pending, "")
        return text + rest

    def _certain(self, piece: str) -> str:
        """Text that is certain after `piece`; the rest becomes the pending text."""
        self._decoded += len(piece)
        text = self._pending + piece
        # A stop string that does not begin at a position never will, so every position is searched only once.
        self._begins = [_begin(text, stop, at) for stop, at in zip(self._stop, self._begins, strict=True)]
        complete = [at for stop, at in zip(self._stop, self._begins, strict=True) if at + len(stop) <= len(text)]
        if complete:
            self.stopped, self._pending = True, ""
            return text[: min(complete)]
        certain = min(self._begins, default=len(text))
        self._begins = [at - certain for at in self._begins]
        self._pending = text[certain:]
        return text[:certain]


def _begin(text: str, stop: str, at: int) -> int:
    """First position from `at` on at which `text` contains all of `stop`, or ends with a beginning of it.

    The end of `text` is such a position.
    """
    while not stop.startswith(text[at : at + len(stop)]):
        at += 1
    return at
