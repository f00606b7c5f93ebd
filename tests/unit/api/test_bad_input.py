"""Every kind of bad input gets its status and an envelope that names field and rule."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from api.app import create_app
from api.deps import Deps
from mora_serve.errors import GenerationError, ScoringError, StorageError
from mora_serve.fakes import FakeGenerator, FakeScorer
from tests.unit.api.conftest import error_of, make_client, make_deps, make_settings

DIAGNOSTICS = "/v1/diagnostics"
SCORES = "/v1/scores"
REWRITES = "/v1/rewrites"
CHAT = "/v1/chat/completions"
BATCHES = "/v1/batches"
JOBS = "/v1/fine_tuning/jobs"

SECRET = "zebra-prompt-text"
HELLO = [{"role": "user", "content": "hello"}]
LONG = "word " * 2000


@pytest.mark.parametrize(
    ("url", "body", "status", "param", "code"),
    [
        # unknown field
        (DIAGNOSTICS, {"prompts": ["a"], "colour": 1}, 400, "colour", "unknown_parameter"),
        (SCORES, {"rows": [{"prompt": "a", "response": "b", "x": 1}]}, 400, "rows.0.x",
         "unknown_parameter"),
        (REWRITES, {"prompt": "a", "colour": 1}, 400, "colour", "unknown_parameter"),
        (CHAT, {"messages": HELLO, "colour": 1}, 400, "colour", "unknown_parameter"),
        (BATCHES, {"input_file_id": "f", "endpoint": SCORES, "x": 1}, 400, "x",
         "unknown_parameter"),
        (JOBS, {"model": "m", "training_file": "f", "x": 1}, 400, "x", "unknown_parameter"),
        # wrong type
        (DIAGNOSTICS, {"prompts": "a"}, 400, "prompts", "invalid_type"),
        (DIAGNOSTICS, {"prompts": [7]}, 400, "prompts.0", "invalid_type"),
        (DIAGNOSTICS, {"prompts": ["a"], "temperature": "hot"}, 400, "temperature",
         "invalid_type"),
        (DIAGNOSTICS, ["a"], 400, None, "invalid_type"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, 400, "messages.0.content",
         "invalid_type"),
        # missing field
        (DIAGNOSTICS, {}, 400, "prompts", "missing_required_parameter"),
        (BATCHES, {"endpoint": SCORES}, 400, "input_file_id", "missing_required_parameter"),
        # out of range
        (DIAGNOSTICS, {"prompts": ["a"], "n": 0}, 400, "n", "invalid_value"),
        (DIAGNOSTICS, {"prompts": ["a"], "n": 100_000}, 400, "n", "invalid_value"),
        (CHAT, {"messages": HELLO, "n": 0}, 400, "n", "invalid_value"),
        (CHAT, {"messages": HELLO, "top_p": 0}, 400, "top_p", "invalid_value"),
        (CHAT, {"messages": HELLO, "seed": 2**70}, 400, "seed", "invalid_value"),
        (DIAGNOSTICS, {"prompts": []}, 400, "prompts", "invalid_value"),
        (DIAGNOSTICS, {"prompts": ["a"] * 257}, 400, "prompts", "invalid_value"),
        # empty prompt
        (DIAGNOSTICS, {"prompts": [" "]}, 400, "prompts.0", "empty_prompt"),
        (REWRITES, {"prompt": ""}, 400, "prompt", "empty_prompt"),
        (CHAT, {"messages": []}, 400, "messages", "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": ""}]}, 400, "messages.0.content",
         "empty_prompt"),
        # longer than the context
        (DIAGNOSTICS, {"prompts": [LONG]}, 400, "prompts.0", "context_length_exceeded"),
        (REWRITES, {"prompt": LONG}, 400, "prompt", "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": LONG}]}, 400, "messages",
         "context_length_exceeded"),
        (CHAT, {"messages": [{"role": "user", "content": LONG}], "stream": True}, 400, "messages",
         "context_length_exceeded"),
        # more tokens than the context holds
        (DIAGNOSTICS, {"prompts": ["a"], "max_tokens": 10**9}, 400, "max_tokens", "invalid_value"),
        (CHAT, {"messages": HELLO, "max_tokens": 10**9}, 400, "max_tokens", "invalid_value"),
        (CHAT, {"messages": HELLO, "max_completion_tokens": 10**9, "stream": True}, 400,
         "max_completion_tokens", "invalid_value"),
        # unknown dimension
        (DIAGNOSTICS, {"prompts": ["a"], "dimensions": ["kind"]}, 400, "dimensions.0",
         "unknown_dimension"),
        (SCORES, {"rows": [{"prompt": "a", "response": "b"}], "dimensions": ["kind"]}, 400,
         "dimensions.0", "unknown_dimension"),
        (JOBS, {"model": "fake-policy", "training_file": "f", "mora": {"dimensions": ["kind"]}},
         400, "mora.dimensions", "unknown_dimension"),
        # unknown model, unknown id
        (DIAGNOSTICS, {"prompts": ["a"], "model": "nope"}, 404, "model", "model_not_found"),
        (REWRITES, {"prompt": "a", "model": "nope"}, 404, "model", "model_not_found"),
        (CHAT, {"messages": HELLO, "model": "nope"}, 404, "model", "model_not_found"),
        (CHAT, {"messages": HELLO, "model": "nope", "stream": True}, 404, "model",
         "model_not_found"),
        (JOBS, {"model": "nope", "training_file": "f"}, 404, "model", "model_not_found"),
        (JOBS, {"model": "fake-policy", "training_file": "f"}, 404, "training_file",
         "file_not_found"),
        (JOBS, {"model": "fake-policy", "training_file": "batch_f"}, 404, "training_file",
         "batch_not_found"),
        (BATCHES, {"input_file_id": "file-x", "endpoint": SCORES}, 404, "input_file_id",
         "file_not_found"),
        # not supported
        (CHAT, {"messages": HELLO, "tools": [{"type": "function"}]}, 400, "tools",
         "invalid_value"),
        (CHAT, {"messages": HELLO, "logprobs": True}, 400, "logprobs", "invalid_value"),
        (CHAT, {"messages": HELLO, "presence_penalty": 1.0}, 400, "presence_penalty",
         "invalid_value"),
        (BATCHES, {"input_file_id": "f", "endpoint": CHAT}, 400, "endpoint", "invalid_value"),
        (BATCHES, {"input_file_id": "f", "endpoint": SCORES, "completion_window": "soon"}, 400,
         "completion_window", "invalid_value"),
        (JOBS, {"model": "m", "training_file": "f", "method": {"type": "supervised"}}, 400,
         "method.type", "invalid_value"),
    ],
)  # fmt: skip
async def test_bad_body_is_refused_naming_field_and_rule(
    client: httpx.AsyncClient, url: str, body: Any, status: int, param: str | None, code: str
) -> None:
    response = await client.post(url, json=body)

    assert response.status_code == status, response.text
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert error["type"] == "invalid_request_error"
    if status == 400 and param is not None and code != "context_length_exceeded":
        assert error["message"].startswith(param)


@pytest.mark.parametrize("url", [DIAGNOSTICS, SCORES, REWRITES, CHAT, BATCHES, JOBS])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"{'a': 1}", b'{"n": NaN}', b'{"n": 1' + b"0" * 5000 + b"}",
     b"[" * 100_000],
)  # fmt: skip
async def test_body_that_is_not_json_is_400(
    client: httpx.AsyncClient, url: str, content: bytes
) -> None:
    response = await client.post(url, content=content, headers={"content-type": "application/json"})

    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_json"


async def test_json_without_its_content_type_is_understood(client: httpx.AsyncClient) -> None:
    response = await client.post(SCORES, content=b'{"rows": [{"prompt": "a", "response": "b"}]}')

    assert response.status_code == 200


async def test_lone_surrogates_are_refused_everywhere_text_is_kept(
    client: httpx.AsyncClient,
) -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "metadata": {"a": "\\ud800"}}'

    response = await client.post(CHAT, content=body)

    assert response.status_code == 400
    assert error_of(response)["param"] == "metadata.a"


@pytest.mark.parametrize(
    ("url", "body", "message"),
    [
        (CHAT, {"messages": HELLO, "logprobs": True}, "logprobs must be false, got true"),
        (CHAT, {"messages": HELLO, "metadata": {"a": "x" * 513}},
         "metadata.a must be at most 512 characters long, got a string"),
        (CHAT, {"messages": HELLO, "metadata": {"a" * 65: "x"}},
         f"metadata.{'a' * 65} must have a name that is at most 64 characters long, got a string"),
        (BATCHES, {"input_file_id": "f", "endpoint": SCORES, "defaults": 3},
         "defaults must be an object, got 3"),
        (JOBS, {"model": "", "training_file": "f"},
         "model must be at least 1 character(s) long, got ''"),
        (JOBS, {"model": "m", "training_file": "f", "suffix": "a b"},
         "suffix must match ^[A-Za-z0-9-]+$, got a string"),
        (JOBS, {"model": "m", "training_file": "f", "suffix": "a" * 19},
         "suffix must be at most 18 characters long, got a string"),
        (JOBS, {"model": "m", "training_file": "f", "validation_file": "f"},
         "validation_file must be null, got a string"),
        ("/v1/files", {"uri": "x" * 2049, "purpose": "batch"},
         "uri must be at most 2048 characters long, got a string"),
    ],
)  # fmt: skip
async def test_rules_are_said_in_our_words(
    client: httpx.AsyncClient, url: str, body: Any, message: str
) -> None:
    response = await client.post(url, json=body)

    assert response.status_code == 400
    assert error_of(response)["message"] == message


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("after=" + "a" * 129, f"after must be at most 128 characters long, got '{'a' * 80}...'."),
        ("limit=many", "limit must be an integer, got 'many'."),
        ("limit=0", "limit must be at least 1, got '0'."),
    ],
)
async def test_rules_of_urls_are_said_in_our_words(
    client: httpx.AsyncClient, query: str, message: str
) -> None:
    response = await client.get(f"{BATCHES}?{query}")

    assert response.status_code == 400
    assert error_of(response)["message"] == message


async def test_rules_of_headers_are_said_in_our_words(client: httpx.AsyncClient) -> None:
    response = await client.post(
        BATCHES,
        json={"input_file_id": "f", "endpoint": SCORES},
        headers={"idempotency-key": "k" * 256},
    )

    error = error_of(response)
    assert (error["param"], response.status_code) == ("idempotency-key", 400)
    assert error["message"].startswith("idempotency-key must be at most 255 characters long, got")


async def test_one_bad_prompt_among_many_fails_alone(client: httpx.AsyncClient) -> None:
    response = await client.post(DIAGNOSTICS, json={"prompts": ["fine", "", LONG, "also fine"]})

    assert response.status_code == 200
    data = response.json()["data"]
    assert [item["status"] for item in data] == ["ok", "failed", "failed", "ok"]
    assert data[1]["error"]["code"] == "empty_prompt"
    assert data[2]["error"]["code"] == "context_length_exceeded"
    assert [item["error"]["param"] for item in data[1:3]] == ["prompts.1", "prompts.2"]


@pytest.mark.parametrize(
    ("method", "url", "status", "code"),
    [
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("GET", DIAGNOSTICS, 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/models/nope", 404, "model_not_found"),
        ("GET", "/v1/files/file-x", 404, "file_not_found"),
        ("GET", "/v1/files/file-x/content", 404, "file_not_found"),
        ("DELETE", "/v1/files/file-x", 404, "file_not_found"),
        ("GET", "/v1/batches/batch_x", 404, "batch_not_found"),
        ("POST", "/v1/batches/batch_x/cancel", 404, "batch_not_found"),
        ("GET", "/v1/batches/batch_x/pairs", 404, "batch_not_found"),
        ("GET", "/v1/batches/batch_x/pairs?follow=true", 404, "batch_not_found"),
        ("GET", "/v1/batches/batch_x/events", 404, "batch_not_found"),
        ("GET", "/v1/files/", 404, "unknown_url"),
        ("GET", "/readyz/", 404, "unknown_url"),
        ("POST", "/v1/diagnostics/", 404, "unknown_url"),
        ("GET", "/v1/fine_tuning/jobs/x", 404, "fine_tuning_job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/x/events", 404, "fine_tuning_job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/x/events?stream=true", 404, "fine_tuning_job_not_found"),
        ("GET", "/v1/fine_tuning/jobs/x/checkpoints", 404, "fine_tuning_job_not_found"),
        ("GET", "/v1/batches?limit=0", 400, "invalid_value"),
        ("GET", "/v1/batches?limit=many", 400, "invalid_type"),
        ("GET", "/v1/batches/b/pairs?after=x", 400, "invalid_type"),
        ("GET", "/v1/files?order=up", 400, "invalid_value"),
    ],
)
async def test_bad_url_is_refused_with_the_envelope(
    client: httpx.AsyncClient, method: str, url: str, status: int, code: str
) -> None:
    response = await client.request(method, url)

    assert response.status_code == status, response.text
    assert error_of(response)["code"] == code


async def test_cursor_that_names_nothing_is_refused(client: httpx.AsyncClient) -> None:
    for url in ("/v1/files", "/v1/batches", "/v1/fine_tuning/jobs"):
        response = await client.get(url, params={"after": "nothing"})

        assert response.status_code in (400, 404), url
        error_of(response)


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (GenerationError("the engine is gone"), "generator_unavailable"),
        (StorageError("Redis is gone"), "storage_unavailable"),
    ],
)
async def test_lost_infrastructure_is_503_with_retry_after(failure: Exception, code: str) -> None:
    class Broken(FakeGenerator):
        async def generate(self, requests: Any) -> Any:
            raise failure

    async with make_client(create_app(make_deps(generator=Broken()))) as client:
        response = await client.post(CHAT, json={"messages": HELLO})

    assert response.status_code == 503
    assert int(response.headers["retry-after"]) >= 1
    assert error_of(response)["code"] == code


async def test_request_that_an_engine_ended_under_is_not_to_be_repeated_by_the_client() -> None:
    class Ending(FakeGenerator):
        async def generate(self, requests: Any) -> Any:
            raise GenerationError("the engine ended", lost=True)

    async with make_client(create_app(make_deps(generator=Ending()))) as client:
        response = await client.post(CHAT, json={"messages": HELLO})

    assert response.status_code == 503
    assert response.headers["x-should-retry"] == "false"
    assert "retry-after" not in response.headers


async def test_lost_scorer_is_503() -> None:
    class Broken(FakeScorer):
        async def score(self, groups: Any, dimensions: Any = None) -> Any:
            raise ScoringError("the scorer is gone")

    async with make_client(create_app(make_deps(scorer=Broken()))) as client:
        response = await client.post(SCORES, json={"rows": [{"prompt": "a", "response": "b"}]})

    assert response.status_code == 503
    assert error_of(response)["code"] == "scorer_unavailable"


async def test_unhandled_error_is_500_naming_the_request_and_nothing_else(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Buggy(FakeGenerator):
        async def generate(self, requests: Any) -> Any:
            raise KeyError(SECRET)

    async with make_client(create_app(make_deps(generator=Buggy()))) as client:
        response = await client.post(
            CHAT,
            json={"messages": [{"role": "user", "content": SECRET}]},
            headers={"x-request-id": "req-7"},
        )

    assert response.status_code == 500
    error = error_of(response)
    assert error["type"] == "server_error"
    assert "req-7" in error["message"]
    assert SECRET not in response.text
    assert "Traceback" not in response.text
    assert "KeyError" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [{"role": "user", "content": SECRET}], "n": -1},
        {"messages": [{"role": SECRET[:5], "content": SECRET}]},
        {"messages": SECRET},
        {"messages": [{"role": "user", "content": [SECRET]}]},
        {"messages": HELLO, "stop": [SECRET] * 5},
    ],
)
async def test_messages_and_logs_never_repeat_prompt_text(
    client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture, body: Any
) -> None:
    response = await client.post(CHAT, json=body)

    assert response.status_code == 400
    assert SECRET not in response.text
    assert SECRET not in caplog.text


async def _chunks(total: int) -> AsyncIterator[bytes]:
    for _ in range(total // 1024):
        yield b" " * 1024


@pytest.mark.parametrize("announced", [True, False])
async def test_body_over_the_limit_is_413_by_length_and_by_counting(announced: bool) -> None:
    generator = FakeGenerator()
    settings = make_settings(server={"max_body_bytes": 4096})
    async with make_client(create_app(make_deps(settings, generator=generator))) as client:
        content: Any = b" " * 10_240 if announced else _chunks(10_240)
        response = await client.post(CHAT, content=content)

    assert response.status_code == 413
    error = error_of(response)
    assert error["code"] == "body_too_large"
    assert "4096" in error["message"]
    assert generator.num_requests == 0


@pytest.mark.parametrize(
    "header", [None, "Bearer wrong", "Bearer ", "Basic key-1", "key-1", "Bearer key-1x"]
)
async def test_missing_or_wrong_key_is_401_when_keys_are_set(header: str | None) -> None:
    settings = make_settings(server={"api_keys": ["key-1", "key-2"]})
    headers = {"authorization": header} if header else None
    async with make_client(create_app(make_deps(settings)), headers) as client:
        responses = [
            await client.get("/v1/models"),
            await client.post(DIAGNOSTICS, json={"prompts": ["a"]}),
            await client.get("/openapi.json"),
            await client.get("/v1/nothing"),
        ]

    for response in responses:
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", ["key-1", "key-2"])
async def test_every_configured_key_opens_the_api(key: str) -> None:
    settings = make_settings(server={"api_keys": ["key-1", "key-2"]})
    headers = {"authorization": f"Bearer {key}"}
    async with make_client(create_app(make_deps(settings)), headers) as client:
        assert (await client.get("/v1/models")).status_code == 200


async def test_probes_and_metrics_never_need_a_key() -> None:
    settings = make_settings(server={"api_keys": ["key-1"]})
    async with make_client(create_app(make_deps(settings))) as client:
        for path in ("/livez", "/readyz", "/metrics"):
            assert (await client.get(path)).status_code == 200


async def test_any_header_is_accepted_when_no_key_is_configured(deps: Deps) -> None:
    app = create_app(deps)
    for headers in (None, {"authorization": "Bearer anything"}, {"authorization": "Basic x"}):
        async with make_client(app, headers) as client:
            assert (await client.get("/v1/models")).status_code == 200


async def test_error_bodies_are_ascii_json_whatever_the_field_was_called(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(DIAGNOSTICS, json={"prompts": ["a"], "größe": 1})

    assert response.status_code == 400
    assert json.loads(response.content.decode("ascii"))["error"]["param"] == "größe"
