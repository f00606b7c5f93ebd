"""Rows per second over the last minute, kept in a ring of buckets; and how long to wait by it.

The commit step of both ledgers adds to the ring (one slot, whatever the size of the batch), and
:func:`recent_rate` reads it. A batch whose work pauses is soon said to stand still; one that is
taken up again is measured from then on, and not over the pause.
"""

from __future__ import annotations

from collections.abc import Iterable

BUCKET_S = 2
NUM_BUCKETS = 30
WINDOW_S = float(BUCKET_S * NUM_BUCKETS)
MIN_ELAPSED_S = 1.0
"""A shorter time measures nothing: the first rows of a batch often end together."""

MIN_WAIT_S, MAX_WAIT_S = 1.0, 60.0
"""The official client heeds ``Retry-After`` up to a minute."""

Bucket = tuple[int, int]
"""``(number of the bucket since 1970, rows committed in it)``."""


class RateRing:
    """The ring of one batch, for ledgers within this process."""

    def __init__(self) -> None:
        self._slots: dict[int, Bucket] = {}

    def add(self, now: float, rows: int = 1) -> None:
        """Count ``rows`` committed at ``now``, in seconds of a clock that does not go back."""
        bucket = int(now // BUCKET_S)
        known, count = self._slots.get(bucket % NUM_BUCKETS, (bucket, 0))
        self._slots[bucket % NUM_BUCKETS] = (bucket, rows + (count if known == bucket else 0))

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """Buckets of the ring, some of which may be out of date."""
        return tuple(self._slots.values())


def recent_rate(buckets: Iterable[Bucket], now: float, since: float) -> float | None:
    """Rows per second over the part of the last minute that was worked in; ``None`` without rows.

    ``since`` is when the work that goes on at ``now`` was taken up. Rows committed before it, but
    within the minute, extend the time back to themselves.
    """
    oldest = int(now // BUCKET_S) - NUM_BUCKETS
    recent = [(bucket, count) for bucket, count in buckets if bucket > oldest]
    if not recent:
        return None
    begun = min([since, *(float(bucket * BUCKET_S) for bucket, _ in recent)])
    elapsed_s = max(now - max(begun, now - WINDOW_S), MIN_ELAPSED_S)
    return sum(count for _, count in recent) / elapsed_s


def bounded_wait(seconds: float) -> float:
    """An estimate of when there will be room, as what a refused caller is told."""
    return min(max(seconds, MIN_WAIT_S), MAX_WAIT_S)
