"""Long answers and clients that leave: cancellation on disconnect, NDJSON and server-sent events.

A request that waits for generation races its work against the client's disconnect; when the client
leaves, the work is cancelled, which frees the generation. Streams do the same and close their
source.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from api.errors import problem_of_exception

T = TypeVar("T")

NDJSON = "application/x-ndjson"
EVENT_STREAM = "text/event-stream"

CLIENT_CLOSED_REQUEST = 499
"""Status (nginx's convention) recorded for a request whose client left; nobody receives it."""


CLIENT_GONE = "mora_client_gone"
"""Key in a request's scope, set where the client was seen leaving before its answer was whole."""


class ClientGoneError(Exception):
    """The client disconnected before the answer was ready."""


async def run_while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Result of ``work``; cancels it and raises ``ClientGoneError`` if the client leaves first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        await _cancel(watcher)
        await _cancel(task)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel and wait, so that no work outlives its request. An outer cancellation still counts."""
    if task.done():
        return
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()


class StreamResponse(Response):
    """Sends chunks as they come and closes their source when the client leaves.

    Starlette's streaming response learns of a disconnect by a failing send, which is too late while
    the source waits for an engine. An exception of the source after the first byte becomes one last
    chunk, formatted by ``on_error``: the status is already sent. Without ``on_error`` it breaks the
    connection off, which a body with a Content-Length needs.
    """

    def __init__(
        self,
        source: AsyncIterator[bytes],
        media_type: str,
        *,
        on_error: Callable[[Mapping[str, Any]], bytes] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        # No Content-Length: Response computes one from content, so the headers are set by hand.
        self.status_code = 200
        self.media_type = media_type
        self.background = None
        self.body = b""
        self.raw_headers = [
            (b"content-type", media_type.encode()),
            (b"cache-control", b"no-store"),
            (b"x-accel-buffering", b"no"),
            *((k.lower().encode(), v.encode()) for k, v in (headers or {}).items()),
        ]
        self._source = source
        self._on_error = on_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = asyncio.ensure_future(self._send_all(scope, send))
        watcher = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({sender, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if sender.done():
                sender.result()
            else:
                scope[CLIENT_GONE] = True
        finally:
            await _cancel(watcher)
            await _cancel(sender)

    async def _send_all(self, scope: Scope, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        try:
            async for chunk in self._source:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as error:
            problem = problem_of_exception(error, str(scope.get("mora_request_id", "")))
            if self._on_error is None:
                raise
            last = self._on_error(problem.body())
            await send({"type": "http.response.body", "body": last, "more_body": True})
        finally:
            closing = getattr(self._source, "aclose", None)
            if closing is not None:
                with contextlib.suppress(RuntimeError):
                    await closing()
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def dump_json(value: Any) -> bytes:
    """Compact JSON in UTF-8. NaN and infinities are refused: they are not JSON.

    A lone surrogate, which UTF-8 cannot say, becomes JSON's escape of it, so that nothing is lost.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace")


class Json(Response):
    """A JSON response from a ready value, without a second validation pass."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dump_json(content)


def ndjson_line(value: Any) -> bytes:
    """One line of ``application/x-ndjson``."""
    return dump_json(value) + b"\n"


def sse_event(value: Any, event: str | None = None, event_id: str | None = None) -> bytes:
    """One server-sent event; JSON never contains a raw newline, so one data line is enough."""
    head = (f"id: {event_id}\n" if event_id else "") + (f"event: {event}\n" if event else "")
    return head.encode() + b"data: " + dump_json(value) + b"\n\n"


SSE_KEEP_ALIVE = b": keep-alive\n\n"
"""A comment: readers ignore it, and nothing on the way takes the connection for a dead one."""
SSE_DONE = b"data: [DONE]\n\n"


def ndjson_response(source: AsyncIterator[bytes], **kwargs: Any) -> StreamResponse:
    """NDJSON stream whose error, if any, is a last line holding the envelope."""
    return StreamResponse(source, NDJSON, on_error=ndjson_line, **kwargs)


def sse_response(source: AsyncIterator[bytes], **kwargs: Any) -> StreamResponse:
    """Event stream whose error, if any, is a last event holding the envelope."""
    return StreamResponse(source, EVENT_STREAM, on_error=sse_event, **kwargs)
