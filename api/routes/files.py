"""``/v1/files``: uploads streamed to blob storage, and registration of files already in it.

A multipart upload never sits in memory; the number of concurrent uploads is bounded, because Serve
queues request bytes without a limit of its own. A JSON body registers a ``uri`` under an allowed
prefix instead (``api.uris`` decides). What a file holds is checked when a batch reads it.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal, get_args
from urllib.parse import quote

from fastapi import APIRouter, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from api.bodies import FilePurpose, FileRegistration, parse, read_json
from api.deps import Context, ContextArg, Deps, DepsArg
from api.openapi import json_body
from api.routes.paging import AfterArg, page
from api.schemas import FileDeleted, FileObject, Page
from api.streaming import ClientGoneError, Json, StreamResponse
from api.uploads import Upload
from api.uris import resolve_uri
from mora_serve.errors import InvalidRequestError, StorageError
from mora_serve.identity import new_id

router = APIRouter(prefix="/v1/files", tags=["files"])

MAX_FILENAME_CHARS = 255
_FORM = {
    "multipart/form-data": {
        "schema": {
            "type": "object",
            "required": ["file", "purpose"],
            "properties": {
                "file": {"type": "string", "format": "binary"},
                "purpose": {"enum": list(get_args(FilePurpose))},
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
    upload = Upload(content_type, request.stream(), deps.settings.server.max_upload_bytes)
    file_id = _file_id()
    blob = f"files/{file_id}"
    try:
        await upload.find_file()
        await deps.stores.blobs.put(blob, upload.file_chunks())
        try:
            await upload.finish()
            purpose = _purpose(upload.fields.get("purpose"))
        except BaseException:
            await deps.stores.blobs.delete(blob)
            raise
    except ClientDisconnect:
        raise ClientGoneError from None
    file = _file_object(file_id, upload.num_bytes, upload.filename or "upload", purpose)
    await deps.stores.batches.put_file(file, blob)
    return file


async def _register(deps: Deps, body: FileRegistration) -> dict[str, Any]:
    location = resolve_uri(body.uri, deps.settings.server.file_uri_prefixes)
    try:
        found = await deps.stores.blobs.exists(location)
    except StorageError:
        found = False
    if not found:
        raise InvalidRequestError(
            "uri must name an existing file that the service can read.", "uri", "file_not_found"
        )
    num_bytes = await deps.stores.blobs.size(location)
    file = _file_object(_file_id(), num_bytes, location.rsplit("/", 1)[-1], body.purpose)
    await deps.stores.batches.put_file(file, location)
    return file


def _file_id() -> str:
    return "file-" + new_id("x").removeprefix("x_")


def _purpose(value: str | None) -> str:
    if value is None:
        raise InvalidRequestError("purpose is required.", "purpose", "missing_required_parameter")
    if value not in get_args(FilePurpose):
        raise InvalidRequestError(
            f"purpose must be one of {', '.join(get_args(FilePurpose))}, got {value[:40]!r}",
            "purpose",
            "invalid_value",
        )
    return value


def _file_object(file_id: str, num_bytes: int, filename: str, purpose: str) -> dict[str, Any]:
    name = filename.replace("\\", "/").rsplit("/", 1)[-1]
    printable = "".join(c for c in name if c.isprintable())[:MAX_FILENAME_CHARS]
    return {
        "id": file_id,
        "object": "file",
        "bytes": num_bytes,
        "created_at": int(time.time()),
        "filename": printable or "upload",
        "purpose": purpose,
        "status": "processed",
        "expires_at": None,
        "status_details": None,
    }


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
    headers = {
        "content-length": str(await deps.stores.blobs.size(blob)),
        "content-disposition": f"attachment; filename*=UTF-8''{quote(file['filename'], safe='')}",
    }
    return StreamResponse(
        deps.stores.blobs.open_read(blob), "application/octet-stream", headers=headers
    )


@router.delete("/{file_id}", response_model=FileDeleted)
async def delete_file(file_id: str, deps: DepsArg) -> Response:
    """Forget a file. Uploaded bytes are deleted; a registered ``uri`` is left alone."""
    await deps.stores.batches.delete_file(file_id)
    return Json({"id": file_id, "object": "file", "deleted": True})
