"""Cursor pagination as OpenAI's lists have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import Query

AfterArg = Annotated[str | None, Query(max_length=128)]
"""Id of the last item of the previous page."""
LimitArg = Annotated[int, Query(ge=1, le=100)]


def page(items: Sequence[dict[str, Any]], has_more: bool) -> dict[str, Any]:
    """The list object of one page."""
    return {
        "object": "list",
        "data": list(items),
        "first_id": items[0]["id"] if items else None,
        "last_id": items[-1]["id"] if items else None,
        "has_more": has_more,
    }
