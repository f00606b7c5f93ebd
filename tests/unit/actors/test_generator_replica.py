"""The generator replica: which policy versions it serves, its metrics, and its end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from itertools import pairwise
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from actors.fake_engine import FakeEngine
from actors.generator import EXIT_DEAD_ENGINE, GeneratorReplica, PolicyVersion
from actors.metrics import GeneratorMetrics
from mora_serve.config import PolicySettings
from mora_serve.errors import GenerationError, StorageError
from mora_serve.ports import CompletionDelta
from mora_serve.store import Stores
from mora_serve.types import Failure, Generation, GenerationRequest, Message, Sampling
from tests.contract.generator_contract import GENERATOR_CHECKS, GeneratorCheck

BASE = "fake-policy"
SETTINGS = PolicySettings(backend="fake", model=BASE, max_model_len=128)


class Engine(FakeEngine):
    """A fake that can die and can refuse a policy version."""

    def __init__(self) -> None:
        super().__init__(SETTINGS)
        self.dead = False
        self.broken: set[str] = set()
        self.num_published = 0

    async def check_health(self) -> None:
        if self.dead:
            raise GenerationError("the engine is not running")

    async def publish(self, versions: Sequence[PolicyVersion], current: str) -> None:
        if current in self.broken:
            raise GenerationError("cannot be loaded")
        self.num_published += 1
        await super().publish(versions, current)

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        await self.check_health()
        return await super().generate(requests)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[CompletionDelta, None]:
        async for delta in super().stream(request):
            await self.check_health()
            yield delta


def request(model: str | None = None) -> GenerationRequest:
    return GenerationRequest((Message("user", "Hi"),), Sampling(n=2, seed=1), model)


async def publish(stores: Stores, name: str, *, make_current: bool = True) -> None:
    version = {"id": name, "kind": "lora", "uri": f"/adapters/{name}"}
    await stores.jobs.publish_policy(version, make_current=make_current)


def replica_of(engine: Engine, stores: Stores, **options: object) -> GeneratorReplica:
    return GeneratorReplica(engine, stores.jobs, BASE, poll_interval_s=3600, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("check", GENERATOR_CHECKS, ids=lambda check: check.__name__)
async def test_a_replica_keeps_the_contract(check: GeneratorCheck) -> None:
    replica = replica_of(Engine(), Stores.memory())
    await replica.start()
    await check(replica, max_model_len=SETTINGS.max_model_len)
    await replica.stop()


async def test_a_store_without_versions_means_the_base() -> None:
    replica = replica_of(Engine(), Stores.memory())
    await replica.start()
    assert await replica.models() == [BASE]
    await replica.stop()


async def test_a_replica_starts_with_the_current_version() -> None:
    stores = Stores.memory()
    await publish(stores, "policy-1")
    replica = replica_of(Engine(), stores)
    await replica.start()
    assert await replica.models() == ["policy-1", BASE]
    await replica.stop()


async def test_rollouts_are_stamped_with_the_version_that_was_published_last() -> None:
    stores = Stores.memory()
    replica = replica_of(Engine(), stores)
    await replica.start()
    await publish(stores, "policy-1")
    await publish(stores, "policy-2")
    await replica.refresh()
    new, old = await replica.generate([request(), request("policy-1")])
    assert isinstance(new, Generation)
    assert isinstance(old, Generation)
    assert (new.policy_version, old.policy_version) == ("policy-2", "policy-1")
    await replica.stop()


async def test_a_listed_version_can_be_named_before_it_is_current() -> None:
    stores = Stores.memory()
    replica = replica_of(Engine(), stores)
    await replica.start()
    await publish(stores, "policy-1", make_current=False)
    await replica.refresh()
    assert await replica.models() == [BASE, "policy-1"]
    await replica.stop()


async def test_an_unchanged_store_publishes_nothing_again() -> None:
    engine, stores = Engine(), Stores.memory()
    replica = replica_of(engine, stores)
    await replica.start()
    before = engine.num_published
    await replica.refresh()
    assert engine.num_published == before
    await replica.stop()


async def test_a_version_that_cannot_be_loaded_leaves_the_old_one_serving_and_is_tried_again() -> (
    None
):
    engine, stores = Engine(), Stores.memory()
    replica = replica_of(engine, stores)
    await replica.start()
    engine.broken = {"policy-1"}
    await publish(stores, "policy-1")
    with pytest.raises(GenerationError):
        await replica.refresh()
    assert await replica.models() == [BASE]
    engine.broken = set()
    await replica.refresh()
    assert (await replica.models())[0] == "policy-1"
    await replica.stop()


async def test_a_replica_starts_although_the_current_version_cannot_be_loaded() -> None:
    engine, stores = Engine(), Stores.memory()
    engine.broken = {"policy-1"}
    await publish(stores, "policy-1")
    replica = replica_of(engine, stores)
    await replica.start()
    assert await replica.models() == [BASE]
    await replica.stop()


async def test_a_version_can_be_sampled_as_soon_as_it_is_published() -> None:
    stores = Stores.memory()
    replica = replica_of(Engine(), stores)
    await replica.start()
    await publish(stores, "policy-1")
    (result,) = await replica.generate([request("policy-1")])
    assert isinstance(result, Generation)
    assert result.policy_version == "policy-1"
    await publish(stores, "policy-2")
    deltas = [delta async for delta in replica.stream(request("policy-2"))]
    assert {delta.policy_version for delta in deltas} == {"policy-2"}
    await publish(stores, "policy-3")
    assert "policy-3" not in await replica.models()
    assert (await replica.models("policy-3"))[0] == "policy-3"
    await replica.stop()


class Watched:
    """A store whose answers wait for a signal; counts how often it was asked."""

    def __init__(self, stores: Stores) -> None:
        self._jobs = stores.jobs
        self.num_asked = 0
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def list_policies(self) -> list[dict[str, Any]]:
        self.num_asked += 1
        listed = await self._jobs.list_policies()
        self.asked.set()
        await self.go_on.wait()
        return listed

    async def current_policy(self) -> tuple[str, int]:
        return await self._jobs.current_policy()


async def test_requests_that_miss_a_version_share_a_look_that_begins_after_them() -> None:
    stores = Stores.memory()
    watched = Watched(stores)
    replica = GeneratorReplica(Engine(), watched, BASE, poll_interval_s=3600)
    await replica.start()
    watched.asked.clear()
    watched.go_on.clear()
    early = asyncio.create_task(replica.generate([request("nobody")]))
    await watched.asked.wait()
    await publish(stores, "policy-1")
    late = [asyncio.create_task(replica.generate([request("policy-1")])) for _ in range(20)]
    await asyncio.sleep(0)
    watched.go_on.set()
    assert isinstance((await early)[0], Failure)
    assert all(isinstance(result, Generation) for (result,) in await asyncio.gather(*late))
    assert watched.num_asked == 3, "one at the start, one for the first, one for all the others"
    await replica.stop()


async def test_a_caller_that_goes_away_does_not_cut_a_change_of_versions_short() -> None:
    stores = Stores.memory()
    watched = Watched(stores)
    replica = GeneratorReplica(Engine(), watched, BASE, poll_interval_s=3600)
    await replica.start()
    await publish(stores, "policy-1")
    watched.asked.clear()
    watched.go_on.clear()
    caller = asyncio.create_task(replica.generate([request("policy-1")]))
    await watched.asked.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    watched.go_on.set()
    await replica.refresh()
    assert watched.num_asked == 3
    assert (await replica.models())[0] == "policy-1"
    await replica.stop()


async def test_requests_for_served_versions_never_wait_for_the_store() -> None:
    watched = Watched(Stores.memory())
    replica = GeneratorReplica(Engine(), watched, BASE, poll_interval_s=3600)
    await replica.start()
    before = watched.num_asked
    await replica.generate([request(), request(BASE)])
    assert watched.num_asked == before
    await replica.stop()


async def test_a_named_version_that_cannot_be_loaded_is_not_found() -> None:
    engine, stores = Engine(), Stores.memory()
    replica = replica_of(engine, stores)
    await replica.start()
    engine.broken = {"policy-1"}
    await publish(stores, "policy-1")
    (result,) = await replica.generate([request("policy-1")])
    assert isinstance(result, Failure)
    assert result.code == "model_not_found"
    await replica.stop()


class Unreachable:
    """A store that is down."""

    async def list_policies(self) -> list[dict[str, object]]:
        raise StorageError("no connection")

    async def current_policy(self) -> tuple[str, int]:
        raise StorageError("no connection")


async def test_a_store_that_is_down_changes_nothing() -> None:
    replica = GeneratorReplica(Engine(), Unreachable(), BASE, poll_interval_s=3600)
    await replica.start()
    assert await replica.models() == [BASE]
    await replica.stop()


async def test_a_replica_exits_with_its_engine() -> None:
    engine, exits = Engine(), list[int]()
    replica = replica_of(engine, Stores.memory(), exit_process=exits.append)
    await replica.start()
    await replica.check_health()
    assert exits == []
    engine.dead = True
    with pytest.raises(GenerationError):
        await replica.generate([request()])
    assert exits == [EXIT_DEAD_ENGINE]
    await replica.stop()


async def test_a_replica_exits_with_an_engine_that_dies_in_a_stream() -> None:
    engine, exits = Engine(), list[int]()
    replica = replica_of(engine, Stores.memory(), exit_process=exits.append)
    await replica.start()
    stream = replica.stream(request())
    await anext(stream)
    engine.dead = True
    with pytest.raises(GenerationError):
        await anext(stream)
    assert exits == [EXIT_DEAD_ENGINE]
    await replica.stop()


async def test_prompts_and_tokens_are_counted() -> None:
    registry = CollectorRegistry()
    replica = replica_of(Engine(), Stores.memory(), metrics=GeneratorMetrics(registry))
    await replica.start()
    good, _ = await replica.generate([request(), request("nobody")])
    assert isinstance(good, Generation)
    count = registry.get_sample_value
    assert count("mora_generator_requests_total", {"outcome": "ok"}) == 1
    assert count("mora_generator_requests_total", {"outcome": "model_not_found"}) == 1
    drawn = sum(completion.num_tokens for completion in good.completions)
    assert count("mora_generator_tokens_total", {"kind": "completion"}) == drawn
    assert count("mora_generator_in_flight") == 0
    await replica.stop()


async def test_it_is_told_whether_the_current_version_is_the_one_served() -> None:
    stores, engine, registry = Stores.memory(), Engine(), CollectorRegistry()
    replica = replica_of(engine, stores, metrics=GeneratorMetrics(registry))
    count = registry.get_sample_value
    await replica.start()
    assert count("mora_generator_serves_current") == 1
    engine.broken.add("policy-1")
    await publish(stores, "policy-1")
    with pytest.raises(GenerationError):
        await replica.refresh()
    assert count("mora_generator_serves_current") == 0
    assert count("mora_generator_policy_versions") == 1
    engine.broken.clear()
    await replica.refresh()
    assert count("mora_generator_serves_current") == 1
    assert count("mora_generator_policy_versions") == 2
    await replica.stop()


async def test_versions_go_live_and_back_under_load_without_a_dropped_request() -> None:
    stores = Stores.memory()
    await stores.jobs.publish_policy({"id": BASE, "kind": "base", "uri": None}, make_current=True)
    replicas = [replica_of(Engine(), stores) for _ in range(2)]
    for replica in replicas:
        await replica.start()
    answers: list[list[str]] = [[], []]
    stopped = asyncio.Event()

    async def load(place: int) -> None:
        while not stopped.is_set():
            (result,) = await replicas[place].generate([request()])
            assert isinstance(result, Generation)
            answers[place].append(result.policy_version)
            await asyncio.sleep(0)

    async def answered(version: str) -> None:
        async with asyncio.timeout(10):
            while any(not seen or seen[-1] != version for seen in answers):
                await asyncio.sleep(0)

    callers = [asyncio.create_task(load(place)) for place in (0, 1) for _ in range(4)]
    await answered(BASE)
    await publish(stores, "policy-1")
    for replica in replicas:
        await replica.refresh()
    await answered("policy-1")
    await stores.jobs.set_current_policy(BASE)
    for replica in replicas:
        await replica.refresh()
    await answered(BASE)
    stopped.set()
    await asyncio.gather(*callers)
    for seen in answers:
        changes = [now for before, now in pairwise(seen) if now != before]
        assert changes == ["policy-1", BASE]
    for replica in replicas:
        await replica.stop()
