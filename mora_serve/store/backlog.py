"""Backpressure of batches: how much may wait, and how long a refused caller had better wait."""

from __future__ import annotations

from dataclasses import dataclass

from mora_serve.errors import OverloadedError
from mora_serve.store.rate import MAX_WAIT_S, bounded_wait
from mora_serve.store.steps import Backlog


@dataclass(frozen=True, slots=True)
class BacklogLimits:
    """What unfinished batches may hold together; a larger batch is admitted when it is alone."""

    max_rows: int = 10_000_000
    max_bytes: int = 64 * 2**30


TYPICAL_ROW_BYTES = 256
"""A row of a short prompt as a JSON line: rather too many rows are expected than too few."""
PACKED_FACTOR = 4
"""JSON lines that a byte of Parquet, or of a directory of data files, may turn into."""


def estimated_rows(filename: str, num_bytes: int) -> int:
    """Rows of an input file that was not read yet, at least one."""
    plain = filename.endswith((".jsonl", ".json", ".csv"))
    return max(1, num_bytes * (1 if plain else PACKED_FACTOR) // TYPICAL_ROW_BYTES)


def backlog_full(waiting: Backlog, input_bytes: int, limits: BacklogLimits) -> OverloadedError:
    """The refusal of a batch of ``input_bytes``."""
    return OverloadedError(
        f"Unfinished batches hold {waiting.rows} rows and {waiting.num_bytes} bytes of input, at "
        f"most {limits.max_rows} rows and {limits.max_bytes} bytes at once. Try again later.",
        retry_after_s(waiting, input_bytes, limits),
    )


def retry_after_s(waiting: Backlog, input_bytes: int, limits: BacklogLimits) -> float:
    """Seconds until there is room at the measured rate, between one and sixty.

    Sixty where nothing was finished within the last minute.
    """
    if waiting.rate <= 0:
        return MAX_WAIT_S
    surplus_bytes = waiting.num_bytes + input_bytes - limits.max_bytes
    rows_of_bytes = surplus_bytes * waiting.rows / max(1, waiting.num_bytes)
    surplus = max(waiting.rows - limits.max_rows + 1, rows_of_bytes)
    return bounded_wait(surplus / waiting.rate)
