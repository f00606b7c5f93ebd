"""Which ``uri`` may be registered and opened: those under an allowed prefix, on resolved paths.

A prefix ends at a path segment: ``file:///data`` allows ``file:///data/x`` and not
``file:///data2/x``. Local paths are resolved through symbolic links on both sides, so that a link
inside a prefix does not lead out of it. Remote paths may hold no ``.`` or ``..`` segment, no query
and no percent escape, so that no layer below reads another path than the one compared here.

A link may be put in the way after a path was resolved. So local files are opened with
:func:`open_within`, which looks at where the open file really is.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from typing import BinaryIO

from mora_serve.errors import InvalidRequestError

LOCAL = "file"
_LOCAL_NAMES = ("file", "local")


def resolve_uri(uri: str, prefixes: Sequence[str]) -> str:
    """``uri`` in resolved form. Raises ``InvalidRequestError`` when no prefix allows it."""
    scheme, path = _split(uri)
    if not _allowed(scheme, path, prefixes):
        raise _not_allowed(prefixes)
    return f"{scheme}://{path}"


def open_within(path: str, prefixes: Sequence[str]) -> BinaryIO:
    """Open a local file for reading, wherever its path leads by now.

    Raises ``InvalidRequestError`` when that is outside the prefixes or no regular file, and
    ``OSError`` when there is none.
    """
    file = open(path, "rb", opener=_open_at_once)  # noqa: SIM115  it is the caller's to close
    real = os.readlink(f"/proc/self/fd/{file.fileno()}")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode) or not _allowed(LOCAL, real, prefixes):
        file.close()
        raise _not_allowed(prefixes)
    return file


def _open_at_once(path: str, flags: int) -> int:
    # A pipe would be waited for.
    return os.open(path, flags | os.O_NONBLOCK)


def is_plain_path(path: str) -> bool:
    """Whether no layer below reads another path than this one."""
    dots = any(segment in (".", "..") for segment in path.split("/"))
    marks = "::" in path or any(c in path for c in "?#%*[]{}\\")
    return not dots and not marks and path.isprintable()


def _allowed(scheme: str, path: str, prefixes: Sequence[str]) -> bool:
    parsed = (_split(prefix if "://" in prefix else f"{LOCAL}://{prefix}") for prefix in prefixes)
    return any(scheme == allowed and _within(path, root) for allowed, root in parsed)


def _not_allowed(prefixes: Sequence[str]) -> InvalidRequestError:
    return InvalidRequestError(
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
    if not is_plain_path(rest):
        raise _malformed("must be a plain path without '.', '..', wildcards, query or escapes")
    if scheme.lower() in _LOCAL_NAMES:
        if not rest.startswith("/"):
            raise _malformed("must name a local file as file:///absolute/path")
        return LOCAL, os.path.realpath(rest)
    return scheme.lower(), "/".join(s for s in segments if s)


def _malformed(rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"uri {rule}.", "uri", "invalid_uri")


def _within(path: str, prefix: str) -> bool:
    root = prefix.rstrip("/")
    return path != root and path.startswith(f"{root}/")
