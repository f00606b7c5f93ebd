"""The official client drives the API: field names, pagination and errors are OpenAI's."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import get_args

import httpx2
import openai
import openai.types.uploads
import pytest
from openai.types import FileObject
from pydantic import BaseModel

from api import schemas
from api.app import create_app
from api.deps import Deps
from tests.unit.api.conftest import MODEL, make_deps, make_settings
from tests.unit.api.test_batches import Runner, pair

ROW = b'{"custom_id":"a","method":"POST","url":"/v1/rewrites","body":{"prompt":"x"}}\n'


@pytest.fixture
def deps() -> Deps:
    return make_deps(make_settings(server={"api_keys": ["secret"]}))


@pytest.fixture
async def client(deps: Deps) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx2.ASGITransport(create_app(deps))
    http = httpx2.AsyncClient(transport=transport)
    async with openai.AsyncOpenAI(
        api_key="secret", base_url="http://gateway/v1", http_client=http, max_retries=0
    ) as client:
        yield client


async def test_models_and_chat(client: openai.AsyncOpenAI) -> None:
    models = [model.id async for model in client.models.list()]
    answer = await client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hello"}], n=2, seed=1, max_tokens=8
    )
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "hello"}],
        seed=1,
        max_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]

    assert models == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    assert len(answer.choices) == 2
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].usage is not None


async def test_files_and_batches_to_their_output(client: openai.AsyncOpenAI, deps: Deps) -> None:
    file = await client.files.create(file=("rows.jsonl", ROW), purpose="batch")
    batch = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/rewrites",  # type: ignore[arg-type]
        completion_window="24h",
        metadata={"who": "me"},
        extra_body={"defaults": {"n": 8}},
        extra_headers={"Idempotency-Key": "k"},
    )
    runner = Runner(deps, batch.id, 1)
    await runner.open()
    await runner.commit(0)
    await runner.finish()
    done = await client.batches.retrieve(batch.id)

    assert done.status == "completed"
    assert done.request_counts is not None
    assert done.request_counts.completed == 1
    assert done.output_file_id is not None
    assert (await client.files.content(done.output_file_id)).text == "{}\n"
    assert (await client.batches.cancel(batch.id)).status == "completed"
    assert [item.id async for item in client.batches.list(limit=1)] == [batch.id]
    assert {item.id async for item in client.files.list()} == {file.id, done.output_file_id}
    assert (await client.files.retrieve(file.id)).bytes == len(ROW)
    assert (await client.files.delete(file.id)).deleted


async def test_pagination_walks_all_pages(client: openai.AsyncOpenAI) -> None:
    file = await client.files.create(file=("rows.jsonl", ROW), purpose="batch")
    ids = [
        (
            await client.batches.create(
                input_file_id=file.id,
                endpoint="/v1/rewrites",  # type: ignore[arg-type]
                completion_window="24h",
            )
        ).id
        for _ in range(5)
    ]

    assert [item.id async for item in client.batches.list(limit=2)] == ids[::-1]


async def test_fine_tuning(client: openai.AsyncOpenAI, deps: Deps) -> None:
    file = await client.files.create(
        file=("pairs.jsonl", str(pair(0)).encode()), purpose="fine-tune"
    )
    job = await client.fine_tuning.jobs.create(
        model=MODEL,
        training_file=file.id,
        method={"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2}}},
        extra_body={"mora": {"max_steps": 3}},
    )
    await deps.stores.jobs.add_event(job.id, {"message": "step 1"})
    await deps.stores.jobs.add_checkpoint(
        job.id, {"step_number": 1, "fine_tuned_model_checkpoint": "x", "metrics": {"step": 1}}
    )
    events = [event.message async for event in client.fine_tuning.jobs.list_events(job.id)]
    checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)

    assert job.method is not None
    assert job.method.type == "dpo"
    assert [item.id async for item in client.fine_tuning.jobs.list()] == [job.id]
    assert (await client.fine_tuning.jobs.retrieve(job.id)).status == "queued"
    assert events[0] == "step 1"
    assert [item.step_number async for item in checkpoints] == [1]
    assert (await client.fine_tuning.jobs.cancel(job.id)).status == "cancelled"


async def test_extensions_are_reached_with_plain_requests(client: openai.AsyncOpenAI) -> None:
    scores = await client.post(
        "/scores", body={"rows": [{"prompt": "a", "response": "b"}]}, cast_to=object
    )

    assert isinstance(scores, dict)
    assert scores["data"][0]["scores"]["helpful"]["status"] == "ok"
    with pytest.raises(openai.BadRequestError) as refused:
        await client.post(
            "/files", body={"uri": "file:///etc/passwd", "purpose": "batch"}, cast_to=FileObject
        )
    assert refused.value.param == "uri"


async def test_errors_arrive_as_the_clients_own_types(client: openai.AsyncOpenAI) -> None:
    hello = [{"role": "user", "content": "hello"}]
    with pytest.raises(openai.NotFoundError) as missing:
        await client.chat.completions.create(model="nope", messages=hello)  # type: ignore[arg-type]
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(model=MODEL, messages=hello, n=0)  # type: ignore[arg-type]
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").models.list()

    assert missing.value.code == "model_not_found"
    assert bad.value.param == "n"
    assert bad.value.request_id


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (schemas.Batch, openai.types.Batch),
        (schemas.BatchErrorOut, openai.types.BatchError),
        (schemas.RequestCounts, openai.types.BatchRequestCounts),
        (schemas.BatchUsage, openai.types.BatchUsage),
        (schemas.FileObject, FileObject),
        (schemas.FileDeleted, openai.types.FileDeleted),
        (schemas.Upload, openai.types.Upload),
        (schemas.UploadPart, openai.types.uploads.UploadPart),
    ],
)
def test_objects_have_exactly_the_fields_of_the_installed_client(
    ours: type[BaseModel], theirs: type[BaseModel]
) -> None:
    assert set(ours.model_fields) == set(theirs.model_fields)


def test_statuses_are_those_of_the_installed_client() -> None:
    for ours, theirs in (
        (schemas.Batch, openai.types.Batch),
        (schemas.Upload, openai.types.Upload),
    ):
        wanted = get_args(theirs.model_fields["status"].annotation)
        assert set(get_args(ours.model_fields["status"].annotation)) == set(wanted)
