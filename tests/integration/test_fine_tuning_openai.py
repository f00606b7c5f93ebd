"""The unmodified ``openai`` client fine-tunes: all is real but the engines, which are fakes.

A sequential job whose trainer is killed between two stages; everything that the client's resource
has is called on it.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica
from api.app import create_app
from api.deps import Deps
from mora_serve.calibrators import load_calibrator
from mora_serve.config import Settings
from mora_serve.fakes import FakeScorer
from mora_serve.service import MoraService
from mora_serve.store import Stores
from tests.contract.gateway_server import http_server, working
from tests.integration.training import (
    eventually,
    kill_driver,
    launcher,
    opened,
    ray_address,
    settings,
)
from tests.redis_fixtures import redis_server, redis_url

__all__ = ["ray_address", "redis_server", "redis_url"]
pytestmark = [pytest.mark.ray, pytest.mark.redis, pytest.mark.slow]

STAGES = ["harmless", "helpful"]
NUM_PROMPTS = 6
OPENAI_OWN = ("validating_files", "queued", "running", "succeeded", "failed", "cancelled")


@dataclass
class World:
    """A served gateway with everything behind it but real engines."""

    client: openai.AsyncOpenAI
    stores: Stores
    settings: Settings

    def log(self, job_id: str) -> Path:
        return self.settings.data_dir / "logs" / f"train-{job_id}.log"

    async def until_over(self, job_id: str) -> FineTuningJob:
        async def look() -> FineTuningJob | None:
            job = await self.client.fine_tuning.jobs.retrieve(job_id)
            return job if job.status in ("succeeded", "failed", "cancelled") else None

        job: FineTuningJob = await eventually(look, self.log(job_id))
        return job

    async def until_stage(self, job_id: str, number: int) -> None:
        async def look() -> bool:
            job = await self.client.fine_tuning.jobs.retrieve(job_id)
            return len(stages_of(job)) >= number

        await eventually(look, self.log(job_id))

    async def prompts(self) -> str:
        rows = [
            {"custom_id": f"r{i}", "method": "POST", "url": "/v1/rewrites",
             "body": {"prompt": f"How do I bake bread number {i}?", "model": "of another day"}}
            for i in range(NUM_PROMPTS)
        ]  # fmt: skip
        data = "\n".join(json.dumps(row) for row in rows).encode()
        file = await self.client.files.create(file=("prompts.jsonl", data), purpose="batch")
        return str(file.id)


@pytest.fixture
async def world(tmp_path: Path, redis_url: str, ray_address: str) -> AsyncIterator[World]:
    config = settings(tmp_path, redis_url)
    async with (
        opened(config) as stores,
        served(config, stores, ray_address) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="any") as client,
    ):
        yield World(client, stores, config)


@asynccontextmanager
async def served(config: Settings, stores: Stores, address: str) -> AsyncIterator[str]:
    replica = GeneratorReplica(
        FakeEngine(config.policy), stores.jobs, config.policy.model, poll_interval_s=0.2
    )
    await replica.start()
    scorer = FakeScorer(config.dimensions)
    service = MoraService(replica, scorer, load_calibrator(config), config)
    app = create_app(Deps(service, replica, scorer, stores, config, poll_interval_s=0.05))
    async with (
        http_server(app) as url,
        working(stores, config, replica, scorer),
        launcher(stores, config, address),
    ):
        yield url
    await replica.stop()


def stages_of(job: FineTuningJob) -> list[dict[str, Any]]:
    return list((job.model_extra or {}).get("stages") or [])


async def test_a_sequential_job_by_the_openai_client_outlives_its_trainer(world: World) -> None:
    jobs = world.client.fine_tuning.jobs
    base = world.settings.policy.model
    created = await jobs.create(
        model=base,
        training_file=await world.prompts(),
        method={
            "type": "dpo",
            "dpo": {
                "hyperparameters": {
                    "beta": 0.2, "batch_size": 2, "learning_rate_multiplier": 1.0, "n_epochs": 1,
                }
            },
        },
        seed=5,
        suffix="kind",
        metadata={"asked-by": "a test"},
        extra_body={
            "mora": {
                "mode": "sequential", "dimensions": STAGES, "lora_rank": 4, "max_steps": 2,
                "loss": {"loss_type": ["sigmoid_norm"]},
            }
        },
    )  # fmt: skip
    assert (created.status, created.seed, created.object) == ("queued", 5, "fine_tuning.job")
    other = await jobs.create(model=base, training_file=created.training_file,
                              extra_body={"mora": {"mode": "sequential"}})  # fmt: skip
    assert (await jobs.cancel(other.id)).status == "cancelled"
    assert [job.id for job in (await jobs.list(limit=5)).data] == [other.id, created.id]

    await world.until_stage(created.id, 2)
    kill_driver(created.id)
    done = await world.until_over(created.id)

    assert done.status == "succeeded", world.log(created.id).read_text()[-4000:]
    assert (done.fine_tuned_model or "").startswith("policy-kind-")
    assert done.trained_tokens
    await check_stages(world, done, base)
    await check_events(world, done)
    await check_files(world, done)


async def check_stages(world: World, done: FineTuningJob, base: str) -> None:
    """Each stage's pairs were sampled from the version before it, and from no other."""
    first, second = stages_of(done)
    assert [stage["dimension"] for stage in (first, second)] == STAGES
    assert (first["model"], first["version"]) == (base, second["model"])
    assert second["version"] == done.fine_tuned_model
    for stage in (first, second):
        pairs = await world.stores.pairs.read(stage["batch_id"], -1, 1000)
        assert pairs
        assert {pair["policy_version"] for pair in pairs} == {stage["model"]}
        batch = await world.client.batches.retrieve(stage["batch_id"])
        assert (batch.metadata or {})["fine_tuning_job_id"] == done.id
    # Asking for a version makes a generator look for it, so that nothing has to be waited for.
    await world.client.models.retrieve(str(done.fine_tuned_model))
    models = [model.id async for model in world.client.models.list()]
    assert models[0] == done.fine_tuned_model
    assert set(models) == {base, first["version"], second["version"]}


