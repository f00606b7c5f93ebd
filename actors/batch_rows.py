"""One batch row: from an input line to what is committed for it.

Faults of the row itself become a line of the error file at once. Infrastructure failures are tried
again with exponential backoff and jitter up to their own budget; anything unforeseen has a smaller
one, so that a row that always breaks something cannot stop its batch.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from mora_serve.config import RunnerSettings
from mora_serve.errors import (
    GenerationError,
    InvalidRequestError,
    MoraError,
    OverloadedError,
    ScoringError,
    StorageError,
)
from mora_serve.ports import RowCommit
from mora_serve.requests import (
    DUPLICATE_CUSTOM_ID,
    MoraRequest,
    custom_id_of,
    parse_batch_row,
)
from mora_serve.service import RowResult
from mora_serve.store.batch_input import Line, row_id

log = logging.getLogger(__name__)

INFRASTRUCTURE = (GenerationError, ScoringError, OverloadedError, StorageError)
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 30.0

Sleep = Callable[[float], Awaitable[None]]


class RowService(Protocol):
    """The part of :class:`~mora_serve.service.MoraService` that rows need."""

    async def run_row(self, request: MoraRequest) -> RowResult: ...


class RowWorker:
    """Turns lines of one batch into commits. ``sleep`` can be injected to test backoff."""

    def __init__(
        self,
        service: RowService,
        settings: RunnerSettings,
        batch: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        max_line_bytes: int,
        sleep: Sleep = asyncio.sleep,
    ) -> None:
        self._service = service
        self._settings = settings
        self._batch_id = str(batch["id"])
        self._endpoint = str(batch["endpoint"])
        self._defaults = defaults
        self._max_line_bytes = max_line_bytes
        self._sleep = sleep

    async def run(self, line: Line, *, duplicate: bool = False, tries: int = 0) -> RowCommit:
        """The outcome of ``line``; never raises for what the row or the engines did.

        ``tries`` is how many runners have begun the row after the first one and, before this one,
        ended with it unfinished.
        """
        if line.data is None:
            return self._error(
                line, None, "row_too_large", f"a row must be at most {self._max_line_bytes} bytes"
            )
        custom_id = custom_id_of(line.data)
        if duplicate:
            return self._error(
                line, custom_id, DUPLICATE_CUSTOM_ID,
                "custom_id must be unique within the batch, got one of an earlier line",
            )  # fmt: skip
        if tries > self._settings.max_poison_tries:
            return self._error(
                line, custom_id, "runner_lost",
                f"the row was given up after {tries} runners ended while they worked on it",
            )  # fmt: skip
        try:
            row = parse_batch_row(self._with_defaults(line.data), self._endpoint)
            result = await self._try(row.body)
        except InvalidRequestError as error:
            return self._error(line, custom_id, error.code or "invalid_row", str(error))
        except _GaveUpError as error:
            return self._error(line, custom_id, error.code, str(error))
        return self._output(line, row.custom_id, result)

    async def _try(self, request: MoraRequest) -> RowResult:
        failures = surprises = 0
        while True:
            try:
                return await self._service.run_row(request)
            except INFRASTRUCTURE as error:
                failures += 1
                if failures > self._settings.max_infra_retries:
                    raise _GaveUpError("service_unavailable", error, failures) from error
                await self._sleep(backoff_s(failures, error))
            except InvalidRequestError:
                raise
            except Exception as error:
                # A row may hit any bug; it must end as an error line and not stop its batch.
                surprises += 1
                if surprises >= self._settings.max_poison_tries:
                    log.exception("a row of %s failed for good", self._batch_id)
                    raise _GaveUpError("internal_error", error, surprises) from error

    def _with_defaults(self, data: bytes) -> bytes | str:
        if not self._defaults:
            return data
        try:
            row = json.loads(data)
        except (ValueError, RecursionError):
            return data
        if not isinstance(row, dict) or not isinstance(row.get("body"), dict):
            return data
        row["body"] = {**self._defaults, **row["body"]}
        return json.dumps(row)

    def _output(self, line: Line, custom_id: str, result: RowResult) -> RowCommit:
        request_id = self._id("req", line)
        response = {"status_code": 200, "request_id": request_id, "body": result.body}
        return RowCommit(
            line=line.number,
            output=self._line(line, custom_id, response, None),
            error=None,
            pairs=tuple(_json(pair) for pair in result.pairs),
            usage=result.usage,
            classes=result.classes,
        )

    def _error(self, line: Line, custom_id: str | None, code: str, message: str) -> RowCommit:
        error = {"code": code, "message": message, "line": line.number + 1}
        return RowCommit(line.number, None, self._line(line, custom_id, None, error))

    def _line(self, line: Line, custom_id: str | None, response: Any, error: Any) -> bytes:
        return _json(
            {
                "id": self._id("batch_req", line),
                "custom_id": custom_id,
                "response": response,
                "error": error,
            }
        )

    def _id(self, prefix: str, line: Line) -> str:
        return row_id(prefix, self._batch_id, line.number)


class _GaveUpError(MoraError):
    """A budget of tries is used up."""

    def __init__(self, code: str, cause: Exception, tries: int) -> None:
        reason = str(cause) if isinstance(cause, MoraError) else type(cause).__name__
        super().__init__(f"the row failed {tries} times, last with: {reason}")
        self.code = code


def backoff_s(failures: int, error: Exception) -> float:
    """Pause after the ``failures``-th failure in seconds: doubling, jittered, bounded."""
    pause: float = min(FIRST_BACKOFF_S * 2 ** (failures - 1), LAST_BACKOFF_S) * random.uniform(
        0.5, 1.0
    )
    return max(pause, float(error.retry_after_s)) if isinstance(error, OverloadedError) else pause


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate, which UTF-8 cannot say, becomes JSON's escape of it.
    return text.encode("utf-8", "backslashreplace")
