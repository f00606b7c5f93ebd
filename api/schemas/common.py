"""What every room shares: errors, pages, health."""

from __future__ import annotations

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

ItemT = TypeVar("ItemT")


class Wire(BaseModel):
    """Base: a response with a field we did not document is a bug."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorBody(Wire):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(Wire):
    """OpenAI's error envelope; the body of every response that is not a success."""

    error: ErrorBody


class Page(Wire, Generic[ItemT]):
    """A page of a list, newest first; pass ``last_id`` as ``after`` for the next one."""

    object: Literal["list"]
    data: list[ItemT]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Alive(Wire):
    status: Literal["ok"]


class Ready(Wire):
    status: Literal["ok", "not_ready"]
    reasons: list[str]
    """Why requests cannot be served yet, one per part; empty when they can."""
    pools: dict[str, str]
    """Each pool's state, for people."""
