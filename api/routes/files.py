"""``/v1/files``: uploads streamed to blob storage, and registration of files already in it.

A multipart upload never sits in memory; the number of concurrent uploads is bounded, because Serve
queues request bytes without a limit of its own. A JSON body registers a ``uri`` under an allowed
prefix instead (:mod:`mora_serve.uris` decides). What a file holds is checked when a batch reads it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from api.bodies import FileForm, FilePurpose, FileRegistration, parse, read_json
from api.deps import Context, ContextArg, Deps, DepsArg
from api.openapi import json_body
from api.routes.paging import AfterArg, page
from api.schemas import FileDeleted, FileObject, Page
from api.streaming import ClientGoneError, Json, StreamResponse
from api.uploads import Upload
from mora_serve.errors import InvalidRequestError, StorageError
from mora_serve.identity import new_id
from mora_serve.store.shapes import file_object
from mora_serve.uris import is_plain_path, resolve_uri

router = APIRouter(prefix="/v1/files", tags=["files"])

MAX_FILENAME_CHARS = 255
FORM_FIELDS = frozenset({"purpose", "expires_after[anchor]", "expires_after[seconds]"})
RESERVATION_S = 86_400.0
"""Bytes that were written for a file which was not registered within this time are removed."""
_FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "purpose": {"enum": list(get_args(FilePurpose))},
                "expires_after[anchor]": {"enum": ["created_at"]},
                "expires_after[seconds]": {"type": "integer"},
            },
        }
    }
}
_UPLOAD_BODY = json_body(FileRegistration)
_UPLOAD_BODY["requestBody"]["content"].update(_FORM)


@router.post("", response_model=FileObject, openapi_extra=_UPLOAD_BODY)
async def create_file(request: Request, context: ContextArg) -> Response:
    """Upload a file as a multipart form, or register one by ``uri`` with a JSON body."""
    content_type = request.headers.get("content-type", "")
    if content_type.lower().startswith("multipart/"):
        with context.uploads.take(1):
            return Json(await _upload(request, context, content_type))
    body = parse(FileRegistration, await read_json(request))
    return Json(await _register(context.deps, body))


async def _upload(request: Request, context: Context, content_type: str) -> dict[str, Any]:
    deps = context.deps
    limit = deps.settings.server.max_upload_bytes
    upload = Upload(content_type, request.stream(), limit, file="file", fields=FORM_FIELDS)
    file_id = new_file_id()
    blob = f"files/{file_id}"
    try:
        await upload.find_file()
        await deps.stores.batches.reserve_blob(blob, RESERVATION_S)
        await deps.stores.blobs.put(blob, upload.file_chunks())
        try:
            await upload.finish()
            form = _form(upload.fields)
        except BaseException:
            await deps.stores.blobs.delete(blob)
            raise
    except ClientDisconnect:
        raise ClientGoneError from None
    file = new_file(file_id, upload.num_bytes, upload.filename or "upload", form)
    await deps.stores.batches.put_file(file, blob)
    return file


def _form(fields: Mapping[str, str]) -> FileForm:
    """The fields as the JSON that they stand for, validated."""
    data: dict[str, Any] = {k: v for k, v in fields.items() if k == "purpose"}
    expiry: dict[str, Any] = {
        name: fields[f"expires_after[{name}]"]
        for name in ("anchor", "seconds")
        if f"expires_after[{name}]" in fields
    }
    if str(expiry.get("seconds", "")).isdecimal():
        expiry["seconds"] = int(expiry["seconds"])
    return parse(FileForm, {**data, **({"expires_after": expiry} if expiry else {})})


async def _register(deps: Deps, body: FileRegistration) -> dict[str, Any]:
    location = resolve_uri(body.uri, deps.settings.server.file_uri_prefixes)
    try:
        num_bytes = await _size_of(deps, location, body.purpose)
    except StorageError:
        raise InvalidRequestError(
            "uri must name an existing file or directory that the service can read.",
            "uri",
            "file_not_found",
        ) from None
    file = new_file(new_file_id(), num_bytes, location.rsplit("/", 1)[-1], body)
    await deps.stores.batches.put_file(file, location)
    return file


async def _size_of(deps: Deps, location: str, purpose: str) -> int:
    """Bytes of the file, or of all files of a dataset's directory."""
    files = await deps.stores.blobs.tree(location)
    if files is None:
        return await deps.stores.blobs.size(location)
    if purpose != "batch":
        raise InvalidRequestError(
            f"uri must name a file for purpose {purpose}, got a directory",
            "uri",
            "uri_is_directory",
        )
    for name in files:
        if not is_plain_path(name):
            raise InvalidRequestError(
                f"uri must name a directory of files with plain names, got {name[:200]!r} in it; "
                "rename that file",
                "uri",
                "invalid_file_name",
            )
    return sum(files.values())


def new_file_id() -> str:
    """An id for a file that is about to be stored."""
    return "file-" + new_id("x").removeprefix("x_")


def new_file(file_id: str, num_bytes: int, filename: str, form: FileForm) -> dict[str, Any]:
    """The object of a file that is created now."""
    lifetime_s = None if form.expires_after is None else form.expires_after.seconds
    return file_object(
        file_id,
        num_bytes,
        plain_filename(filename),
        purpose=form.purpose,
        created_at=int(time.time()),
        lifetime_s=lifetime_s,
    )


def plain_filename(filename: str) -> str:
    """The last segment of a path as clients of any system write it, without control characters."""
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    return "".join(c for c in name if c.isprintable())[:MAX_FILENAME_CHARS] or "upload"


@router.get("", response_model=Page[FileObject])
async def list_files(
    deps: DepsArg,
    after: AfterArg = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Files, newest first unless ``order`` is ``asc``."""
    files = await deps.stores.batches.list_files(
        after=after, limit=limit, purpose=purpose, order=order
    )
    return Json(page(*files))


@router.get("/{file_id}", response_model=FileObject)
async def get_file(file_id: str, deps: DepsArg) -> Response:
    """One file's object."""
    file, _ = await deps.stores.batches.get_file(file_id)
    return Json(file)


@router.get("/{file_id}/content", response_class=Response)
async def file_content(file_id: str, deps: DepsArg) -> Response:
    """The file's bytes, streamed."""
    file, blob = await deps.stores.batches.get_file(file_id)
    if await deps.stores.blobs.tree(blob) is not None:
        raise InvalidRequestError(
            f"file_id must name a file, got a registered directory; read its files under {blob}",
            "file_id",
            "file_is_directory",
        )
    headers = {
        "content-length": str(await deps.stores.blobs.size(blob)),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file['filename'], safe='')}",
    }
    return StreamResponse(
        deps.stores.blobs.open_read(blob), "application/octet-stream", headers=headers
    )


@router.delete("/{file_id}", response_model=FileDeleted)
async def delete_file(file_id: str, deps: DepsArg) -> Response:
    """Forget a file. Uploaded bytes are deleted; a registered ``uri`` is left alone.

    With the output file of a batch go its pairs, once no reader is registered and no fine-tuning
    job trains on them; so they do when ``output_expires_after`` ends the file.
    """
    await deps.stores.batches.delete_file(file_id)
    return Json({"id": file_id, "object": "file", "deleted": True})
