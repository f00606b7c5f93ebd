"""Chat completions and models, as OpenAI's API has them."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from api import schemas
from api.app import create_app
from api.deps import Deps
from mora_serve.fakes import FakeGenerator
from mora_serve.types import Failure
from tests.unit.api.conftest import MODEL, error_of, make_client, make_deps

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hello there"}]


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of an event stream; fails unless it ends with ``[DONE]``."""
    events = [part.removeprefix("data: ") for part in response.text.strip().split("\n\n")]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


async def test_n_answers_come_with_usage_and_the_version_that_answered(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, "n": 3, "seed": 4})

    body = schemas.ChatCompletion.model_validate(response.json())
    assert [choice.index for choice in body.choices] == [0, 1, 2]
    assert len({choice.message.content for choice in body.choices}) == 3
    assert body.model == MODEL
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens


async def test_streamed_pieces_join_to_the_same_text(client: httpx.AsyncClient) -> None:
    asked = {"messages": HELLO, "n": 2, "seed": 4}
    whole = await client.post(CHAT, json=asked)
    streamed = await client.post(
        CHAT, json={**asked, "stream": True, "stream_options": {"include_usage": True}}
    )

    assert streamed.headers["content-type"] == "text/event-stream"
    chunks = chunks_of(streamed)
    for chunk in chunks:
        schemas.ChatChunk.model_validate(chunk)
    texts = {0: "", 1: ""}
    finish = {}
    for chunk in chunks[:-1]:
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["delta"]["content"]
            finish[choice["index"]] = choice["finish_reason"]
    choices = whole.json()["choices"]
    assert [texts[0], texts[1]] == [choice["message"]["content"] for choice in choices]
    assert [finish[0], finish[1]] == [choice["finish_reason"] for choice in choices]
    assert chunks[-1]["choices"] == []
    usage = whole.json()["usage"]
    assert chunks[-1]["usage"]["completion_tokens"] == usage["completion_tokens"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"


async def test_usage_is_not_streamed_unless_asked_for(client: httpx.AsyncClient) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, "stream": True})

    assert all("usage" not in chunk for chunk in chunks_of(response))


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_token_limit_cuts_and_says_so(client: httpx.AsyncClient, field: str) -> None:
    response = await client.post(CHAT, json={"messages": HELLO, field: 2, "seed": 1})

    body = response.json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["usage"]["completion_tokens"] == 2


async def test_stop_strings_end_the_answer(client: httpx.AsyncClient) -> None:
    asked = {"messages": HELLO, "seed": 2}
    text = (await client.post(CHAT, json=asked)).json()["choices"][0]["message"]["content"]
    word = text.split()[2]

    for stop in (word, [word]):
        stopped = await client.post(CHAT, json={**asked, "stop": stop})
        content = stopped.json()["choices"][0]["message"]["content"]
        assert word not in content
        assert text.startswith(content)


async def test_harmless_openai_fields_are_accepted(client: httpx.AsyncClient) -> None:
    response = await client.post(
        CHAT,
        json={
            "model": MODEL, "messages": [{"role": "developer", "content": "be brief"}, *HELLO],
            "user": "u", "metadata": {"k": "v"}, "store": False, "service_tier": "auto",
            "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "tools": [],
            "response_format": {"type": "text"}, "logprobs": False, "parallel_tool_calls": True,
        },
    )  # fmt: skip

    assert response.status_code == 200, response.text


async def test_text_parts_are_joined(client: httpx.AsyncClient) -> None:
    parts = [{"type": "text", "text": "hello "}, {"type": "text", "text": "there"}]
    asked = {"seed": 3}
    joined = await client.post(CHAT, json={**asked, "messages": HELLO})
    split = await client.post(
        CHAT, json={**asked, "messages": [{"role": "user", "content": parts}]}
    )

    assert joined.json()["choices"] == split.json()["choices"]


@pytest.mark.parametrize(("retryable", "status"), [(True, 503), (False, 400)])
async def test_failed_generation_is_the_callers_or_ours(retryable: bool, status: int) -> None:
    generator = FakeGenerator(fail=lambda _: Failure("odd", "it failed", retryable=retryable))
    async with make_client(create_app(make_deps(generator=generator))) as client:
        response = await client.post(CHAT, json={"messages": HELLO})

    assert response.status_code == status
    error_of(response)


async def test_models_list_the_current_version_first_with_its_origin() -> None:
    generator = FakeGenerator((MODEL,))
    deps = make_deps(generator=generator)
    version = {
        "id": "policy-1", "kind": "lora", "uri": "file:///x", "parent": MODEL, "job_id": "ftjob-1"
    }  # fmt: skip
    await deps.stores.jobs.publish_policy(version, make_current=True)
    generator.publish("policy-1")
    async with make_client(create_app(deps)) as client:
        listed = schemas.ModelList.model_validate((await client.get("/v1/models")).json())
        one = schemas.Model.model_validate((await client.get("/v1/models/policy-1")).json())
        answered = await client.post(CHAT, json={"messages": HELLO})
        older = await client.post(CHAT, json={"messages": HELLO, "model": MODEL})

    assert [(m.id, m.current, m.kind) for m in listed.data] == [
        ("policy-1", True, "lora"), (MODEL, False, "base"),
    ]  # fmt: skip
    assert (one.parent, one.job_id) == (MODEL, "ftjob-1")
    assert answered.json()["model"] == "policy-1"
    assert older.json()["model"] == MODEL


async def test_a_version_goes_live_and_is_rolled_back_to_the_base_that_nobody_published() -> None:
    deps = make_deps()
    version = {"id": "policy-1", "kind": "lora", "uri": "file:///x", "parent": MODEL}
    await deps.stores.jobs.publish_policy(version, make_current=False)
    base = deps.settings.policy.model
    async with make_client(create_app(deps)) as client:
        live = await client.post("/v1/models/policy-1/activate")
        assert schemas.Model.model_validate(live.json()).current
        assert (await deps.stores.jobs.current_policy())[0] == "policy-1"

        back = schemas.Model.model_validate(
            (await client.post(f"/v1/models/{base}/activate")).json()
        )
        assert (back.id, back.kind, back.current) == (base, "base", True)
        assert (await deps.stores.jobs.current_policy())[0] == base

        unknown = await client.post("/v1/models/policy-2/activate")
    assert unknown.status_code == 404
    assert error_of(unknown)["code"] == "model_not_found"


async def test_model_names_may_hold_slashes() -> None:
    deps: Deps = make_deps(generator=FakeGenerator(("org/model",)))
    async with make_client(create_app(deps)) as client:
        assert (await client.get("/v1/models/org/model")).json()["id"] == "org/model"
