"""One batch row: from an input line to what is committed for it.

Whatever goes wrong has one of five budgets, and ends as a line of the error file whose stable code
is in :data:`mora_serve.row_codes.ROW_CODES`::

    the row's own fault           at once                                   a code of its own
    an engine answers with an     ``max_infra_retries`` repeats             ``service_unavailable``
    error, and lives
    nothing answers: full queues, ``unavailable_timeout_s`` of waiting      ``service_unavailable``
    no replica, no storage
    an engine ends under the row  ``max_poison_tries`` losses, of which     ``engine_lost``
                                  the last in quarantine
    anything unforeseen           ``max_poison_tries`` tries                ``internal_error``

Between tries lies an exponential backoff with full jitter, which holds no place that others need.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from actors.isolation import Isolation, Place
from actors.quarantine import QuarantineLostError
from mora_serve.config import RunnerSettings
from mora_serve.errors import (
    InvalidRequestError,
    MoraError,
    OverloadedError,
    ReplicaError,
    StorageError,
)
from mora_serve.ports import RowCommit
from mora_serve.requests import (
    DUPLICATE_CUSTOM_ID,
    MoraRequest,
    custom_id_of,
    parse_batch_row,
)
from mora_serve.row_codes import (
    ENGINE_LOST,
    INTERNAL_ERROR,
    ROW_TOO_LARGE,
    RUNNER_LOST,
    SERVICE_UNAVAILABLE,
)
from mora_serve.service import RowResult
from mora_serve.store.batch_input import Line, row_id

log = logging.getLogger(__name__)

UNAVAILABLE = (OverloadedError, StorageError)
"""Nothing was asked of an engine yet: waiting is all that helps."""
FIRST_BACKOFF_S, LAST_BACKOFF_S = 0.5, 30.0

Sleep = Callable[[float], Awaitable[None]]


class RowWorker:
    """Turns lines of one batch into commits. ``sleep`` and ``clock`` (s) can be injected.

    ``defaults`` are body fields of rows that do not give them; ``fixed`` are those of every row.
    """

    def __init__(
        self,
        isolation: Isolation,
        settings: RunnerSettings,
        batch: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any],
        fixed: Mapping[str, Any],
        max_line_bytes: int,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._isolation = isolation
        self._settings = settings
        self._batch_id = str(batch["id"])
        self._endpoint = str(batch["endpoint"])
        self._defaults = defaults
        self._fixed = fixed
        self._max_line_bytes = max_line_bytes
        self._sleep = sleep
        self._clock = clock

    async def run(
        self,
        line: Line,
        *,
        duplicate: bool = False,
        place: Place = Place.TOGETHER,
        begin: Callable[[], Awaitable[int]] | None = None,
    ) -> RowCommit:
        """The outcome of ``line``; never raises for what the row or the engines did.

        ``place`` is where the row begins. ``begin`` is called there, before anything is asked of
        an engine; it returns how many runners have begun the row and ended with it unfinished, and
        its errors are raised.
        """
        if line.data is None:
            return self._error(
                line, None, ROW_TOO_LARGE, f"a row must be at most {self._max_line_bytes} bytes"
            )
        custom_id = custom_id_of(line.data)
        if duplicate:
            return self._error(
                line, custom_id, DUPLICATE_CUSTOM_ID,
                "custom_id must be unique within the batch, got one of an earlier line",
            )  # fmt: skip
        try:
            row = parse_batch_row(self._with_defaults(line.data), self._endpoint)
            result = await self._try(row.body, place, begin)
        except InvalidRequestError as error:
            return self._error(line, custom_id, error.code or "invalid_row", str(error))
        except _GaveUpError as error:
            return self._error(line, custom_id, error.code, str(error))
        return self._output(line, row.custom_id, result)

    async def _try(
        self, request: MoraRequest, place: Place, begin: Callable[[], Awaitable[int]] | None
    ) -> RowResult:
        budget = _Budget(self._settings, self._clock, place)
        while True:
            try:
                async with self._isolation.enter(budget.place) as service:
                    if begin is not None and budget.failures == 0:
                        self._check_runners(await begin())
                    try:
                        return await service.run_row(request)
                    except InvalidRequestError:
                        raise
                    except Exception as error:  # noqa: BLE001  any bug must cost this row alone
                        failure = error
            except QuarantineLostError:
                log.warning("a row of %s waits for another quarantine", self._batch_id)
                continue
            code = budget.spend(failure)
            if code is not None:
                cause = None if isinstance(failure, MoraError) else failure
                log.error("a row of %s ends as %s", self._batch_id, code, exc_info=cause)
                raise _GaveUpError(code, _gave_up(budget.failures, failure)) from failure
            await self._sleep(backoff_s(budget.failures, failure))

    def _check_runners(self, tries: int) -> None:
        if tries > self._settings.max_poison_tries:
            raise _GaveUpError(
                RUNNER_LOST,
                f"the row was given up after {tries} runners ended while they worked on it",
            )

    def _with_defaults(self, data: bytes) -> bytes | str:
        if not self._defaults and not self._fixed:
            return data
        try:
            row = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError):
            return data
        if not isinstance(row, dict) or not isinstance(row.get("body"), dict):
            return data
        row["body"] = {**self._defaults, **row["body"], **self._fixed}
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


class _Budget:
    """What one row has used up; see the module docstring for who may use what."""

    def __init__(self, settings: RunnerSettings, clock: Callable[[], float], place: Place) -> None:
        self._settings = settings
        self._clock = clock
        self._errors = self._losses = self._surprises = 0
        self._unavailable_since: float | None = None
        self.place = place
        """Where the next try runs."""
        self.failures = 0
        """Tries that failed, for whatever reason."""

    def spend(self, error: Exception) -> str | None:
        """Count a failed try; the code of the row's error line when that was the last one."""
        self.failures += 1
        if isinstance(error, ReplicaError):
            return self._lose() if error.lost else self._fail()
        if isinstance(error, UNAVAILABLE):
            return self._wait()
        self._surprises += 1
        return INTERNAL_ERROR if self._surprises >= self._settings.max_poison_tries else None

    def _lose(self) -> str | None:
        was, self.place = self.place, self.place.next()
        self._losses += was > Place.TOGETHER
        convicted = was is Place.QUARANTINED and self._losses >= self._settings.max_poison_tries
        return ENGINE_LOST if convicted else None

    def _fail(self) -> str | None:
        self._errors += 1
        return SERVICE_UNAVAILABLE if self._errors > self._settings.max_infra_retries else None

    def _wait(self) -> str | None:
        if self._unavailable_since is None:
            self._unavailable_since = self._clock()
        waited_s = self._clock() - self._unavailable_since
        return SERVICE_UNAVAILABLE if waited_s > self._settings.unavailable_timeout_s else None


class _GaveUpError(MoraError):
    """A budget is used up."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _gave_up(tries: int, cause: Exception) -> str:
    reason = str(cause) if isinstance(cause, MoraError) else type(cause).__name__
    return f"the row failed {tries} times, last with: {reason}"


def backoff_s(failures: int, error: Exception) -> float:
    """Pause after the ``failures``-th failure in seconds: full jitter under a doubling bound."""
    bound = min(FIRST_BACKOFF_S * 2.0 ** min(failures - 1, 16), LAST_BACKOFF_S)
    pause = random.uniform(0.0, bound)
    return max(pause, float(error.retry_after_s)) if isinstance(error, OverloadedError) else pause


def _json(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # A lone surrogate, which UTF-8 cannot say, becomes JSON's escape of it.
    return text.encode("utf-8", "backslashreplace")
