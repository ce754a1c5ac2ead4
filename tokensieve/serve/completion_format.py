"""OpenAI's text completions: a request's prompts, and the choices of its response."""

import codecs
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tokensieve.engine import Output, TokenLogprob
from tokensieve.serve.handler import Prepared
from tokensieve.serve.prompts import Prompts
from tokensieve.serve.response import Json, Labels, choice
from tokensieve.serve.schema import CompletionRequest
from tokensieve.serve.token_texts import TokenTexts

Scored = tuple[int, TokenLogprob | None, bytes]  # a token, its log probability, and its bytes in the text


@dataclass(frozen=True)
class Echo:
    """A prompt that its answers repeat. silent: how many of the first tokens are not in the text."""

    text: str
    tokens: Sequence[int]
    silent: int


class CompletionFormat:
    labels = Labels("cmpl", "text_completion", "text_completion")

    def __init__(self, prompts: Prompts, texts: TokenTexts):
        self._prompts, self._texts = prompts, texts

    def prepare(self, body: CompletionRequest) -> Prepared:
        prompts = [self._prompts.completion(prompt) for prompt in body.prompts]
        echoes = [
            self._echo(given, tokens) if body.echo else None
            for given, tokens in zip(body.prompts, prompts, strict=True)
        ]
        return Prepared(
            prompts=prompts,
            choice=lambda _, number: CompletionChoice(self._texts, body.logprobs is not None, echoes[number]),
        )

    def _echo(self, given: str | list[int], tokens: list[int]) -> Echo:
        if not isinstance(given, str):
            text = b"".join(map(self._texts.bytes_of, given)).decode(errors="replace")
            return Echo(text, tokens, 0)
        begins = not tokens or given.encode().startswith(self._texts.bytes_of(tokens[0]))
        return Echo(given, tokens, 0 if begins else 1)  # a first token that the text lacks was put before it


class CompletionChoice:
    """A choice of a text completion. echo: the prompt, if the text and the log probabilities begin with it."""

    reasoning_tokens = 0

    def __init__(self, texts: TokenTexts, logprobs: bool, echo: Echo | None = None):
        self._texts, self._with_logprobs, self._echo = texts, logprobs, echo
        self._text, self._offset = "", 0  # offset: characters of the tokens whose logprobs were shown
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._finish: str | None = None
        self._logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def push(self, output: Output) -> list[Json]:
        text = output.text
        scored: list[Scored] = [(one.token, one, self._texts.visible_bytes(one.token)) for one in output.logprobs]
        if self._echo is not None:
            text = self._echo.text + text
            scored = [*self._prompt(self._echo, output.prompt_logprobs), *scored]
            self._echo = None
        self._text += text
        self._finish = output.finish
        logprobs = self._push_logprobs(scored) if self._with_logprobs else None
        if not text and output.finish is None and not (logprobs and logprobs["tokens"]):
            return []
        return [choice(text=text, logprobs=logprobs, finish_reason=output.finish)]

    def whole(self) -> Json:
        logprobs = self._logprobs if self._with_logprobs else None
        return choice(text=self._text, logprobs=logprobs, finish_reason=self._finish)

    def _prompt(self, echo: Echo, logprobs: Sequence[TokenLogprob | None]) -> Iterable[Scored]:
        """The prompt's tokens, if they have log probabilities. Markers are part of an echoed text."""
        for number, (token, one) in enumerate(zip(echo.tokens, logprobs)):
            yield token, one, b"" if number < echo.silent else self._texts.bytes_of(token)

    def _push_logprobs(self, scored: Iterable[Scored]) -> Json:
        new: Json = {name: [] for name in self._logprobs}
        for token, one, data in scored:
            new["tokens"].append(self._texts.name_of(token))
            new["token_logprobs"].append(None if one is None else max(one.logprob, -9999.0))  # JSON has no infinity
            new["top_logprobs"].append(None if one is None else self._top(one))
            new["text_offset"].append(self._offset)
            self._offset += len(self._characters.decode(data))
        for name, values in new.items():
            self._logprobs[name] += values
        return new

    def _top(self, one: TokenLogprob) -> dict[str, float]:
        """The alternatives with the token itself, which may not be among them."""
        top = {**dict(one.top), one.token: one.logprob}
        return {self._texts.name_of(t): max(p, -9999.0) for t, p in top.items()}
