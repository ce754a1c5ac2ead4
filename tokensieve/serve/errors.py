"""Errors as OpenAI's clients expect them: a status, and {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tokensieve.config import UserError
from tokensieve.engine import Busy, Stopping
from tokensieve.serve.settings import UnknownModel
from tokensieve.serve.streaming import ClientGone

CLIENT_GONE = 499  # no status of the standard; what web servers write where nobody was left to answer
MOST_FAULTS = 3  # of one request's, that are told


class ApiError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    # a name that the client gave may hold half a character, which no answer can
    message = message.encode(errors="backslashreplace").decode()
    param = None if param is None else param.encode(errors="backslashreplace").decode()
    kinds = {401: "authentication_error", 429: "rate_limit_error"}
    kind = "server_error" if status >= 500 else kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(
    status: int,
    message: str,
    param: str | None = None,
    code: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    if status in (429, 503):
        headers = {"Retry-After": "1", **(headers or {})}
    return JSONResponse(error_body(status, message, param, code), status, headers)


def install(app: FastAPI) -> None:
    """Every error that a route may meet, by its kind. Others are defects: a 500 without details, and a traceback in the log."""

    async def asked_wrongly(_: Request, error: Any) -> JSONResponse:
        return error_response(error.status, error.message, error.param, error.code)

    async def refused(_: Request, error: Any) -> JSONResponse:
        return error_response(400, str(error))

    async def unknown(_: Request, error: Any) -> JSONResponse:
        return error_response(404, str(error), "model", "model_not_found")

    async def busy(_: Request, error: Any) -> JSONResponse:
        return error_response(429, str(error), code="overloaded")

    async def stopping(_: Request, error: Any) -> JSONResponse:
        return error_response(503, str(error), code="unavailable")

    async def malformed(request: Request, error: Any) -> JSONResponse:
        faults = error.errors()
        told = "; ".join(_fault(f) for f in faults[:MOST_FAULTS])
        more = f"; and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else ""
        named = [part for part in faults[0]["loc"][1:2] if isinstance(part, str)]
        param = faults[0].get("ctx", {}).get("param") or next(iter(named), None)
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json" and not kind.endswith("+json"):
            return error_response(400, "the body is read as JSON only with the header Content-Type: application/json")
        return error_response(400, told + more, param)

    async def http(_: Request, error: Any) -> JSONResponse:
        message = f"{error.detail}: no such route" if error.status_code == 404 else str(error.detail)
        code = "request_too_large" if error.status_code == 413 else None
        return error_response(error.status_code, message, code=code, headers=error.headers)

    async def left(_: Request, error: Any) -> Response:
        return Response(status_code=CLIENT_GONE)

    async def defect(request: Request, error: Any) -> JSONResponse:
        # answered outside of the gate, which gives all others their id
        headers = {"x-request-id": request.scope["state"]["record"].id}
        return error_response(500, f"the server failed ({type(error).__name__}); its log says more", headers=headers)

    app.add_exception_handler(ApiError, asked_wrongly)
    app.add_exception_handler(UserError, refused)
    app.add_exception_handler(UnknownModel, unknown)
    app.add_exception_handler(Busy, busy)
    app.add_exception_handler(Stopping, stopping)
    app.add_exception_handler(RequestValidationError, malformed)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(ClientGone, left)
    app.add_exception_handler(Exception, defect)


def _where(fault: Mapping[str, Any]) -> str:
    return ".".join(str(part) for part in fault["loc"] if part != "body")


def _fault(fault: Mapping[str, Any]) -> str:
    """Without the input itself, which may be long or private."""
    if fault["type"] == "json_invalid":
        return f"the body is no JSON: {fault.get('ctx', {}).get('error', fault['msg'])}"
    where = _where(fault)
    message = fault["msg"].removeprefix("Value error, ")
    return f"{where}: {message}" if where else message
