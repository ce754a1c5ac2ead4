"""Requests to an OpenAI-compatible endpoint, whatever serves it; the replies are checked before they are used."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tokensieve.config import UserError
from tokensieve.integers import LARGEST

if TYPE_CHECKING:
    import openai

ALTERNATIVES = 5  # log probabilities beside that of each token
LONGER = 4  # times as many tokens are made beside an answer that is to run in a crowd
LONGEST_PAUSE = 60.0  # seconds between two tries
CONNECTED = ("connect_tcp.complete", "start_tls.complete")  # how events that bring a connection end
MOST_BYTES = 2**30  # bytes of a reply: many times those of a million tokens with their alternatives
UNSUPPORTED = (400, 404, 405, 422, 501)  # statuses by which servers refuse a route or a field


class Refused(Exception):
    """The endpoint does not take a request: its route or one of its fields."""


class Late(UserError):
    """A reply did not come in time, which need not be so of the next one."""


class TooLarge(Exception):
    """A reply has more than `MOST_BYTES` bytes."""


@dataclass(frozen=True)
class Reply:
    """An answer, or a scored prompt: its text, and for each of its tokens the text, the log probability in nats, and
    those of the best alternatives. A log probability is None if the endpoint gave none, as for a prompt's first token.
    output_tokens: None if the endpoint does not count them. content: of a chat, the text without the thoughts that the
    endpoint keeps apart from it.
    """

    text: str
    prompt_tokens: int
    tokens: tuple[str, ...] = ()
    logprobs: tuple[float | None, ...] = ()
    top: tuple[Mapping[str, float], ...] = ()
    output_tokens: int | None = None
    content: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_address(url: str) -> None:
    """UserError for what is not the address of an HTTP server."""
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # of a bracket that is open, or of a port
        known = False
    if not known:
        raise UserError(f"{url!r} is no address of a server; give one such as http://127.0.0.1:8000/v1")


def bounded_client(url: str, key: str, seconds: float, retries: int = 0) -> "openai.OpenAI":
    """OpenAI's client, whose replies come whole within so many seconds of their request, or not at all.

    retries: of the client's own. UserError for what is no address of a server.

    Raises, with a request:
        TooLarge: the body has more than `MOST_BYTES` bytes.
    """
    import openai

    class Client(openai.DefaultHttpxClient):
        def send(self, request: Any, **how: Any) -> Any:
            end = time.monotonic() + seconds

            def bounded(read: Callable[..., bytes], most: int, timeout: float | None = None) -> bytes:
                if (left := end - time.monotonic()) <= 0:
                    raise openai.APITimeoutError(request=request)
                return read(most, left if timeout is None else min(left, timeout))

            def trace(event: str, info: Mapping[str, Any]) -> None:
                if event.endswith(CONNECTED):
                    stream = info["return_value"]
                    stream.read = partial(bounded, stream.read)

            # The library's own timeout is of one wait: what comes in drops, or has no end, would never be late.
            request.extensions["trace"] = trace
            return _whole(super().send(request, **how | {"stream": True}))

    check_address(url)
    return openai.OpenAI(
        base_url=url,
        api_key=key,
        timeout=seconds,
        max_retries=retries,
        http_client=Client(timeout=seconds),
        default_headers={"Connection": "close"},  # each request reads from its own connection
    )


class Endpoint:
    """One model of an OpenAI-compatible server. Answers are greedy, unless a chat is asked for otherwise.

    url: with its /v1. seconds: for the whole of a reply, from the request on; `setting` is its name in the config. The
    waits to connect and to send are each bounded by as much, so all together can take longer. retries: further tries of
    a request that was refused because of its rate, or that failed on the way or in the server; a reply that does not
    come in time is final. UserError without the openai package.
    """

    def __init__(
        self,
        url: str,
        key: str = "none",
        seconds: float = 300.0,
        retries: int = 4,
        setting: str = "serving.seconds",
    ):
        try:
            import openai
        except ImportError as error:
            raise UserError(
                "to ask an endpoint needs the openai package; install it with: pip install 'tokensieve[eval]'"
            ) from error
        self._errors, self.url, self._seconds, self._retries = openai, url, seconds, retries
        self._setting = setting

        self._client = bounded_client(url, key, seconds)

    def models(self) -> list[dict[str, Any]]:
        """The cards of the served models. UserError if the reply has none."""
        reply = self._request("/models", None)
        cards = reply.get("data")
        if not isinstance(cards, list) or not all(isinstance(c, dict) and isinstance(c.get("id"), str) for c in cards):
            raise self._nonsense("/models", "no list of models")
        return cards

    def complete(self, model: str, prompt: str, tokens: int, logprobs: bool = True) -> Reply:
        """The continuation of a text. Refused if the endpoint has no such route, or no log probabilities."""
        asked = {"logprobs": ALTERNATIVES} if logprobs else {}
        return self._completion(model, prompt, {"max_tokens": tokens, **asked}, logprobs)

    def score(self, model: str, text: str) -> Reply:
        """The log probabilities of a text's own tokens, as a prompt. Refused if the endpoint has no `echo`."""
        fields = {"max_tokens": 1, "logprobs": ALTERNATIVES, "echo": True}  # 0 tokens are not taken everywhere
        reply = self._completion(model, text, fields, True)
        if len(reply.tokens) < reply.prompt_tokens:
            raise Refused(f"/completions of {self.url} does not return the prompt's tokens; it ignores echo")
        return reply

    def chat(self, model: str, message: str, tokens: int, **sampling: float) -> Reply:
        """The answer to a message. Refused if the endpoint has no such route, or the model no chat template."""
        body = {"model": model, "messages": [{"role": "user", "content": message}], "max_tokens": tokens}
        reply = self._request("/chat/completions", body | {"temperature": 0} | sampling)
        said = _choice(reply).get("message")
        if not isinstance(said, dict):
            raise self._nonsense("/chat/completions", "no message")
        thoughts, content = (str(said.get(part) or "") for part in ("reasoning_content", "content"))
        prompt_tokens = self._prompt_tokens(reply, "/chat/completions")
        made = reply["usage"].get("completion_tokens")
        counted = made if isinstance(made, int) and 0 <= made <= LARGEST else None
        return Reply(thoughts + content, prompt_tokens, output_tokens=counted, content=content)

    def crowd(self, model: str, prompt: str, others: Sequence[str], tokens: int) -> Reply:
        """The continuation of a text, while longer ones of other texts are made."""
        with ThreadPoolExecutor(len(others)) as pool:
            running = [pool.submit(self.complete, model, other, LONGER * tokens) for other in others]
            reply = self.complete(model, prompt, tokens)
            for one in running:
                one.result()
        return reply

    def close(self) -> None:
        self._client.close()

    def _completion(self, model: str, prompt: str, fields: Mapping[str, Any], logprobs: bool) -> Reply:
        route = "/completions"
        reply = self._request(route, {"model": model, "prompt": prompt, "temperature": 0, **fields})
        choice = _choice(reply)
        if not isinstance(choice.get("text"), str):
            raise self._nonsense(route, "no text")
        if not logprobs:
            return Reply(choice["text"], self._prompt_tokens(reply, route))
        found = choice.get("logprobs")
        if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
            raise Refused(f"{route} of {self.url} gives no log probabilities")
        values, tokens = found["token_logprobs"], found.get("tokens")
        top = found.get("top_logprobs") or [None] * len(values)
        if not isinstance(tokens, list) or not isinstance(top, list):
            raise self._nonsense(route, "log probabilities that cannot be read")
        alternatives = tuple(one if isinstance(one, dict) else {} for one in top)
        given = [value for value in values if value is not None]
        if not all(map(_is_finite, chain(given, *(one.values() for one in alternatives)))):
            raise self._nonsense(route, "log probabilities that cannot be read")
        if not len(tokens) == len(values) == len(top):
            raise self._nonsense(route, "log probabilities that do not belong to its tokens")
        prompt_tokens = self._prompt_tokens(reply, route)
        return Reply(choice["text"], prompt_tokens, tuple(map(str, tokens)), tuple(values), alternatives)

    def _prompt_tokens(self, reply: Mapping[str, Any], route: str) -> int:
        usage = reply.get("usage")
        count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if not isinstance(count, int) or not 1 <= count <= LARGEST:
            raise self._nonsense(route, "no usage.prompt_tokens")
        return count

    def _request(self, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """The reply's JSON. Refused, or UserError with the remedy once nothing more is tried."""
        for tried in range(self._retries + 1):
            try:
                if body is None:
                    reply = self._client.get(route, cast_to=object)
                else:
                    reply = self._client.post(route, cast_to=object, body=body)
            except self._errors.APITimeoutError as error:
                raise self._late(route) from error
            except self._errors.APIStatusError as error:
                if error.status_code in UNSUPPORTED:
                    raise Refused(f"{self.url}{route}: {_line(error)}") from error
                if error.status_code in (401, 403):
                    raise UserError(f"{self.url} needs another API key: set OPENAI_API_KEY") from error
                if tried == self._retries:
                    raise UserError(
                        f"{self.url}{route} still fails after {tried + 1} tries ({error.status_code}: {_line(error)}); "
                        "go on later with --resume"
                    ) from error
                pause = _pause(error.response.headers.get("retry-after"), tried)
            except self._errors.APIConnectionError as error:
                if tried == self._retries:
                    why = _line(error.__cause__ if isinstance(error.__cause__, Exception) else error)
                    raise UserError(f"{self.url} cannot be reached ({why}); is the server up?") from error
                pause = _pause(None, tried)
            except TooLarge as error:
                raise self._nonsense(route, f"more than {MOST_BYTES} bytes") from error
            except (ValueError, RecursionError) as error:
                raise self._nonsense(route, "no JSON") from error
            else:
                if not isinstance(reply, dict):
                    raise self._nonsense(route, "no JSON object")
                return reply
            time.sleep(pause)
        raise AssertionError("the last try returns or raises")

    def _late(self, route: str) -> Late:
        return Late(
            f"{self.url}{route} did not answer within {self._seconds:g} seconds; raise {self._setting}, or ask for "
            "shorter prompts or answers. --resume keeps what is finished"
        )

    def _nonsense(self, route: str, what: str) -> UserError:
        return UserError(f"{self.url}{route} answered with {what}; is it the /v1 of an OpenAI-compatible server?")


def served_model(endpoint: Endpoint, asked: str, remedy: str) -> tuple[str, dict[str, dict[str, Any]]]:
    """The id of the model that is meant, `asked` or the first that is listed; and the endpoint's cards of all, by id.

    remedy: what else to give if the endpoint lists no models; "" if nothing is wanted of a card, which is empty then.
    UserError if it does not serve the model.
    """
    try:
        cards = {card["id"]: card for card in endpoint.models()}
    except Refused as error:
        if remedy:
            raise UserError(f"{error}; {remedy}") from error
        cards = {asked: {}}
    model = asked or next(iter(cards), "")
    if model not in cards:
        if not cards:
            raise UserError(f"{endpoint.url} lists no models; load one there, or ask another endpoint")
        raise UserError(f"{endpoint.url} serves no model {model!r}, but {', '.join(cards)}")
    return model, cards


def _whole(response: Any) -> Any:
    """The response with all of its body, as a client that does not stream reads it.

    Raises:
        TooLarge: the body has more than `MOST_BYTES` bytes.
    """
    pieces, size = [], 0
    for piece in response.iter_bytes():
        size += len(piece)
        if size > MOST_BYTES:
            response.close()
            raise TooLarge
        pieces.append(piece)
    headers = [(name, value) for name, value in response.headers.multi_items() if name != "content-encoding"]
    whole = {"headers": headers, "content": b"".join(pieces), "request": response.request}
    return type(response)(response.status_code, **whole)


def _is_finite(value: Any) -> bool:
    """Whether a value of a reply is a finite number, and one that a float holds."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _choice(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    choices = reply.get("choices")
    first = choices[0] if isinstance(choices, list) and choices else None
    return first if isinstance(first, dict) else {}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _pause(asked: str | None, tried: int) -> float:
    """Seconds: as many as the server asks for, in seconds or by a date, else twice as many each time, and never more
    than a minute.
    """
    try:
        seconds = float(asked or "")
    except ValueError:
        try:
            seconds = parsedate_to_datetime(asked or "").timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            seconds = math.nan
    return min(2.0**tried if math.isnan(seconds) else max(seconds, 0.0), LONGEST_PAUSE)
