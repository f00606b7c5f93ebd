"""Engines behind Ray Serve on a real local Ray, with fakes in the place of weights."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from typing import Any

import pytest
from ray import cloudpickle, serve

from actors.adapters import ServeGenerator, ServeScorer, Tries
from actors.deploy import Backends, build_backends
from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica
from actors.runner import BatchRunner
from mora_serve.config import PolicySettings, Settings, load_settings
from mora_serve.errors import GenerationError, InvalidRequestError, OverloadedError
from mora_serve.fakes import FakeScorer
from mora_serve.ports import CompletionDelta
from mora_serve.redis_server import RedisServer
from mora_serve.store import Stores
from mora_serve.types import (
    Failure,
    Generation,
    GenerationRequest,
    Message,
    Sampling,
    ScoreGroup,
)
from tests.contract.generator_contract import GENERATOR_CHECKS, GeneratorCheck
from tests.contract.scorer_contract import SCORER_CHECKS, ScorerCheck
from tests.unit.store.ledger_driver import content
from tests.unit.store.runner_driver import ended, row_line, running, submit

pytestmark = [pytest.mark.ray, pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="session")]
PATIENCE_S = 60.0


def request(text: str = "Why is the sky blue?", **sampling: Any) -> GenerationRequest:
    return GenerationRequest((Message("user", text),), Sampling(**{"n": 2, **sampling}))


# --- the fake profile, as deployed ----------------------------------------------------------------


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield load_settings("fake", environ={}, overrides={"redis": {"url": server.url}})
    server.stop()


@pytest.fixture(scope="module")
def backends(ray_local: None, settings: Settings) -> Backends:
    return build_backends(settings)


@pytest.fixture(scope="module")
def generator(backends: Backends) -> Iterator[ServeGenerator]:
    handle = serve.run(backends.generator, name="generator", route_prefix=None)
    yield ServeGenerator(handle, chunk=2)
    serve.delete("generator")


@pytest.fixture(scope="module")
def scorer(backends: Backends) -> Iterator[ServeScorer]:
    handles = {
        name: serve.run(application, name=f"scorer-{name}", route_prefix=None)
        for name, application in backends.scorers.items()
    }
    yield ServeScorer(handles, chunk=2)
    for name in handles:
        serve.delete(f"scorer-{name}")


@pytest.mark.redis
async def test_results_come_in_order_however_the_list_was_cut(generator: ServeGenerator) -> None:
    texts = [f"Question {index}?" for index in range(7)]
    whole = await generator.generate([request(text, seed=3) for text in texts])
    single = [(await generator.generate([request(text, seed=3)]))[0] for text in texts]
    assert whole == single
    assert all(isinstance(item, Generation) and len(item.completions) == 2 for item in whole)


@pytest.mark.redis
@pytest.mark.parametrize("check", GENERATOR_CHECKS, ids=lambda check: check.__name__)
async def test_generators_over_serve_keep_the_contract(
    generator: ServeGenerator, settings: Settings, check: GeneratorCheck
) -> None:
    await check(generator, max_model_len=settings.policy.max_model_len)


@pytest.mark.redis
@pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
async def test_scorers_over_serve_keep_the_contract(
    scorer: ServeScorer, settings: Settings, check: ScorerCheck
) -> None:
    await check(scorer, max_tokens=settings.scorers[0].max_tokens, tolerance=0.0)


@pytest.mark.redis
async def test_a_published_policy_is_served_without_a_restart(
    generator: ServeGenerator, settings: Settings
) -> None:
    from mora_serve.store import open_stores

    stores = open_stores(settings)
    version = {"id": "policy-new", "kind": "lora", "uri": "/nowhere", "parent": None}
    await stores.jobs.publish_policy(version, make_current=True)
    await stores.aclose()

    async def current() -> str:
        return (await generator.models())[0]

    await eventually(current, "policy-new")
    result = (await generator.generate([request()]))[0]
    assert isinstance(result, Generation)
    assert result.policy_version == "policy-new"
    old = GenerationRequest((Message("user", "Hi"),), Sampling(n=1), model="fake-policy")
    assert isinstance((await generator.generate([old]))[0], Generation)


@pytest.mark.redis
async def test_metrics_of_every_replica_reach_the_board(
    generator: ServeGenerator, settings: Settings
) -> None:
    from mora_serve.store import open_stores

    await generator.generate([request()])
    stores = open_stores(settings)

    async def counted() -> bool:
        texts = await stores.metrics.collect()
        return any('mora_generator_requests_total{outcome="ok"}' in t for t in texts.values())

    await eventually(counted, True)
    await stores.aclose()


@pytest.mark.redis
async def test_scores_of_all_scorers_are_merged_in_order(scorer: ServeScorer) -> None:
    groups = [
        ScoreGroup((Message("user", f"Question {index}?"),), ("yes", f"no {index}"))
        for index in range(5)
    ]
    assert await scorer.score(groups) == await FakeScorer().score(groups)
    assert set(await scorer.dimensions()) == {"helpful", "harmless", "truthful"}


@pytest.mark.redis
async def test_only_the_asked_dimensions_are_scored(scorer: ServeScorer) -> None:
    group = ScoreGroup((Message("user", "Hi"),), ("yes",))
    scores = await scorer.score([group], ["truthful"])
    assert set(scores[0][0]) == {"truthful"}


# --- replicas that die, hang and fill up ----------------------------------------------------------

# Serve's controller and replicas cannot import a test module: send its classes by value.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class ChildEngine(FakeEngine):
    """A fake whose engine is a process of its own, as vLLM's is. The models name its pid."""

    def __init__(self) -> None:
        super().__init__(PolicySettings(backend="fake", model="fake-policy"))
        self._child: subprocess.Popen[bytes] | None = None
        self.num_cancelled = 0

    async def start(self) -> None:
        self._child = subprocess.Popen(["sleep", "600"])

    async def stop(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def check_health(self) -> None:
        if self._child is None or self._child.poll() is not None:
            raise GenerationError("the engine is not running")

    async def models(self, wanted: str | None = None) -> list[str]:
        assert self._child is not None
        return [str(self._child.pid), str(self.num_cancelled)]

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        await self.check_health()
        text = requests[0].prompt[-1].content
        if text == "invalid":
            raise InvalidRequestError("n must be at least 1, got 0", "n", "out_of_range")
        if text == "bug":
            raise ZeroDivisionError("a secret prompt")
        if any(item.prompt[-1].content == "die" for item in requests):
            os._exit(1)
        if text == "wait":
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.num_cancelled += 1
                raise
        return await super().generate(requests)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[CompletionDelta, None]:
        try:
            while True:
                yield CompletionDelta("on ")
                await asyncio.sleep(0.01)
        finally:
            self.num_cancelled += 1


class ChildGenerator(GeneratorReplica):
    async def __init__(self) -> None:  # type: ignore[misc]
        super().__init__(ChildEngine(), None, "fake-policy")
        await self.start()

    async def __del__(self) -> None:  # type: ignore[misc]
        await self.stop()


@pytest.fixture(scope="module")
def child(ray_local: None) -> Iterator[ServeGenerator]:
    deployment = serve.deployment(
        name="child",
        max_ongoing_requests=2,
        max_queued_requests=1,
        health_check_period_s=1.0,
        graceful_shutdown_timeout_s=1.0,
        ray_actor_options={"num_cpus": 0},
    )(ChildGenerator)
    handle = serve.run(deployment.bind(), name="child", route_prefix=None)
    yield ServeGenerator(handle)
    serve.delete("child")


async def test_an_error_keeps_its_type_and_fields_across_ray(child: ServeGenerator) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await child.generate([request("invalid")])
    assert type(caught.value) is InvalidRequestError
    assert (caught.value.param, caught.value.code) == ("n", "out_of_range")


async def test_a_foreign_error_becomes_ours_without_its_message(child: ServeGenerator) -> None:
    with pytest.raises(GenerationError) as caught:
        await child.generate([request("bug")])
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError" in str(caught.value)


async def test_cancelling_a_call_frees_the_generation(child: ServeGenerator) -> None:
    before = int((await child.models())[1])
    call = asyncio.create_task(child.generate([request("wait")]))
    await asyncio.wait({call}, timeout=2.0)
    call.cancel()

    async def cancelled() -> int:
        return int((await child.models())[1])

    await eventually(cancelled, before + 1)


async def test_leaving_a_stream_frees_the_generation(child: ServeGenerator) -> None:
    before = int((await child.models())[1])
    stream = child.stream(request("stream"))
    assert (await anext(stream)).text == "on "
    await stream.aclose()

    async def cancelled() -> int:
        return int((await child.models())[1])

    await eventually(cancelled, before + 1)


async def test_a_full_queue_is_an_overload_at_once(child: ServeGenerator) -> None:
    calls = [asyncio.create_task(child.generate([request("wait")])) for _ in range(8)]
    done, _ = await asyncio.wait(calls, timeout=PATIENCE_S, return_when=asyncio.FIRST_EXCEPTION)
    errors = [task.exception() for task in done]
    assert errors
    assert all(isinstance(error, OverloadedError) for error in errors)
    for task in calls:
        task.cancel()
    await asyncio.gather(*calls, return_exceptions=True)


async def test_a_dead_engine_takes_its_replica_along_and_a_retry_meets_a_new_one(
    child: ServeGenerator,
) -> None:
    async def pid() -> int:
        return int((await child.models())[0])

    first = await pid()
    os.kill(first, signal.SIGKILL)
    result = (await child.generate([request()]))[0]
    assert isinstance(result, Generation)
    assert await pid() != first


@pytest.mark.parametrize("repeats", [0, 1])
async def test_a_prompt_that_ends_replicas_ends_no_more_of_them_than_it_is_allowed_to(
    child: ServeGenerator, repeats: int
) -> None:
    async def pid() -> int:
        return int((await child.models())[0])

    before = await pid()
    careful = ServeGenerator(child._handle, tries=Tries(lost_repeats=repeats))
    with pytest.raises(GenerationError) as caught:
        await careful.generate([request("die")])
    assert caught.value.lost
    assert isinstance((await child.generate([request()]))[0], Generation)
    assert await pid() != before


async def test_a_row_that_ends_its_replica_is_given_up_and_the_others_come_through(
    child: ServeGenerator,
) -> None:
    stores = Stores.memory()
    limits = {"max_poison_tries": 1, "max_in_flight_rows": 2, "poll_interval_s": 0.1}
    settings = load_settings("fake", environ={}, overrides={"runner": limits})
    careful = ServeGenerator(child._handle, tries=Tries(lost_repeats=0))
    runner = BatchRunner(careful, FakeScorer(), stores, settings, "w1")
    prompts = ["one", "two", "die", "four", "five", "six"]
    lines = [row_line(n, body={"prompt": text, "n": 4}) for n, text in enumerate(prompts)]
    batch_id = await submit(stores, lines)
    async with running(runner, timeout_s=120.0):
        batch = await ended(stores, batch_id)
    errors = await content(stores, batch["error_file_id"])
    assert [(e["custom_id"], e["error"]["code"]) for e in errors] == [("r2", "engine_lost")]
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 1}


async def eventually(probe: Any, expected: Any) -> None:
    """Ask until the answer is the expected one."""
    async with asyncio.timeout(PATIENCE_S):
        while (answer := await probe()) != expected:
            await asyncio.sleep(0.05)
    assert answer == expected