async def check_events(world: World, done: FineTuningJob) -> None:
    jobs = world.client.fine_tuning.jobs
    events = [event async for event in jobs.list_events(done.id, limit=2)][::-1]
    told = [event.message for event in events if event.type == "message"]
    assert [text.split(":")[0] for text in told if text.startswith("Stage")] == [
        "Stage 1 of 2 (harmless)", "Stage 2 of 2 (helpful)",
    ]  # fmt: skip
    assert sum(text.startswith("Published") for text in told) == 2
    assert any("started again, 1 of" in text for text in told)
    steps = [event.data for event in events if event.type == "metrics"]
    assert {step["step"] for step in steps} == {1, 2, 3, 4}  # type: ignore[index]
    names = {"train_loss", "rewards/margins", "rewards/accuracies", "wait_for_data_seconds"}
    for step in steps:
        assert names | {f"margins/{k}" for k in STAGES} <= set(step)  # type: ignore[call-overload]
    checkpoints = (await jobs.checkpoints.list(done.id)).data
    assert [item.step_number for item in checkpoints] == [4, 3, 2, 1]
    assert checkpoints[0].fine_tuned_model_checkpoint == done.fine_tuned_model
    assert checkpoints[2].fine_tuned_model_checkpoint == stages_of(done)[0]["version"]
    assert checkpoints[0].metrics.train_loss is not None


async def check_files(world: World, done: FineTuningJob) -> None:
    metrics, adapter = [await world.client.files.content(name) for name in done.result_files]
    rows = list(csv.DictReader(io.StringIO(metrics.text)))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(row["margins/harmless"] for row in rows)
    with zipfile.ZipFile(io.BytesIO(adapter.content)) as archive:
        assert set(archive.namelist()) == {"adapter_config.json", "adapter_model.safetensors"}
        assert json.loads(archive.read("adapter_config.json"))["r"] == 4
    jobs = world.client.fine_tuning.jobs
    assert (await jobs.cancel(done.id)).status == "succeeded"
    for call in (jobs.pause, jobs.resume):
        with pytest.raises(openai.NotFoundError):
            await call(done.id)
    with pytest.raises(openai.NotFoundError):
        await jobs.retrieve("ftjob-none")
    assert done.status in OPENAI_OWN
