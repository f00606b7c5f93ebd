"""``/v1/diagnostics``, ``/v1/scores``, ``/v1/rewrites`` and ``/get_reward``, synchronously.

The core does the work (:class:`mora_serve.service.MoraService`); this module reads the body, takes
permits before anything is queued, cancels the work when the client leaves, and streams NDJSON.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api.admission import Admission
from api.bodies import parse, read_json
from api.deps import Context, ContextArg, queued_body
from api.openapi import json_body
from api.schemas import DiagnosticsResponse, GetRewardResponse, RewriteResponse, ScoresResponse
from api.streaming import Json, ndjson_line, ndjson_response, run_while_connected
from mora_serve.remote_reward import GET_REWARD_URL, RewardRequest, remote_reward
from mora_serve.requests import (
    DIAGNOSTICS_URL,
    REWRITES_URL,
    SCORES_URL,
    DiagnosticsRequest,
    MoraRequest,
    RewriteRequest,
    ScoresRequest,
    parse_body,
)

router = APIRouter(tags=["method"], dependencies=[Depends(queued_body)])

BodyT = TypeVar("BodyT", bound=MoraRequest)
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-ndjson": {}}}}


@router.post(
    DIAGNOSTICS_URL,
    response_model=DiagnosticsResponse,
    responses=_STREAM,
    openapi_extra=json_body(DiagnosticsRequest),
)
async def create_diagnostics(request: Request, context: ContextArg) -> Response:
    """Diagnose prompts. ``stream``: one prompt a line as it finishes, the summary last."""
    body = await _body(request, DIAGNOSTICS_URL, DiagnosticsRequest)
    service = context.deps.service
    permits = len(body.prompts)
    if body.stream:
        return await _stream(request, context, body, permits, service.diagnose(body))
    with context.prompts.take(permits):
        return Json(await run_while_connected(request, service.diagnose_list(body)))


@router.post(
    SCORES_URL,
    response_model=ScoresResponse,
    responses=_STREAM,
    openapi_extra=json_body(ScoresRequest),
)
async def create_scores(request: Request, context: ContextArg) -> Response:
    """Score answers. ``stream``: one row a line, in any order, with ``index``."""
    body = await _body(request, SCORES_URL, ScoresRequest)
    service = context.deps.service
    permits = _row_permits(context, len(body.rows))
    if body.stream:
        return await _stream(request, context, body, permits, service.score(body))
    with context.prompts.take(permits):
        return Json(await run_while_connected(request, service.score_list(body)))


@router.post(REWRITES_URL, response_model=RewriteResponse, openapi_extra=json_body(RewriteRequest))
async def create_rewrite(request: Request, context: ContextArg) -> Response:
    """Diagnose one prompt, rewrite it where its class asks for it, and select pairs."""
    body = await _body(request, REWRITES_URL, RewriteRequest)
    with context.prompts.take(1):
        return Json(await run_while_connected(request, context.deps.service.rewrite(body)))


@router.post(
    GET_REWARD_URL, response_model=GetRewardResponse, openapi_extra=json_body(RewardRequest)
)
async def get_reward(request: Request, context: ContextArg) -> Response:
    """Weighted reward of answers, in the shape of OpenRLHF's remote reward model."""
    body = parse(RewardRequest, await read_json(request))
    deps = context.deps
    with context.prompts.take(_row_permits(context, len(body.query))):
        work = remote_reward(deps.service, body, deps.settings)
        return Json(await run_while_connected(request, work))


def _row_permits(context: Context, num_rows: int) -> int:
    """As many rows as a prompt has rollouts weigh as much as one prompt."""
    return -(-num_rows // context.deps.settings.sampling.n)


async def _body(request: Request, url: str, kind: type[BodyT]) -> BodyT:
    body = parse_body(url, await read_json(request))
    assert isinstance(body, kind)
    return body


async def _stream(
    request: Request,
    context: Context,
    body: MoraRequest,
    permits: int,
    items: AsyncGenerator[dict[str, Any], None],
) -> Response:
    """Validate before the status is sent; permits are held until the stream ends."""
    await run_while_connected(request, context.deps.service.validate(body))
    lines = _lines(context.prompts, permits, items)
    # The first step takes the permits, so that a full gateway still answers 429.
    await anext(lines)
    return ndjson_response(lines)


async def _lines(
    admission: Admission, permits: int, items: AsyncGenerator[dict[str, Any], None]
) -> AsyncIterator[bytes]:
    with admission.take(permits):
        yield b""
        async with aclosing(items) as open_items:
            async for item in open_items:
                yield ndjson_line(item)
