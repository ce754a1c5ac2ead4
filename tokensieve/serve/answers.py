"""Outputs of the engine in OpenAI's shapes: whole answers, and the chunks of a stream."""

import codecs
import time
from collections.abc import Sequence
from typing import Any, Protocol

from tokensieve.engine import Output, TokenLogprob
from tokensieve.serve.chat import Answer, Piece
from tokensieve.serve.gate import Record

Json = dict[str, Any]


class Answering(Protocol):
    """One answer on its way. `push` gives the choices that a stream shows for an output, and keeps them for `whole`."""

    id: str
    kind: str
    chunk_kind: str
    model: str
    reasoning_tokens: int

    def begin(self) -> list[Json]: ...
    def push(self, output: Output) -> list[Json]: ...
    def whole(self) -> Json: ...


def usage_of(record: Record, reasoning_tokens: int) -> Json:
    return {
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": record.completion_tokens,
        "total_tokens": record.prompt_tokens + record.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": record.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": reasoning_tokens},
    }


class Reply:
    """All answers to one request, numbered; and token ids beside the texts, for who asks for them."""

    def __init__(self, answers: dict[str, Answering], told_prompt: Sequence[int] | None):
        """answers: by the ids of the engine's requests, in the order of their numbers. told_prompt: token ids are wanted, and these are
        the prompt's."""
        self._answers, self._told_prompt = answers, told_prompt
        self._numbers = {id: number for number, id in enumerate(answers)}
        self._begun: set[str] = set()
        self._new: dict[str, list[int]] = {id: [] for id in answers}  # token ids that no choice has told yet
        self._created = int(time.time())

    @property
    def reasoning_tokens(self) -> int:
        return sum(answer.reasoning_tokens for answer in self._answers.values())

    def envelope(self, choices: list[Json], usage: Json | None, chunk: bool = False) -> Json:
        first = next(iter(self._answers.values()))
        return {
            "id": first.id,
            "object": first.chunk_kind if chunk else first.kind,
            "created": self._created,
            "model": first.model,
            "choices": choices,
            "usage": usage,
        }

    def head(self) -> Json:
        """What the first chunk, or the whole answer, says besides."""
        return {} if self._told_prompt is None else {"prompt_token_ids": list(self._told_prompt)}

    def push(self, output: Output) -> list[Json]:
        self._new[output.id] += output.tokens
        return self._answers[output.id].push(output)

    def chunks(self, output: Output) -> list[Json]:
        """The choices that a stream shows for an output."""
        begin = [] if output.id in self._begun else self._answers[output.id].begin()
        self._begun.add(output.id)
        return self._numbered(output.id, [*begin, *self.push(output)])

    def whole(self) -> list[Json]:
        return [self._numbered(id, [answer.whole()])[0] for id, answer in self._answers.items()]

    def _numbered(self, id: str, choices: list[Json]) -> list[Json]:
        for choice in choices:
            choice["index"] = self._numbers[id]
        if self._told_prompt is not None and choices:
            choices[0]["token_ids"], self._new[id] = self._new[id], []
        return choices


class TokenTexts:
    """A token alone, as text and as bytes: half a character has bytes and no text."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # Byte-level BPE writes a byte as a letter: printable ones as themselves, the others by their turn from 256 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [b for b in range(256) if b not in printable]
        self._bytes = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
        added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
        self._added = {id: token.content for id, token in added.items()}
        self._special = {id for id, token in added.items() if token.special}
        self._byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)

    def bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        letters = self._tokenizer.convert_ids_to_tokens(token)
        if letters and self._byte_level and all(letter in self._bytes for letter in letters):
            return bytes(self._bytes[letter] for letter in letters)
        return self._tokenizer.decode([token]).encode()

    def text_of(self, token: int) -> str:
        return self.bytes_of(token).decode(errors="replace")

    def name_of(self, token: int) -> str:
        """Its text; its bytes, as OpenAI writes them, where they are no text: different tokens have different names."""
        held = self.bytes_of(token)
        text = held.decode(errors="replace")
        return text if text.encode() == held else "bytes:" + "".join(f"\\x{byte:02x}" for byte in held)

    def shown(self, token: int) -> bytes:
        """What an answer's text has of it: nothing of a special token."""
        return b"" if token in self._special else self.bytes_of(token)


