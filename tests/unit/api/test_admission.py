"""Admission by prompts and by bytes, and what a refused caller is told."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest

from api.admission import Admission
from api.app import create_app
from mora_serve.errors import OverloadedError
from tests.unit.api.conftest import error_of, make_client, make_deps, make_settings
from tests.unit.api.test_method_routes import WaitingGenerator


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_admission_gives_permits_back_however_the_block_is_left() -> None:
    seen: list[int] = []
    admission = Admission(2, "prompts", seen.append)
    with admission.take(2), pytest.raises(OverloadedError), admission.take(1):
        pass
    with pytest.raises(KeyError), admission.take(1):
        raise KeyError
    with admission.take(5):
        assert admission.in_use == 5, "alone, a large request is admitted"

    assert admission.in_use == 0
    assert seen == [2, 0, 1, 0, 5, 0]


def refusal(admission: Admission, permits: int) -> float:
    with pytest.raises(OverloadedError) as refused, admission.take(permits):
        pass
    return refused.value.retry_after_s


def test_refused_caller_waits_until_the_measured_rate_has_made_room() -> None:
    clock = Clock()
    admission = Admission(10, "prompts", clock=clock)
    with admission.take(8):
        for _ in range(30):
            with admission.take(2):
                clock.now += 1.0
        # Two prompts a second were finished.
        assert refusal(admission, 10) == pytest.approx(4.0, rel=0.1)
        assert refusal(admission, 3) == 1.0, "never less than a second"
        assert refusal(admission, 1000) == pytest.approx(4.0, rel=0.1), "it needs all, not more"


def test_while_nothing_is_finished_the_wait_grows_with_the_work() -> None:
    clock = Clock()
    admission = Admission(1, "prompts", clock=clock)
    with admission.take(1):
        waits = []
        for _ in range(4):
            clock.now += 20.0
            waits.append(refusal(admission, 1))

    assert waits == [20.0, 40.0, 60.0, 60.0]


BODY = json.dumps({"prompts": ["a"], "n": 4, "n_max": 4}).encode()


@pytest.mark.parametrize("announced", [True, False])
async def test_bytes_are_refused_before_they_are_read(announced: bool) -> None:
    generator, read = WaitingGenerator(), 0
    settings = make_settings(server={"max_queued_bytes": len(BODY) + 10})
    deps = make_deps(settings, generator=generator)

    async def pieces() -> AsyncIterator[bytes]:
        nonlocal read
        read += 1
        yield BODY

    async with make_client(create_app(deps)) as client:
        first = asyncio.create_task(client.post("/v1/diagnostics", content=BODY))
        await generator.started.wait()
        content: bytes | AsyncIterator[bytes] = BODY if announced else pieces()
        refused = await client.post("/v1/diagnostics", content=content)
        chat = await client.post("/v1/chat/completions", content=BODY)
        generator.release.set()
        done = await first
        after = await client.post("/v1/diagnostics", content=BODY)

    assert (refused.status_code, chat.status_code) == (429, 429)
    assert error_of(refused)["code"] == "overloaded"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert read == 0
    assert (done.status_code, after.status_code) == (200, 200)
    assert 'mora_gateway_rejected_total{reason="bytes"} 2.0' in deps.metrics.text()


async def test_a_stream_holds_its_bytes_until_it_ends() -> None:
    generator = WaitingGenerator()
    deps = make_deps(generator=generator)
    app = create_app(deps)
    bodies = app.state.context.bodies
    async with make_client(app) as client:
        body = {"prompts": ["a"], "n": 4, "n_max": 4, "stream": True}
        answer: asyncio.Task[httpx.Response] = asyncio.create_task(
            client.post("/v1/diagnostics", json=body)
        )
        await generator.started.wait()
        held = bodies.in_use
        generator.release.set()
        await answer

    assert held > 0
    assert bodies.in_use == 0
