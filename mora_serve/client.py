"""A small REST client for the gateway: JSON, multipart, NDJSON and server-sent events.

The command line and the demo are users of the REST API like any other, and this module is all they
use. It stands on the standard library alone, keeps no connection between calls and reads streams
as they arrive. Refusals made before any work was queued (429, 503) are sent again after the delay
that the server asks for. It owns no knowledge of the routes beyond their content types; what
comes back is read by :mod:`mora_serve.answers`.
"""

from __future__ import annotations

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from mora_serve.answers import (
    CHUNK_BYTES,
    ApiError,
    Json,
    ServerEvent,
    UnreachableError,
    error_from,
    read_body,
    read_chunks,
    read_events,
    read_lines,
    read_object,
    read_object_or_text,
    retry_after,
)
from mora_serve.errors import MoraError

BUSY_STATUS = frozenset({429, 503})
"""Refusals that the gateway makes before it queues anything, so that sending again is safe."""
READY_POLL_S = 1.0


class Client:
    """Calls one gateway. Paths are given as in the REST contract, for example ``/v1/models``.

    Args:
        url: where the gateway listens, for example ``http://127.0.0.1:8000``.
        api_key: sent as bearer token when given.
        timeout_s: longest silence of the server before :class:`UnreachableError`.
        max_tries: how often a call that is refused as busy is sent in all.
        sleep: waits between these tries; replaced in tests.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout_s: float = 600.0,
        max_tries: int = 8,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        parts = urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise MoraError(
                f"--url must be an http address such as http://127.0.0.1:8000, got {url}"
            )
        self.url = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"
        self._secure = parts.scheme == "https"
        self._address = (parts.hostname, parts.port)
        self._prefix = parts.path.rstrip("/")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._max_tries = max_tries
        self._sleep = sleep

    # --- JSON ---------------------------------------------------------------------------------

    def get(self, path: str, **params: Any) -> Json:
        """The JSON object at ``path``; parameters that are ``None`` are left out."""
        return self._json("GET", path, params=params)

    def post(self, path: str, body: Any = None, **headers: str) -> Json:
        """Send ``body`` as JSON and return the JSON answer."""
        return self._json("POST", path, body=body, headers=headers)

    def delete(self, path: str) -> Json:
        return self._json("DELETE", path)

    def pages(self, path: str, **params: Any) -> Iterator[Json]:
        """Every item of a paginated list, following ``after`` while ``has_more`` says so."""
        after: str | None = None
        while True:
            page = self.get(path, after=after, **params)
            items = page.get("data", [])
            yield from items
            if not page.get("has_more") or not items:
                return
            after = items[-1]["id"]

    def ready(self) -> tuple[bool, Json]:
        """Whether ``/readyz`` answers 200, and what it said. Raises ``UnreachableError``."""
        try:
            with self._open("GET", "/readyz", tries=1) as response:
                return True, read_object(read_body(response))
        except ApiError as error:
            return False, error.body

    def wait_ready(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Return when ``/readyz`` answers 200. Raises ``UnreachableError`` that says what was
        missing last.

        One answer is waited for as long as ``timeout_s`` of the client says.
        """
        deadline = clock() + timeout_s
        while True:
            try:
                ready, state = self.ready()
                missing = "; ".join(map(str, state.get("reasons", ()))) or "starting"
            except UnreachableError as error:
                ready, missing = False, str(error)
            if ready:
                return
            if clock() + READY_POLL_S > deadline:
                raise UnreachableError(f"{self.url} is not ready after {timeout_s:g} s: {missing}")
            self._sleep(READY_POLL_S)

    # --- streams ------------------------------------------------------------------------------

    def ndjson(self, method: str, path: str, body: Any = None, **params: Any) -> Iterator[Json]:
        """JSON lines as they arrive. A line that is only an error envelope raises ``ApiError``."""
        headers = {"Accept": "application/x-ndjson"}
        with self._open(method, path, body=body, params=params, headers=headers) as response:
            for line in read_lines(response):
                if line.strip():
                    item = read_object(line)
                    if set(item) == {"error"}:
                        raise error_from(response.status, item)
                    yield item

    def events(self, path: str, **params: Any) -> Iterator[ServerEvent]:
        """Server-sent events until the server ends the stream or sends ``[DONE]``."""
        headers = {"Accept": "text/event-stream"}
        with self._open("GET", path, params=params, headers=headers) as response:
            yield from read_events(read_lines(response))

    def download(self, path: str, target: Path, *, accept: str | None = None, **params: Any) -> int:
        """Write the body of ``path`` to ``target``, all or nothing; returns its size in bytes."""
        headers = {"Accept": accept} if accept else {}
        partial = target.with_name(f".{target.name}.partial")
        size = 0
        with self._open("GET", path, params=params, headers=headers) as response:
            try:
                with partial.open("wb") as file:
                    for chunk in read_chunks(response):
                        size += file.write(chunk)
                partial.replace(target)
            finally:
                partial.unlink(missing_ok=True)
        return size

    def upload(self, content: bytes | Path, filename: str, purpose: str = "batch") -> Json:
        """Upload a file as OpenAI's multipart form does; a path is streamed, not read whole."""
        boundary = f"mora{secrets.token_hex(16)}"
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        head = (
            f'--{boundary}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\n{purpose}\r\n'
            f'--{boundary}\r\nContent-Disposition: form-data; name="file"; '
            f'filename="{quote(filename)}"\r\nContent-Type: application/octet-stream\r\n\r\n'
        ).encode()
        tail = f"\r\n--{boundary}--\r\n".encode()
        headers = {
            "Content-Type": f"multipart/form-data; boundary={boundary}",
            "Content-Length": str(len(head) + size + len(tail)),
        }
        with self._open(
            "POST", "/v1/files", raw=lambda: _form(head, content, tail), headers=headers
        ) as response:
            return read_object(read_body(response))

    # --- transport ----------------------------------------------------------------------------

    def _json(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Json:
        with self._open(method, path, body=body, params=params, headers=headers) as response:
            return read_object(read_body(response))

    @contextmanager
    def _open(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        raw: Callable[[], Iterable[bytes]] | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        tries: int | None = None,
    ) -> Iterator[HTTPResponse]:
        target = self._prefix + path + _query(params)
        sent = {"Accept": "application/json", **(headers or {})}
        if self._api_key:
            sent["Authorization"] = f"Bearer {self._api_key}"
        data = None if body is None else json.dumps(body).encode()
        if data is not None:
            sent["Content-Type"] = "application/json"
        remaining = self._max_tries if tries is None else tries
        while True:
            remaining -= 1
            connection = self._connect()
            try:
                response = self._send(connection, method, target, raw() if raw else data, sent)
                if response.status < 400:
                    yield response
                    return
                delay_s = retry_after(response)
                error = error_from(response.status, read_object_or_text(read_body(response)))
            finally:
                connection.close()
            if error.status not in BUSY_STATUS or remaining <= 0:
                raise error
            self._sleep(delay_s)

    def _send(
        self,
        connection: HTTPConnection,
        method: str,
        target: str,
        body: bytes | Iterable[bytes] | None,
        headers: Mapping[str, str],
    ) -> HTTPResponse:
        """The response's head. A server that refuses a body early has answered before we finish."""
        try:
            try:
                connection.request(method, target, body=body, headers=dict(headers))
            except (BrokenPipeError, ConnectionResetError):
                if body is None:
                    raise
            return connection.getresponse()
        except (OSError, HTTPException) as cause:
            raise self._unreachable(cause) from cause

    def _connect(self) -> HTTPConnection:
        host, port = self._address
        kind = HTTPSConnection if self._secure else HTTPConnection
        return kind(host, port, timeout=self._timeout_s)

    def _unreachable(self, cause: Exception) -> UnreachableError:
        if isinstance(cause, ConnectionRefusedError | socket.gaierror):
            return UnreachableError(f"no server answers at {self.url}; start one: mora-serve up")
        if isinstance(cause, TimeoutError):
            return UnreachableError(f"{self.url} was silent for {self._timeout_s:g} s")
        return UnreachableError(f"the connection to {self.url} broke: {type(cause).__name__}")


def _query(params: Mapping[str, Any] | None) -> str:
    given = {
        key: str(value).lower() if isinstance(value, bool) else value
        for key, value in (params or {}).items()
        if value is not None
    }
    return f"?{urlencode(given)}" if given else ""


def _form(head: bytes, content: bytes | Path, tail: bytes) -> Iterator[bytes]:
    yield head
    if isinstance(content, Path):
        with content.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    else:
        yield content
    yield tail
