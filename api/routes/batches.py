"""``/v1/batches``: OpenAI's Batch API over the ledger, with the pair stream and progress events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from starlette.responses import Response

from api.bodies import BatchRequest, parse, read_json, window_seconds
from api.deps import Deps, DepsArg
from api.openapi import json_body
from api.parquet import PARQUET, parquet_response, prefers_parquet
from api.routes.paging import AfterArg, LimitArg, page, referenced
from api.schemas import Batch, BatchEvent, Page
from api.streaming import (
    SSE_KEEP_ALIVE,
    Json,
    ndjson_line,
    ndjson_response,
    sse_event,
    sse_response,
)
from mora_serve.errors import ConflictError, InvalidRequestError, NotFoundError
from mora_serve.identity import content_hash
from mora_serve.ports import BatchStore
from mora_serve.requests import SCORES_URL, parse_body

router = APIRouter(prefix="/v1/batches", tags=["batches"])

TERMINAL = frozenset({"failed", "completed", "expired", "cancelled"})
MAX_KEY_CHARS = 255
PAIRS_PER_READ = 256

_SAMPLE_BODIES: dict[str, dict[str, Any]] = {
    "/v1/diagnostics": {"prompts": ["x"]},
    "/v1/rewrites": {"prompt": "x"},
    "/v1/scores": {"rows": [{"prompt": "x", "response": "y"}]},
}
"""A minimal row of each endpoint, under which a batch's defaults are checked once."""


@router.post("", response_model=Batch, openapi_extra=json_body(BatchRequest))
async def create_batch(
    request: Request,
    deps: DepsArg,
    idempotency_key: Annotated[str | None, Header(max_length=MAX_KEY_CHARS)] = None,
) -> Response:
    """Acknowledge a batch; runners pick it up. The same key and body return the same batch."""
    data = await read_json(request)
    body = parse(BatchRequest, data)
    body_hash = content_hash(data)
    if idempotency_key:
        known = await deps.stores.batches.known_batch(idempotency_key, body_hash)
        if known is not None:
            return Json(known)
    await _check_input_file(deps, body.input_file_id)
    if body.defaults:
        _check_defaults(body.endpoint, body.defaults)
    options: dict[str, Any] = {
        "defaults": body.defaults or {},
        "completion_window_s": window_seconds(body.completion_window),
    }
    if body.output_expires_after is not None:
        options["output_expires_after_s"] = body.output_expires_after.seconds
    batch = {
        "endpoint": body.endpoint,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "metadata": body.metadata,
        "model": await _model(deps, body),
    }
    stored = await deps.stores.batches.create_batch(
        batch, options, idempotency_key or None, body_hash
    )
    return Json(stored)


async def _model(deps: Deps, body: BatchRequest) -> str | None:
    """Policy version that a row without a model of its own asks for; scoring samples none."""
    if body.endpoint == SCORES_URL:
        return None
    if body.defaults and body.defaults.get("model") is not None:
        return str(body.defaults["model"])
    try:
        version, _ = await deps.stores.jobs.current_policy()
    except NotFoundError:
        return deps.settings.policy.model
    return version


async def _check_input_file(deps: Deps, file_id: str) -> None:
    file, _ = await referenced(deps.stores.batches.get_file(file_id), "input_file_id")
    if file["purpose"] != "batch":
        raise InvalidRequestError(
            f"input_file_id must name a file with purpose batch, got {file['purpose']}",
            "input_file_id",
            "invalid_file_purpose",
        )


def _check_defaults(endpoint: str, defaults: Mapping[str, Any]) -> None:
    """Refuse defaults that would fail every row."""
    sample = _SAMPLE_BODIES[endpoint]
    clash = sorted((set(sample) | {"stream"}) & set(defaults))
    if clash:
        name = f"defaults.{clash[0]}"
        raise InvalidRequestError(f"{name} must be given by each row", name, "invalid_value")
    parse_body(endpoint, {**sample, **defaults}, prefix="defaults.")


@router.get("", response_model=Page[Batch])
async def list_batches(deps: DepsArg, after: AfterArg = None, limit: LimitArg = 20) -> Response:
    """Batches, newest first."""
    return Json(page(*await deps.stores.batches.list_batches(after=after, limit=limit)))


@router.get("/{batch_id}", response_model=Batch)
async def get_batch(batch_id: str, deps: DepsArg) -> Response:
    """One batch."""
    return Json(await deps.stores.batches.get_batch(batch_id))


@router.post("/{batch_id}/cancel", response_model=Batch)
async def cancel_batch(batch_id: str, deps: DepsArg) -> Response:
    """Ask for cancellation; a finished batch is returned unchanged."""
    return Json(await deps.stores.batches.cancel_batch(batch_id))


