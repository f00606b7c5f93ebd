"""``/v1/uploads``: OpenAI's uploads in parts, for files larger than one request may be.

Each part is a blob of its own, written as it arrives. Completing joins them into the file's blob
without holding one in memory; parts of uploads that are over are removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from api.bodies import Expiry, FileForm, UploadCompletion, UploadRequest, parse, read_json
from api.deps import Context, ContextArg, Deps, DepsArg
from api.openapi import json_body
from api.routes.files import RESERVATION_S, new_file, new_file_id, plain_filename
from api.schemas import Upload as UploadObject
from api.schemas import UploadPart
from api.streaming import ClientGoneError, Json
from api.uploads import Upload
from mora_serve.errors import InvalidRequestError
from mora_serve.identity import new_id
from mora_serve.ports import UploadState
from mora_serve.store import file_steps

router = APIRouter(prefix="/v1/uploads", tags=["uploads"])

_PART_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["data"],
                    "properties": {"data": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}


@router.post("", response_model=UploadObject, openapi_extra=json_body(UploadRequest))
async def create_upload(request: Request, deps: DepsArg) -> Response:
    """Announce a file; it expires unless it is completed within the hour."""
    body = parse(UploadRequest, await read_json(request))
    server = deps.settings.server
    if body.bytes > server.max_parts_bytes:
        raise InvalidRequestError(
            f"bytes must be at most {server.max_parts_bytes}, got {body.bytes}; register the file "
            "by uri instead",
            "bytes",
            "invalid_value",
        )
    expiry = body.expires_after
    upload = {
        "id": new_id("upload"),
        "bytes": body.bytes,
        "filename": plain_filename(body.filename),
        "purpose": body.purpose,
        "expires_after": None if expiry is None else expiry.model_dump(),
    }
    stored = await deps.stores.batches.create_upload(upload, server.upload_lifetime_s)
    return Json(_object(stored))


@router.post("/{upload_id}/parts", response_model=UploadPart, openapi_extra=_PART_BODY)
async def add_part(upload_id: str, request: Request, context: ContextArg) -> Response:
    """Store one part, the form's ``data``. Parts may come in any order, several at a time."""
    with context.uploads.take(1):
        return Json(await _part(upload_id, request, context))


async def _part(upload_id: str, request: Request, context: Context) -> dict[str, Any]:
    batches, blobs = context.deps.stores.batches, context.deps.stores.blobs
    _require_pending(await batches.get_upload(upload_id))
    content_type = request.headers.get("content-type", "")
    limit = context.deps.settings.server.max_part_bytes
    form = Upload(content_type, request.stream(), limit, file="data")
    part_id = new_id("part")
    blob = _part_blob(upload_id, part_id)
    try:
        await form.find_file()
        await blobs.put(blob, form.file_chunks())
        try:
            await form.finish()
            _require_bytes(form.num_bytes)
            upload = await batches.add_part(upload_id, part_id, form.num_bytes)
            _require_counted(upload, part_id)
        except BaseException:
            await blobs.delete(blob)
            raise
    except ClientDisconnect:
        raise ClientGoneError from None
    return {
        "id": part_id,
        "object": "upload.part",
        "created_at": int(upload.now),
        "upload_id": upload_id,
    }


@router.post(
    "/{upload_id}/complete", response_model=UploadObject, openapi_extra=json_body(UploadCompletion)
)
async def complete_upload(upload_id: str, request: Request, deps: DepsArg) -> Response:
    """Join the parts into a file. A completed upload is returned as it is."""
    body = parse(UploadCompletion, await read_json(request))
    upload = await deps.stores.batches.get_upload(upload_id)
    if upload.status != "completed":
        _require_pending(upload)
        _check_parts(upload, body.part_ids)
        upload = await _complete(deps, upload, body)
    return Json(_object(upload))


