"""Readiness of the pools behind the gateway, read from what Ray Serve reports of its deployments.

A pool is ready when a replica of it runs, or when it is healthy without one because it may start
from zero. Reading the status is a call to the Serve controller, so it is shared between probes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Protocol

from mora_serve.errors import MoraError

CACHE_S = 0.5
"""How long one status answers probes."""
STATUS_TIMEOUT_S = 5.0
SCALING = ("UPSCALING", "DOWNSCALING")
"""What Serve calls a deployment that is on its way from none or to none."""


@dataclass(frozen=True, slots=True)
class Pool:
    """One deployment as a probe sees it."""

    ready: bool
    state: str
    """For people, for example ``UPDATING, 0 running``."""


class DeploymentStatus(Protocol):
    """What is read of Ray Serve's ``DeploymentStatusOverview``."""

    status: str
    replica_states: Mapping[str, int]


def pool_states(
    deployments: Mapping[str, DeploymentStatus], from_zero: Collection[str] = ()
) -> dict[str, Pool]:
    """State of every deployment of the application, by name; ``from_zero`` may have no replica."""
    return {name: _pool(status, name in from_zero) for name, status in deployments.items()}


def _pool(deployment: DeploymentStatus, from_zero: bool) -> Pool:
    running = sum(
        count for state, count in deployment.replica_states.items() if _plain(state) == "RUNNING"
    )
    status = _plain(deployment.status)
    ready = running > 0 or status == "HEALTHY" or (from_zero and status in SCALING)
    return Pool(ready, f"{status}, {running} running")


def _plain(value: str) -> str:
    """The bare name of an enum member that is also a string."""
    return str(getattr(value, "value", value))


class PoolMonitor:
    """Asks for the deployments' status at most every ``CACHE_S``; concurrent probes share a call.

    ``fetch`` blocks; it runs in a thread. ``expected`` are the pools that must be reported,
    ``from_zero`` those that may be without a replica.
    """

    def __init__(
        self,
        fetch: Callable[[], Mapping[str, DeploymentStatus]],
        expected: tuple[str, ...],
        clock: Callable[[], float] = time.monotonic,
        *,
        from_zero: Collection[str] = (),
    ) -> None:
        self._from_zero = from_zero
        self._fetch = fetch
        self._expected = expected
        self._clock = clock
        self._lock = asyncio.Lock()
        self._states: dict[str, Pool] = {}
        self._until = float("-inf")

    async def __call__(self) -> dict[str, Pool]:
        async with self._lock:
            if self._clock() >= self._until:
                self._states = await self._read()
                self._until = self._clock() + CACHE_S
            return self._states

    async def _read(self) -> dict[str, Pool]:
        try:
            async with asyncio.timeout(STATUS_TIMEOUT_S):
                states = pool_states(await asyncio.to_thread(self._fetch), self._from_zero)
        except TimeoutError:
            return {"serve": Pool(False, "the controller does not answer")}
        missing = {name: Pool(False, "not deployed yet") for name in self._expected}
        return {**missing, **states}


class CheckedPools:
    """Pool states, and a check that must pass once when all pools serve (the calibrator)."""

    def __init__(
        self,
        pools: Callable[[], Awaitable[dict[str, Pool]]],
        check: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._pools = pools
        self._check = check

    async def __call__(self) -> dict[str, Pool]:
        states = await self._pools()
        if self._check is None or not all(pool.ready for pool in states.values()):
            return states
        try:
            await self._check()
        except MoraError as error:
            return {**states, "calibrator": Pool(False, str(error))}
        self._check = None
        return states
