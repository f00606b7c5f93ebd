"""``POST /v1/chat/completions``: OpenAI's, streaming too; samples any listed policy version.

Messages are sampled as given: the configured system prompt is for pre-sampling only.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any, cast

from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from api.bodies import ChatRequest, parse, read_json
from api.deps import Context, ContextArg, Deps, queued_body
from api.openapi import json_body
from api.routes.models import unknown_model
from api.schemas import ChatCompletion
from api.streaming import SSE_DONE, Json, run_while_connected, sse_event, sse_response
from mora_serve.errors import GenerationError, InvalidRequestError, NotFoundError
from mora_serve.identity import new_id
from mora_serve.planning import check_max_tokens
from mora_serve.ports import CompletionDelta
from mora_serve.requests import to_messages
from mora_serve.types import Failure, Generation, GenerationRequest, Sampling

router = APIRouter(prefix="/v1/chat", tags=["chat"], dependencies=[Depends(queued_body)])


@router.post("/completions", response_model=ChatCompletion, openapi_extra=json_body(ChatRequest))
async def create_chat_completion(request: Request, context: ContextArg) -> Response:
    """Sample ``n`` answers; with ``stream`` as server-sent chunks that end with ``[DONE]``."""
    body = parse(ChatRequest, await read_json(request))
    wanted = generation_request(body, context.deps)
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return await _stream(request, context, wanted, usage)
    with context.prompts.take(1):
        results = await run_while_connected(request, context.deps.generator.generate([wanted]))
    return Json(completion_object(_generation(results[0], wanted)))


def generation_request(body: ChatRequest, deps: Deps) -> GenerationRequest:
    """The port's request; null fields take the configured defaults, ``n`` is 1."""
    defaults = deps.settings.sampling
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = body.max_completion_tokens or body.max_tokens or defaults.max_tokens
    check_max_tokens(limit, deps.settings.policy, name)
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    sampling = Sampling(
        n=body.n or 1,
        temperature=defaults.temperature if body.temperature is None else body.temperature,
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        max_tokens=limit,
        seed=body.seed,
        stop=tuple(stop),
    )
    prompt = to_messages([message.plain() for message in body.messages], "messages")
    return GenerationRequest(prompt, sampling, body.model)


def _generation(result: Generation | Failure, wanted: GenerationRequest) -> Generation:
    if isinstance(result, Generation):
        return result
    if result.code == "model_not_found":
        raise unknown_model(wanted.model or "")
    if result.retryable:
        raise GenerationError(result.message)
    raise _refused(result.message, result.code)


def _refused(message: str, code: str | None) -> InvalidRequestError:
    """What the generator has against a request, naming the field that it means."""
    param = "messages" if code == "context_length_exceeded" else None
    return InvalidRequestError(message, param, code)


def completion_object(generation: Generation) -> dict[str, Any]:
    """OpenAI's chat completion."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": completion.text, "refusal": None},
            "finish_reason": completion.finish_reason,
            "logprobs": None,
        }
        for index, completion in enumerate(generation.completions)
    ]
    num_tokens = sum(completion.num_tokens for completion in generation.completions)
    usage = usage_object(generation.num_prompt_tokens, num_tokens)
    usage["prompt_tokens_details"] = {"cached_tokens": generation.num_cached_tokens}
    return {
        "id": new_id("chatcmpl"),
        "object": "chat.completion",
        "created": int(time.time()),
        "model": generation.policy_version,
        "choices": choices,
        "usage": usage,
        "system_fingerprint": None,
    }


def usage_object(num_prompt_tokens: int, num_completion_tokens: int) -> dict[str, Any]:
    """OpenAI's usage; the prompt counts once however many answers were drawn."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
    }


async def _stream(
    request: Request, context: Context, wanted: GenerationRequest, include_usage: bool
) -> Response:
    """Wait for the first piece, so that a refused request still gets its own status."""
    chunks = _chunks(context, wanted, include_usage)
    try:
        first = await run_while_connected(request, _first(chunks))
    except NotFoundError:
        raise unknown_model(wanted.model or "") from None
    except InvalidRequestError as error:
        raise _refused(error.message, error.code) from None
    return sse_response(_prepend(first, chunks))


async def _first(chunks: AsyncIterator[bytes]) -> bytes:
    return await anext(chunks)


async def _prepend(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncIterator[bytes]:
    try:
        yield first
        async for chunk in rest:
            yield chunk
    finally:
        await rest.aclose()


async def _chunks(
    context: Context, wanted: GenerationRequest, include_usage: bool
) -> AsyncGenerator[bytes, None]:
    head: dict[str, Any] = {
        "id": new_id("chatcmpl"),
        "object": "chat.completion.chunk",
        "created": int(time.time()),
        "model": wanted.model or "",
        "system_fingerprint": None,
    }
    if include_usage:
        head["usage"] = None
    counts: dict[int, int] = {}
    num_prompt_tokens = 0
    with context.prompts.take(1):
        deltas = cast(AsyncGenerator[CompletionDelta, None], context.deps.generator.stream(wanted))
        try:
            async for delta in deltas:
                head["model"] = delta.policy_version or head["model"]
                first = delta.index not in counts
                counts[delta.index] = max(counts.get(delta.index, 0), delta.num_tokens)
                num_prompt_tokens = max(num_prompt_tokens, delta.num_prompt_tokens)
                yield sse_event({**head, "choices": [_choice(delta, first)]})
        finally:
            await deltas.aclose()
    if include_usage:
        usage = usage_object(num_prompt_tokens, sum(counts.values()))
        yield sse_event({**head, "choices": [], "usage": usage})
    yield SSE_DONE


def _choice(delta: CompletionDelta, first: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"role": "assistant"} if first else {}
    return {
        "index": delta.index,
        "delta": {**content, "content": delta.text},
        "finish_reason": delta.finish_reason,
        "logprobs": None,
    }
