"""What stands before every route: the key, the size of the body, and afterwards one line of the log and the count."""

import base64
import binascii
import hmac
import json
import logging
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tokensieve.serve.errors import CLIENT_GONE, error_response
from tokensieve.serve.metrics import Metrics
from tokensieve.serve.settings import ServeConfig

log = logging.getLogger("tokensieve.serve")

OPEN_ROUTES = ("/health",)


@dataclass
class Record:
    """Of one request, filled in on its way; never with what was said."""

    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    model: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    finish: str | None = None


def log_event(event: str, **fields: Any) -> None:
    log.info(json.dumps({"event": event, "time": round(time.time(), 3), **fields}))


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
        read = 0

        async def counted() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._config.max_body:
                raise HTTPException(413, self._too_large_text)  # the kind that reading a body lets through
            return message

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", record.id.encode())]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._app(scope, counted, noted)
            else:
                await refusal(scope, receive, noted)
        finally:
            status = status or (CLIENT_GONE if record.finish == "abort" else 500)
            route = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - begin
            self._metrics.requests.labels(route, str(status), record.finish or "").inc()
            if route not in OPEN_ROUTES and route != "/metrics":
                tokens = {
                    name: getattr(record, name) for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
                }
                said = {"id": record.id, "route": route, "model": record.model, "status": status}
                log_event("request", **said, **tokens, finish=record.finish, seconds=round(seconds, 4))

    def _refusal(self, scope: Scope) -> ASGIApp | None:
        headers = dict(scope["headers"])
        if scope["method"] == "POST" and headers.get(b"sec-fetch-site") == b"cross-site":
            # a browser would send the visitor's key along, or reach a server that is meant for its own machine only
            return error_response(
                403, "pages of other sites may not ask; open the server's own page", code="cross_site"
            )
        if self._keys and scope["path"] not in OPEN_ROUTES and not self._admitted(headers.get(b"authorization", b"")):
            # a browser then asks its user for it, and sends it with whatever the page asks for
            challenge = {"WWW-Authenticate": 'Basic realm="tokensieve", charset="UTF-8"'}
            return error_response(
                401, "an API key is needed: Authorization: Bearer KEY", None, "invalid_api_key", challenge
            )
        length = headers.get(b"content-length", b"0")
        return self._too_large() if length.isdigit() and int(length[:20]) > self._config.max_body else None

    def _admitted(self, authorization: bytes) -> bool:
        scheme, _, given = authorization.partition(b" ")
        given = given.strip()
        if scheme.lower() == b"basic":  # from the page: under any name, with the key as password
            try:
                given = base64.b64decode(given, validate=True).partition(b":")[2]
            except binascii.Error:
                return False
        # all of them, each in constant time: how long it takes tells nothing about any
        equal = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() in (b"bearer", b"basic") and any(equal)

    def _too_large(self) -> ASGIApp:
        return error_response(413, self._too_large_text, code="request_too_large")
