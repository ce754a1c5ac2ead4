"""Answers that obey a JSON schema or a grammar: which tokens may come next. llguidance knows; this brings its conventions to ours."""

import importlib.util
import json
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.request import Sampling

LONGEST_SCHEMA = 1 << 15  # characters; to compile this many takes about a second, in which nothing else runs

LONGEST_REASON = 300
COMPILED = 64  # schemas that are kept
# Spaces as `json.dumps` writes them: where any may stand, a small model writes spaces until its tokens are used up. oneOf as anyOf: the
# alternatives of a tagged union, which is what writes it, exclude each other anyway.
JSON_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


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
        # the answers to one request have the same schema, and so often have those to the next
        self._compiled = lru_cache(COMPILED)(self._compile)

    @cached_property
    def _known(self) -> Any:
        import llguidance.hf

        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=max(self._vocabulary, len(self._tokenizer)))

    def matcher(self, sampling: Sampling) -> Matcher | None:
        """None where any answer will do. UserError where the schema or grammar cannot be followed, or llguidance is not installed."""
        if sampling.schema is None and sampling.grammar is None:
            return None
        if not importlib.util.find_spec("llguidance"):
            raise UserError("answers in a JSON schema need llguidance; pip install 'tokensieve[serve]'")
        kind = "JSON schema" if sampling.grammar is None else "grammar"
        text = json.dumps(sampling.schema) if sampling.grammar is None else sampling.grammar
        if len(text) > LONGEST_SCHEMA:
            raise UserError(f"the {kind} has {len(text)} characters, more than {LONGEST_SCHEMA}; make it smaller")
        found = self._compiled(text, kind)
        if isinstance(found, str):
            raise UserError(f"the {kind} cannot be followed: {found}")
        return Matcher(found.deep_copy(), self._vocabulary)

    def _compile(self, text: str, kind: str) -> Any:
        """A matcher at its beginning, or why there is none."""
        from llguidance import LLMatcher

        try:
            if kind == "grammar":
                grammar = LLMatcher.grammar_from_lark(text)
            else:
                grammar = LLMatcher.grammar_from_json_schema(text, JSON_SPACES)
        except ValueError as error:  # nested too deeply, say
            return str(error)
        wrong = LLMatcher.validate_grammar(grammar, self._known)
        if wrong:
            return _reason(wrong)
        matcher = LLMatcher(self._known, grammar)
        return _reason(matcher.get_error()) if matcher.is_error() else matcher


def _reason(error: str) -> str:
    """In one line that is not long."""
    return " ".join(error.split())[:LONGEST_REASON]
