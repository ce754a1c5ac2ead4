"""Text to the token ids of a prompt."""

from typing import Any

from tokensieve.serve.errors import ApiError, prompt_too_long


class Prompts:
    """longest: tokens of the longest prompt and answer together."""

    def __init__(self, tokenizer: Any, longest: int):
        self._tokenizer, self._longest = tokenizer, longest
        # No token of a byte-level tokenizer stands for more characters than it is written with.
        self._most_characters = longest * max(map(len, tokenizer.get_vocab()))

    def tokens_of(self, text: str) -> list[int]:
        """ApiError for a text that is too long for any tokenization, or that is no valid Unicode."""
        if len(text) > self._most_characters:
            raise prompt_too_long(f"{len(text)} characters", self._longest)
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ApiError(400, "the prompt holds half of a surrogate pair, which is no character")
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)

    def completion(self, prompt: str | list[int]) -> list[int]:
        """A prompt to be continued: token ids unchanged, and a text behind the tokenizer's first token."""
        if not isinstance(prompt, str):
            return prompt
        first, tokens = self._tokenizer.bos_token_id, self.tokens_of(prompt)
        return tokens if first is None or tokens[:1] == [first] else [first, *tokens]
