"""Diagnostics, scores and rewrites over HTTP: objects, NDJSON, admission, disconnects."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import httpx
import pytest

from api import schemas
from api.app import create_app
from api.deps import Deps
from api.streaming import dump_json
from mora_serve.errors import GenerationError
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.types import Failure, Generation, GenerationRequest, ScoreStatus
from tests.unit.api.conftest import error_of, make_client, make_deps, make_settings


class WaitingGenerator(FakeGenerator):
    """Tells when work has started, and holds it until released or cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.started = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        self.started.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return await super().generate(requests)

    async def stream(self, request: GenerationRequest) -> Any:
        await self.generate([request])
        async for delta in super().stream(request):
            yield delta


async def test_diagnostics_answer_in_the_order_of_the_prompts(client: httpx.AsyncClient) -> None:
    prompts: list[Any] = ["one", [{"role": "user", "content": "two"}], "three"]

    response = await client.post(
        "/v1/diagnostics", json={"prompts": prompts, "n": 8, "seed": 1, "include_rollouts": True}
    )

    body = schemas.DiagnosticsResponse.model_validate(response.json())
    assert [item.index for item in body.data] == [0, 1, 2]
    assert all(len(item.rollouts or []) >= 8 for item in body.data)
    assert set(body.data[0].dimensions) == {"helpful", "harmless", "truthful"}
    assert body.usage.rollouts == sum(item.num_rollouts for item in body.data)
    assert response.headers["content-type"] == "application/json"


@pytest.mark.parametrize("status", ["ok", "failed", "timeout", "truncated"])
@pytest.mark.parametrize(
    ("url", "body", "schema"),
    [
        ("/v1/diagnostics", {"prompts": ["one", "two", ""], "n": 3, "n_max": 3},
         schemas.DiagnosticsResponse),
        ("/v1/diagnostics", {"prompts": ["one"], "responses": [["a", "b c"]]},
         schemas.DiagnosticsResponse),
        ("/v1/rewrites", {"prompt": "one", "n": 3, "n_max": 3}, schemas.RewriteResponse),
        ("/v1/rewrites", {"prompt": "one", "n": 8}, schemas.RewriteResponse),
        ("/v1/scores", {"rows": [{"prompt": "a", "response": "b"}]}, schemas.ScoresResponse),
    ],
)  # fmt: skip
async def test_answers_with_few_or_missing_scores_keep_to_their_schema(
    url: str, body: dict[str, Any], schema: type[schemas.Wire], status: ScoreStatus
) -> None:
    """Every other answer scores with ``status`` on one dimension."""
    scorer = FakeScorer(status=lambda _, i, k: status if k == "helpful" and i % 2 == 0 else None)
    async with make_client(create_app(make_deps(scorer=scorer))) as client:
        response = await client.post(url, json={**body, "seed": 1} if "n" in body else body)

    assert response.status_code == 200, response.text
    schema.model_validate(response.json())


async def test_equal_seeds_give_equal_bytes(client: httpx.AsyncClient) -> None:
    body = {"prompts": ["one", "two"], "seed": 7}

    first = await client.post("/v1/diagnostics", json=body)
    second = await client.post("/v1/diagnostics", json=body)

    assert first.content == second.content


async def test_given_responses_are_diagnosed_without_sampling(deps: Deps) -> None:
    generator = FakeGenerator()
    async with make_client(create_app(make_deps(generator=generator))) as client:
        response = await client.post(
            "/v1/diagnostics", json={"prompts": ["one"], "responses": [["a b", "c d", "e f", "g"]]}
        )

    assert response.status_code == 200
    assert response.json()["data"][0]["num_rollouts"] == 4
    assert generator.num_requests == 0


