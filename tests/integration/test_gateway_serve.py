"""The whole service as its command starts it: real Ray Serve, real Redis, fake engines."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from api import schemas
from mora_serve.config import ENV_CONFIG, Settings, dump_settings, load_settings
from mora_serve.free_ports import free_port
from mora_serve.processes import Child
from mora_serve.redis_server import RedisServer
from mora_serve.stack import child_env, resolve_settings
from mora_serve.store import open_stores

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(600)]

START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 90
HELLO = [{"role": "user", "content": "hello"}]


@dataclass
class Service:
    url: str
    settings: Settings
    child: Child
    log: Path


def start(settings: Settings, log: Path) -> Child:
    env = {**child_env(), ENV_CONFIG: json.dumps(dump_settings(settings, reveal=True))}
    with log.open("wb") as output:
        return Child([sys.executable, "-m", "api.deploy"], env=env, output=output)


def wait_until_ready(service: Service) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if service.child.poll() is not None:
            break
        try:
            if httpx.get(f"{service.url}/readyz", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise AssertionError(f"not ready; log:\n{service.log.read_text('utf-8', 'replace')[-4000:]}")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("gateway")
    redis = RedisServer(root / "redis")
    redis.start()
    port = free_port()
    settings = resolve_settings(
        load_settings(
            "fake",
            environ={},
            overrides={
                "data_dir": str(root / "data"),
                "redis": {"url": redis.url},
                "server": {"port": port, "max_body_bytes": 65_536},
                "policy": {"fake_delay_ms": 100.0},
            },
        )
    )
    log = root / "serve.log"
    service = Service(f"http://127.0.0.1:{port}", settings, start(settings, log), log)
    try:
        wait_until_ready(service)
        yield service
    finally:
        service.child.stop(STOP_TIMEOUT_S)
        redis.stop()


@pytest.fixture
def client(service: Service) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key="any", base_url=f"{service.url}/v1") as client:
        yield client


def post(service: Service, path: str, body: Any) -> httpx.Response:
    return httpx.post(f"{service.url}{path}", json=body, timeout=60)


def ray_address(child: Child) -> str:
    """Address of the Ray that a service started, from its raylet's command line."""
    for pid in child.family():
        for part in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            if part.startswith(b"--gcs-address="):
                return part.decode().partition("=")[2]
    raise AssertionError("no raylet")


async def publish(settings: Settings, name: str) -> None:
    stores = open_stores(settings)
    await stores.jobs.publish_policy({"id": name, "kind": "lora", "uri": "/x"}, make_current=False)
    await stores.aclose()


@pytest.mark.parametrize("path", ["chat/completions", "diagnostics", "models"])
def test_a_version_answers_as_soon_as_it_is_published(service: Service, path: str) -> None:
    name = f"policy-{path.partition('/')[0]}"
    asyncio.run(publish(service.settings, name))

    if path == "models":
        answer = httpx.get(f"{service.url}/v1/models/{name}", timeout=60)
    else:
        asked = {"messages": HELLO} if path.startswith("chat") else {"prompts": ["one"], "n": 4}
        answer = post(service, f"/v1/{path}", {**asked, "model": name})

    assert answer.status_code == 200, answer.text


