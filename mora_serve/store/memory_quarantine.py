"""Who may run a suspect row, within one process: see :mod:`actors.quarantine`."""

from __future__ import annotations

from collections.abc import Callable


class MemoryQuarantine:
    """Its part of :class:`~mora_serve.store.steps.LedgerSteps`, in dictionaries."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quarantine: tuple[str, float] | None = None
        self._runners: dict[str, tuple[float, str | None]] = {}

    async def claim_quarantine(self, claim: str, ttl_s: float) -> bool:
        if self._quarantined_by() not in (None, claim):
            return False
        self._quarantine = claim, self._clock() + ttl_s
        return True

    async def leave_quarantine(self, claim: str) -> None:
        if self._quarantined_by() == claim:
            self._quarantine = None

    async def report_runner(self, worker: str, ttl_s: float, quiet_for: str | None) -> str | None:
        if ttl_s > 0:
            self._runners[worker] = self._clock() + ttl_s, quiet_for
        else:
            self._runners.pop(worker, None)
        return self._quarantined_by()

    async def num_unquiet(self, worker: str, claim: str) -> int:
        now = self._clock()
        return sum(
            till > now and quiet_for != claim
            for name, (till, quiet_for) in self._runners.items()
            if name != worker
        )

    def _quarantined_by(self) -> str | None:
        found = self._quarantine
        return None if found is None or found[1] <= self._clock() else found[0]
