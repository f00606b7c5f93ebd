"""A batch survives the loss of any process: real Redis, a real runner process, real kills."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.runner import BatchRunner
from mora_serve.config import Settings, dump_settings, load_settings
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.redis_server import RedisServer
from mora_serve.store import Stores, open_stores

pytestmark = pytest.mark.redis

NUM_ROWS = 60
RUNNER = """
import asyncio, json, sys
from actors.runner import BatchRunner
from mora_serve.config import settings_from_dump
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.store import open_stores

async def main():
    settings = settings_from_dump(json.loads(sys.argv[1]))
    generator = FakeGenerator(delay_ms=10.0)
    scorer = FakeScorer(settings.dimensions)
    await BatchRunner(generator, scorer, open_stores(settings), settings, sys.argv[2]).run()

asyncio.run(main())
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path / "redis")
    running.start()
    yield running
    running.stop()


@pytest.fixture
def settings(server: RedisServer, tmp_path: Path) -> Settings:
    overrides = {
        "data_dir": str(tmp_path),
        "redis": {"url": server.url},
        "runner": {"poll_interval_s": 0.05, "shard_rows": 7, "lease_ttl_s": 1.0},
        "sampling": {"n": 8, "n_max": 8},
    }
    return load_settings("fake", overrides=overrides, environ={})


@pytest.fixture
async def stores(settings: Settings) -> AsyncIterator[Stores]:
    opened = open_stores(settings)
    yield opened
    await opened.aclose()


async def _submit(stores: Stores) -> str:
    rows = [
        {
            "custom_id": f"r{number}",
            "method": "POST",
            "url": "/v1/rewrites",
            "body": {"prompt": f"What is number {number}?"},
        }
        for number in range(NUM_ROWS)
    ]
    data = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    await stores.blobs.put("files/in", data)
    file = {"id": "file-in", "purpose": "batch", "bytes": len(data), "filename": "in.jsonl"}
    await stores.batches.put_file(file, "files/in")
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": "file-in"}, {}, None, "hash"
    )
    return str(batch["id"])


async def _done(stores: Stores, batch_id: str, num_rows: int) -> None:
    """Wait until at least ``num_rows`` rows are committed."""
    while (await stores.batches.get_batch(batch_id))["request_counts"]["completed"] < num_rows:
        await asyncio.sleep(0.01)


async def _ended(stores: Stores, batch_id: str) -> dict[str, Any]:
    while (batch := await stores.batches.get_batch(batch_id))["status"] != "completed":
        await asyncio.sleep(0.05)
    return batch


async def _check_exactly_once(stores: Stores, batch: dict[str, Any], seen: list[int]) -> None:
    assert batch["request_counts"] == {"total": NUM_ROWS, "completed": NUM_ROWS, "failed": 0}
    _, blob = await stores.batches.get_file(batch["output_file_id"])
    data = b"".join([chunk async for chunk in stores.blobs.open_read(blob)])
    rows = [json.loads(line) for line in data.splitlines()]
    assert [row["custom_id"] for row in rows] == [f"r{number}" for number in range(NUM_ROWS)]
    pairs = [pair async for pair in stores.pairs.follow(batch["id"])]
    assert [pair["seq"] for pair in pairs] == list(range(len(pairs)))
    assert len(pairs) == sum(len(row["response"]["body"]["pairs"]) for row in rows)
    assert seen == list(range(len(pairs)))


async def _follow(stores: Stores, batch_id: str) -> list[int]:
    return [pair["seq"] async for pair in stores.pairs.follow(batch_id)]


async def test_killing_redis_again_and_again_loses_and_repeats_no_row(
    server: RedisServer, settings: Settings, stores: Stores
) -> None:
    batch_id = await _submit(stores)
    generator = FakeGenerator(delay_ms=10.0)
    runner = BatchRunner(generator, FakeScorer(settings.dimensions), stores, settings, "w1")
    work = asyncio.create_task(runner.run())
    follower = asyncio.create_task(_follow(stores, batch_id))
    async with asyncio.timeout(120):
        for milestone in (5, 20, 40):
            await _done(stores, batch_id, milestone)
            assert server.pid is not None
            os.kill(server.pid, signal.SIGKILL)
        batch = await _ended(stores, batch_id)
        await _check_exactly_once(stores, batch, await follower)
        await runner.stop()
        await work
    assert server.num_restarts == 3


async def test_killing_runner_processes_loses_and_repeats_no_row(
    settings: Settings, stores: Stores
) -> None:
    batch_id = await _submit(stores)
    dump = json.dumps(dump_settings(settings, reveal=True))
    follower = asyncio.create_task(_follow(stores, batch_id))
    async with asyncio.timeout(120):
        for number, milestone in enumerate((4, 25)):
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-c", RUNNER, dump, f"w{number}"
            )
            await _done(stores, batch_id, milestone)
            process.kill()
            await process.wait()
        generator = FakeGenerator()
        runner = BatchRunner(generator, FakeScorer(settings.dimensions), stores, settings, "last")
        work = asyncio.create_task(runner.run())
        batch = await _ended(stores, batch_id)
        await _check_exactly_once(stores, batch, await follower)
        await runner.stop()
        await work
