"""Codes of a batch's error file: all of them, what they mean, and whether submitting again helps.

The codes are stable: programs may compare them. Each is reported for one row; faults of a file as a
whole end the batch instead (``batch.errors``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

ENGINE_LOST: Final = "engine_lost"
RUNNER_LOST: Final = "runner_lost"
SERVICE_UNAVAILABLE: Final = "service_unavailable"
INTERNAL_ERROR: Final = "internal_error"
ROW_TOO_LARGE: Final = "row_too_large"
BATCH_EXPIRED: Final = "batch_expired"

DATA_CODES: Final[Mapping[str, str]] = {
    "invalid_json": "the line is not JSON",
    "invalid_row": "the line is not a JSON object",
    "invalid_custom_id": "custom_id is missing, empty or too long",
    "duplicate_custom_id": "custom_id was used on an earlier line",
    "invalid_method": "method is not POST",
    "invalid_url": "url is not the batch's endpoint",
    "missing_body": "body is missing",
    "missing_required_parameter": "a required field of the body is missing",
    "unknown_parameter": "a field is not one of the request's",
    "invalid_type": "a field has the wrong type",
    "invalid_value": "a field is out of its range, or contradicts another",
    "invalid_request": "the engine refused the request's parameters",
    "empty_prompt": "the prompt, or a turn of it, is empty",
    "invalid_prompt": "the turns of the prompt are in an order that cannot be sampled",
    "context_length_exceeded": "prompt and answer do not fit the engine's context",
    "unknown_dimension": "a dimension is not scored here",
    "model_not_found": "no policy version has that name",
    ROW_TOO_LARGE: "the line is longer than server.max_body_bytes",
}
"""Faults of the row: it is not tried again, and would fail again."""

SERVICE_CODES: Final[Mapping[str, str]] = {
    SERVICE_UNAVAILABLE: "engines failed, or none answered, for longer than the row's budget",
    ENGINE_LOST: "engines ended while nothing but this row was in them",
    RUNNER_LOST: "batch runners ended while they worked on this row alone",
    INTERNAL_ERROR: "the row met a bug; the runner's log has it",
    BATCH_EXPIRED: "the completion window ended before the row was worked on",
}
"""Faults of the service: the row may come through when it is submitted again."""

ROW_CODES: Final[Mapping[str, str]] = {**DATA_CODES, **SERVICE_CODES}
