"""Answers that obey a JSON schema or a grammar: the tokens that may come next.

llguidance finds them. This file adapts its conventions to the engine's.
"""

import importlib.util
import json
import re
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from tokensieve.config import UserError
from tokensieve.engine.request import Sampling

LONGEST_SCHEMA = 1 << 15  # characters; it takes about a second to compile so many, and nothing else runs meanwhile
LONGEST_REASON = 300  # characters
LONGEST_LINE = 100  # characters
LISTING = re.compile(r"\n\s*\d+ \| ")  # llguidance's, of the grammar's first lines
PLACE = re.compile(r"at (\d+)\(\d+\): (failed to compile JSON schema: )?")  # the number of a line
COMPILED = 64  # schemas and grammars that are kept compiled
# Spaces as `json.dumps` writes them. If any number were allowed, a small model would write spaces until its tokens are
# used up. oneOf is read as anyOf: it is mostly written for tagged unions, whose alternatives exclude each other anyway.
JSON_SPACES: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": ", "coerce_one_of": True}


class Matcher:
    """The state of one answer in its schema or grammar."""

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary

    def allowed(self) -> Tensor:
        """Mask (V) bool of the tokens that may come next. If the answer may end here, its end tokens are among them."""
        bits = torch.frombuffer(bytearray(self._matcher.compute_bitmask()), dtype=torch.uint8)
        mask = (bits[:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
        return torch.nn.functional.pad(mask, (0, max(0, self._vocabulary - len(mask))))[: self._vocabulary]

    def accept(self, token: int) -> bool:
        """Advances by one token. False if the matcher fails.

        Some schemas need more than the matcher can follow, which it finds out only on the way.
        """
        return bool(self._matcher.consume_token(token)) and not self._matcher.is_error()

    @property
    def done(self) -> bool:
        """Whether nothing may follow."""
        return self._matcher.is_stopped()


class Grammars:
    """Matchers for one tokenizer. vocabulary: size of the logits, V."""

    def __init__(self, tokenizer: Any, vocabulary: int):
        self._tokenizer, self._vocabulary = tokenizer, vocabulary
        # All answers to a request have the same schema, and the next requests often have it too.
        self._compiled = lru_cache(COMPILED)(self._compile)

    @cached_property
    def _ll_tokenizer(self) -> Any:
        import llguidance.hf

        return llguidance.hf.from_tokenizer(self._tokenizer, n_vocab=max(self._vocabulary, len(self._tokenizer)))

    def matcher(self, sampling: Sampling) -> Matcher | None:
        """Matcher for an answer, or None if any answer will do.

        Raises UserError if the schema or grammar is too long or cannot be followed, or llguidance is not installed.
        """
        if sampling.schema is None and sampling.grammar is None:
            return None
        if not importlib.util.find_spec("llguidance"):
            raise UserError("answers in a JSON schema need llguidance; pip install 'tokensieve[serve]'")
        kind = "JSON schema" if sampling.grammar is None else "grammar"
        text = json.dumps(sampling.schema) if sampling.grammar is None else sampling.grammar
        if len(text) > LONGEST_SCHEMA:
            raise UserError(f"the {kind} has {len(text)} characters, more than {LONGEST_SCHEMA}; make it smaller")
        result = self._compiled(text, kind)
        if isinstance(result, str):
            raise UserError(f"the {kind} cannot be followed: {result}")
        return Matcher(result.deep_copy(), self._vocabulary)

    def _compile(self, text: str, kind: str) -> Any:
        """llguidance's matcher at the beginning of an answer, or the reason why there is none."""
        from llguidance import LLMatcher

        try:
            if kind == "grammar":
                grammar = LLMatcher.grammar_from_lark(text)
            else:
                grammar = LLMatcher.grammar_from_json_schema(text, JSON_SPACES)
        except ValueError as error:  # for example, it is nested too deeply
            return str(error)
        problem = LLMatcher.validate_grammar(grammar, self._ll_tokenizer)
        if problem:
            return _reason(problem, text)
        matcher = LLMatcher(self._ll_tokenizer, grammar)
        return _reason(matcher.get_error(), text) if matcher.is_error() else matcher


def _reason(error: str, grammar: str) -> str:
    """An error as one line of at most `LONGEST_REASON` characters: the line at fault in place of the whole listing."""
    reason = LISTING.split(error)[0]
    if place := PLACE.match(reason):
        line = grammar.splitlines()[int(place[1]) - 1]
        reason = f"{reason[place.end() :]}, in {line[:LONGEST_LINE]}"
    return " ".join(reason.split())[:LONGEST_REASON]