@router.post("/{upload_id}/cancel", response_model=UploadObject)
async def cancel_upload(upload_id: str, deps: DepsArg) -> Response:
    """End an upload and remove its parts. A completed one cannot be cancelled."""
    upload = await deps.stores.batches.cancel_upload(upload_id)
    if upload.status == "completed":
        _require_pending(upload)
    return Json(_object(upload))


async def _complete(deps: Deps, upload: UploadState, body: UploadCompletion) -> UploadState:
    batches, blobs = deps.stores.batches, deps.stores.blobs
    upload_id, file_id = str(upload.doc["id"]), new_file_id()
    blob, digest = f"files/{file_id}", hashlib.md5(usedforsecurity=False)
    await batches.reserve_blob(blob, RESERVATION_S)
    num_bytes = await blobs.put(blob, _joined(deps, upload_id, body.part_ids, digest))
    try:
        _check_md5(body.md5, digest.hexdigest())
        given = upload.doc["expires_after"]
        expiry = None if given is None else Expiry(**given)
        form = FileForm(purpose=upload.doc["purpose"], expires_after=expiry)
        file = new_file(file_id, num_bytes, upload.doc["filename"], form)
        ended = await batches.complete_upload(upload_id, file, blob)
        if ended.file is None:
            _require_pending(ended)
    except InvalidRequestError:
        await blobs.delete(blob)
        raise
    if ended.file != file:
        await blobs.delete(blob)
    return ended


async def _joined(
    deps: Deps, upload_id: str, part_ids: Sequence[str], digest: Any
) -> AsyncIterator[bytes]:
    for part_id in part_ids:
        async for chunk in deps.stores.blobs.open_read(_part_blob(upload_id, part_id)):
            digest.update(chunk)
            yield chunk


def _part_blob(upload_id: str, part_id: str) -> str:
    return f"uploads/{upload_id}/{part_id}"


def _require_pending(upload: UploadState) -> None:
    if upload.status != "pending":
        raise InvalidRequestError(
            f"The upload is {upload.status}; create another one.",
            "upload_id",
            f"upload_{upload.status}",
        )


def _require_bytes(num_bytes: int) -> None:
    if num_bytes == 0:
        raise InvalidRequestError(
            "data must hold at least one byte, got 0", "data", "invalid_value"
        )


def _require_counted(upload: UploadState, part_id: str) -> None:
    if part_id not in upload.parts:
        _require_pending(upload)
        if len(upload.parts) >= file_steps.MAX_PARTS:
            raise InvalidRequestError(
                f"an upload must have at most {file_steps.MAX_PARTS} parts; send larger ones",
                "data",
                "too_many_parts",
            )
        raise InvalidRequestError(
            f"data must not exceed what the upload announced: {upload.doc['bytes']} bytes, of "
            f"which {upload.received_bytes} were received before",
            "data",
            "upload_too_large",
        )


def _check_parts(upload: UploadState, part_ids: Sequence[str]) -> None:
    named: set[str] = set()
    for index, part_id in enumerate(part_ids):
        if part_id not in upload.parts or part_id in named:
            raise InvalidRequestError(
                f"part_ids.{index} must be a part of this upload that is named once",
                f"part_ids.{index}",
                "invalid_value",
            )
        named.add(part_id)
    num_bytes = sum(upload.parts[part_id] for part_id in part_ids)
    if num_bytes != upload.doc["bytes"]:
        raise InvalidRequestError(
            f"part_ids must hold the {upload.doc['bytes']} bytes that were announced, got "
            f"{num_bytes}",
            "part_ids",
            "invalid_value",
        )


def _check_md5(wanted: str | None, found: str) -> None:
    if wanted is not None and wanted.lower() != found:
        raise InvalidRequestError(
            f"md5 must be that of the joined parts, {found}", "md5", "checksum_mismatch"
        )


def _object(upload: UploadState) -> dict[str, Any]:
    """OpenAI's Upload object."""
    doc = upload.doc
    shown = ("id", "bytes", "created_at", "expires_at", "filename", "purpose")
    return {
        **{name: doc[name] for name in shown},
        "object": "upload",
        "status": upload.status,
        "file": upload.file,
    }
