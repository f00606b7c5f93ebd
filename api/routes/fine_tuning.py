"""``/v1/fine_tuning/jobs``: DPO runs as OpenAI's fine-tuning jobs.

What the gateway stores and the trainer reads (``trainer/job.py``) is one object, OpenAI's
``fine_tuning.job`` with the extensions under ``mora``::

    {"id": "ftjob-...", "object": "fine_tuning.job", "status": "queued", "created_at": ...,
     "model": "<policy version to start from>", "training_file": "file-... | batch_...",
     "seed": int, "suffix": str | null, "metadata": {...} | null,
     "method": {"type": "dpo", "dpo": {"hyperparameters": {
         "beta", "batch_size", "learning_rate_multiplier", "n_epochs"}}},   # number or "auto"
     "mora": {"mode", "dimensions", "resample", "lora", "lora_rank", "loss", "max_steps",
              "max_length", "checkpoint_steps", "make_current"}}   # only the keys that were given

``training_file`` may name a batch: its pairs are then trained on while it still runs. A sequential
job takes the prompts of the batch, or of a file of batch rows, and has a batch of its own sample
them for every stage, from the version of the stage before; ``stages`` says how far it is. The store
fills in the remaining fields of the object; the trainer alone changes ``status`` after ``queued``,
apart from cancellation. Events and checkpoints are what the trainer adds, with OpenAI's fields.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.datastructures import QueryParams
from starlette.responses import Response

from api.bodies import FineTuningRequest, MoraTraining, parse, read_json
from api.deps import Deps, DepsArg
from api.openapi import json_body
from api.routes.models import unknown_model
from api.routes.paging import AfterArg, LimitArg, page, referenced
from api.schemas import FineTuningCheckpoint, FineTuningEvent, FineTuningJob, Page
from api.streaming import SSE_DONE, Json, sse_event, sse_response
from mora_serve.errors import InvalidRequestError
from mora_serve.policies import cancel_stage_batches
from mora_serve.requests import REWRITES_URL

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["fine-tuning"])

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
BATCH_PREFIXES = ("batch_", "batch-")
EVENTS_PER_READ = JOBS_PER_READ = 100


@router.post("", response_model=FineTuningJob, openapi_extra=json_body(FineTuningRequest))
async def create_job(request: Request, deps: DepsArg) -> Response:
    """Queue a DPO run; a launcher starts a trainer for it."""
    body = parse(FineTuningRequest, await read_json(request))
    _check_dimensions(deps, body)
    if body.mora is not None:
        _check_sequential(body.mora)
    _check_rank(deps, body.mora)
    await _check_model(deps, body.model)
    purpose = "batch" if _resamples(body) else "fine-tune"
    await _check_training_file(deps, body.training_file, purpose)
    job = await deps.stores.jobs.create_job(job_object(body, deps.settings.dimensions))
    await deps.stores.jobs.add_event(job["id"], {"message": f"Created fine-tuning job {job['id']}"})
    return Json(present(job))


def job_object(body: FineTuningRequest, dimensions: Sequence[str]) -> dict[str, Any]:
    """The stored object of a request, see the module docstring."""
    mora = body.mora.model_dump(exclude_none=True) if body.mora else {}
    if mora.get("mode") == "sequential":
        mora.setdefault("dimensions", list(dimensions))
    method = body.method.dpo.hyperparameters if body.method and body.method.dpo else None
    given = method or body.hyperparameters
    hyperparameters = given.model_dump(exclude_none=True) if given else {}
    resolved = {
        name: hyperparameters.get(name, "auto")
        for name in ("beta", "batch_size", "learning_rate_multiplier", "n_epochs")
    }
    return {
        "id": f"ftjob-{secrets.token_hex(12)}",
        "status": "queued",
        "model": body.model,
        "training_file": body.training_file,
        "seed": secrets.randbelow(2**31) if body.seed is None else body.seed,
        "suffix": body.suffix,
        "metadata": body.metadata,
        "hyperparameters": {k: v for k, v in resolved.items() if k != "beta"},
        "method": {"type": "dpo", "dpo": {"hyperparameters": resolved}},
        "mora": mora,
    }


def present(job: dict[str, Any]) -> dict[str, Any]:
    """The job as callers see it: exactly the documented fields."""
    return {name: job.get(name) for name in FineTuningJob.model_fields}


async def _check_model(deps: Deps, model: str) -> None:
    known = {version["id"] for version in await deps.stores.jobs.list_policies()}
    if model not in known and model != deps.settings.policy.model:
        raise unknown_model(model)


def _resamples(body: FineTuningRequest) -> bool:
    """Whether each stage of the job samples the prompts of its training file."""
    options = body.mora
    return options is not None and options.mode == "sequential" and options.resample is not False


def _check_sequential(options: MoraTraining) -> None:
    if options.mode != "sequential":
        # The pairs' own margins decided what they teach; nothing here could change it.
        for name, given in (("resample", options.resample), ("dimensions", options.dimensions)):
            if given:
                raise _bad(f"mora.{name}", "must be absent unless mora.mode is sequential")
        return
    named = options.dimensions or []
    if len(set(named)) < len(named):
        raise _bad("mora.dimensions", "must name each stage of a sequential job once")
    if options.make_current is False and options.resample is not False:
        raise _bad(
            "mora.make_current",
            "must not be false in a sequential job, whose stages sample the version before; "
            "activate another one when the job is over",
        )


def _check_rank(deps: Deps, options: MoraTraining | None) -> None:
    """An adapter that the engine could not apply would be trained for nothing."""
    trainer, policy = deps.settings.trainer, deps.settings.policy
    lora, rank = trainer.lora, trainer.lora_rank
    if options is not None:
        lora = lora if options.lora is None else options.lora
        rank = options.lora_rank or rank
    if lora and policy.lora and policy.backend == "vllm" and rank > policy.max_lora_rank:
        raise _bad(
            "mora.lora_rank",
            f"must be at most policy.max_lora_rank ({policy.max_lora_rank}), got {rank}",
        )


def _bad(param: str, rule: str) -> InvalidRequestError:
    return InvalidRequestError(f"{param} {rule}", param, "invalid_value")


async def _check_training_file(deps: Deps, name: str, purpose: str) -> None:
    if not name.startswith(BATCH_PREFIXES):
        file, _ = await referenced(deps.stores.batches.get_file(name), "training_file")
        if file["purpose"] != purpose:
            pairs = "; sequential jobs sample prompts, unless mora.resample is false"
            raise InvalidRequestError(
                f"training_file must name a file with purpose {purpose} or a batch, "
                f"got purpose {file['purpose']}{pairs if purpose == 'batch' else ''}",
                "training_file",
                "invalid_file_purpose",
            )
        return
    batch = await referenced(deps.stores.batches.get_batch(name), "training_file")
    if batch["endpoint"] != REWRITES_URL:
        raise InvalidRequestError(
            f"training_file must name a batch of {REWRITES_URL}, which yields pairs, "
            f"got one of {batch['endpoint']}",
            "training_file",
            "invalid_training_file",
        )


def _check_dimensions(deps: Deps, body: FineTuningRequest) -> None:
    for name in (body.mora.dimensions if body.mora else None) or []:
        if name not in deps.settings.dimensions:
            raise InvalidRequestError(
                f"mora.dimensions must be among {', '.join(deps.settings.dimensions)}, "
                f"got '{name[:80]}'",
                "mora.dimensions",
                "unknown_dimension",
            )


@router.get("", response_model=Page[FineTuningJob])
async def list_jobs(
    request: Request, deps: DepsArg, after: AfterArg = None, limit: LimitArg = 20
) -> Response:
    """Jobs, newest first; ``metadata[key]=value`` keeps those that have it, ``metadata=null`` those
    that have none."""
    is_wanted = _metadata_filter(request.query_params)
    found: list[dict[str, Any]] = []
    has_more = True
    while has_more and len(found) <= limit:
        jobs, has_more = await deps.stores.jobs.list_jobs(after=after, limit=JOBS_PER_READ)
        found += [job for job in jobs if is_wanted(job.get("metadata") or {})]
        after = jobs[-1]["id"] if jobs else after
    shown = [present(job) for job in found[:limit]]
    return Json(page(shown, has_more or len(found) > limit))


def _metadata_filter(query: QueryParams) -> Callable[[Mapping[str, str]], bool]:
    """Whether a job's metadata are what ``query`` asks for."""
    if query.get("metadata") == "null":
        return lambda metadata: not metadata
    wanted = {
        name.removeprefix("metadata[").removesuffix("]"): value
        for name, value in query.items()
        if name.startswith("metadata[")
    }
    return lambda metadata: wanted.items() <= metadata.items()


