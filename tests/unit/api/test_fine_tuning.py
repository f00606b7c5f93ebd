"""Fine-tuning jobs: what is stored for the trainer, lists, events, checkpoints, cancel."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from api import schemas
from api.app import create_app
from api.deps import Deps
from mora_serve.config import TrainerSettings
from tests.unit.api.conftest import MODEL, error_of, make_client, make_deps, make_settings
from tests.unit.api.test_batches import create as create_batch
from tests.unit.api.test_batches import upload
from trainer.job import read_job

JOBS = "/v1/fine_tuning/jobs"


async def create_job(client: httpx.AsyncClient, **extra: Any) -> dict[str, Any]:
    body = {"model": MODEL, "training_file": await upload(client, "fine-tune"), **extra}
    response = await client.post(JOBS, json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


async def test_created_job_is_openais_object_and_queued(client: httpx.AsyncClient) -> None:
    job = schemas.FineTuningJob.model_validate(await create_job(client, suffix="mine", seed=3))

    assert (job.status, job.model, job.seed, job.suffix) == ("queued", MODEL, 3, "mine")
    assert job.method == {
        "type": "dpo",
        "dpo": {
            "hyperparameters": {
                "beta": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto",
                "n_epochs": "auto",
            }
        },
    }  # fmt: skip


async def test_trainer_reads_back_what_was_asked_for(client: httpx.AsyncClient, deps: Deps) -> None:
    batch = await create_batch(client)
    job = await create_job(
        client,
        training_file=batch["id"],
        seed=11,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.3, "batch_size": 2}}},
        mora={"mode": "sequential", "dimensions": ["harmless"], "max_steps": 7, "lora_rank": 4},
    )

    stored = await deps.stores.jobs.get_job(job["id"])
    read = read_job(stored, TrainerSettings())

    assert (read.beta, read.batch_size, read.max_steps, read.lora_rank) == (0.3, 2, 7, 4)
    assert (read.stages, read.seed, read.model) == (("harmless",), 11, MODEL)
    assert read.training_file == batch["id"]
    assert read.reads_stream


async def test_launcher_can_claim_a_created_job(client: httpx.AsyncClient, deps: Deps) -> None:
    job = await create_job(client)

    claimed = await deps.stores.jobs.claim_job("launcher", 10)

    assert claimed is not None
    assert claimed["id"] == job["id"]


async def test_deprecated_hyperparameters_are_understood(client: httpx.AsyncClient) -> None:
    job = await create_job(client, hyperparameters={"n_epochs": 2})

    assert job["method"]["dpo"]["hyperparameters"]["n_epochs"] == 2


async def test_batch_without_pairs_cannot_be_trained_on(client: httpx.AsyncClient) -> None:
    batch = await create_batch(client, endpoint="/v1/scores")

    response = await client.post(JOBS, json={"model": MODEL, "training_file": batch["id"]})

    assert response.status_code == 400
    assert error_of(response)["param"] == "training_file"


async def test_file_for_another_purpose_cannot_be_trained_on(client: httpx.AsyncClient) -> None:
    file_id = await upload(client, "batch")

    response = await client.post(JOBS, json={"model": MODEL, "training_file": file_id})

    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("training_file", "invalid_file_purpose")


async def test_any_published_version_can_be_trained_further(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    version = {"id": "policy-1", "kind": "lora", "uri": "file:///x"}
    await deps.stores.jobs.publish_policy(version, make_current=False)

    assert (await create_job(client, model="policy-1"))["model"] == "policy-1"


async def test_jobs_are_listed_and_read(client: httpx.AsyncClient) -> None:
    ids = [(await create_job(client))["id"] for _ in range(3)]

    first = (await client.get(JOBS, params={"limit": 2})).json()
    second = (await client.get(JOBS, params={"after": first["last_id"]})).json()

    schemas.Page[schemas.FineTuningJob].model_validate(first)
    assert [job["id"] for job in first["data"] + second["data"]] == ids[::-1]
    assert (await client.get(f"{JOBS}/{ids[0]}")).json()["id"] == ids[0]


async def test_jobs_are_listed_by_their_metadata(client: httpx.AsyncClient) -> None:
    plain = await create_job(client)
    red, blue = [
        await create_job(client, metadata={"team": team, "kind": "x"}) for team in ("red", "blue")
    ]

    async def listed(**query: Any) -> tuple[list[str], bool]:
        found = (await client.get(JOBS, params=query)).json()
        return [job["id"] for job in found["data"]], found["has_more"]

    assert await listed(**{"metadata[team]": "red"}) == ([red["id"]], False)
    assert await listed(**{"metadata[team]": "red", "metadata[kind]": "y"}) == ([], False)
    assert await listed(**{"metadata[kind]": "x", "limit": 1}) == ([blue["id"]], True)
    assert await listed(**{"metadata[kind]": "x", "after": blue["id"]}) == ([red["id"]], False)
    assert await listed(metadata="null") == ([plain["id"]], False)


async def test_cancel_ends_a_job_and_leaves_a_finished_one_unchanged(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    running, done = await create_job(client), await create_job(client)
    await deps.stores.jobs.update_job(done["id"], status="succeeded")

    cancelled = await client.post(f"{JOBS}/{running['id']}/cancel")
    unchanged = await client.post(f"{JOBS}/{done['id']}/cancel")

    assert cancelled.json()["status"] == "cancelled"
    assert unchanged.json()["status"] == "succeeded"


async def test_events_and_checkpoints_are_pages_newest_first(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    job = await create_job(client)
    jobs = deps.stores.jobs
    for step in range(3):
        await jobs.add_event(
            job["id"], {"message": f"step {step}", "type": "metrics", "data": {"loss": 0.5}}
        )
        await jobs.add_checkpoint(job["id"], {"step_number": step, "metrics": {"step": step}})

    events = schemas.Page[schemas.FineTuningEvent].model_validate(
        (await client.get(f"{JOBS}/{job['id']}/events")).json()
    )
    checkpoints = schemas.Page[schemas.FineTuningCheckpoint].model_validate(
        (await client.get(f"{JOBS}/{job['id']}/checkpoints")).json()
    )

    assert [event.message for event in events.data[:3]] == ["step 2", "step 1", "step 0"]
    assert events.data[-1].message.startswith("Created fine-tuning job")
    assert [item.step_number for item in checkpoints.data] == [2, 1, 0]


@pytest.mark.parametrize("count", [1, 250])
async def test_streamed_events_come_once_each_in_order_to_the_end(
    client: httpx.AsyncClient, deps: Deps, count: int
) -> None:
    job = await create_job(client)
    jobs = deps.stores.jobs
    stream = asyncio.create_task(client.get(f"{JOBS}/{job['id']}/events?stream=true"))
    for step in range(count):
        await jobs.add_event(job["id"], {"message": f"step {step}"})
        await asyncio.sleep(0)
    await jobs.update_job(job["id"], status="succeeded")
    async with asyncio.timeout(20):
        response = await stream

    data = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    items = [json.loads(item) for item in data[:-1]]
    assert items[-1]["object"] == "fine_tuning.job"
    assert items[-1]["status"] == "succeeded"
    messages = [item["message"] for item in items[1:-1]]
    assert messages == [f"step {step}" for step in range(count)]


async def test_a_loss_that_trl_would_refuse_is_refused_when_the_job_is_created(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    job = await create_job(client, mora={"loss": {"loss_type": ["sigmoid", "sft"]}})
    stored = await deps.stores.jobs.get_job(job["id"])
    assert read_job(stored, TrainerSettings()).loss.loss_type == ("sigmoid", "sft")
    body = {"model": MODEL, "training_file": job["training_file"]}

    response = await client.post(JOBS, json={**body, "mora": {"loss": {"loss_type": ["exo_pair"]}}})

    assert response.status_code == 400
    error = error_of(response)
    assert (error["param"], error["code"]) == ("mora.loss.label_smoothing", "invalid_value")


@pytest.mark.parametrize(
    ("field", "digits"),
    [
        ("beta", "1e999"),
        ("beta", "1000.5"),
        ("batch_size", "1" + "0" * 400),
        ("batch_size", "4097"),
        ("learning_rate_multiplier", "1" + "0" * 400),
        ("n_epochs", "1001"),
    ],
)
async def test_a_hyperparameter_that_nothing_can_train_with_is_refused_and_the_list_stays_readable(
    client: httpx.AsyncClient, field: str, digits: str
) -> None:
    training_file = await upload(client, "fine-tune")
    method = f'{{"type": "dpo", "dpo": {{"hyperparameters": {{"{field}": {digits}}}}}}}'
    body = f'{{"model": "{MODEL}", "training_file": "{training_file}", "method": {method}}}'

    response = await client.post(JOBS, content=body)

    assert response.status_code == 400
    assert (await client.get(JOBS)).json()["data"] == []


@pytest.mark.parametrize(
    ("mora", "param"),
    [
        ({"max_steps": 10**30}, "mora.max_steps"),
        ({"checkpoint_steps": 10**30}, "mora.checkpoint_steps"),
        ({"lora_rank": 10**9}, "mora.lora_rank"),
        ({"max_length": 10**9}, "mora.max_length"),
        ({"dimensions": ["harmless"]}, "mora.dimensions"),
        ({"mode": "simultaneous", "dimensions": ["harmless"]}, "mora.dimensions"),
    ],
)
async def test_options_that_cannot_have_the_effect_they_name_are_refused(
    client: httpx.AsyncClient, mora: dict[str, Any], param: str
) -> None:
    body = {"model": MODEL, "training_file": await upload(client, "fine-tune"), "mora": mora}

    response = await client.post(JOBS, json=body)

    assert response.status_code == 400
    assert error_of(response)["param"] == param


async def test_an_adapter_of_more_ranks_than_the_engine_applies_is_not_trained() -> None:
    settings = make_settings(policy={"backend": "vllm", "model": MODEL, "max_lora_rank": 16})
    client = make_client(create_app(make_deps(settings)))
    body = {"model": MODEL, "training_file": await upload(client, "fine-tune")}

    refused = await client.post(JOBS, json={**body, "mora": {"lora_rank": 17}})
    full = await client.post(JOBS, json={**body, "mora": {"lora_rank": 17, "lora": False}})

    assert refused.status_code == 400
    assert error_of(refused)["param"] == "mora.lora_rank"
    assert full.status_code == 200


SEQUENTIAL = {"mode": "sequential"}


async def test_a_sequential_job_samples_prompts_for_every_dimension_in_its_order(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    prompts = await upload(client, "batch")
    job = await create_job(client, training_file=prompts, mora=SEQUENTIAL)
    read = read_job(await deps.stores.jobs.get_job(job["id"]), TrainerSettings())
    assert (read.stages, read.resample) == (deps.settings.dimensions, True)
    assert schemas.FineTuningJob.model_validate(job).stages is None


async def test_a_sequential_job_may_train_on_the_pairs_there_are(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    options = {**SEQUENTIAL, "resample": False, "make_current": False}
    job = await create_job(client, mora=options)
    read = read_job(await deps.stores.jobs.get_job(job["id"]), TrainerSettings())
    assert (read.stages, read.resample) == (deps.settings.dimensions, False)


@pytest.mark.parametrize(
    ("purpose", "mora", "param", "rule"),
    [
        ("fine-tune", SEQUENTIAL, "training_file", "sequential jobs sample prompts"),
        ("batch", {**SEQUENTIAL, "resample": False}, "training_file", "purpose fine-tune"),
        ("batch", {**SEQUENTIAL, "make_current": False}, "mora.make_current", "must not be false"),
        ("batch", {**SEQUENTIAL, "dimensions": ["helpful", "helpful"]}, "mora.dimensions", "once"),
        ("fine-tune", {"resample": True}, "mora.resample", "unless mora.mode is sequential"),
    ],
)
async def test_a_sequential_job_that_cannot_run_is_refused_by_field(
    client: httpx.AsyncClient, purpose: str, mora: dict[str, Any], param: str, rule: str
) -> None:
    body = {"model": MODEL, "training_file": await upload(client, purpose), "mora": mora}

    response = await client.post(JOBS, json=body)

    assert response.status_code == 400
    assert error_of(response)["param"] == param
    assert rule in error_of(response)["message"]


async def test_cancelling_a_sequential_job_cancels_the_batch_of_its_stage(
    client: httpx.AsyncClient, deps: Deps
) -> None:
    batch = await create_batch(client)
    job = await create_job(client, training_file=await upload(client, "batch"), mora=SEQUENTIAL)
    stage = {
        "dimension": "helpful", "model": MODEL, "batch_id": batch["id"], "version": None,
        "steps": 0, "trained_tokens": 0, "status": "running",
    }  # fmt: skip
    await deps.stores.jobs.update_job(job["id"], stages=[stage])

    cancelled = await client.post(f"{JOBS}/{job['id']}/cancel")

    assert schemas.FineTuningJob.model_validate(cancelled.json()).stages is not None
    assert (await deps.stores.batches.get_batch(batch["id"]))["status"] == "cancelling"
