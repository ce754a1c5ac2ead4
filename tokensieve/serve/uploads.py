"""`POST /documents`: a PDF's bytes to its text, for the page. Nothing is kept, and nothing touches a disk."""

import asyncio
import importlib.util
import json
import sys

from fastapi import APIRouter, Request
from pydantic import BaseModel

from tokensieve.engine import Busy
from tokensieve.serve import pdf
from tokensieve.serve.errors import ApiError
from tokensieve.serve.streaming import unless_gone

PDF = "application/pdf"
TOGETHER = 2  # documents that are read at once
WAITING = 16
MOST_SECONDS = 60  # by the clock, where the processor is busy with other things
TOO_LONG = "the PDF takes too long to read; send its text"


class Text(BaseModel):
    text: str
    pages: int


def router() -> APIRouter:
    routes, reading, asked = APIRouter(), asyncio.Semaphore(TOGETHER), set[Request]()

    @routes.post("/documents", include_in_schema=False)
    async def documents(request: Request) -> Text:
        """The text of a PDF, which is the request's body."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != PDF:
            raise ApiError(400, f"the body must be a PDF, its Content-Type {PDF}; text needs no reading")
        if importlib.util.find_spec("pypdf") is None:
            raise ApiError(501, "reading a PDF needs pypdf; pip install 'tokensieve[serve]'", code="not_installed")
        if len(asked) >= TOGETHER + WAITING:
            raise Busy(f"{len(asked)} documents are read or wait already; try again later")
        asked.add(request)
        try:
            data = await _arrived(request)

            async def wait_and_read() -> Text:
                async with reading:
                    return await text_of(data)

            return await unless_gone(request.receive, wait_and_read())
        finally:
            asked.discard(request)

    return routes


async def _arrived(request: Request) -> bytes:
    """The body. ApiError where it takes too long: who sends nothing would keep the place of others."""
    try:
        return await asyncio.wait_for(request.body(), MOST_SECONDS)
    except TimeoutError:
        raise ApiError(408, "the document did not arrive in time; send it again") from None


async def text_of(data: bytes) -> Text:
    """ApiError where the PDF does not give them, within the limits of `pdf`."""
    pipe = asyncio.subprocess.PIPE
    # -P: the files beside pdf.py must not stand in for modules of the same name
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-P", pdf.__file__, stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
    )
    try:
        told, _ = await asyncio.wait_for(process.communicate(data), MOST_SECONDS)
    except TimeoutError:
        raise ApiError(400, TOO_LONG) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:  # the limit of memory or of time, where pypdf could not say so itself
        raise ApiError(400, TOO_LONG if process.returncode < 0 else "the PDF cannot be read; send its text")
    result = json.loads(told)
    if "error" in result:
        raise ApiError(400, result["error"])
    return Text(**result)