@router.get("/{job_id}", response_model=FineTuningJob)
async def get_job(job_id: str, deps: DepsArg) -> Response:
    """One job."""
    return Json(present(await deps.stores.jobs.get_job(job_id)))


@router.post("/{job_id}/cancel", response_model=FineTuningJob)
async def cancel_job(job_id: str, deps: DepsArg) -> Response:
    """Ask for cancellation; a finished job is returned unchanged."""
    job = await deps.stores.jobs.cancel_job(job_id)
    await cancel_stage_batches(deps.stores.batches, job)
    return Json(present(job))


@router.get("/{job_id}/events", response_model=Page[FineTuningEvent])
async def list_events(
    job_id: str,
    deps: DepsArg,
    after: AfterArg = None,
    limit: LimitArg = 20,
    stream: Annotated[bool, Query()] = False,
) -> Response:
    """Events, newest first; with ``stream`` server-sent in the order they happen, to the end."""
    if stream:
        await deps.stores.jobs.get_job(job_id)
        return sse_response(_follow(deps, job_id))
    return Json(page(*await deps.stores.jobs.list_events(job_id, after=after, limit=limit)))


async def _follow(deps: Deps, job_id: str) -> AsyncIterator[bytes]:
    """Every event once, oldest first. The status is read before the events, so none is missed."""
    seen: str | None = None
    while True:
        job = await deps.stores.jobs.get_job(job_id)
        for event in await _events_since(deps, job_id, seen):
            seen = event["id"]
            yield sse_event(event, "event", seen)
        if job["status"] in TERMINAL:
            yield sse_event(present(job), "job")
            yield SSE_DONE
            return
        yield b": waiting\n\n"
        await asyncio.sleep(deps.poll_interval_s)


async def _events_since(deps: Deps, job_id: str, seen: str | None) -> list[dict[str, Any]]:
    """Events after ``seen``, oldest first; lists are newest first, so pages are read backwards."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        events, has_more = await deps.stores.jobs.list_events(
            job_id, after=after, limit=EVENTS_PER_READ
        )
        for event in events:
            if event["id"] == seen:
                return found[::-1]
            found.append(event)
        if not has_more:
            return found[::-1]
        after = events[-1]["id"]


@router.get("/{job_id}/checkpoints", response_model=Page[FineTuningCheckpoint])
async def list_checkpoints(
    job_id: str, deps: DepsArg, after: AfterArg = None, limit: LimitArg = 10
) -> Response:
    """Checkpoints, newest first."""
    return Json(page(*await deps.stores.jobs.list_checkpoints(job_id, after=after, limit=limit)))
