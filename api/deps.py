"""What the routes work with: handed to :func:`api.app.create_app`, kept on the application's state.

Routes get it as a FastAPI dependency (:data:`DepsArg`); nothing here is a module-level singleton.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from fastapi import Depends, Request

from actors.metrics import MetricsPublisher
from api.admission import Admission
from api.pools import Pool
from api.telemetry import GatewayMetrics
from mora_serve.config import Settings
from mora_serve.ports import Generator, Scorer
from mora_serve.service import MoraService
from mora_serve.store import Stores

Readiness = Callable[[], Awaitable[Mapping[str, Pool]]]
"""State of every pool that requests need, by name."""


async def _no_pools() -> Mapping[str, Pool]:
    return {}


@dataclass(frozen=True, slots=True)
class Deps:
    """Ports and settings of one gateway replica."""

    service: MoraService
    generator: Generator
    scorer: Scorer
    stores: Stores
    settings: Settings
    readiness: Readiness = _no_pools
    replica: str = "gateway"
    """Name of this replica in merged metrics."""
    poll_interval_s: float = 0.5
    """How often event streams look at the store."""
    keep_alive_s: float = 15.0
    """Longest silence of an event stream."""
    metrics: GatewayMetrics = field(default_factory=GatewayMetrics)
    sets_request_id: bool = True
    """False where a server around us already puts ``x-request-id`` on every response."""
    publisher: MetricsPublisher | None = None
    """Posts our metrics for other gateway replicas' ``/metrics``; run while the app runs."""


@dataclass(frozen=True, slots=True)
class Context:
    """Deps plus the admission counters that belong to one application."""

    deps: Deps
    prompts: Admission
    bodies: Admission
    uploads: Admission


def build_context(deps: Deps) -> Context:
    """Counters from the server's limits, wired to the metrics."""
    server, metrics = deps.settings.server, deps.metrics

    def admission(limit: int, name: str, reason: str, observe: Any = None) -> Admission:
        refused = metrics.rejected.labels(reason).inc
        return Admission(limit, name, observe, refused=refused)

    return Context(
        deps,
        admission(
            server.max_in_flight_prompts, "prompts", "prompts", metrics.prompts_in_flight.set
        ),
        admission(server.max_queued_bytes, "bytes of requests", "bytes", metrics.queued_bytes.set),
        admission(server.max_uploads, "uploads", "uploads"),
    )


# Coroutines, because FastAPI runs plain functions in a thread: half of a small request's cost.


async def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


async def _deps(request: Request) -> Deps:
    return (await _context(request)).deps


async def queued_body(request: Request) -> AsyncIterator[None]:
    """Holds a permit for the request's bytes, from before they are read until it is answered.

    A body that does not announce its size counts as the largest one that is accepted.
    """
    context = await _context(request)
    announced = request.headers.get("content-length", "")
    largest = context.deps.settings.server.max_body_bytes
    num_bytes = int(announced) if announced.isdecimal() else largest
    with context.bodies.take(num_bytes):
        yield


ContextArg = Annotated[Context, Depends(_context)]
DepsArg = Annotated[Deps, Depends(_deps)]
