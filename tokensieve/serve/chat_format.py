"""OpenAI's chat completions: a request's prompt, and the choices of its response."""

from typing import Any

from tokensieve.engine import Output, TokenLogprob
from tokensieve.serve.answer_grammar import AnswerGrammar
from tokensieve.serve.chat_template import ChatTemplate
from tokensieve.serve.handler import Prepared
from tokensieve.serve.parsing import OutputParser, Piece
from tokensieve.serve.prompts import Prompts
from tokensieve.serve.response import Json, Labels, choice
from tokensieve.serve.schema import ChatRequest
from tokensieve.serve.token_texts import TokenTexts


class ChatFormat:
    labels = Labels("chatcmpl", "chat.completion", "chat.completion.chunk")

    def __init__(self, tokenizer: Any, prompts: Prompts, texts: TokenTexts):
        self._template, self._grammar = ChatTemplate(tokenizer), AnswerGrammar(tokenizer)
        self._prompts, self._texts = prompts, texts

    def prepare(self, body: ChatRequest) -> Prepared:
        text = self._template.render(body)
        tokens = self._prompts.tokens_of(text)
        thinks = self._template.thinking(body, text) is True
        notation = self._template.notation if body.callable else None
        return Prepared(
            prompts=[tokens],
            choice=lambda id, _: ChatChoice(id, self._template.parser(body, text), self._texts, body.logprobs),
            constraint=self._grammar.constraint(body, notation, thinks),
        )


class ChatChoice:
    """A choice of a chat completion. id: of its request to the engine; it becomes part of the ids of tool calls."""

    def __init__(self, id: str, parser: OutputParser, texts: TokenTexts, logprobs: bool):
        self._id, self._parser, self._texts = id, parser, texts
        self._logprobs: list[Json] | None = [] if logprobs else None
        self._begun = False
        self._text = {"reasoning": "", "content": ""}
        self._calls: list[Json] = []
        self._finish: str | None = None
        self.reasoning_tokens = 0

    def push(self, output: Output) -> list[Json]:
        self.reasoning_tokens += len(output.tokens) if self._parser.state == "reasoning" else 0
        pieces = self._parser.push(output.text, output.tokens)
        if output.finish is not None:
            pieces += self._parser.finish()
        deltas = [self._delta(piece) for piece in pieces]
        logprobs = None
        if self._logprobs is not None and output.logprobs:
            new = [self._logprob(t) for t in output.logprobs]
            self._logprobs += new
            logprobs = {"content": new}
            deltas = deltas or [{}]
        choices = [choice(delta=delta, logprobs=None, finish_reason=None) for delta in deltas]
        if choices:
            choices[0]["logprobs"] = logprobs
        if not self._begun:
            self._begun = True
            role = {"role": "assistant", "content": ""}
            choices.insert(0, choice(delta=role, logprobs=None, finish_reason=None))
        if output.finish is not None:
            self._finish = "tool_calls" if output.finish == "stop" and self._calls else output.finish
            choices.append(choice(delta={}, logprobs=None, finish_reason=self._finish))
        return choices

    def whole(self) -> Json:
        message: Json = {"role": "assistant", "content": self._text["content"], "refusal": None}
        if self._text["reasoning"]:
            message["reasoning_content"] = self._text["reasoning"]
        if self._calls:
            message |= {"tool_calls": self._calls, "content": self._text["content"] or None}
        logprobs = None if self._logprobs is None else {"content": self._logprobs}
        return choice(message=message, logprobs=logprobs, finish_reason=self._finish)

    def _delta(self, piece: Piece) -> Json:
        if piece.kind == "call":
            index = len(self._calls)
            call = {
                "id": f"call_{self._id}_{index}",
                "type": "function",
                "function": {"name": piece.name, "arguments": piece.text},
            }
            self._calls.append(call)
            return {"tool_calls": [{"index": index, **call}]}
        self._text[piece.kind] += piece.text
        return {"content" if piece.kind == "content" else "reasoning_content": piece.text}

    def _logprob(self, logprob: TokenLogprob) -> Json:
        top = [self._alternative(token, value) for token, value in logprob.top]
        return {**self._alternative(logprob.token, logprob.logprob), "top_logprobs": top}

    def _alternative(self, token: int, logprob: float) -> Json:
        return {
            "token": self._texts.text_of(token),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": list(self._texts.bytes_of(token)),
        }
