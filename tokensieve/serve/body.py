"""The body of a request, whole before a route sees it: within its time and size, and with gzip undone."""

import asyncio
import gzip
import io
import zlib

from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.types import Receive

from tokensieve.engine import Service, Stopping
from tokensieve.serve.errors import ApiError
from tokensieve.serve.json_size import ANYTHING, is_bounded
from tokensieve.serve.settings import ServeConfig
from tokensieve.serve.streaming import ClientGone


class Bodies:
    """Reads bodies. Once the service stops, no body is waited for: `stop_waiting` ends the waits that have begun."""

    def __init__(self, config: ServeConfig, service: Service):
        self._most, self._seconds, self._service = config.max_body, config.seconds, service
        self._waits: set[asyncio.Timeout] = set()

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """ApiError for a body that is too slow, too large or cannot be read; ClientGone; Stopping."""
        encoding = headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", "gzip", "x-gzip"):
            raise ApiError(415, f"the body's Content-Encoding is {encoding[:40]!r}; send it as gzip, or as it is")
        length = headers.get("content-length", "0")
        if length.isdigit() and int(length[:20]) > self._most:
            raise self._too_large()
        body = await self._arrival(receive)
        if encoding.endswith("gzip"):
            body = await run_in_threadpool(self._unpacked, body)
        is_json = "json" in headers.get("content-type", "").lower()
        if is_json and len(body) > ANYTHING and not await run_in_threadpool(is_bounded, body):
            raise ApiError(413, "the body has too many fields and values; send less at once", code="request_too_large")
        return body

    def stop_waiting(self) -> None:
        for wait in self._waits:
            if not wait.expired():
                wait.reschedule(0)

    async def _arrival(self, receive: Receive) -> bytes:
        loop, limits, body, more = asyncio.get_running_loop(), self._seconds, bytearray(), True
        begin = loop.time()
        try:
            async with asyncio.timeout(None) as wait:
                self._waits.add(wait)
                try:
                    while more:
                        deadline = limits.body + min(loop.time(), begin + len(body) / limits.body_rate)
                        wait.reschedule(0 if self._service.draining else deadline)
                        message = await receive()
                        if message["type"] == "http.disconnect":
                            raise ClientGone
                        body += message.get("body", b"")
                        more = message.get("more_body", False)
                        if len(body) > self._most:
                            raise self._too_large()
                finally:
                    self._waits.discard(wait)
        except TimeoutError:
            if self._service.draining:
                raise Stopping("the server is stopping") from None
            raise ApiError(408, "the body did not arrive in time; send it again") from None
        return bytes(body)

    def _unpacked(self, body: bytes) -> bytes:
        try:
            with gzip.GzipFile(fileobj=io.BytesIO(body)) as packed:
                unpacked = packed.read(self._most + 1)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ApiError(400, f"the body is not gzip, though its Content-Encoding says so ({error})") from None
        if len(unpacked) > self._most:
            raise self._too_large()
        return unpacked

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request has more than {self._most} bytes", code="request_too_large")
