"""The middleware before every route: it checks the key and the body's size, and logs and counts each request."""

import base64
import binascii
import hmac
import time
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokensieve.serve.errors import CLIENT_GONE, error_response
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.record import Record, log_event
from tokensieve.serve.settings import ServeConfig

OPEN_ROUTES = ("/health",)


class Gate:
    def __init__(self, app: ASGIApp, config: ServeConfig, metrics: Metrics):
        self._app, self._config, self._metrics = app, config, metrics
        self._too_large_text = f"the request has more than {config.max_body} bytes"
        self._keys = [key.encode() for key in config.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        begin, record, status = time.perf_counter(), Record(), 0
        scope.setdefault("state", {})["record"] = record
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._config.max_body:
                raise HTTPException(
                    413, self._too_large_text
                )  # FastAPI lets this exception through from reading a body
            return message

        async def send_noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, receive_counted, send_noted)
            else:
                await refusal(scope, receive, send_noted)
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

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = dict(scope["headers"])
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            # a browser would send its visitor's key along, or reach a server that only its own machine should reach
            return error_response(
                403, "pages of other sites may not ask; open the server's own page", code="cross_site"
            )
        if self._keys and scope["path"] not in OPEN_ROUTES and not self._admitted(headers.get(b"authorization", b"")):
            # on this challenge a browser asks its user for the key, and sends it with all requests of the page
            challenge = {"WWW-Authenticate": 'Basic realm="tokensieve", charset="UTF-8"'}
            return error_response(
                401, "an API key is needed: Authorization: Bearer KEY", None, "invalid_api_key", challenge
            )
        length = headers.get(b"content-length", b"0")
        return self._too_large() if length.isdigit() and int(length[:20]) > self._config.max_body else None

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

    def _too_large(self) -> ASGIApp:
        return error_response(413, self._too_large_text, code="request_too_large")
