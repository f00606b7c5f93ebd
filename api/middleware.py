"""Pure ASGI middleware: request ids and metrics, authentication, body limits.

Order, outermost first: :class:`RequestContext`, :class:`Authentication`, :class:`BodyLimits`. They
wrap ``receive`` and ``send`` and never buffer a body or a response.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.errors import (
    BodyTooLargeError,
    UnauthorizedError,
    envelope_response,
    problem_of,
    problem_of_exception,
)
from api.streaming import CLIENT_GONE
from api.telemetry import GatewayMetrics

OPEN_PATHS = frozenset({"/livez", "/readyz", "/metrics"})
"""Paths that never need a key: probes and scrapers have none."""

FORM_OVERHEAD_BYTES = 64 * 1024
"""Room for the framing of a multipart form around an upload of the largest allowed size."""

_PART_PATH = re.compile(r"^/v1/uploads/[^/]+/parts$")
_REQUEST_ID = re.compile(r"^[A-Za-z0-9._:-]{1,128}$")


class RequestContext:
    """Gives each request an id, counts and times it, and turns what nobody caught into a 500."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, sets_request_id: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._sets_request_id = sets_request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.match(given) else f"req_{secrets.token_hex(12)}"
        scope["mora_request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._sets_request_id:
                    MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        started = time.perf_counter()
        self._metrics.in_flight.inc()
        try:
            await self._app(scope, receive, send_with_id)
        except asyncio.CancelledError:
            # How Serve tells of a client that left; it does so before, or instead of, a message.
            scope[CLIENT_GONE] = True
            raise
        except Exception as error:
            if status:
                raise
            problem = problem_of_exception(error, request_id)
            await envelope_response(problem)(scope, receive, send_with_id)
        finally:
            self._metrics.in_flight.dec()
            if scope.get(CLIENT_GONE):
                self._metrics.disconnects.inc()
            route = getattr(scope.get("route"), "path", "unmatched")
            self._metrics.requests.labels(scope["method"], route, str(status or 499)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)


class Authentication:
    """Accepts configured bearer keys, or anything when none is configured."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        needed = scope["type"] == "http" and self._keys and scope["path"] not in OPEN_PATHS
        if needed and not self._accepts(Headers(scope=scope).get("authorization", "")):
            given = "authorization" in Headers(scope=scope)
            problem = problem_of(
                UnauthorizedError(
                    "The API key is not valid."
                    if given
                    else "An API key is required: send it as 'Authorization: Bearer <key>'."
                )
            )
            assert problem is not None
            await envelope_response(problem)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _accepts(self, header: str) -> bool:
        """Compare with every key in constant time, so that timing tells nothing about them."""
        scheme, _, token = header.partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)


class BodyLimits:
    """Refuses a body over its limit by Content-Length, and by counting when there is none."""

    def __init__(
        self, app: ASGIApp, max_body_bytes: int, max_upload_bytes: int, max_part_bytes: int
    ) -> None:
        self._app = app
        self._max_body = max_body_bytes
        self._max_upload = max_upload_bytes
        self._max_part = max_part_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit, slack = self._limit(scope, headers)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > limit + slack:
            problem = problem_of(BodyTooLargeError(_too_large(limit)))
            assert problem is not None
            await envelope_response(problem)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > limit + slack:
                # FastAPI passes HTTPException through while it reads a body and nothing else.
                raise HTTPException(413, _too_large(limit))
            return message

        await self._app(scope, counted, send)

    def _limit(self, scope: Scope, headers: Headers) -> tuple[int, int]:
        form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if form and scope["method"] == "POST":
            if scope["path"] == "/v1/files":
                return self._max_upload, FORM_OVERHEAD_BYTES
            if _PART_PATH.match(scope["path"]):
                return self._max_part, FORM_OVERHEAD_BYTES
        return self._max_body, 0


def _too_large(limit: int) -> str:
    return f"The request body must be at most {limit} bytes."
