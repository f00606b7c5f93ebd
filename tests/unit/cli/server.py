"""A tiny HTTP server for client tests: routes are functions, requests are remembered."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass
class Seen:
    """A request as it arrived."""

    method: str
    path: str
    params: dict[str, str]
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Answer:
    """What a route answers; ``pieces`` are sent as chunks, ``cut`` breaks off after them."""

    status: int = 200
    body: Any = None
    pieces: list[bytes] | None = None
    cut: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    content_type: str = "application/json"


Route = Callable[[Seen], Answer]


class Server:
    """Answers by ``routes["METHOD /path"]``; everything else is 404."""

    def __init__(self, url: str, routes: dict[str, Route]) -> None:
        self.url = url
        self.routes = routes
        self.seen: list[Seen] = []

    def on(self, route: str, answer: Answer | Route) -> None:
        self.routes[route] = answer if callable(answer) else lambda _: answer

    def answer(self, seen: Seen) -> Answer:
        self.seen.append(seen)
        route = self.routes.get(f"{seen.method} {seen.path}")
        return route(seen) if route else error(404, f"no route {seen.path}")


def error(status: int, message: str, **fields: Any) -> Answer:
    return Answer(status, {"error": {"message": message, "type": None, "code": None, **fields}})


def ndjson(*items: Any, cut: bool = False) -> Answer:
    pieces = [json.dumps(item).encode() + b"\n" for item in items]
    return Answer(pieces=pieces, cut=cut, content_type="application/x-ndjson")


def sse(*pieces: bytes) -> Answer:
    return Answer(pieces=list(pieces), content_type="text/event-stream")


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port of the loopback interface."""
    routes: dict[str, Route] = {}

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _respond(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            parts = urlsplit(self.path)
            seen = Seen(
                self.command, parts.path, dict(parse_qsl(parts.query)),
                {k.lower(): v for k, v in self.headers.items()}, self.rfile.read(length),
            )  # fmt: skip
            self._send(server.answer(seen))

        def _send(self, answer: Answer) -> None:
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.content_type)
            for name, value in answer.headers.items():
                self.send_header(name, value)
            if answer.pieces is None:
                data = answer.body if isinstance(answer.body, bytes) else _dump(answer.body)
                self.send_header("Content-Length", str(len(data) + 10 * answer.cut))
                self.end_headers()
                self.wfile.write(data)
            else:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for piece in answer.pieces:
                    self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                if not answer.cut:
                    self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        do_GET = do_POST = do_DELETE = _respond

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server = Server(f"http://127.0.0.1:{http.server_address[1]}", routes)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        thread.join()
        http.server_close()


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()
