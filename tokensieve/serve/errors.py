"""Errors in the form that OpenAI's clients expect: a status, and {"error": {"message", "type", "param", "code"}}."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from tokensieve.config import UserError
from tokensieve.engine import Busy, Stopping
from tokensieve.serve.record import record_of
from tokensieve.serve.settings import UnknownModel
from tokensieve.serve.streaming import ClientGone

CLIENT_GONE = 499  # in no standard; web servers log it if the client left before there was a response
MAX_FAULTS = 3  # faults of one request that its error lists
# Why Python's parser gave a body up, by what it raised. FastAPI says only that it did.
UNREADABLE: dict[type[Exception], str] = {
    UnicodeDecodeError: "the body is not UTF-8",
    RecursionError: "the body is nested too deeply",
    ValueError: "a number in the body has too many digits",
}


class ApiError(Exception):
    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def prompt_too_long(length: str, limit: int, param: str | None = None) -> ApiError:
    """In the words by which clients recognize this error and then shorten what they send."""
    message = f"this model's maximum context length is {limit} tokens, and the prompt has {length}; shorten it"
    return ApiError(400, message, param, "context_length_exceeded")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    # a name given by the client may hold half a surrogate pair, which no response can
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
    if status == 408:  # what is left of the request is not waited for
        headers = {"Connection": "close", **(headers or {})}
    return JSONResponse(error_body(status, message, param, code), status, headers)


def install(app: FastAPI) -> None:
    """A handler for every error that a route may raise.

    Any other exception is a defect: a 500 without details, and a traceback in the log.
    """
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(UserError, _user_error)
    app.add_exception_handler(UnknownModel, _unknown_model)
    app.add_exception_handler(Busy, _busy)
    app.add_exception_handler(Stopping, _stopping)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(ClientGone, _client_gone)
    app.add_exception_handler(Exception, _defect)


def api_error_response(error: ApiError) -> JSONResponse:
    return error_response(error.status, error.message, error.param, error.code)


async def _api_error(_: Request, error: Any) -> JSONResponse:
    return api_error_response(error)


async def _user_error(_: Request, error: Any) -> JSONResponse:
    return error_response(400, str(error))


async def _unknown_model(_: Request, error: Any) -> JSONResponse:
    return error_response(404, str(error), "model", "model_not_found")


async def _busy(_: Request, error: Any) -> JSONResponse:
    return error_response(429, str(error), code="overloaded")


async def _stopping(_: Request, error: Any) -> JSONResponse:
    return error_response(503, str(error), code="unavailable")


async def _invalid(request: Request, error: Any) -> JSONResponse:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not kind.endswith("+json"):
        return error_response(400, "the body is read as JSON only with the header Content-Type: application/json")
    faults = _furthest(error.errors(), error.body)
    message = "; ".join(_fault(fault) for fault in faults[:MAX_FAULTS])
    more = f"; and {len(faults) - MAX_FAULTS} more" if len(faults) > MAX_FAULTS else ""
    named = [part for part in faults[0]["loc"][:1] if isinstance(part, str)]
    param = faults[0].get("ctx", {}).get("param") or next(iter(named), None)
    return error_response(400, message + more, param)


async def _http_exception(_: Request, error: Any) -> JSONResponse:
    message = f"{error.detail}: no such route" if error.status_code == 404 else str(error.detail)
    for kind, unreadable in UNREADABLE.items():
        if isinstance(error.__cause__, kind):
            message = unreadable
            break
    return error_response(error.status_code, message, headers=error.headers)


async def _client_gone(_: Request, error: Any) -> Response:
    return Response(status_code=CLIENT_GONE)


async def _defect(request: Request, error: Any) -> JSONResponse:
    # this response is made outside of the gate, which adds the id to all others
    headers = {"x-request-id": record_of(request).id}
    return error_response(500, f"the server failed ({type(error).__name__}); its log says more", headers=headers)


def _furthest(faults: Sequence[Mapping[str, Any]], body: Any) -> list[dict[str, Any]]:
    """The faults by their places in the body, without the alternatives that did not fit from the beginning.

    Of a field that may be a text or a list, pydantic reports both. If a list was sent, its faults lie deeper.
    """
    placed = [{**fault, "loc": _place(fault, body)} for fault in faults]
    too_long = [fault for fault in placed if fault["type"] == "too_long"]
    if too_long:  # as far as it was read, the list did fit
        return too_long
    places = [fault["loc"] for fault in placed]
    return [f for f in placed if not any(p[: len(f["loc"])] == f["loc"] and p != f["loc"] for p in places)]


def _place(fault: Mapping[str, Any], body: Any) -> tuple[int | str, ...]:
    """Fields and indices down to the fault, without the names that pydantic gives to a field's alternatives."""
    place: list[int | str] = []
    missing = fault["type"] == "missing"  # or null, which counts as missing: its name is the last part
    for part in fault["loc"][1:-1] if missing else fault["loc"][1:]:
        if (isinstance(body, dict) and part in body) or (isinstance(body, list) and isinstance(part, int)):
            body = body[part]
            place.append(part)
    return (*place, *fault["loc"][1:][-1:]) if missing else tuple(place)


def _fault(fault: Mapping[str, Any]) -> str:
    """A fault without the input itself, which may be long or private."""
    if fault["type"] == "json_invalid":
        return f"the body is no JSON: {fault.get('ctx', {}).get('error', fault['msg'])}"
    if not fault["loc"] and fault["type"] in ("missing", "model_attributes_type"):
        return "the body is no JSON object; send one"
    field = ".".join(str(part) for part in fault["loc"])
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "literal_error" and "content" in fault["loc"]:
        message += "; images, audio and files are not supported"
    return f"{field}: {message}" if field else message
