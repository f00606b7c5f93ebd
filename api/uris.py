"""Which ``uri`` a caller may register: those under an allowed prefix, decided on resolved paths.

A prefix ends at a path segment: ``file:///data`` allows ``file:///data/x`` and not
``file:///data2/x``. Local paths are resolved through symbolic links on both sides, so that a link
inside a prefix does not lead out of it. Remote paths may hold no ``.`` or ``..`` segment, no query
and no percent escape, so that no layer below reads another path than the one compared here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from mora_serve.errors import InvalidRequestError

LOCAL = "file"


def resolve_uri(uri: str, prefixes: Sequence[str]) -> str:
    """``uri`` in resolved form. Raises ``InvalidRequestError`` when no prefix allows it."""
    scheme, path = _split(uri)
    for prefix in prefixes:
        allowed_scheme, allowed = _split(prefix if "://" in prefix else f"{LOCAL}://{prefix}")
        if scheme == allowed_scheme and _within(path, allowed):
            return f"{scheme}://{path}"
    raise InvalidRequestError(
        "uri must be under a prefix that server.file_uri_prefixes allows."
        if prefixes
        else "uri cannot be registered: server.file_uri_prefixes allows none; upload the file.",
        "uri",
        "uri_not_allowed",
    )


def _split(uri: str) -> tuple[str, str]:
    scheme, mark, rest = uri.partition("://")
    if not mark or not scheme.isascii() or not scheme.replace("+", "").isalnum():
        raise _malformed("must be an absolute URI such as s3://bucket/key")
    segments = rest.split("/")
    if any(segment in (".", "..") for segment in segments) or any(
        c in rest for c in "?#%*[]{}\\"
    ) or not rest.isprintable() or "::" in uri:  # fmt: skip
        raise _malformed("must be a plain path without '.', '..', wildcards, query or escapes")
    if scheme.lower() == LOCAL:
        if not rest.startswith("/"):
            raise _malformed("must name a local file as file:///absolute/path")
        return LOCAL, os.path.realpath(rest)
    return scheme.lower(), "/".join(s for s in segments if s)


def _malformed(rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"uri {rule}.", "uri", "invalid_uri")


def _within(path: str, prefix: str) -> bool:
    root = prefix.rstrip("/")
    return path != root and path.startswith(f"{root}/")
