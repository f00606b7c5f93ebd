"""Validation of a batch: its input is read once, made JSON lines where it is none, and cut up.

::

    input file -> parts (actors.inputs) -> JSON lines, a blob of the claim -> scan -> shards
       '-- uploaded JSON lines: scanned where they are

A registered file is others' and may change or go, so the batch keeps what it was when validated.
What is wrong with the input as a whole fails the batch; what is wrong with a row is found when the
row is worked on. Whatever else goes wrong leaves the claim to lapse, and the batch is validated
again, until it fails::

    storage does not answer     ``unavailable_timeout_s``         ``input_unreadable``
    anything unforeseen         ``max_poison_tries`` claims       ``validation_failed``
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from typing import Any

from actors.inputs.faults import InputFault
from actors.inputs.lines import stream, too_large
from actors.inputs.sandbox import BatchPieces
from actors.inputs.sources import input_parts, is_plain
from actors.shard_run import duplicates_key
from mora_serve.config import RunnerSettings
from mora_serve.errors import (
    BlobNotFoundError,
    InvalidRequestError,
    NotFoundError,
    StorageError,
)
from mora_serve.ports import ValidationClaim
from mora_serve.store import Stores
from mora_serve.store.batch_input import InputScan, NotUtf8Error, Shard

log = logging.getLogger(__name__)


class BatchValidator:
    """Validates batches that a runner has claimed, and keeps the claim meanwhile."""

    def __init__(self, stores: Stores, settings: RunnerSettings, max_line_bytes: int) -> None:
        self._stores = stores
        self._settings = settings
        self._max_line_bytes = max_line_bytes

    async def validate(self, claim: ValidationClaim) -> None:
        """Open the batch, or fail it. Raises ``StorageError`` when it has to be tried again."""
        batch_id = str(claim.batch["id"])
        run = _Validation(self._stores, self._settings, self._max_line_bytes, claim)
        if claim.tries > self._settings.max_poison_tries:
            await run.fail(_gave_up())
            return
        beat = asyncio.create_task(run.keep_claim())
        try:
            await run.run()
        except StorageError as error:
            waited_s = await self._stores.batches.postpone_validation(batch_id, claim.number)
            if waited_s <= self._settings.unavailable_timeout_s:
                raise
            log.error("the input of %s is given up: %s", batch_id, error)
            await run.fail(_unreadable())
        except asyncio.CancelledError:
            await self._stores.batches.postpone_validation(batch_id, claim.number)
            raise
        except Exception:
            log.exception("validating %s failed, try %d", batch_id, claim.tries)
            if claim.tries >= self._settings.max_poison_tries:
                await run.fail(_gave_up())
        finally:
            beat.cancel()
            await asyncio.gather(beat, return_exceptions=True)


class _ClaimLostError(Exception):
    """Another runner validates the batch now, or it is over."""


class _Validation:
    """One claim's work on a batch."""

    def __init__(
        self, stores: Stores, settings: RunnerSettings, max_line_bytes: int, claim: ValidationClaim
    ) -> None:
        self._stores = stores
        self._settings = settings
        self._max_line_bytes = max_line_bytes
        self._batch_id = str(claim.batch["id"])
        self._endpoint = str(claim.batch["endpoint"])
        self._claim = claim.number
        self._held = True
        self._converted: str | None = None

    async def run(self) -> None:
        opened = False
        try:
            opened = await self._open()
        except InputFault as fault:
            await self.fail(fault)
        except NotUtf8Error as error:
            wrong = "The input file must be UTF-8."
            await self.fail(InputFault("invalid_encoding", wrong, line=error.line))
        except (NotFoundError, BlobNotFoundError):
            gone = "The input file was deleted before it was read."
            await self.fail(InputFault("input_file_not_found", gone))
        except InvalidRequestError as error:
            await self.fail(
                InputFault(error.code or "invalid_input", str(error), param=error.param)
            )
        except _ClaimLostError:
            log.warning("the claim on %s was lost, its validation stops", self._batch_id)
        finally:
            if not opened:
                await self._stores.batches.discard_validation(self._batch_id, self._converted)

    async def fail(self, fault: InputFault) -> None:
        """End the batch with a fault of its input as a whole."""
        await self._stores.batches.fail_batch(
            self._batch_id, fault.code, str(fault), fault.line, fault.param
        )

    async def keep_claim(self) -> None:
        """Renew the claim until it is lost. Storage that fails is asked again before it lapses."""
        batches, ttl_s = self._stores.batches, self._settings.lease_ttl_s
        pause_s = ttl_s / 3
        while self._held:
            await asyncio.sleep(pause_s)
            try:
                self._held = await batches.renew_validation(self._batch_id, self._claim, ttl_s)
                pause_s = ttl_s / 3
            except Exception as error:  # noqa: BLE001  a claim not renewed is work done twice
                pause_s = ttl_s / 10
                log.warning("the claim on %s is renewed again: %r", self._batch_id, error)

    async def _open(self) -> bool:
        lines = await self._lines()
        shards, total = await self._scan(lines)
        self._check_claim()
        return await self._stores.batches.open_batch(self._batch_id, shards, total, lines)

    async def _lines(self) -> str:
        """The blob that holds the input as JSON lines."""
        blobs = self._stores.blobs
        file, blob = await self._stores.batches.batch_input(self._batch_id)
        parts = await input_parts(blobs, str(file["filename"]), blob)
        registered = "://" in blob
        if is_plain(parts) and not registered:
            return blob
        self._converted = f"batches/{self._batch_id}/input/{self._claim}.jsonl"
        limits = self._settings
        pieces = BatchPieces(
            parts, blobs, self._endpoint, self._max_line_bytes, limits.max_unpack_bytes
        )
        lines = stream(pieces, limits.max_input_bytes, pieces.abort)
        await blobs.put(self._converted, self._while_held(lines))
        return self._converted

    async def _scan(self, blob: str) -> tuple[list[Any], int]:
        specs = []
        num_bytes, max_bytes = 0, self._settings.max_input_bytes
        with InputScan(self._settings.shard_rows, self._max_line_bytes) as scan:
            async for chunk in self._while_held(self._stores.blobs.open_read(blob)):
                num_bytes += len(chunk)
                if num_bytes > max_bytes:
                    raise too_large(max_bytes)
                for shard in await asyncio.to_thread(scan.feed, chunk):
                    specs.append(await self._keep(blob, shard))
                self._check_rows(scan.num_rows)
            for shard in await asyncio.to_thread(scan.finish):
                specs.append(await self._keep(blob, shard))
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

    async def _keep(self, blob: str, shard: Shard) -> tuple[int, int, int, int]:
        if shard.duplicates:
            key = duplicates_key(self._batch_id, blob, shard.first_line)
            await self._stores.blobs.put(key, json.dumps(shard.duplicates).encode())
        return shard.spec

    async def _while_held(self, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        async for chunk in chunks:
            self._check_claim()
            yield chunk

    def _check_claim(self) -> None:
        if not self._held:
            raise _ClaimLostError


def _gave_up() -> InputFault:
    return InputFault(
        "validation_failed",
        "The input could not be validated, each time for a reason that was not foreseen.",
    )


def _unreadable() -> InputFault:
    return InputFault("input_unreadable", "Storage kept failing while the input was read.")
