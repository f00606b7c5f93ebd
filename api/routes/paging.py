"""What several resources share: cursor pagination as OpenAI's, and lookups of ids in bodies."""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import Query

from mora_serve.errors import NotFoundError

T = TypeVar("T")

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


async def referenced(lookup: Awaitable[T], param: str) -> T:
    """Result of looking up an id that a body's field ``param`` gave; a 404 names that field."""
    try:
        return await lookup
    except NotFoundError as error:
        raise NotFoundError(error.message, param, error.code) from None
