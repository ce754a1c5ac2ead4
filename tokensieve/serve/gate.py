"""The middleware before every route: who may ask, the whole body, and a log line and a count for each request."""

import base64
import binascii
import hmac
import time
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokensieve.engine import Stopping
from tokensieve.serve.body import Bodies
from tokensieve.serve.errors import CLIENT_GONE, ApiError, api_error_response, error_response
from tokensieve.serve.hosts import is_allowed
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.record import Record, log_event
from tokensieve.serve.settings import ServeConfig
from tokensieve.serve.streaming import ClientGone

OPEN_ROUTES = ("/health",)


class Gate:
    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics, bodies: Bodies):
        self._app, self._config, self._metrics, self._bodies = app, config, metrics, bodies
        self._keys = [key.encode() for key in config.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        begin, record, status = time.perf_counter(), Record(), 0
        if scope["method"] == "HEAD":  # routed as GET; the server sends no body, as the original scope says HEAD
            scope = {**scope, "method": "GET"}
        scope.setdefault("state", {})["record"] = record

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            headers = Headers(scope=scope)
            refusal = self._refusal(scope, headers)
            try:
                body = b"" if refusal else await self._bodies.read(headers, receive)
            except ApiError as error:
                refusal = api_error_response(error)
            except Stopping as error:
                refusal = error_response(503, str(error), code="unavailable")
            if refusal is None:
                await self._app(scope, _replayed(body, receive), send_noted)
            else:
                await refusal(scope, receive, send_noted)
        except ClientGone:
            status = CLIENT_GONE
        finally:
            status = status or (CLIENT_GONE if record.finish == "abort" else 500)
            route = getattr(scope.get("route"), "path", "other")
            self._finish(record, route, status, time.perf_counter() - begin)

    def _finish(self, record: Record, route: str, status: int, seconds: float) -> None:
        self._metrics.requests.labels(route, str(status), record.finish or "").inc()
        if route in OPEN_ROUTES or route == "/metrics":
            return
        counts: dict[str, Any] = {
            "prompt_tokens": record.prompt_tokens,
            "cached_tokens": record.cached_tokens,
            "completion_tokens": record.completion_tokens,
        }
        fields = {"id": record.id, "route": route, "model": record.model, "status": status, **counts}
        log_event("request", **fields, finish=record.finish, seconds=round(seconds, 4))

    def _refusal(self, scope: Scope, headers: Headers) -> ASGIApp | None:
        open_route = scope["path"] in OPEN_ROUTES
        host = headers.get("host")  # which no browser leaves out
        if host is not None and not open_route and not is_allowed(host, ("localhost", *self._config.allow_hosts)):
            return error_response(
                403, f"the server is not asked by the name {host[:100]!r}; --allow-host allows it", code="unknown_host"
            )
        if (
            scope["method"] == "POST"
            and headers.get("sec-fetch-site") == "cross-site"
            and not self._from_allowed_origin(headers)
        ):
            # a browser would send its visitor's key along, or reach a server that only its own machine should reach
            return error_response(
                403,
                "pages of other sites may not ask; open the server's own page, or allow them with --allow-origin",
                code="cross_site",
            )
        if self._keys and not open_route and not self._admitted(headers.get("authorization", "").encode("latin-1")):
            # on this challenge a browser asks its user for the key, and sends it with all requests of the page
            challenge = {"WWW-Authenticate": 'Basic realm="tokensieve", charset="UTF-8"'}
            return error_response(
                401, "an API key is needed: Authorization: Bearer KEY", None, "invalid_api_key", challenge
            )
        return None

    def _from_allowed_origin(self, headers: Headers) -> bool:
        return bool({"*", headers.get("origin")} & {*self._config.allow_origins})

    def _admitted(self, authorization: bytes) -> bool:
        scheme, _, key = authorization.partition(b" ")
        key = key.strip()
        if scheme.lower() == b"basic":  # from a browser: any name, with the key as password
            try:
                key = base64.b64decode(key, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        # all keys are compared, each in constant time, so that the time taken tells nothing about any of them
        equal = [hmac.compare_digest(key, known) for known in self._keys]
        return scheme.lower() in (b"bearer", b"basic") and any(equal)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """`receive` as it was before the body was read."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
