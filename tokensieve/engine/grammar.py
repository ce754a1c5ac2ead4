"""Answers that obey a JSON schema: which tokens may come next. llguidance knows; this brings its conventions to ours."""

import importlib.util
import json
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError

LONGEST_SCHEMA = 1 << 15  # characters; to compile this many takes about a second, in which nothing else runs


class Matcher:
    """Of one answer."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """(V) bool: the tokens that may come next; the end of the answer is one of them where it may end."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        mask = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        return torch.nn.functional.pad(mask, (0, max(0, self._vocabulary - len(mask))))[: self._vocabulary]

    def accept(self, token: int) -> bool:
        """False where the matcher fails: some schemas ask for more than it can follow, which it only sees on the way."""
        return bool(self._matcher.consume_token(token)) and not self._matcher.is_error()

    @property
    def done(self) -> bool:
        """Nothing may follow."""
        return self._matcher.is_stopped()


class Grammars:
    def __init__(self, tokenizer: Any, vocabulary: int):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary

    @cached_property
    def _known(self) -> Any:
        import llguidance.hf

        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=max(self._vocabulary, len(self._tokenizer)))

    def matcher(self, schema: dict[str, Any]) -> Matcher:
        """UserError where the schema cannot be followed, or llguidance is not installed."""
        if not importlib.util.find_spec("llguidance"):
            raise UserError("answers in a JSON schema need llguidance; pip install 'tokensieve[serve]'")
        from llguidance import LLMatcher

        text = json.dumps(schema)
        if len(text) > LONGEST_SCHEMA:
            raise UserError(f"the JSON schema has {len(text)} characters, more than {LONGEST_SCHEMA}; make it smaller")
        # Spaces as `json.dumps` writes them: where any may stand, a small model writes spaces until its tokens are used up.
        try:
            grammar = LLMatcher.grammar_from_json_schema(
                text, {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
            )
        except ValueError as error:  # nested too deeply, say
            raise UserError(f"the JSON schema cannot be followed: {error}") from error
        wrong = LLMatcher.validate_grammar(grammar, self._known)
        if wrong:
            raise UserError(f"the JSON schema cannot be followed: {wrong.splitlines()[0]}")
        matcher = LLMatcher(self._known, grammar)
        if matcher.is_error():
            raise UserError(f"the JSON schema cannot be followed: {matcher.get_error().splitlines()[0]}")
        return Matcher(matcher, self._vocabulary)
