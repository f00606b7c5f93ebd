"""What the gateway answers, read as it arrives: JSON, lines, server-sent events, errors.

The other half of :mod:`mora_serve.client`, which asks. An answer that ends early or is not what it
should be raises :class:`UnreachableError`; the server's own errors become :class:`ApiError`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from typing import Any

from mora_serve.errors import MoraError

CHUNK_BYTES = 1 << 16

Json = dict[str, Any]


class UnreachableError(MoraError):
    """The server did not answer, or the connection broke before the answer was complete."""


class ApiError(MoraError):
    """The server answered with an error; the fields are those of its error envelope."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str | None = None,  # noqa: A002
        param: str | None = None,
        code: str | None = None,
        body: Json | None = None,
    ) -> None:
        super().__init__(status, message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.body = body or {}
        """The whole JSON answer."""

    def __str__(self) -> str:
        where = f" ({self.param})" if self.param and self.param not in self.message else ""
        return f"the server answered {self.status}: {self.message}{where}"


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event, for example ``ServerEvent("progress", {"pairs": 3}, "12")``."""

    event: str
    """The event's name; ``message`` when the server gave none."""
    data: Any
    """Decoded JSON, or the text itself when it is not JSON."""
    id: str | None


def retry_after(response: HTTPResponse) -> float:
    """Seconds that a refusal asks to wait, within 0.1 and 30; 1 where it says nothing."""
    try:
        return min(30.0, max(0.1, float(response.getheader("Retry-After") or 1.0)))
    except ValueError:
        return 1.0


def error_from(status: int, body: Json) -> ApiError:
    """An answer's error envelope, or what it says in place of one, as an exception."""
    error = body.get("error")
    if not isinstance(error, dict):
        message = str(error or body.get("message") or "no error envelope")
        return ApiError(status, message, body=body)
    known = {name: error.get(name) for name in ("type", "param", "code")}
    return ApiError(status, str(error.get("message") or "no message"), **known, body=body)


def read_object(data: bytes) -> Json:
    """One JSON object; anything else raises ``UnreachableError``."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise UnreachableError("the server's answer is not JSON") from error
    if not isinstance(value, dict):
        raise UnreachableError("the server's answer is not a JSON object")
    return value


def read_object_or_text(data: bytes) -> Json:
    """One JSON object; what is no JSON becomes its ``message``."""
    try:
        value = json.loads(data)
    except ValueError:
        return {"message": data[:200].decode("utf-8", "replace")}
    return value if isinstance(value, dict) else {}


def read_chunks(response: HTTPResponse) -> Iterator[bytes]:
    """Pieces of the body as they arrive; a body that ends early raises ``UnreachableError``.

    ``HTTPResponse.readline`` would hide the early end of a chunked body; ``read1`` reports it.
    """
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, HTTPException) as cause:
            message = f"the connection broke inside an answer: {type(cause).__name__}"
            raise UnreachableError(message) from cause
        if not chunk:
            break
        yield chunk
    if response.length:
        raise UnreachableError("the connection broke inside an answer")


def read_body(response: HTTPResponse) -> bytes:
    """The whole body; one that ends early raises ``UnreachableError``."""
    return b"".join(read_chunks(response))


def read_lines(response: HTTPResponse) -> Iterator[bytes]:
    """Lines as they arrive, without their ends; the last may lack one."""
    pending = b""
    for chunk in read_chunks(response):
        *complete, pending = (pending + chunk).split(b"\n")
        yield from complete
    if pending:
        yield pending


def read_events(lines: Iterable[bytes]) -> Iterator[ServerEvent]:
    """Server-sent events until the lines end or one says ``[DONE]``."""
    name, identifier, data = "message", None, list[str]()
    for raw in lines:
        line = raw.decode("utf-8").rstrip("\r")
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                text = "\n".join(data)
                if text == "[DONE]":
                    return
                yield ServerEvent(name, _decoded(text), identifier)
            name, data = "message", []
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id":
            identifier = value


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
