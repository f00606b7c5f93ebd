"""Validation of a batch: its input is read once, made JSON lines where it is none, and cut up.

::

    input file -> parts (actors.inputs) -> JSON lines, a blob of the batch -> scan -> shards
       '-- uploaded JSON lines: scanned where they are

A registered file is others' and may change or go, so the batch keeps what it was when validated.
What is wrong with the input as a whole fails the batch; what is wrong with a row is found when the
row is worked on. Storage that fails is not the input's fault: ``StorageError`` passes through, and
the batch is validated again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any

from actors.inputs.faults import InputFault
from actors.inputs.lines import stream, too_large
from actors.inputs.sources import input_parts, is_plain
from actors.shard_run import duplicates_key
from mora_serve.config import RunnerSettings
from mora_serve.errors import BlobNotFoundError, InvalidRequestError, NotFoundError
from mora_serve.store import Stores
from mora_serve.store.batch_input import InputScan, NotUtf8Error, Shard


class BatchValidator:
    """Validates batches that ``worker_id`` has claimed, and keeps the claim meanwhile."""

    def __init__(
        self, stores: Stores, settings: RunnerSettings, worker_id: str, max_line_bytes: int
    ) -> None:
        self._stores = stores
        self._settings = settings
        self._worker_id = worker_id
        self._max_line_bytes = max_line_bytes

    async def validate(self, batch: Mapping[str, Any]) -> None:
        """Open the batch, or fail it."""
        batch_id = str(batch["id"])
        beat = asyncio.create_task(self._keep_claim(batch_id))
        try:
            lines = await self._lines(batch_id, str(batch["endpoint"]))
            shards, total = await self._scan(batch_id, lines)
        except InputFault as fault:
            await self._fail(batch_id, fault)
        except NotUtf8Error as error:
            wrong = "The input file must be UTF-8."
            await self._fail(batch_id, InputFault("invalid_encoding", wrong, line=error.line))
        except (NotFoundError, BlobNotFoundError):
            gone = "The input file was deleted before it was read."
            await self._fail(batch_id, InputFault("input_file_not_found", gone))
        except InvalidRequestError as error:
            refused = InputFault(error.code or "invalid_input", str(error), param=error.param)
            await self._fail(batch_id, refused)
        else:
            await self._stores.batches.open_batch(batch_id, shards, total, lines)
        finally:
            beat.cancel()

    async def _lines(self, batch_id: str, endpoint: str) -> str:
        """The blob that holds the input as JSON lines."""
        blobs = self._stores.blobs
        file, blob = await self._stores.batches.batch_input(batch_id)
        parts = await input_parts(blobs, str(file["filename"]), blob)
        registered = "://" in blob
        if is_plain(parts) and not registered:
            return blob
        key = f"batches/{batch_id}/input/rows.jsonl"
        most = self._settings.max_input_bytes
        await blobs.put(key, stream(parts, blobs, endpoint, most, self._max_line_bytes))
        return key

    async def _scan(self, batch_id: str, blob: str) -> tuple[list[Any], int]:
        specs = []
        num_bytes, max_bytes = 0, self._settings.max_input_bytes
        with InputScan(self._settings.shard_rows, self._max_line_bytes) as scan:
            async for chunk in self._stores.blobs.open_read(blob):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise too_large(max_bytes)
                for shard in await asyncio.to_thread(scan.feed, chunk):
                    specs.append(await self._keep(batch_id, shard))
                self._check_rows(scan.num_rows)
            for shard in await asyncio.to_thread(scan.finish):
                specs.append(await self._keep(batch_id, shard))
            self._check_rows(scan.num_rows)
        if scan.num_rows == 0:
            raise InputFault("empty_file", "The input file must hold at least one row.")
        return specs, scan.num_rows

    def _check_rows(self, num_rows: int) -> None:
        limit = self._settings.max_input_rows
        if num_rows > limit:
            raise InputFault(
                "too_many_rows",
                f"a batch must have at most {limit} rows (runner.max_input_rows); split the input",
            )

    async def _keep(self, batch_id: str, shard: Shard) -> tuple[int, int, int, int]:
        if shard.duplicates:
            key = duplicates_key(batch_id, shard.first_line)
            await self._stores.blobs.put(key, json.dumps(shard.duplicates).encode())
        return shard.spec

    async def _fail(self, batch_id: str, fault: InputFault) -> None:
        await self._stores.batches.fail_batch(
            batch_id, fault.code, str(fault), fault.line, fault.param
        )

    async def _keep_claim(self, batch_id: str) -> None:
        ttl_s = self._settings.lease_ttl_s
        held = True
        while held:
            await asyncio.sleep(ttl_s / 3)
            held = await self._stores.batches.renew_validation(batch_id, self._worker_id, ttl_s)
