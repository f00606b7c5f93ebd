"""Uploads without Serve's queue: the application reads them from the connection itself.

Serve watches every request for a client that leaves, and to do so reads its body ahead into a queue
that has no bound: an upload that is stored more slowly than it arrives piles up in memory
(``ASGIDIReceiveProxy`` of Ray 2.60). It lets a request opt out with a header. Whoever reads an
upload notices by that when its client leaves, so uploads opt out here, in the server of each
replica: what the application does not take then waits in the client's socket. Other bodies are
small and their work is long, so that Serve goes on watching those.
"""

from __future__ import annotations

import re

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Receive, Scope, Send

CALLBACK = "api.direct_bodies:middlewares"
"""Import path for ``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``."""
_HEADER = b"x-request-disconnect-disabled"
_UPLOADS = re.compile(r"^/v1/(files|uploads/[^/]+/parts)$")


class DirectBodies:
    """Sets the header that makes Serve hand the connection's own ``receive`` to the application."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST" and _UPLOADS.match(scope["path"]):
            kept = [item for item in scope["headers"] if item[0] != _HEADER]
            scope["headers"] = [*kept, (_HEADER, b"?1")]
        await self._app(scope, receive, send)


def middlewares() -> list[Middleware]:
    """What Serve puts around its HTTP servers."""
    return [Middleware(DirectBodies)]
