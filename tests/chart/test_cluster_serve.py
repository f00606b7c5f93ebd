"""The rendered Serve configuration on a real Ray, given to it as KubeRay does: over REST.

One node stands for head and gateway pod. It has the variables and resources of the rendered pod;
only what would collide on a shared machine is replaced: ports, the store's address, directories.
"""

from __future__ import annotations

import copy
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from actors.deploy import GENERATOR
from api.proxy import common_environment, find_haproxy, haproxy_environment
from mora_serve.free_ports import free_ports
from mora_serve.processes import Child
from mora_serve.redis_server import RedisServer
from tests.chart.charts import ROOT, Rendered, environment, render

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(600)]

TIMEOUT_S = 120
POLL_S = 0.5


@dataclass
class Cluster:
    rendered: Rendered
    url: str
    dashboard: str
    data_dir: Path
    child: Child
    log: Path

    def apply(self, **settings: Any) -> None:
        """What the operator does with ``serveConfigV2`` whenever that changed."""
        config = copy.deepcopy(self.rendered.serve_config)
        arguments = config["applications"][0]["args"]["settings"]
        arguments |= {"data_dir": str(self.data_dir), **settings}
        answer = httpx.put(f"{self.dashboard}/api/serve/applications/", json=config, timeout=60)
        assert answer.status_code == 200, answer.text

    def applications(self) -> Any:
        return httpx.get(f"{self.dashboard}/api/serve/applications/", timeout=30).json()

    def post(self, path: str, body: Any) -> httpx.Response:
        keys = {"Authorization": "Bearer key-0815"}
        return httpx.post(f"{self.url}{path}", json=body, headers=keys, timeout=60)


def wait_until(said: str, cluster: Cluster, condition: Any) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline and cluster.child.poll() is None:
        with suppress(httpx.HTTPError, KeyError):
            if condition():
                return
        time.sleep(POLL_S)
    log = cluster.log.read_text("utf-8", "replace")[-2000:]
    with suppress(httpx.HTTPError):
        log += str(cluster.applications())[-4000:]
    raise AssertionError(f"{said}; {log}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    port, gcs, dashboard, agent, metrics, client = free_ports(6)
    rendered = render(
        "cpu", f"service.port={port}", values={"secrets.apiKeys": {"existingSecret": "keys"}}
    )
    redis = RedisServer(root / "redis")
    redis.start()
    # Unix socket paths are limited to 107 bytes, so these directories must be short.
    with tempfile.TemporaryDirectory(prefix="mora-kr-", dir="/tmp") as short:
        given = {
            **environment(rendered.ray_pods()["gateway"]),
            **common_environment(local=True),
            **haproxy_environment(_bundled_haproxy(), Path(short)),
            "MORA_REDIS__URL": redis.url,
            "MORA_SERVER__API_KEYS": '["key-0815"]',
            "HOME": short,
            "PYTHONPATH": str(ROOT),
        }
        env = {**os.environ, **{name: str(value) for name, value in given.items()}}
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head", "--block",
            f"--port={gcs}", "--include-dashboard=true", "--dashboard-host=127.0.0.1",
            f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}",
            f"--metrics-export-port={metrics}", f"--ray-client-server-port={client}",
            "--num-cpus=4",
            f"--resources={rendered.groups['gateway']['rayStartParams']['resources'][1:-1]}",
            f"--temp-dir={short}/ray", "--object-store-memory=100000000",
        ]  # fmt: skip
        with (root / "ray.log").open("wb") as log:
            child = Child(command, env=env, output=log)
        try:
            yield Cluster(
                rendered, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}",
                root / "data", child, root / "ray.log",
            )  # fmt: skip
        finally:
            child.stop(1)
            redis.stop()


def _bundled_haproxy() -> str:
    binary = find_haproxy({})
    assert binary is not None
    return binary


def test_the_rendered_application_serves_and_changes_in_place(cluster: Cluster) -> None:
    answers = lambda: httpx.get(f"{cluster.dashboard}/api/version", timeout=5).status_code == 200  # noqa: E731
    wait_until("Ray did not start", cluster, answers)
    cluster.apply()
    ready = lambda: httpx.get(f"{cluster.url}/readyz", timeout=5).status_code == 200  # noqa: E731
    wait_until("not ready", cluster, ready)

    assert httpx.get(f"{cluster.url}/-/healthz", timeout=5).text == "success"
    assert httpx.get(f"{cluster.url}/v1/models", timeout=5).status_code == 401
    body = {"prompts": ["How do I boil an egg?"]}
    first = cluster.post("/v1/diagnostics", body)
    assert first.status_code == 200, first.text
    assert set(first.json()["data"][0]["dimensions"]) == {"helpful", "harmless", "truthful"}

    refused = {"prompts": ["one", "two", "three"]}
    assert cluster.post("/v1/diagnostics", refused).status_code == 200
    cluster.apply(server={**_server(cluster), "max_prompts": 2})
    wait_until(
        "the change did not arrive",
        cluster,
        lambda: cluster.post("/v1/diagnostics", refused).status_code == 400,
    )
    assert cluster.post("/v1/diagnostics", body).status_code == 200


def test_with_a_surge_a_single_replica_stays_until_its_successor_runs(cluster: Cluster) -> None:
    settings = cluster.rendered.serve_config["applications"][0]["args"]["settings"]
    replica = {**settings["policy"].get("replica", {}), "max_surge_percent": 100}
    policy = {**settings["policy"], "replica": replica}
    cluster.apply(policy=policy)
    wait_until("the surge was not taken on", cluster, lambda: _generator(cluster).surge == 100)
    wait_until("the surge was not taken on", cluster, lambda: _generator(cluster).at_rest)

    before = _generator(cluster).running
    cluster.apply(policy={**policy, "max_model_len": 512})
    seen: list[set[str]] = []

    def replaced() -> bool:
        generator = _generator(cluster)
        seen.append(generator.running)
        return generator.at_rest and not generator.running & before

    wait_until("the generator was not replaced", cluster, replaced)
    assert len(before) == len(seen[-1]) == 1
    assert all(seen)


def test_settings_that_cannot_be_served_are_reported_and_the_old_ones_go_on(
    cluster: Cluster,
) -> None:
    cluster.apply(server=_server(cluster), nonsense=1)

    def failed() -> bool:
        application = cluster.applications()["applications"]["mora"]
        return "nonsense is not a setting" in str(application["message"])

    wait_until("the mistake was not reported", cluster, failed)
    assert cluster.post("/v1/diagnostics", {"prompts": ["Hello?"]}).status_code == 200


@dataclass
class Generator:
    """What Serve says of the generator: replicas that take requests, and whether none changes."""

    running: set[str]
    at_rest: bool
    surge: int


def _generator(cluster: Cluster) -> Generator:
    application = cluster.applications()["applications"]["mora"]
    deployment = application["deployments"][GENERATOR]
    states = {item["replica_id"]: item["state"] for item in deployment["replicas"]}
    return Generator(
        running={replica for replica, state in states.items() if state == "RUNNING"},
        at_rest=application["status"] == "RUNNING" and set(states.values()) == {"RUNNING"},
        surge=deployment["deployment_config"]["max_surge_percent"],
    )


def _server(cluster: Cluster) -> dict[str, Any]:
    (application,) = cluster.rendered.serve_config["applications"]
    server: dict[str, Any] = application["args"]["settings"]["server"]
    return server
