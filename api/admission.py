"""Admission: how much one gateway replica works on at once.

A pure counter: it owns no task and no queue. A request takes its permits before any work is queued
and is refused at once when they do not fit; whoever holds permits gives them back by leaving the
``with`` block, however it is left. A request larger than the whole limit is admitted alone when
nothing else runs, so that limits of request size and of concurrency stay independent.

A refused caller is told when there will be room at the rate at which permits came back within the
last minute. As long as none has, it is told to wait as long as the work has run already.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mora_serve.errors import OverloadedError
from mora_serve.store.rate import RateRing, bounded_wait, recent_rate


class Admission:
    """Counts permits; ``observe`` is told the number in use after every change.

    ``refused`` is called for every refusal. ``clock`` gives seconds.
    """

    def __init__(
        self,
        limit: int,
        name: str,
        observe: Callable[[int], None] | None = None,
        *,
        refused: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit = limit
        self._name = name
        self._observe = observe
        self._refused = refused
        self._clock = clock
        self._returned = RateRing()
        self._busy_since = 0.0
        self.in_use = 0

    @contextmanager
    def take(self, permits: int) -> Iterator[None]:
        """Hold ``permits`` for the block. Raises ``OverloadedError`` at once when full."""
        if self.in_use and self.in_use + permits > self._limit:
            if self._refused is not None:
                self._refused()
            raise OverloadedError(
                f"The gateway works on {self.in_use} {self._name}, at most {self._limit} at once; "
                f"this request needs {permits} more. Try again later.",
                self._retry_after_s(permits),
            )
        if not self.in_use:
            self._busy_since = self._clock()
        self._change(permits)
        try:
            yield
        finally:
            self._returned.add(self._clock(), permits)
            self._change(-permits)

    def _retry_after_s(self, permits: int) -> float:
        now = self._clock()
        surplus = min(self.in_use, self.in_use + permits - self._limit)
        rate = recent_rate(self._returned.buckets, now, self._busy_since)
        return bounded_wait(now - self._busy_since if rate is None else surplus / rate)

    def _change(self, permits: int) -> None:
        self.in_use += permits
        if self._observe is not None:
            self._observe(self.in_use)
