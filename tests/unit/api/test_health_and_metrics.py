"""Probes, merged metrics, request ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import httpx
import pytest

from api import schemas
from api.app import create_app
from api.pools import CACHE_S, CheckedPools, Pool, PoolMonitor, pool_states
from api.telemetry import merge_expositions
from mora_serve.errors import CalibrationError, StorageError
from mora_serve.store import Stores
from tests.unit.api.conftest import make_client, make_deps


@dataclass
class Status:
    status: str
    replica_states: Mapping[str, int] = field(default_factory=dict)


async def test_ready_when_store_and_pools_answer(client: httpx.AsyncClient) -> None:
    response = await client.get("/readyz")

    assert response.status_code == 200
    assert schemas.Ready.model_validate(response.json()).reasons == []


async def test_not_ready_names_each_pool_that_does_not_serve() -> None:
    async def pools() -> Mapping[str, Pool]:
        return {"generator": Pool(False, "UPDATING, 0 running"), "scorer-a": Pool(True, "HEALTHY")}

    async with make_client(create_app(make_deps(readiness=pools))) as client:
        response = await client.get("/readyz")

    body = schemas.Ready.model_validate(response.json())
    assert response.status_code == 503
    assert "retry-after" in response.headers
    assert body.reasons == ["generator: UPDATING, 0 running"]
    assert set(body.pools) == {"generator", "scorer-a"}


async def test_not_ready_without_the_store_but_alive() -> None:
    stores = Stores.memory()

    async def broken() -> None:
        raise StorageError("Redis does not answer")

    stores.batches.ping = broken  # type: ignore[method-assign]
    async with make_client(create_app(make_deps(stores=stores))) as client:
        ready, alive = await client.get("/readyz"), await client.get("/livez")

    assert ready.status_code == 503
    assert "Redis does not answer" in ready.json()["reasons"][0]
    assert alive.status_code == 200


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        (Status("HEALTHY", {"RUNNING": 1}), True),
        (Status("HEALTHY", {}), True),
        (Status("UPDATING", {"STARTING": 1}), False),
        (Status("UPDATING", {"RUNNING": 1, "STARTING": 1}), True),
        (Status("UPSCALING", {"RUNNING": 1, "STARTING": 3}), True),
        (Status("UNHEALTHY", {"STARTING": 1}), False),
        (Status("DEPLOY_FAILED", {}), False),
    ],
)
def test_pool_is_ready_when_it_runs_or_may_start_from_zero(status: Status, ready: bool) -> None:
    assert pool_states({"p": status})["p"].ready is ready


@pytest.mark.parametrize("status", ["UPSCALING", "DOWNSCALING", "HEALTHY"])
def test_pool_that_may_start_from_zero_is_ready_on_its_way_from_there_and_back(status: str) -> None:
    starting = {"p": Status(status, {"STARTING": 1})}
    assert pool_states(starting, from_zero={"p"})["p"].ready
    assert pool_states(starting, from_zero={"other"})["p"].ready is (status == "HEALTHY")
    assert not pool_states({"p": Status("UNHEALTHY", {})}, from_zero={"p"})["p"].ready


async def test_pool_that_serve_does_not_know_yet_is_not_ready() -> None:
    monitor = PoolMonitor(dict, ("generator",))

    assert (await monitor())["generator"].ready is False


async def test_probes_share_one_status_call() -> None:
    calls, now = [], [0.0]

    def fetch() -> dict[str, Status]:
        calls.append(1)
        return {"g": Status("HEALTHY", {"RUNNING": 1})}

    monitor = PoolMonitor(fetch, ("g",), clock=lambda: now[0])
    await monitor()
    await monitor()
    assert len(calls) == 1
    now[0] = CACHE_S
    await monitor()
    assert len(calls) == 2


async def test_calibrator_of_other_scorers_keeps_the_gateway_not_ready() -> None:
    outcomes: list[Exception | None] = [CalibrationError("wrong scorer"), None]
    checks = []

    async def pools() -> dict[str, Pool]:
        return {"g": Pool(True, "HEALTHY")}

    async def check() -> None:
        checks.append(1)
        if (error := outcomes.pop(0)) is not None:
            raise error

    checked = CheckedPools(pools, check)
    assert (await checked())["calibrator"].state == "wrong scorer"
    assert "calibrator" not in await checked()
    await checked()
    assert len(checks) == 2, "passed once, never asked again"


async def test_metrics_merge_every_replica_under_its_name() -> None:
    deps = make_deps(replica="gateway-1")
    await deps.stores.metrics.publish(
        "generator-1",
        "# HELP vllm:num_requests_running Running.\n# TYPE vllm:num_requests_running gauge\n"
        'vllm:num_requests_running{model_name="m"} 3.0\n',
        60,
    )
    await deps.stores.metrics.publish(
        "generator-2",
        "# HELP vllm:num_requests_running Running.\n# TYPE vllm:num_requests_running gauge\n"
        "vllm:num_requests_running 4.0\n",
        60,
    )
    async with make_client(create_app(deps)) as client:
        await client.get("/v1/models")
        text = (await client.get("/metrics")).text

    assert 'vllm:num_requests_running{model_name="m",replica="generator-1"} 3.0' in text
    assert 'vllm:num_requests_running{replica="generator-2"} 4.0' in text
    assert text.count("# TYPE vllm:num_requests_running gauge") == 1
    assert (
        'mora_http_requests_total{method="GET",route="/v1/models",status="200",'
        'replica="gateway-1"} 1.0' in text
    )


async def test_metrics_survive_a_lost_store() -> None:
    stores = Stores.memory()

    async def broken() -> dict[str, str]:
        raise StorageError("gone")

    stores.metrics.collect = broken  # type: ignore[method-assign]
    async with make_client(create_app(make_deps(stores=stores))) as client:
        await client.get("/livez")
        response = await client.get("/metrics")

    assert response.status_code == 200
    assert 'mora_http_requests_total{method="GET",route="/livez"' in response.text


def test_merge_drops_what_is_no_exposition_and_escapes_names() -> None:
    text = merge_expositions({'a"b': "# TYPE x counter\nx 1\nnot a sample !\n\n", "c": "x{} 2 3"})

    assert text.splitlines() == [
        "# TYPE x counter",
        'x{replica="a\\"b"} 1',
        'x{replica="c"} 2 3',
    ]


async def test_route_labels_are_templates_not_urls(client: httpx.AsyncClient) -> None:
    await client.get("/v1/files/file-1")
    await client.get("/v1/whatever/it/is")
    text = (await client.get("/metrics")).text

    assert 'route="/v1/files/{file_id}",status="404"' in text
    assert "file-1" not in text
    assert 'route="unmatched",status="404"' in text


@pytest.mark.parametrize(
    ("given", "kept"), [("abc-1", True), ("x" * 200, False), ("a b", False), (None, False)]
)
async def test_request_id_is_the_callers_when_sane(
    client: httpx.AsyncClient, given: str | None, kept: bool
) -> None:
    headers = {"x-request-id": given} if given else {}
    answered = (await client.get("/livez", headers=headers)).headers["x-request-id"]

    assert (answered == given) is kept
    assert answered
