"""`POST /documents`: the text of a PDF, for the page. Nothing is kept, and nothing is written to a disk."""

import asyncio
import importlib.util
import json
import sys

from fastapi import APIRouter, Request
from pydantic import BaseModel

from tokensieve.engine import Busy
from tokensieve.serve.errors import ApiError
from tokensieve.serve.playground import pdf
from tokensieve.serve.streaming import unless_gone

PDF = "application/pdf"
MAX_READING = 2  # documents that are read at once
MAX_WAITING = 16
MAX_SECONDS = 60  # of wall-clock time, because the processor may be busy with other work
TOO_LONG = "the PDF takes too long to read; send its text"


class Text(BaseModel):
    text: str
    pages: int


def router() -> APIRouter:
    routes = APIRouter()
    routes.add_api_route("/documents", Uploads().documents, methods=["POST"], include_in_schema=False)
    return routes


class Uploads:
    """Limits how many documents are read, and how many wait."""

    def __init__(self) -> None:
        self._reading = asyncio.Semaphore(MAX_READING)
        self._open: set[Request] = set()

    async def documents(self, request: Request) -> Text:
        """The text of a PDF, which is the request's body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != PDF:
            raise ApiError(400, f"the body must be a PDF, its Content-Type {PDF}; text needs no reading")
        if importlib.util.find_spec("pypdf") is None:
            raise ApiError(501, "reading a PDF needs pypdf; pip install 'tokensieve[serve]'", code="not_installed")
        data = await request.body()
        if len(self._open) >= MAX_READING + MAX_WAITING:
            raise Busy(f"{len(self._open)} documents are read or wait already; try again later")
        self._open.add(request)
        try:
            return await unless_gone(request.receive, self._read(data))
        finally:
            self._open.discard(request)

    async def _read(self, data: bytes) -> Text:
        async with self._reading:
            return await text_of(data)


async def text_of(data: bytes) -> Text:
    """ApiError if the PDF yields no text within the limits of `pdf`."""
    pipe = asyncio.subprocess.PIPE
    # -P: the files beside pdf.py must not stand in for modules of the same name
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", pdf.__file__, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        printed, _ = await asyncio.wait_for(process.communicate(data), MAX_SECONDS)
    except TimeoutError:
        raise ApiError(400, TOO_LONG) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:  # ended by the limit of memory or of time before pypdf could report it
        raise ApiError(400, TOO_LONG if process.returncode < 0 else "the PDF cannot be read; send its text")
    result = json.loads(printed)
    if "error" in result:
        raise ApiError(400, result["error"])
    return Text(**result)
