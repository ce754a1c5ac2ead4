"""Text -> token ids for any tokenizer with a Rust backend; text is never mistaken for a marker."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from tokensieve.config import UserError
from tokensieve.tasks.turns import (
    ASSISTANT,
    BOS,
    CALL,
    DEEPSEEK,
    END_CALL,
    END_THINK,
    EOS,
    PAD,
    THINK,
    Message,
    Turns,
    deepseek_conversation,
    deepseek_turns,
    plain_turns,
    template_pieces,
    template_turns,
)


class PlainEncoder:
    """Text -> token ids, in which a marker that is spelled out in the text stays ordinary text.

    Takes a transformers tokenizer or a `tokenizers.Tokenizer`; works on a copy and leaves the original as it was.
    `bos`, `eos` and `pad` are the tokenizer's, or None; `pad` falls back to eos. A tokenizer with DeepSeek's chat
    markers is used by them, any other one by its chat template; only chat data needs either.

    Raises:
        UserError: the tokenizer has no Rust backend.
    """

    def __init__(self, tokenizer: Any):
        raw = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not hasattr(raw, "encode_batch_fast"):
            raise UserError(f"{type(tokenizer).__name__} has no `tokenizers` backend; use one with a tokenizer.json")
        self.serialized: str = raw.to_str()
        self._load()
        ids = ((marker, self.raw.token_to_id(marker)) for marker in DEEPSEEK)
        markers = {marker: number for marker, number in ids if number is not None}
        self.markers = markers if len(markers) == len(DEEPSEEK) else None
        self.tokenizer = None if self.markers else tokenizer
        self.bos: int | None
        self.eos: int | None
        self.pad: int | None
        self.no_chat = ""  # the reason why there is no chat format
        identity = self.serialized
        if self.markers:
            self.bos, self.eos, self.pad = self.markers[BOS], self.markers[EOS], self.markers[PAD]
            self.turns = deepseek_turns(self.markers)
        else:
            self.bos, self.eos, pad = (getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad"))
            self.pad = self.eos if pad is None else pad
            try:
                self.turns = template_turns(tokenizer, self._with_markers, self.eos, self._special)
            except UserError as error:
                self.turns, self.no_chat = plain_turns(self, self.bos, self.eos), str(error)
            identity += repr((self.bos, self.eos, self.turns))
        self.fingerprint = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()

    def _load(self) -> None:
        from tokenizers import Tokenizer

        self.raw = Tokenizer.from_str(self.serialized)
        self.raw.encode_special_tokens = True
        self.raw.no_truncation()
        self.raw.no_padding()

    def __getstate__(self) -> dict[str, Any]:
        # The Rust object would come back without encode_special_tokens: it is not part of its serialized form.
        return {name: value for name, value in self.__dict__.items() if name != "raw"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._load()

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        added = max(self.raw.get_added_tokens_decoder(), default=-1)
        return max(self.raw.get_vocab_size(with_added_tokens=True), added + 1)

    @property
    def _special(self) -> set[int]:
        return {number for number, token in self.raw.get_added_tokens_decoder().items() if token.special}

    def __call__(self, text: str) -> list[int]:
        return self.raw.encode(text, add_special_tokens=False).ids

    def batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes many texts on all cores."""
        return [encoding.ids for encoding in self.raw.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self.raw.decode(list(ids), skip_special_tokens=False)

    def _with_markers(self, text: str) -> list[int]:
        """The ids of a template's own text, in which markers are markers."""
        self.raw.encode_special_tokens = False
        try:
            return self(text)
        finally:
            self.raw.encode_special_tokens = True

    @property
    def begin(self) -> list[int]:
        """What a text begins with: bos, or nothing."""
        return [] if self.bos is None else [self.bos]

    def frame(self) -> tuple[list[int], list[int]]:
        """The ids before and after a document among others: bos and eos, or whichever of them exists.

        Raises:
            UserError: the tokenizer has neither.
        """
        if self.bos is None and self.eos is None:
            raise UserError("the tokenizer has neither bos nor eos to part documents; set one in tokenizer_config.json")
        return self.begin, [] if self.eos is None or self.eos == self.bos else [self.eos]

    @property
    def ends(self) -> list[int]:
        """The tokens that end an answer: eos, and what the chat format closes answers with. Without either: empty."""
        eos = [] if self.eos is None else [self.eos]
        close = [] if self.no_chat else [self.turns.close[-1]]
        return sorted({*eos, *close})

    def chat(self) -> Turns:
        """The ids around the texts of a conversation: `turns`, but only if they are a chat format's.

        Raises:
            UserError: the tokenizer has no chat format, or one that cannot be used.
        """
        if self.no_chat:
            raise UserError(self.no_chat)
        return self.turns

    def prompt(self, prompt: "Sequence[int] | str | Sequence[Message]", think: bool = False) -> list[int]:
        """The token ids that a model continues: token ids as they are, a text after bos, messages in the chat format.

        think: behind messages with DeepSeek's markers the answer's thoughts are open, instead of closed. A chat
        template decides by itself what stands before an answer.

        Raises:
            UserError: messages, and the tokenizer has no chat format for them.
        """
        if isinstance(prompt, str):
            return [*self.begin, *self(prompt)]
        if not prompt or isinstance(prompt[0], int):
            return list(cast("Sequence[int]", prompt))
        messages = list(cast("Sequence[Message]", prompt))
        if self.markers:
            return [*deepseek_conversation(self.markers, self, messages), *self._reply(think)]
        return self._by_template(messages, generate=True)

    def _reply(self, think: bool) -> tuple[int, ...]:
        return (self.markers[ASSISTANT], self.markers[THINK]) if think and self.markers else self.turns.reply

    def next_turn(self, text: str, think: bool = False) -> list[int]:
        """The ids behind an answer that has ended: a user's text, up to where the next answer begins; as in `prompt`.

        Raises:
            UserError: the tokenizer has no chat format.
        """
        return [*self.chat().next, *self(text), *self._reply(think)]

    def solution(self, text: str) -> list[int]:
        """The ids of an answer, in which the markers of thoughts and calls are tokens if the vocabulary has them."""
        spelled = (THINK, END_THINK, CALL, END_CALL)
        parts = re.split(f"({'|'.join(map(re.escape, spelled))})", text)
        marks = {mark: self.raw.token_to_id(mark) for mark in spelled}
        known = {mark: number for mark, number in marks.items() if number is not None}
        return [token for part in parts if part for token in ([known[part]] if part in known else self(part))]

    def conversation(self, messages: "Sequence[Message]") -> list[int]:
        """The token ids of a whole conversation in the chat format.

        Raises:
            UserError: the tokenizer has no chat format for them.
        """
        if self.markers:
            return deepseek_conversation(self.markers, self, messages)
        return self._by_template(messages, generate=False)

    def _by_template(self, messages: "Sequence[Message]", generate: bool) -> list[int]:
        pieces = template_pieces(self.tokenizer, messages, generate)
        texts = [self(message["content"]) for message in messages]
        around = [self._with_markers(piece) for piece in pieces]
        return [token for piece, text in zip(around, [*texts, []], strict=True) for token in (*piece, *text)]


def encoder(tokenizer: Any) -> PlainEncoder:
    """The tokenizer's encoder; an encoder as it is."""
    return tokenizer if isinstance(tokenizer, PlainEncoder) else PlainEncoder(tokenizer)


def end_tokens(model: Any, tokenizer: Any) -> set[int]:
    """Tokens that end an answer: those of the checkpoint's files, eos, and what the chat template closes answers with.

    The last is needed for a tokenizer whose eos ends documents only, as `<|end_of_text|>` of Llama 3.
    """
    return {*model.end_tokens(tokenizer), *encoder(tokenizer).ends}
