"""Files: streaming uploads, registration under allowed prefixes, listing, content, deletion."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api import schemas
from api.app import create_app
from api.deps import Deps
from api.uploads import Upload
from mora_serve.errors import InvalidRequestError
from mora_serve.store import Stores
from mora_serve.store.blobs import FsspecBlobs
from mora_serve.uris import resolve_uri
from tests.unit.api.conftest import error_of, make_client, make_deps, make_settings

ROW = b'{"custom_id": "a", "method": "POST", "url": "/v1/scores", "body": {}}\n'
BOUNDARY = "xyzzy"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(content: bytes, *, purpose: str | None = "batch", name: str = "rows.jsonl") -> bytes:
    """A multipart body with the file before the purpose, the order that is harder to stream."""
    head = (
        f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="file"; filename="{name}"\r\n'
        "content-type: application/jsonl\r\n\r\n"
    ).encode()
    field = (
        f'\r\n--{BOUNDARY}\r\ncontent-disposition: form-data; name="purpose"\r\n\r\n{purpose}'
        if purpose is not None
        else ""
    ).encode()
    return head + content + field + f"\r\n--{BOUNDARY}--\r\n".encode()


async def test_uploaded_file_can_be_read_listed_and_deleted(client: httpx.AsyncClient) -> None:
    uploaded = await client.post(
        "/v1/files", files={"file": ("rows.jsonl", ROW)}, data={"purpose": "batch"}
    )
    file = schemas.FileObject.model_validate(uploaded.json())
    url = f"/v1/files/{file.id}"

    assert (file.bytes, file.filename, file.purpose) == (len(ROW), "rows.jsonl", "batch")
    assert (await client.get(url)).json() == uploaded.json()
    content = await client.get(f"{url}/content")
    assert content.content == ROW
    assert content.headers["content-length"] == str(len(ROW))
    assert (await client.delete(url)).json() == {"id": file.id, "object": "file", "deleted": True}
    for gone in (await client.get(url), await client.get(f"{url}/content")):
        assert gone.status_code == 404


async def test_purpose_may_come_after_the_file(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/files", content=form(ROW), headers=FORM)

    assert response.status_code == 200, response.text
    assert response.json()["bytes"] == len(ROW)


async def test_lists_are_paged_newest_first_and_filtered(client: httpx.AsyncClient) -> None:
    ids = []
    for index in range(5):
        purpose = "batch" if index % 2 == 0 else "fine-tune"
        response = await client.post(
            "/v1/files", files={"file": (f"{index}", ROW)}, data={"purpose": purpose}
        )
        ids.append(response.json()["id"])

    first = (await client.get("/v1/files", params={"limit": 2})).json()
    schemas.Page[schemas.FileObject].model_validate(first)
    second = (await client.get("/v1/files", params={"limit": 9, "after": first["last_id"]})).json()
    tuned = (await client.get("/v1/files", params={"purpose": "fine-tune"})).json()
    ascending = (await client.get("/v1/files", params={"order": "asc"})).json()

    assert [item["id"] for item in first["data"] + second["data"]] == ids[::-1]
    assert (first["has_more"], second["has_more"]) == (True, False)
    assert {item["id"] for item in tuned["data"]} == {ids[1], ids[3]}
    assert [item["id"] for item in ascending["data"]] == ids


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (form(ROW, purpose="assistants"), "purpose", "invalid_value"),
        (form(ROW, purpose=None), "purpose", "missing_required_parameter"),
        (b"--xyzzy--\r\n", "file", "missing_required_parameter"),
        (b"", "file", "missing_required_parameter"),
        (b"not a form", None, "invalid_multipart"),
        (form(ROW)[:-30], None, "invalid_multipart"),
        (form(ROW)[: len(ROW) // 2 + 120], None, "invalid_multipart"),
    ],
)
async def test_broken_form_is_400_and_leaves_nothing_behind(
    tmp_path: Path, content: bytes, param: str | None, code: str
) -> None:
    deps = blob_deps(tmp_path)
    async with make_client(create_app(deps)) as client:
        response = await client.post("/v1/files", content=content, headers=FORM)
        listed = await client.get("/v1/files")

    assert response.status_code == 400, response.text
    error = error_of(response)
    assert (error["param"], error["code"]) == (param, code)
    assert listed.json()["data"] == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("name", ["bogus", "expires_after[days]", "n" * 4000])
@pytest.mark.parametrize("first", [True, False])
async def test_field_that_would_be_ignored_is_refused_by_name(
    tmp_path: Path, name: str, first: bool
) -> None:
    whole = form(ROW)
    part = f'--{BOUNDARY}\r\ncontent-disposition: form-data; name="{name}"\r\n\r\n1\r\n'.encode()
    end = whole.rindex(f"--{BOUNDARY}--".encode())
    content = part + whole if first else whole[:end] + part + whole[end:]
    deps = blob_deps(tmp_path)
    async with make_client(create_app(deps)) as client:
        response = await client.post("/v1/files", content=content, headers=FORM)

    assert response.status_code == 400
    error = error_of(response)
    assert error["code"] == "unknown_parameter"
    assert error["param"][:80] == name[:80]
    assert len(error["message"]) < 150
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_form_without_boundary_is_400(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/files", content=b"x", headers={"content-type": "multipart/form-data"}
    )

    assert response.status_code == 400
    assert error_of(response)["code"] == "invalid_multipart"


def blob_deps(root: Path, **server: Any) -> Deps:
    memory = Stores.memory()
    blobs = FsspecBlobs(str(root), uri_prefixes=server.get("file_uri_prefixes", ()))
    stores = Stores(memory.batches, memory.jobs, memory.pairs, blobs, memory.metrics)
    return make_deps(make_settings(server=server) if server else None, stores=stores)


@pytest.mark.parametrize("announced", [True, False])
async def test_upload_over_the_limit_is_413_and_leaves_nothing_behind(
    tmp_path: Path, announced: bool
) -> None:
    body = form(b"x" * 300_000)
    chunks = (body[i : i + 8192] for i in range(0, len(body), 8192))

    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    content: Any = body if announced else stream()
    deps = blob_deps(tmp_path, max_upload_bytes=100_000)
    async with make_client(create_app(deps)) as client:
        response = await client.post("/v1/files", content=content, headers=FORM)

    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_uploads_beyond_the_bound_are_429(tmp_path: Path) -> None:
    app = create_app(blob_deps(tmp_path, max_uploads=1))
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        body = form(ROW)
        yield body[:60]
        begun.set()
        await go_on.wait()
        yield body[60:]

    async with make_client(app) as client:
        first = asyncio.create_task(client.post("/v1/files", content=slow(), headers=FORM))
        await begun.wait()
        second = await client.post("/v1/files", content=form(ROW), headers=FORM)
        go_on.set()
        done = await first

    assert second.status_code == 429
    assert "retry-after" in second.headers
    assert done.status_code == 200


async def test_upload_is_not_held_in_memory() -> None:
    """The parser asks for the next piece only after the last one was consumed."""
    given: list[int] = []
    content = b"y" * 100_000

    async def body() -> AsyncIterator[bytes]:
        data = form(content)
        for start in range(0, len(data), 1000):
            given.append(start)
            yield data[start : start + 1000]

    upload = Upload(FORM["content-type"], body(), 10**6, file="file", fields=["purpose"])
    await upload.find_file()
    taken = 0
    async for chunk in upload.file_chunks():
        taken += len(chunk)
        assert given[-1] <= taken + 2000
    await upload.finish()

    assert taken == len(content)
    assert upload.fields == {"purpose": "batch"}


@settings(max_examples=60, deadline=None)
@given(content=st.binary(max_size=400), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_every_chunking_of_a_form_yields_the_same_file(content: bytes, cuts: list[int]) -> None:
    if f"--{BOUNDARY}".encode() in content:
        return
    data = form(content)

    def pieces() -> Iterator[bytes]:
        start = index = 0
        while start < len(data):
            step = cuts[index % len(cuts)]
            yield data[start : start + step]
            start, index = start + step, index + 1

    async def read() -> tuple[bytes, Upload]:
        async def body() -> AsyncIterator[bytes]:
            for piece in pieces():
                yield piece

        upload = Upload(FORM["content-type"], body(), 10**6, file="file", fields=["purpose"])
        await upload.find_file()
        got = b"".join([chunk async for chunk in upload.file_chunks()])
        await upload.finish()
        return got, upload

    got, upload = asyncio.run(read())
    assert got == content
    assert (upload.num_bytes, upload.filename) == (len(content), "rows.jsonl")


async def test_file_under_an_allowed_prefix_is_registered_in_place(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "rows.jsonl").write_bytes(ROW)
    deps = blob_deps(tmp_path / "blobs", file_uri_prefixes=[f"file://{data}"])
    async with make_client(create_app(deps)) as client:
        response = await client.post(
            "/v1/files", json={"uri": f"file://{data}/rows.jsonl", "purpose": "batch"}
        )
        file = schemas.FileObject.model_validate(response.json())
        content = await client.get(f"/v1/files/{file.id}/content")
        await client.delete(f"/v1/files/{file.id}")

    assert (file.bytes, file.filename) == (len(ROW), "rows.jsonl")
    assert content.content == ROW
    assert (data / "rows.jsonl").exists(), "a registered file is not ours to delete"


@pytest.mark.parametrize(
    "path",
    [
        "/../secret", "/link/secret", "2/secret", "/./rows", "/a%2e%2e/b", "/missing.jsonl", "",
        "/", "/*", "/rows?x",
    ],
)  # fmt: skip
async def test_uri_outside_the_prefixes_is_refused(tmp_path: Path, path: str) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret"
    (data / "sub").mkdir(parents=True)
    secret.write_bytes(ROW)
    (tmp_path / "data2").mkdir()
    (tmp_path / "data2" / "secret").write_bytes(ROW)
    (data / "link").symlink_to(tmp_path)
    deps = blob_deps(tmp_path / "blobs", file_uri_prefixes=[f"file://{data}"])
    async with make_client(create_app(deps)) as client:
        response = await client.post(
            "/v1/files", json={"uri": f"file://{data}{path}", "purpose": "batch"}
        )

    assert response.status_code == 400, response.text
    assert error_of(response)["param"] == "uri"


@pytest.mark.parametrize("name", ["a#b.jsonl", "50%25.jsonl", "[1].jsonl", "what?.jsonl"])
async def test_directory_with_a_name_that_no_uri_has_is_refused_by_that_name(
    tmp_path: Path, name: str
) -> None:
    data = tmp_path / "data" / "set"
    data.mkdir(parents=True)
    (data / "0.jsonl").write_bytes(ROW)
    (data / name).write_bytes(ROW)
    deps = blob_deps(tmp_path / "blobs", file_uri_prefixes=[f"file://{tmp_path}/data"])
    async with make_client(create_app(deps)) as client:
        response = await client.post(
            "/v1/files", json={"uri": f"file://{data}", "purpose": "batch"}
        )

    assert response.status_code == 400, response.text
    assert error_of(response)["code"] == "invalid_file_name"
    assert name in error_of(response)["message"]


async def test_no_uri_is_allowed_by_default(client: httpx.AsyncClient) -> None:
    response = await client.post(
        "/v1/files", json={"uri": "file:///etc/passwd", "purpose": "batch"}
    )

    assert response.status_code == 400
    assert error_of(response)["code"] == "uri_not_allowed"


@pytest.mark.parametrize(
    ("uri", "allowed"),
    [
        ("s3://bucket/data/x.jsonl", True),
        ("s3://bucket/data//x.jsonl", True),
        ("s3://bucket/database/x.jsonl", False),
        ("s3://other/data/x.jsonl", False),
        ("gs://bucket/data/x.jsonl", False),
        ("s3://bucket/data/../x.jsonl", False),
        ("s3://bucket/data/x?versionId=1", False),
        ("simplecache::s3://bucket/data/x", False),
        ("bucket/data/x", False),
    ],
)
def test_remote_prefixes_end_at_path_segments(uri: str, allowed: bool) -> None:
    if allowed:
        assert resolve_uri(uri, ["s3://bucket/data"]) == "s3://bucket/data/x.jsonl"
    else:
        with pytest.raises(InvalidRequestError) as caught:
            resolve_uri(uri, ["s3://bucket/data"])
        assert caught.value.param == "uri"
