"""The process of a real vLLM engine is killed in mid-batch; every row still arrives, once."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import serve

from actors.adapters import ServeGenerator, Tries
from actors.deploy import build_backends
from actors.runner import BatchRunner
from benchmarks import kills
from mora_serve.config import Settings, load_settings
from mora_serve.fakes import FakeScorer
from mora_serve.redis_server import RedisServer
from mora_serve.store import Stores, open_stores
from tests.unit.store.ledger_driver import all_pairs, content
from tests.unit.store.runner_driver import ended, row_line, running, submit

pytestmark = [
    pytest.mark.ray,
    pytest.mark.redis,
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.asyncio(loop_scope="session"),
]
NUM_ROWS = 16
BODY = {"n": 4, "n_max": 4, "candidates": 1, "max_tokens": 12}


@pytest.fixture
def settings(model_dir: Path, tmp_path: Path) -> Iterator[Settings]:
    server = RedisServer(tmp_path / "redis")
    server.start()
    engine = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 64}
    overrides: dict[str, Any] = {
        "data_dir": str(tmp_path),
        "redis": {"url": server.url},
        "policy": {"backend": "vllm", "path": str(model_dir), "engine": engine},
        "runner": {"shard_rows": 8, "max_in_flight_rows": 4},
    }
    yield load_settings("fake", environ={}, overrides=overrides)
    server.stop()


@pytest.fixture
def generator(ray_local: None, settings: Settings) -> Iterator[ServeGenerator]:
    application = build_backends(settings).generator
    handle = serve.run(application, name="vllm-generator", route_prefix=None)
    yield ServeGenerator(handle, tries=Tries(lost_repeats=0))
    serve.delete("vllm-generator")


async def test_rows_survive_the_engine_they_were_in(
    settings: Settings, generator: ServeGenerator
) -> None:
    stores = open_stores(settings)
    scorer = FakeScorer(settings.dimensions)
    runner = BatchRunner(generator, scorer, stores, settings, "w1")
    prompt = "What should somebody with {} cats know?"
    lines = [row_line(n, body={"prompt": prompt.format(n), **BODY}) for n in range(NUM_ROWS)]
    batch_id = await submit(stores, lines)
    async with running(runner, timeout_s=300.0):
        await some_done(stores, batch_id)
        (killed,) = kills.find(os.getpid(), "engine")
        os.kill(killed, signal.SIGKILL)
        batch = await ended(stores, batch_id)
    assert batch["request_counts"] == {"total": NUM_ROWS, "completed": NUM_ROWS, "failed": 0}
    output = await content(stores, batch["output_file_id"])
    assert [row["custom_id"] for row in output] == [f"r{n}" for n in range(NUM_ROWS)]
    promised = sum(len(row["response"]["body"]["pairs"]) for row in output)
    assert [pair["seq"] for pair in await all_pairs(stores, batch_id)] == list(range(promised))
    assert killed not in kills.find(os.getpid(), "engine")
    await stores.aclose()


async def some_done(stores: Stores, batch_id: str) -> None:
    while (await stores.batches.get_batch(batch_id))["request_counts"]["completed"] < 3:
        await asyncio.sleep(0.05)
