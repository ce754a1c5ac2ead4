"""OpenAI's text completions: a request's prompts, and the choices of its response."""

import codecs

from tokensieve.engine import Output, TokenLogprob
from tokensieve.serve.handler import Prepared
from tokensieve.serve.prompts import Prompts
from tokensieve.serve.response import Json, Labels, choice
from tokensieve.serve.schema import CompletionRequest
from tokensieve.serve.token_texts import TokenTexts


class CompletionFormat:
    labels = Labels("cmpl", "text_completion", "text_completion")

    def __init__(self, prompts: Prompts, texts: TokenTexts):
        self._prompts, self._texts = prompts, texts

    def prepare(self, body: CompletionRequest) -> Prepared:
        return Prepared(
            prompts=[self._prompts.completion(prompt) for prompt in body.prompts],
            choice=lambda _: CompletionChoice(self._texts, body.logprobs is not None),
        )


class CompletionChoice:
    """A choice of a text completion."""

    reasoning_tokens = 0

    def __init__(self, texts: TokenTexts, logprobs: bool):
        self._texts, self._with_logprobs = texts, logprobs
        self._text, self._offset = "", 0  # offset: characters of the tokens whose logprobs were shown
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._finish: str | None = None
        self._logprobs: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def push(self, output: Output) -> list[Json]:
        self._text += output.text
        self._finish = output.finish
        logprobs = self._push_logprobs(output.logprobs) if self._with_logprobs else None
        if not output.text and output.finish is None and not (logprobs and logprobs["tokens"]):
            return []
        return [choice(text=output.text, logprobs=logprobs, finish_reason=output.finish)]

    def whole(self) -> Json:
        logprobs = self._logprobs if self._with_logprobs else None
        return choice(text=self._text, logprobs=logprobs, finish_reason=self._finish)

    def _push_logprobs(self, logprobs: tuple[TokenLogprob, ...]) -> Json:
        new: Json = {name: [] for name in self._logprobs}
        for one in logprobs:
            new["tokens"].append(self._texts.name_of(one.token))
            new["token_logprobs"].append(max(one.logprob, -9999.0))  # JSON has no infinity
            top = {**dict(one.top), one.token: one.logprob}  # with the token itself, which may not be among them
            new["top_logprobs"].append({self._texts.name_of(t): max(p, -9999.0) for t, p in top.items()})
            new["text_offset"].append(self._offset)
            self._offset += len(self._characters.decode(self._texts.visible_bytes(one.token)))
        for name, values in new.items():
            self._logprobs[name] += values
        return new
