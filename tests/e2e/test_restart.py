"""A restart of `mora-serve up` on the same data directory goes on with the batches it finds."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path

import pytest

from mora_serve.client import Client
from mora_serve.free_ports import free_port
from mora_serve.redis_server import RedisServer
from mora_serve.store.redis_client import RedisClient
from tests.e2e.running import CONFIG, Up, eventually

NUM_ROWS = 24


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_batch_that_was_cut_short_by_sigterm_is_finished_by_the_next_up(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(CONFIG)
    data_dir, port = tmp_path / "data", free_port()
    first = Up(data_dir, port, "--config", str(config))
    try:
        first.wait_for("ready ")
        batch_id = start_batch(Client(first.url))
        eventually(lambda: 0 < num_done(first.url, batch_id) < NUM_ROWS)
        assert first.named("redis-server")
        assert len(first.family()) > 8
        assert first.stop(signal.SIGTERM) == 0
        eventually(lambda: first.family() == [], 10.0)
    finally:
        first.kill_all()
    assert leased_shards(data_dir, batch_id) == []
    second = Up(data_dir, port)
    try:
        second.wait_for("ready ")
        client = Client(second.url)
        eventually(lambda: client.get(f"/v1/batches/{batch_id}")["status"] == "completed", 120)
        batch = client.get(f"/v1/batches/{batch_id}")
        assert batch["request_counts"] == {"total": NUM_ROWS, "completed": NUM_ROWS, "failed": 0}
        client.download(f"/v1/files/{batch['output_file_id']}/content", tmp_path / "output.jsonl")
        rows = [json.loads(line) for line in (tmp_path / "output.jsonl").read_text().splitlines()]
        assert sorted(row["custom_id"] for row in rows) == sorted(custom_ids())
    finally:
        second.stop()
        second.kill_all()


@pytest.mark.ray
@pytest.mark.redis
@pytest.mark.slow
def test_up_that_was_killed_can_be_started_again_at_once(tmp_path: Path) -> None:
    data_dir, port = tmp_path / "data", free_port()
    first = Up(data_dir, port)
    second: Up | None = None
    try:
        first.wait_for("ready ")
        assert len(first.family()) > 8
        first.stop(signal.SIGKILL)
        second = Up(data_dir, port)
        eventually(lambda: first.family() == [])
        second.wait_for("ready ")
    finally:
        first.kill_all()
        if second is not None:
            second.stop()
            second.kill_all()


def leased_shards(data_dir: Path, batch_id: str) -> list[bytes]:
    """Shards that somebody holds, as the stopped stack's Redis has them on disk."""
    server = RedisServer(data_dir / "redis")
    server.start()

    async def read() -> list[bytes]:
        client = RedisClient(server.url)
        held = await client.command("ZRANGE", f"mora:batch:{batch_id}:leased", 0, -1)
        await client.aclose()
        return list(held)

    try:
        return asyncio.run(read())
    finally:
        server.stop()


def start_batch(client: Client) -> str:
    url = "/v1/diagnostics"
    rows = [
        {"custom_id": name, "method": "POST", "url": url, "body": {"prompts": [name]}}
        for name in custom_ids()
    ]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file = client.upload(content, "rows.jsonl")
    body = {"input_file_id": file["id"], "endpoint": url, "completion_window": "24h"}
    return str(client.post("/v1/batches", body)["id"])


def num_done(url: str, batch_id: str) -> int:
    done: int = Client(url).get(f"/v1/batches/{batch_id}")["request_counts"]["completed"]
    return done


def custom_ids() -> list[str]:
    return [f"row-{index:02d}" for index in range(NUM_ROWS)]
