"""``/livez``, ``/readyz`` and ``/metrics``: never behind a key."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter
from starlette.responses import Response

from api.deps import Deps, DepsArg
from api.errors import problem_of_exception
from api.schemas import Alive, Ready
from api.streaming import Json
from api.telemetry import merge_expositions
from mora_serve.errors import MoraError

router = APIRouter(tags=["health"])

STORE_TIMEOUT_S = 2.0
"""How long a probe waits for the store before it calls it unreachable."""

EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


@router.get("/livez", response_model=Alive)
async def livez() -> Response:
    """200 while the process answers."""
    return Json({"status": "ok"})


@router.get("/readyz", response_model=Ready, responses={503: {"model": Ready}})
async def readyz(deps: DepsArg) -> Response:
    """200 when the store answers and every needed pool serves or may start from zero."""
    store, pools = await asyncio.gather(_store_reasons(deps), deps.readiness())
    reasons = [*store, *(f"{name}: {pool.state}" for name, pool in pools.items() if not pool.ready)]
    body = {
        "status": "not_ready" if reasons else "ok",
        "reasons": reasons,
        "pools": {name: pool.state for name, pool in pools.items()},
    }
    return Json(body, 503, {"Retry-After": "1"}) if reasons else Json(body)


async def _store_reasons(deps: Deps) -> list[str]:
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            await deps.stores.batches.ping()
    except TimeoutError:
        return [f"store: no answer within {STORE_TIMEOUT_S:g} s"]
    except MoraError as error:
        return [f"store: {error}"]
    return []


@router.get("/metrics", response_class=Response)
async def metrics(deps: DepsArg) -> Response:
    """Prometheus exposition of all replicas. Without the store: this gateway's own."""
    texts: dict[str, str] = {}
    try:
        async with asyncio.timeout(STORE_TIMEOUT_S):
            texts = await deps.stores.metrics.collect()
    except (TimeoutError, MoraError) as error:
        problem_of_exception(error, "metrics")
    texts[deps.replica] = deps.metrics.text()
    return Response(merge_expositions(texts), media_type=EXPOSITION)
