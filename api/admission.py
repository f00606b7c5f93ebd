"""Admission: how many prompts one gateway replica works on at once.

A pure counter: it owns no task and no queue. A request takes its permits before any work is queued
and is refused at once when they do not fit; whoever holds permits gives them back by leaving the
``with`` block, however it is left. A request larger than the whole limit is admitted alone when
nothing else runs, so that limits of request size and of concurrency stay independent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mora_serve.errors import OverloadedError

RETRY_AFTER_S = 1.0
"""Suggested wait of a refused request; short, because permits come back one prompt at a time."""


class Admission:
    """Counts permits; ``observe`` is told the number in use after every change."""

    def __init__(self, limit: int, name: str, observe: Callable[[int], None] | None = None) -> None:
        self._limit = limit
        self._name = name
        self._observe = observe
        self.in_use = 0

    @contextmanager
    def take(self, permits: int) -> Iterator[None]:
        """Hold ``permits`` for the block. Raises ``OverloadedError`` at once when full."""
        if self.in_use and self.in_use + permits > self._limit:
            raise OverloadedError(
                f"The gateway works on {self.in_use} {self._name}, at most {self._limit} at once; "
                f"this request needs {permits} more. Try again later.",
                RETRY_AFTER_S,
            )
        self._change(permits)
        try:
            yield
        finally:
            self._change(-permits)

    def _change(self, permits: int) -> None:
        self.in_use += permits
        if self._observe is not None:
            self._observe(self.in_use)