async def test_streamed_diagnostics_are_one_json_object_a_line_and_a_summary(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(
        "/v1/diagnostics", json={"prompts": ["one", "two", ""], "stream": True}
    )

    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    *items, summary = lines
    assert sorted(item["index"] for item in items) == [0, 1, 2]
    for item in items:
        schemas.DiagnosticOut.model_validate(item)
    assert summary["object"] == "diagnostic.summary"
    assert summary["aggregate"]["num_failed"] == 1


async def test_refused_stream_still_gets_its_own_status(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/diagnostics", json={"prompts": ["one"], "model": "nope", "stream": True}
    )

    assert response.status_code == 404
    assert error_of(response)["code"] == "model_not_found"


async def test_scores_keep_the_order_of_rows_and_streams_carry_the_index(
    client: httpx.AsyncClient,
) -> None:
    rows = [{"prompt": f"p{i % 3}", "response": f"answer {i}"} for i in range(20)]

    listed = await client.post("/v1/scores", json={"rows": rows})
    streamed = await client.post("/v1/scores", json={"rows": rows, "stream": True})

    body = schemas.ScoresResponse.model_validate(listed.json())
    assert [row.index for row in body.data] == list(range(20))
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    assert sorted(lines, key=lambda line: int(line["index"])) == listed.json()["data"]


async def test_scores_of_one_dimension_hold_that_dimension_only(
    client: httpx.AsyncClient,
) -> None:
    response = await client.post(
        "/v1/scores",
        json={"rows": [{"prompt": "a", "response": "b"}], "dimensions": ["truthful"]},
    )

    assert set(response.json()["data"][0]["scores"]) == {"truthful"}


@pytest.mark.parametrize("mode", ["simultaneous", "sequential"])
async def test_rewrites_measure_candidates_and_return_pairs(
    client: httpx.AsyncClient, mode: str
) -> None:
    accepted = 0
    for index in range(12):
        response = await client.post(
            "/v1/rewrites", json={"prompt": f"question {index}", "mode": mode, "seed": index}
        )
        body = schemas.RewriteResponse.model_validate(response.json())
        assert all(pair.mode == mode for pair in body.pairs)
        accepted += body.accepted is not None

    assert accepted > 0


async def test_a_rewrite_for_the_one_reward_that_a_prompt_reaches_has_nothing_to_open(
    client: httpx.AsyncClient,
) -> None:
    classes = set()
    for number in range(12):
        body = {"prompt": f"subject {number}", "dimensions": ["harmless"], "seed": number}
        response = await client.post("/v1/rewrites", json=body)
        assert response.status_code == 200, response.text
        found = response.json()
        assert found["candidates"] == []
        classes.add(found["original"]["class"])
        if found["original"]["class"] == "single:harmless":
            assert found["pairs"] or found["no_pairs"]
    assert "single:harmless" in classes


async def test_full_gateway_refuses_before_any_work_is_queued() -> None:
    generator = WaitingGenerator()
    settings = make_settings(server={"max_in_flight_prompts": 2})
    async with make_client(create_app(make_deps(settings, generator=generator))) as client:
        first = asyncio.create_task(
            client.post("/v1/diagnostics", json={"prompts": ["a", "b"], "n": 4, "n_max": 4})
        )
        await generator.started.wait()
        bodies: list[tuple[str, dict[str, Any]]] = [
            ("/v1/diagnostics", {"prompts": ["c"]}),
            ("/v1/diagnostics", {"prompts": ["c"], "stream": True}),
            ("/v1/rewrites", {"prompt": "c"}),
            ("/v1/scores", {"rows": [{"prompt": "c", "response": "d"}]}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "c"}]}),
            (
                "/v1/chat/completions",
                {"messages": [{"role": "user", "content": "c"}], "stream": True},
            ),
        ]
        refused = [await client.post(url, json=body) for url, body in bodies]
        seen = generator.num_requests
        generator.release.set()
        done = await first
        after = await client.post("/v1/diagnostics", json={"prompts": ["c"]})

    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "overloaded"
    assert seen == 0
    assert done.status_code == 200
    assert after.status_code == 200, "the permits came back"


async def _disconnecting_call(
    app: Any, url: str, body: dict[str, Any], leave: asyncio.Event
) -> list[Any]:
    """Call the app as a client that leaves when ``leave`` is set; returns what was sent."""
    content = json.dumps(body).encode()
    sent: list[Any] = []
    pending = [{"type": "http.request", "body": content, "more_body": False}]

    async def receive() -> Any:
        if pending:
            return pending.pop()
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "method": "POST",
        "path": url, "raw_path": url.encode(), "query_string": b"", "root_path": "",
        "scheme": "http", "http_version": "1.1", "client": ("127.0.0.1", 1),
        "server": ("gateway", 80), "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, send)
    return sent


@pytest.mark.parametrize(
    ("url", "body"),
    [
        ("/v1/diagnostics", {"prompts": ["a"]}),
        ("/v1/diagnostics", {"prompts": ["a"], "stream": True}),
        ("/v1/rewrites", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "stream": True}),
    ],
)
async def test_client_that_disconnects_frees_its_generation(url: str, body: dict[str, Any]) -> None:
    generator = WaitingGenerator()
    deps = make_deps(generator=generator)
    app = create_app(deps)

    call = asyncio.create_task(_disconnecting_call(app, url, body, generator.started))
    async with asyncio.timeout(5):
        await call
        await generator.cancelled.wait()

    assert app.state.context.prompts.in_use == 0
    assert "mora_gateway_disconnects_total 1.0" in deps.metrics.text()


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelled_request_counts_as_a_client_that_left(stream: bool) -> None:
    """Ray Serve cancels the application instead of sending ``http.disconnect``."""
    generator = WaitingGenerator()
    deps = make_deps(generator=generator)
    app, never = create_app(deps), asyncio.Event()
    body = {"prompts": ["a"], "stream": stream}

    call = asyncio.create_task(_disconnecting_call(app, "/v1/diagnostics", body, never))
    async with asyncio.timeout(5):
        await generator.started.wait()
        call.cancel()
        await generator.cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await call

    assert app.state.context.prompts.in_use == 0
    assert "mora_gateway_disconnects_total 1.0" in deps.metrics.text()


async def test_fault_in_the_middle_of_a_stream_is_its_last_line() -> None:
    class FailsLater(FakeGenerator):
        async def generate(
            self, requests: Sequence[GenerationRequest]
        ) -> list[Generation | Failure]:
            if self.num_requests:
                raise GenerationError("the engine is gone")
            return await super().generate(requests)

        async def stream(self, request: GenerationRequest) -> Any:
            async for delta in super().stream(request):
                yield delta
                raise GenerationError("the engine is gone")

    async with make_client(create_app(make_deps(generator=FailsLater()))) as client:
        response = await client.post(
            "/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "a"}], "stream": True},
        )

    assert response.status_code == 200
    last = response.text.strip().splitlines()[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "generator_unavailable"


def test_what_is_sent_is_what_was_said_even_where_utf8_cannot_say_it() -> None:
    value = {"text": "\ud800 größe", "\udfff": [1, None]}

    assert json.loads(dump_json(value).decode("utf-8")) == value
