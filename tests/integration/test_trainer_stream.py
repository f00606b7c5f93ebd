"""A whole job on Ray Train: fed by a batch that still runs, killed, resumed, published."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica
from actors.launcher import TrainerLauncher
from mora_serve.config import Settings, load_settings
from mora_serve.identity import new_id
from mora_serve.ports import Lease, RowCommit
from mora_serve.store import Stores, open_stores
from mora_serve.types import Generation, GenerationRequest, Message, Sampling
from tests.redis_fixtures import redis_server, redis_url

__all__ = ["redis_server", "redis_url"]
pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

PAIRS_PER_ROW = 2
TIMEOUT_S = 300.0


def settings(data_dir: Path, url: str) -> Settings:
    return load_settings(
        "fake",
        overrides={
            "data_dir": str(data_dir),
            "redis": {"url": url, "key_prefix": new_id("test")},
            "ray": {"num_cpus": 2},
            "trainer": {
                "batch_size": 2, "checkpoint_steps": 1, "max_length": 128, "learning_rate": 1e-2,
                "num_threads": 1,
            },
        },
        environ={},
    )  # fmt: skip


def pair(line: int, index: int) -> bytes:
    def turn(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    return json.dumps(
        {
            "prompt": turn("user", f"question {line} {index}"),
            "chosen": turn("assistant", "yes, gladly"),
            "rejected": turn("assistant", "no, never"),
            "stage": None,
        }
    ).encode()


async def commit_shard(stores: Stores, held: Lease) -> None:
    for line in range(held.first_line, held.first_line + held.num_rows):
        pairs = tuple(pair(line, index) for index in range(PAIRS_PER_ROW))
        await stores.batches.commit_row(held, RowCommit(line, b"{}", None, pairs))
    await stores.batches.seal_shard(held)


async def lease(stores: Stores) -> Lease:
    held = await stores.batches.lease_shard("worker", 600.0)
    assert held is not None
    return held


async def open_batch(stores: Stores, shards: int, rows: int) -> str:
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": "file-in"}, {}, None, "hash"
    )
    bounds = [(first * rows, rows, first * 10, 10) for first in range(shards)]
    await stores.batches.open_batch(batch["id"], bounds, shards * rows)
    return str(batch["id"])


async def steps(stores: Stores, job_id: str) -> list[int]:
    """Steps whose metrics were reported, in the order in which they happened."""
    events, _ = await stores.jobs.list_events(job_id, after=None, limit=100)
    return [event["data"]["step"] for event in events[::-1] if event["type"] == "metrics"]


async def first_step_tokens(stores: Stores, job_id: str) -> int:
    """Tokens of one step: all pairs of these tests are equally long."""
    events, _ = await stores.jobs.list_events(job_id, after=None, limit=100)
    (found, *_) = [e["data"]["num_tokens"] for e in events[::-1] if e["type"] == "metrics"]
    return int(found)


async def eventually(condition: Callable[[], Awaitable[Any]], explain: Callable[[], str]) -> Any:
    """The first true answer; what other processes bring about cannot be waited for by an event."""
    try:
        async with asyncio.timeout(TIMEOUT_S):
            while not (answer := await condition()):
                await asyncio.sleep(0.1)
            return answer
    except TimeoutError:
        pytest.fail(f"not within {TIMEOUT_S} s: {explain()[-4000:]}")


@asynccontextmanager
async def launcher(stores: Stores, config: Settings) -> AsyncIterator[TrainerLauncher]:
    started = TrainerLauncher(stores.jobs, config, ray_address=lambda: None)
    running = asyncio.create_task(started.run())
    try:
        yield started
    finally:
        await started.stop()
        await running


@asynccontextmanager
async def opened(config: Settings) -> AsyncIterator[Stores]:
    stores = open_stores(config)
    try:
        yield stores
    finally:
        await stores.aclose()


async def test_a_job_trains_while_its_batch_runs_survives_a_kill_and_publishes(
    tmp_path: Path, redis_url: str
) -> None:
    config = settings(tmp_path, redis_url)
    async with opened(config) as stores:
        await stores.jobs.publish_policy(
            {"id": config.policy.model, "kind": "base", "uri": None}, make_current=True
        )
        batch_id = await open_batch(stores, shards=2, rows=4)
        job = await stores.jobs.create_job(
            {"id": "ftjob-s1", "model": config.policy.model, "training_file": batch_id}
        )

        def log() -> str:
            path = tmp_path / "logs" / f"train-{job['id']}.log"
            return path.read_text() if path.exists() else "no log"

        async def reported(step: int) -> bool:
            return step in await steps(stores, job["id"])

        # Polls never: it learns of the version only by being asked for it.
        generator = GeneratorReplica(
            FakeEngine(config.policy), stores.jobs, config.policy.model, poll_interval_s=3600
        )
        await generator.start()

        async with launcher(stores, config):
            await commit_shard(stores, await lease(stores))
            await eventually(lambda: reported(4), log)
            assert (await stores.batches.get_batch(batch_id))["status"] == "in_progress"

            os.kill(trainer_pid(job["id"]), signal.SIGKILL)
            await commit_shard(stores, await lease(stores))
            await stores.batches.finalize_ready("worker", 60.0)

            async def finished() -> dict[str, Any] | None:
                current = await stores.jobs.get_job(job["id"])
                return current if current["status"] in ("succeeded", "failed") else None

            done = await eventually(finished, log)

        assert done["status"] == "succeeded", log()[-4000:]
        asked = GenerationRequest((Message("user", "Hi"),), Sampling(), done["fine_tuned_model"])
        assert isinstance((await generator.generate([asked]))[0], Generation)
        await generator.stop()
        # The step that ran when the process died may be reported twice; it counts once.
        assert sorted(set(await steps(stores, job["id"]))) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert done["trained_tokens"] == 8 * await first_step_tokens(stores, job["id"])
        assert done["fine_tuned_model"] == "policy-s1"
        assert done["restarts"] == 1
        assert (await stores.jobs.current_policy())[0] == "policy-s1"
        versions = {version["id"]: version for version in await stores.jobs.list_policies()}
        weights = load_file(Path(versions["policy-s1"]["uri"]) / "adapter_model.safetensors")
        assert any(abs(value).max() > 0 for name, value in weights.items() if "lora_B" in name)


async def test_a_batch_without_pairs_fails_its_job_with_the_reason(
    tmp_path: Path, redis_url: str
) -> None:
    config = settings(tmp_path, redis_url)
    async with opened(config) as stores:
        batch_id = await open_batch(stores, shards=1, rows=1)
        held = await lease(stores)
        await stores.batches.commit_row(held, RowCommit(0, b"{}", None))
        await stores.batches.seal_shard(held)
        await stores.batches.finalize_ready("worker", 60.0)
        job = await stores.jobs.create_job(
            {"id": "ftjob-s2", "model": config.policy.model, "training_file": batch_id}
        )

        async def failed() -> dict[str, Any] | None:
            current = await stores.jobs.get_job(job["id"])
            return current if current["status"] == "failed" else None

        async with launcher(stores, config):
            ended = await eventually(failed, lambda: "job not failed")
        assert ended["error"]["code"] == "no_pairs"


def trainer_pid(job_id: str) -> int:
    """The process that runs the job, found by its command line."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            command = (entry / "cmdline").read_bytes().split(b"\0")
            if command[1:5] == [b"-m", b"trainer", b"--job", job_id.encode()]:
                return int(entry.name)
    raise AssertionError(f"no trainer runs {job_id}")
