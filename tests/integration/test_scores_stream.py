"""Ten thousand rows through the whole service, and OpenRLHF's client against it."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from benchmarks.processes import replica_pids, watching
from benchmarks.scores_stream import rows
from mora_serve.client import Client
from mora_serve.config import load_settings
from mora_serve.fakes import FAIL_SCORING
from mora_serve.free_ports import free_port
from mora_serve.redis_server import RedisServer
from mora_serve.stack import resolve_settings
from tests.integration.test_gateway_serve import STOP_TIMEOUT_S, Service, start, wait_until_ready
from tests.unit.act.test_rendered_chat import CHATML
from tests.unit.api.openrlhf_client import fetch_sharded, to_batch

pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow, pytest.mark.timeout(600)]

MIB = 2**20
NUM_ROWS = 10_000


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    root = tmp_path_factory.mktemp("scores")
    redis = RedisServer(root / "redis")
    redis.start()
    port = free_port()
    overrides = {
        "data_dir": str(root / "data"),
        "redis": {"url": redis.url},
        "server": {"port": port},
    }
    settings = resolve_settings(load_settings("fake", environ={}, overrides=overrides))
    log = root / "serve.log"
    service = Service(f"http://127.0.0.1:{port}", settings, start(settings, log), log)
    try:
        wait_until_ready(service)
        yield service
    finally:
        service.child.stop(STOP_TIMEOUT_S)
        redis.stop()


def stream(client: Client, asked: list[dict[str, str]]) -> tuple[dict[int, Any], float]:
    """Rows by index, and which part of the time passed before the first came."""
    began = time.perf_counter()
    first = 0.0
    found: dict[int, Any] = {}
    for item in client.ndjson("POST", "/v1/scores", {"rows": asked, "stream": True}):
        first = first or time.perf_counter() - began
        assert item["index"] not in found, "every row comes once"
        found[item["index"]] = item["scores"]
    return found, first / (time.perf_counter() - began)


def expected_status(row: dict[str, str]) -> str:
    if not row["prompt"].strip() or FAIL_SCORING in row["prompt"]:
        return "failed"
    return "truncated" if len(row["response"].split()) > 1024 else "ok"


def test_ten_thousand_rows_stream_in_flat_memory_and_every_invalid_score_has_its_reason(
    service: Service,
) -> None:
    client = Client(service.url)
    asked = rows(NUM_ROWS)
    asked[17] = {"prompt": " ", "response": "an answer to nothing"}
    stream(client, asked[:1000])
    pids = replica_pids()
    assert {"gateway", "scorer-fake-helpful"} <= set(pids)
    highest = []
    with watching(pids) as peaks:
        for _ in range(3):
            peaks.take()
            found, part_before_first = stream(client, asked)
            highest.append(peaks.take())

            assert sorted(found) == list(range(NUM_ROWS))
            assert part_before_first < 0.5, "rows come while others are scored"

    wrong = Counter[str]()
    for index, scores in found.items():
        expected = expected_status(asked[index])
        assert set(scores) == {"helpful", "harmless", "truthful"}
        for score in scores.values():
            assert score["status"] == expected
            valid = expected == "ok"
            assert (score["value"] is not None) == (score["raw"] is not None) == valid
            if not valid:
                assert score["reason"]
                wrong[f"{score['status']}: {score['reason']}"] += 1
    assert set(wrong) == {
        "failed: fake failed", "truncated: fake truncated",
        "failed: rows.17.prompt must not be empty",
    }  # fmt: skip
    for name in ("gateway", "scorer-fake-helpful"):
        assert highest[2][name] < highest[0][name] + 24 * MIB, (
            "memory stays from request to request"
        )
        assert highest[2][name] < 640 * MIB


async def test_openrlhfs_client_trains_on_rewards_of_the_running_service(service: Service) -> None:
    prompts = [CHATML.replace("Why?", f"Question {i // 8}?") for i in range(1024)]
    queries = [f"{prompt}answer {i}<|im_end|>" for i, prompt in enumerate(prompts)]
    async with httpx.AsyncClient(base_url=service.url) as client:
        sharded, whole = await asyncio.gather(
            fetch_sharded(client, queries, prompts, 64),
            fetch_sharded(client, queries, prompts, 1024),
        )
        empty = await client.post(
            "/get_reward",
            json={"query": [f"{FAIL_SCORING} x"], "prompts": [FAIL_SCORING], "labels": [None]},
        )

    first, second = to_batch(sharded), to_batch(whole)
    assert first.rewards.shape == (1024,)
    assert np.isfinite(first.rewards).all()
    assert (first.rewards == second.rewards).all()
    assert set(first.extra_logs) == {
        f"{name}_{kind}" for name in ("helpful", "harmless", "truthful") for kind in ("z", "raw")
    }
    assert empty.status_code == 400
    assert empty.json()["error"]["code"] == "invalid_scores"