def test_another_stack_does_not_join_the_ray_of_this_one(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # what address "auto" turns on by itself
    port = free_port()
    server = service.settings.server.model_copy(update={"port": port})
    ray = service.settings.ray.model_copy(update={"address": ray_address(service.child)})
    log = tmp_path / "other.log"
    update = {"server": server, "ray": ray, "data_dir": tmp_path / "data"}
    child = start(service.settings.model_copy(update=update), log)
    deadline = time.monotonic() + START_TIMEOUT_S
    while child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    child.stop(STOP_TIMEOUT_S)

    assert child.poll() == 1
    last = log.read_text("utf-8").splitlines()[-1]
    assert last.startswith("error: ray.address must not lead to the private Ray of another")
    assert httpx.get(f"{service.url}/readyz", timeout=5).status_code == 200


def test_method_answers_over_http(service: Service) -> None:
    diagnostics = post(service, "/v1/diagnostics", {"prompts": ["one", ""], "n": 4})
    scores = post(service, "/v1/scores", {"rows": [{"prompt": "a", "response": "b"}]})
    rewrite = post(service, "/v1/rewrites", {"prompt": "why is it so", "n": 8, "n_max": 8})

    parsed = schemas.DiagnosticsResponse.model_validate(diagnostics.json())
    assert [item.status for item in parsed.data] == ["ok", "failed"]
    schemas.ScoresResponse.model_validate(scores.json())
    schemas.RewriteResponse.model_validate(rewrite.json())


def test_streams_pass_the_proxy_piece_by_piece(service: Service, client: openai.OpenAI) -> None:
    body = {"prompts": ["one", "two", "three"], "stream": True}
    with httpx.stream("POST", f"{service.url}/v1/diagnostics", json=body, timeout=60) as response:
        lines = [json.loads(line) for line in response.iter_lines()]
    stream = client.chat.completions.create(
        model=service.settings.policy.model,
        messages=HELLO,
        stream=True,  # type: ignore[arg-type]
    )

    assert lines[-1]["object"] == "diagnostic.summary"
    assert len(lines) == 4
    assert len(list(stream)) > 1


def test_errors_keep_their_envelope_behind_the_proxy(service: Service) -> None:
    bad = post(service, "/v1/diagnostics", {"prompts": ["a"], "n": 0})
    missing = httpx.get(f"{service.url}/v1/batches/batch_x")
    large = post(service, "/v1/diagnostics", {"prompts": ["x" * 70_000]})
    unknown = httpx.get(f"{service.url}/nothing")

    for response, status in ((bad, 400), (missing, 404), (large, 413), (unknown, 404)):
        assert response.status_code == status
        schemas.ErrorResponse.model_validate(response.json())


def test_batch_runs_to_its_files_and_pairs(service: Service, client: openai.OpenAI) -> None:
    rows = [
        {"custom_id": f"r{i}", "method": "POST", "url": "/v1/rewrites",
         "body": {"prompt": f"question number {i}", "seed": i}}
        for i in range(12)
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in rows) + "\nnot json\n"
    file = client.files.create(file=("rows.jsonl", lines.encode()), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/rewrites",  # type: ignore[arg-type]
        completion_window="24h",
        extra_body={"defaults": {"n": 8, "n_max": 8}},
    )
    url = f"{service.url}/v1/batches/{batch.id}"
    with httpx.stream("GET", f"{url}/pairs?follow=true", timeout=180) as response:
        pairs = [json.loads(line) for line in response.iter_lines()]
    events = httpx.get(f"{url}/events", timeout=60).text
    done = client.batches.retrieve(batch.id)

    assert done.status == "completed"
    assert done.request_counts is not None
    assert (done.request_counts.completed, done.request_counts.failed) == (12, 1)
    assert [pair["seq"] for pair in pairs] == list(range(len(pairs)))
    assert pairs
    assert '"status":"completed"' in events
    assert done.output_file_id is not None
    output = client.files.content(done.output_file_id).text.splitlines()
    assert {json.loads(line)["custom_id"] for line in output} == {row["custom_id"] for row in rows}
    parquet = httpx.get(f"{url}/pairs", headers={"accept": "application/vnd.apache.parquet"})
    assert parquet.content[:4] == b"PAR1"


def test_metrics_of_all_replicas_are_one_page(service: Service) -> None:
    deadline = time.monotonic() + 30
    text = ""
    while "mora_generator_requests_total" not in text and time.monotonic() < deadline:
        text = httpx.get(f"{service.url}/metrics", timeout=10).text
        time.sleep(0.5)

    assert "mora_generator_requests_total" in text
    assert "mora_http_requests_total" in text
    assert 'replica="gateway-' in text


@pytest.mark.parametrize("stream", [True, False])
def test_client_that_leaves_is_counted(service: Service, stream: bool) -> None:
    before = metric(service, "mora_gateway_disconnects_total")
    # Of so many prompts some stay undecided for tens of rounds, most of which is waiting.
    prompts = [f"question {i}" for i in range(60)]
    body = json.dumps({"prompts": prompts, "n": 4, "n_max": 1024, "stream": stream})
    connection = http.client.HTTPConnection("127.0.0.1", service.settings.server.port)
    connection.request("POST", "/v1/diagnostics", body)
    wait_for(lambda: metric(service, "mora_gateway_prompts_in_flight") > 0)
    connection.close()

    wait_for(lambda: metric(service, "mora_gateway_disconnects_total") > before)
    assert metric(service, "mora_gateway_disconnects_total") == before + 1
    assert metric(service, "mora_gateway_prompts_in_flight") == 0


def metric(service: Service, name: str) -> float:
    """A sample, added up over all replicas."""
    text = httpx.get(f"{service.url}/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith(f"{name}{{")]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 30 seconds"
        time.sleep(0.05)


def test_second_service_on_the_port_says_so_and_leaves_the_first_alone(service: Service) -> None:
    dump = json.dumps(dump_settings(service.settings, reveal=True))
    done = subprocess.run(
        [sys.executable, "-m", "api.deploy"],
        env={**child_env(), ENV_CONFIG: dump},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 1
    assert "server.port must be free" in done.stderr
    assert httpx.get(f"{service.url}/readyz").status_code == 200


def test_sigterm_ends_it_cleanly_and_leaves_no_process(service: Service) -> None:
    """Last in the module: it stops the shared service."""
    os.kill(service.child.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while service.child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    status = service.child.poll()
    while service.child.family() and time.monotonic() < deadline:
        time.sleep(0.2)

    assert status == 0, service.log.read_text("utf-8", "replace")[-2000:]
    assert service.child.family() == []
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{service.url}/livez")
