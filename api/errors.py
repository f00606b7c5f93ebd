"""The one table from exceptions to HTTP: OpenAI's error envelope, status and headers.

Every response of the gateway that is not a success passes through :func:`envelope_response`. Bad
input is 400, never 422 and never 500; an unhandled exception becomes a 500 that names the request
id and nothing else. Messages never carry a stack trace or prompt text.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from mora_serve.errors import (
    CalibrationError,
    ConfigError,
    ConflictError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ReplicaError,
    ScoringError,
    StorageError,
)
from mora_serve.validation import rule_text, shown

logger = logging.getLogger("mora.api")

RETRY_UNAVAILABLE = {"Retry-After": "5"}
"""Headers of a 503: about the seconds Serve needs to notice and replace a dead replica."""


class UnauthorizedError(InvalidRequestError):
    """No key or a wrong one although keys are configured; maps to HTTP 401."""


class BodyTooLargeError(InvalidRequestError):
    """The body exceeds a limit, by its Content-Length or as counted; maps to HTTP 413."""


class NotReadyError(Exception):
    """A part the request needs is not serving; maps to HTTP 503."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What the envelope says, with the status and headers it travels under."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


_ClientRow = tuple[type[InvalidRequestError], int, str, str | None, dict[str, str]]
_CLIENT_ERRORS: tuple[_ClientRow, ...] = (
    (UnauthorizedError, 401, "authentication_error", "invalid_api_key",
     {"WWW-Authenticate": "Bearer"}),
    (BodyTooLargeError, 413, "invalid_request_error", "body_too_large", {}),
    (NotFoundError, 404, "invalid_request_error", "not_found", {}),
    (ConflictError, 409, "invalid_request_error", "conflict", {"x-should-retry": "false"}),
    (InvalidRequestError, 400, "invalid_request_error", "invalid_value", {}),
)  # fmt: skip
"""Most specific first: exception type, status, envelope type, default code, headers."""

_UNAVAILABLE: tuple[tuple[type[Exception], str, str], ...] = (
    (GenerationError, "generator_unavailable", "The generator could not answer; try again."),
    (ScoringError, "scorer_unavailable", "A scorer could not answer; try again."),
    (StorageError, "storage_unavailable", "The store could not answer; try again."),
    (CalibrationError, "calibration_unavailable", "No calibrator fits the scorers being served."),
    (NotReadyError, "not_ready", "The service is not ready."),
)


def problem_of(error: Exception) -> Problem | None:
    """The table row of ``error``; ``None`` when it is not one of ours."""
    for kind, status, name, code, headers in _CLIENT_ERRORS:
        if isinstance(error, kind):
            return Problem(status, str(error), name, error.param, error.code or code, headers)
    if isinstance(error, OverloadedError):
        seconds = max(1, math.ceil(error.retry_after_s))
        return Problem(429, str(error), "rate_limit_error", None, "overloaded",
                       {"Retry-After": str(seconds)})  # fmt: skip
    for unavailable, code, default in _UNAVAILABLE:
        if isinstance(error, unavailable):
            # What an engine ended under may end the next one, and clients repeat a 503 unasked.
            lost = isinstance(error, ReplicaError) and error.lost
            headers = {"x-should-retry": "false"} if lost else RETRY_UNAVAILABLE
            return Problem(503, str(error) or default, "service_unavailable", None, code, headers)
    if isinstance(error, ConfigError):
        return Problem(500, "The service is not configured correctly.", "server_error", None,
                       "configuration_error")  # fmt: skip
    return None


def internal_problem(request_id: str) -> Problem:
    """The 500 of an unhandled exception: it names the request id for the operator's log."""
    return Problem(
        500,
        f"The server failed to handle this request; its id is {request_id}.",
        "server_error",
        None,
        "internal_error",
    )


def problem_of_exception(error: Exception, request_id: str) -> Problem:
    """Table row of any exception; logs the ones that have none, without the message.

    Exception messages of foreign libraries may repeat request content, so the log carries the type
    and the place only.
    """
    problem = problem_of(error)
    if problem is not None:
        return problem
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    place = f"{last.tb_frame.f_code.co_filename}:{last.tb_lineno}" if last else "unknown"
    logger.error("request %s failed with %s at %s", request_id, type(error).__qualname__, place)
    return internal_problem(request_id)


def envelope_response(problem: Problem) -> Response:
    """The HTTP response of a problem."""
    content = json.dumps(problem.body(), ensure_ascii=True).encode("ascii")
    return Response(content, problem.status, dict(problem.headers), "application/json")


_HTTP_CODES = {
    401: "invalid_api_key",
    404: "unknown_url",
    405: "method_not_allowed",
    413: "body_too_large",
}


def _http_problem(request: Request, error: HTTPException) -> Problem:
    """Starlette's own errors: unknown route, wrong method, unreadable body or form."""
    messages = {
        404: f"Unknown request URL: {request.method} {request.url.path}.",
        405: f"{request.method} is not allowed on {request.url.path}.",
        400: "The request body must be valid JSON in UTF-8, or a valid multipart form.",
    }
    status = error.status_code if error.status_code != 422 else 400
    return Problem(
        status,
        messages.get(status, str(error.detail)),
        "invalid_request_error" if status < 500 else "server_error",
        None,
        _HTTP_CODES.get(status, "invalid_request"),
        dict(error.headers or {}),
    )


def validation_problem(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """400 for a path or query parameter, naming it and its rule.

    Bodies are validated by :mod:`api.bodies` with the core's own messages.
    """
    first = errors[0]
    param = ".".join(str(part) for part in first["loc"][1:]) or None
    kind = str(first["type"])
    if kind == "missing":
        return Problem(400, f"{param} is required.", "invalid_request_error", param,
                       "missing_required_parameter")  # fmt: skip
    value = first.get("input")
    got = f", got {shown(str(value))!r}" if isinstance(value, str | int) else ""
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    message = f"{param} {rule_text(first)}{got}."
    return Problem(400, message, "invalid_request_error", param, code)


def install_error_handlers(app: FastAPI) -> None:
    """Route every exception of ``app`` through the table above."""

    async def on_validation(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return envelope_response(validation_problem(error.errors()))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return envelope_response(_http_problem(request, error))

    async def on_known(request: Request, error: Exception) -> Response:
        request_id = str(request.scope.get("mora_request_id", ""))
        return envelope_response(problem_of_exception(error, request_id))

    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    for kind in (InvalidRequestError, OverloadedError, ConfigError,
                 *(row[0] for row in _UNAVAILABLE)):  # fmt: skip
        app.add_exception_handler(kind, on_known)