class ChatAnswer:
    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def __init__(self, id: str, own_id: str, model: str, answer: Answer, texts: TokenTexts, logprobs: bool):
        """id: of the whole reply; own_id: of this answer of it."""
        self.id, self._own_id, self.model = f"chatcmpl-{id}", own_id, model
        self._answer, self._texts = answer, texts
        self._logprobs: list[Json] | None = [] if logprobs else None
        self._said = {"reasoning": "", "content": ""}
        self._calls: list[Json] = []
        self._finish: str | None = None
        self.reasoning_tokens = 0

    def begin(self) -> list[Json]:
        return [_choice(delta={"role": "assistant", "content": ""}, logprobs=None, finish_reason=None)]

    def push(self, output: Output) -> list[Json]:
        self.reasoning_tokens += len(output.tokens) if self._answer.state == "reasoning" else 0
        pieces = self._answer.push(output.text, output.tokens)
        if output.finish is not None:
            pieces += self._answer.finish()
        deltas = [self._delta(piece) for piece in pieces]
        logprobs = None
        if self._logprobs is not None:
            new = [self._told(t) for t in output.logprobs]
            self._logprobs += new
            logprobs = {"content": new} if new else None
            deltas = deltas or ([{}] if new else [])
        choices = [_choice(delta=delta, logprobs=None, finish_reason=None) for delta in deltas]
        if choices:
            choices[0]["logprobs"] = logprobs
        if output.finish is not None:
            self._finish = "tool_calls" if output.finish == "stop" and self._calls else output.finish
            choices.append(_choice(delta={}, logprobs=None, finish_reason=self._finish))
        return choices

    def whole(self) -> Json:
        message: Json = {"role": "assistant", "content": self._said["content"], "refusal": None}
        if self._said["reasoning"]:
            message["reasoning_content"] = self._said["reasoning"]
        if self._calls:
            message |= {"tool_calls": self._calls, "content": self._said["content"] or None}
        logprobs = None if self._logprobs is None else {"content": self._logprobs}
        return _choice(message=message, logprobs=logprobs, finish_reason=self._finish)

    def _delta(self, piece: Piece) -> Json:
        if piece.kind == "call":
            index = len(self._calls)
            call = {
                "id": f"call_{self._own_id}_{index}",
                "type": "function",
                "function": {"name": piece.name, "arguments": piece.text},
            }
            self._calls.append(call)
            return {"tool_calls": [{"index": index, **call}]}
        self._said[piece.kind] += piece.text
        return {"content" if piece.kind == "content" else "reasoning_content": piece.text}

    def _told(self, told: TokenLogprob) -> Json:
        top = [self._one(token, logprob) for token, logprob in told.top]
        return {**self._one(told.token, told.logprob), "top_logprobs": top}

    def _one(self, token: int, logprob: float) -> Json:
        return {
            "token": self._texts.text_of(token),
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": list(self._texts.bytes_of(token)),
        }


class CompletionAnswer:
    kind = chunk_kind = "text_completion"

    def __init__(self, id: str, model: str, texts: TokenTexts, logprobs: bool):
        self.id, self.model = f"cmpl-{id}", model
        self._texts = texts
        self._logprobs: list[TokenLogprob] | None = [] if logprobs else None
        self._text, self._offset = "", 0  # characters of the tokens told so far
        self._characters = codecs.getincrementaldecoder("utf-8")("replace")
        self._finish: str | None = None
        self._told: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        self.reasoning_tokens = 0

    def begin(self) -> list[Json]:
        return []

    def push(self, output: Output) -> list[Json]:
        self._text += output.text
        self._finish = output.finish
        told = None if self._logprobs is None else self._tell(output.logprobs)
        if not output.text and output.finish is None and not (told and told["tokens"]):
            return []
        return [_choice(text=output.text, logprobs=told, finish_reason=output.finish)]

    def whole(self) -> Json:
        told = None if self._logprobs is None else self._told
        return _choice(text=self._text, logprobs=told, finish_reason=self._finish)

    def _tell(self, new: tuple[TokenLogprob, ...]) -> Json:
        told: Json = {name: [] for name in self._told}
        for one in new:
            told["tokens"].append(self._texts.name_of(one.token))
            told["token_logprobs"].append(max(one.logprob, -9999.0))
            top = {**dict(one.top), one.token: one.logprob}  # the token itself too, where it is not among them
            told["top_logprobs"].append({self._texts.name_of(t): max(p, -9999.0) for t, p in top.items()})
            told["text_offset"].append(self._offset)
            self._offset += len(self._characters.decode(self._texts.shown(one.token)))
        for name, values in told.items():
            self._told[name] += values
        return told


def _choice(**parts: Any) -> Json:
    return {"index": 0, **parts}