@router.get(
    "/{batch_id}/pairs",
    response_class=Response,
    responses={200: {"content": {"application/x-ndjson": {}, PARQUET: {}}}},
)
async def read_pairs(  # noqa: PLR0917  FastAPI passes keywords
    batch_id: str,
    request: Request,
    deps: DepsArg,
    after: Annotated[int, Query(ge=-1, le=2**53)] = -1,
    follow: bool = False,
    limit: Annotated[int | None, Query(ge=1)] = None,
) -> Response:
    """Preference rows in ascending ``seq`` above ``after``; ``follow`` waits for further ones."""
    batch = await deps.stores.batches.get_batch(batch_id)
    if prefers_parquet(request.headers.get("accept", "")):
        if batch["status"] not in TERMINAL:
            raise ConflictError(
                f"Pairs are available as Parquet once the batch is finished; it is "
                f"{batch['status']}. Read them as application/x-ndjson meanwhile.",
                None,
                "batch_not_finished",
            )
        rows = _at_most(_pairs(deps, batch_id, after, follow=False), limit)
        name = f"{batch_id}-pairs.parquet"
        return await parquet_response(rows, name, deps.settings.dimensions)
    lines = _pair_lines(_at_most(_pairs(deps, batch_id, after, follow), limit))
    return ndjson_response(lines)


async def _pairs(
    deps: Deps, batch_id: str, after: int, follow: bool
) -> AsyncGenerator[dict[str, Any], None]:
    if follow:
        async for pair in deps.stores.pairs.follow(batch_id, after):
            yield pair
        return
    while rows := await deps.stores.pairs.read(batch_id, after, PAIRS_PER_READ):
        for pair in rows:
            yield pair
        after = rows[-1]["seq"]


async def _at_most(
    pairs: AsyncGenerator[dict[str, Any], None], limit: int | None
) -> AsyncGenerator[dict[str, Any], None]:
    count = 0
    async with aclosing(pairs) as open_pairs:
        async for pair in open_pairs:
            yield pair
            count += 1
            if count == limit:
                return


async def _pair_lines(pairs: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    async with aclosing(pairs) as open_pairs:
        async for pair in open_pairs:
            yield ndjson_line(pair)


@router.get(
    "/{batch_id}/events",
    response_class=Response,
    responses={
        200: {"model": BatchEvent, "content": {"text/event-stream": {}}},
        204: {"description": "The batch is over, and its last event was received."},
    },
)
async def batch_events(
    batch_id: str,
    deps: DepsArg,
    last_event_id: Annotated[int | None, Header(ge=0, le=2**53)] = None,
) -> Response:
    """Server-sent progress: where the batch stands, then each change, until it is over.

    An event's id is the version of the batch that it shows, so that a client which comes back with
    ``Last-Event-ID`` goes on with the first newer one.
    """
    first = await deps.stores.batches.progress(batch_id)
    if first["status"] in TERMINAL and last_event_id == first["version"]:
        return Response(status_code=204)
    return sse_response(
        progress_events(
            deps.stores.batches,
            batch_id,
            first,
            last_event_id,
            poll_s=deps.poll_interval_s,
            keep_alive_s=deps.keep_alive_s,
        )
    )


async def progress_events(
    batches: BatchStore,
    batch_id: str,
    progress: dict[str, Any],
    seen: int | None,
    *,
    poll_s: float,
    keep_alive_s: float,
) -> AsyncGenerator[bytes, None]:
    """Events from ``progress`` on, one per change that a look every ``poll_s`` seconds sees.

    ``seen`` is the version that the client has; one that the store never had is ignored. A comment
    breaks every silence of ``keep_alive_s``.
    """
    if seen is not None and seen > progress["version"]:
        seen = None
    quiet_s = 0.0
    while True:
        if progress["version"] != seen:
            seen, quiet_s = progress["version"], 0.0
            yield sse_event(progress_event(batch_id, progress), "progress", str(seen))
        elif quiet_s >= keep_alive_s:
            quiet_s = 0.0
            yield SSE_KEEP_ALIVE
        if progress["status"] in TERMINAL:
            return
        await asyncio.sleep(poll_s)
        quiet_s += poll_s
        progress = await batches.progress(batch_id)


def progress_event(batch_id: str, progress: Mapping[str, Any]) -> dict[str, Any]:
    """A progress event from what the store counts; ``eta_s`` goes by the last minute's rate."""
    counts, rate = progress["request_counts"], progress["rate"]
    left = counts["total"] - counts["completed"] - counts["failed"]
    running = progress["status"] in ("in_progress", "finalizing")
    return {
        "object": "batch.event",
        "batch_id": batch_id,
        "status": progress["status"],
        "request_counts": counts,
        "classes": progress["classes"],
        "pairs": progress["pairs"],
        "rate": rate,
        "eta_s": left / rate if rate and running else None,
    }
