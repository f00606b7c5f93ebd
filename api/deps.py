"""What the routes work with: handed to :func:`api.app.create_app`, kept on the application's state.

Routes get it as a FastAPI dependency (:data:`DepsArg`); nothing here is a module-level singleton.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, cast

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
    uploads: Admission


def build_context(deps: Deps) -> Context:
    """Counters from the server's limits, wired to the metrics."""
    server = deps.settings.server
    return Context(
        deps,
        Admission(server.max_in_flight_prompts, "prompts", deps.metrics.prompts_in_flight.set),
        Admission(server.max_uploads, "uploads"),
    )


# Coroutines, because FastAPI runs plain functions in a thread: half of a small request's cost.


async def _context(request: Request) -> Context:
    return cast(Context, request.app.state.context)


async def _deps(request: Request) -> Deps:
    return (await _context(request)).deps


ContextArg = Annotated[Context, Depends(_context)]
DepsArg = Annotated[Deps, Depends(_deps)]
