"""The ledger's steps on Redis: each is one call of ``ledger.lua``, hence atomic and durable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mora_serve.ports import Lease, RowCommit
from mora_serve.store.redis_client import RedisClient
from mora_serve.store.shapes import bad_cursor, idempotency_conflict
from mora_serve.store.steps import (
    READER_TTL_S,
    BatchState,
    PairPart,
    SealedShard,
    ShardSpec,
    StoredRow,
)

COUNTERS = ("total", "completed", "failed", "pairs", "pairs_sealed")


class RedisLedger:
    """:class:`~mora_serve.store.steps.LedgerSteps` under one key prefix."""

    def __init__(self, client: RedisClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def ping(self) -> None:
        await self._client.ping()

    async def aclose(self) -> None:
        await self._client.aclose()

    # files

    async def put_file(self, file: Mapping[str, Any], blob: str) -> None:
        doc = dict(file)
        if doc.get("created_at") is None:
            doc["created_at"] = int((await self._client.command("TIME"))[0])
        await self._step("put", "files", doc["id"], _dump({"file": doc, "blob": blob}))

    async def get_file(self, file_id: str) -> tuple[dict[str, Any], str] | None:
        found = await self._step("get", "files", file_id)
        return None if found is None else _file(found)

    async def list_files(
        self, *, after: str | None, limit: int, purpose: str | None, ascending: bool
    ) -> list[dict[str, Any]]:
        files: list[dict[str, Any]] = []
        while len(files) < limit:
            docs = await self._step("page", "files", after or "", limit, int(ascending))
            if docs is None:
                raise bad_cursor(str(after))
            page = [_file(doc)[0] for doc in docs]
            files += [file for file in page if purpose is None or file["purpose"] == purpose]
            if len(page) < limit:
                break
            after = page[-1]["id"]
        return files[:limit]

    async def delete_file(self, file_id: str) -> str | None:
        found = await self._step("remove", "files", file_id)
        return None if found is None else _file(found)[1]

    # batches

    async def create_batch(
        self,
        doc: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        body_hash: str,
        window_s: float,
    ) -> str:
        outcome, batch_id = await self._step(
            "create_batch", doc["id"], _dump(doc), _dump(options), _ms(window_s),
            idempotency_key or "", body_hash,
        )  # fmt: skip
        if outcome == b"conflict":
            raise idempotency_conflict()
        return str(batch_id.decode())

    async def get_state(self, batch_id: str) -> BatchState | None:
        return _state(await self._step("state", batch_id))

    async def list_batches(self, *, after: str | None, limit: int) -> list[BatchState]:
        replies = await self._step("list_batches", after or "", limit)
        if replies is None:
            raise bad_cursor(str(after))
        return [state for reply in replies if (state := _state(reply)) is not None]

    async def cancel(self, batch_id: str) -> bool:
        return bool(await self._step("cancel", batch_id))

    async def backlog(self) -> int:
        return int(await self._step("backlog"))

    async def unfinished(self) -> list[BatchState]:
        replies = await self._step("unfinished")
        return [state for reply in replies if (state := _state(reply)) is not None]

    async def claim_validation(self, worker: str, ttl_s: float) -> str | None:
        return _text(await self._step("claim_validation", worker, _ms(ttl_s)))

    async def renew_claim(self, batch_id: str, worker: str, ttl_s: float) -> bool:
        return bool(await self._step("renew_claim", batch_id, worker, _ms(ttl_s)))

    async def open_batch(self, batch_id: str, shards: Sequence[ShardSpec], total: int) -> bool:
        specs = [",".join(str(number) for number in spec) for spec in shards]
        return bool(await self._step("open_batch", batch_id, _dump(specs), total))

    async def fail(self, batch_id: str, error: Mapping[str, Any]) -> bool:
        return bool(await self._step("fail", batch_id, _dump([error])))

    # shards

    async def lease_shard(
        self, worker: str, ttl_s: float, exclude: Sequence[str] = ()
    ) -> Lease | None:
        return _lease(await self._step("lease_shard", worker, _ms(ttl_s), *exclude), worker)

    async def lease_leftover(self, batch_id: str, worker: str, ttl_s: float) -> Lease | None:
        return _lease(await self._step("lease_leftover", batch_id, worker, _ms(ttl_s)), worker)

    async def heartbeat(self, lease: Lease, ttl_s: float) -> Literal["ok", "stop", "lost"]:
        answer = _text(await self._step("heartbeat", *_held(lease), _ms(ttl_s)))
        return "ok" if answer == "ok" else "stop" if answer == "stop" else "lost"

    async def release(self, lease: Lease) -> None:
        await self._step("release", *_held(lease))

    async def commit_row(
        self, lease: Lease, row: RowCommit
    ) -> Literal["committed", "repeated", "lost"]:
        counters = [(f"u:{name}", number) for name, number in row.usage.items()]
        counters += [(f"c:{name}", number) for name, number in row.classes.items()]
        kind, data = ("e", row.error) if row.output is None else ("o", row.output)
        answer = await self._step(
            "commit_row", *_held(lease), row.line, kind, data, len(row.pairs), *row.pairs,
            *(item for counter in counters for item in counter),
        )  # fmt: skip
        return "committed" if answer == b"committed" else _refused(answer, "repeated")

    async def count_try(self, lease: Lease, line: int) -> int:
        return int(await self._step("count_try", *_held(lease), line))

    async def forget_try(self, lease: Lease, line: int) -> None:
        await self._step("forget_try", *_held(lease), line)

    async def shard_rows(self, lease: Lease) -> list[StoredRow]:
        found = _pairs(await self._step("shard_rows", lease.batch_id, lease.shard))
        rows = [StoredRow(int(k), v[:1] == b"e", v[1:]) for k, v in found]
        return sorted(rows, key=lambda row: row.line)

    async def seal_shard(
        self, lease: Lease, sealed: SealedShard, num_rows: int, num_extra: int
    ) -> Literal["sealed", "changed", "lost"]:
        parts = _dump([sealed.output, sealed.error])
        answer = await self._step("seal_shard", *_held(lease), parts, num_rows, num_extra)
        return "sealed" if answer == b"sealed" else _refused(answer, "changed")

    async def sealed_shards(self, batch_id: str) -> list[SealedShard]:
        found = _pairs(await self._step("sealed_shards", batch_id))
        shards = [SealedShard(int(k), *json.loads(v)) for k, v in found]
        return sorted(shards, key=lambda shard: shard.shard)

    async def claim_finalize(self, worker: str, ttl_s: float) -> str | None:
        return _text(await self._step("claim_finalize", worker, _ms(ttl_s)))

    async def finish(
        self,
        batch_id: str,
        output: tuple[dict[str, Any], str] | None,
        error: tuple[dict[str, Any], str] | None,
    ) -> str:
        args: list[str] = []
        now = int((await self._client.command("TIME"))[0])
        for name, found in (("output_file_id", output), ("error_file_id", error)):
            if found is not None:
                file = {**found[0], "created_at": found[0].get("created_at") or now}
                args += [name, file["id"], _dump({"file": file, "blob": found[1]})]
        return str(_text(await self._step("finish", batch_id, *args)))

    # pairs

    async def tail(self, batch_id: str, after: int, limit: int) -> list[dict[str, Any]]:
        entries = await self._step("tail", batch_id, after, limit)
        return [
            {"seq": int(entry.split(b"-")[0]) - 1, **json.loads(fields[1])}
            for entry, fields in entries
        ]

    async def tail_length(self, batch_id: str) -> int:
        return int(await self._step("tail_length", batch_id))

    async def add_pair_part(self, batch_id: str, part: PairPart) -> bool:
        doc = _dump([part.first, part.last, part.key])
        return bool(await self._step("add_pair_part", batch_id, part.first, part.last, doc))

    async def pair_part(self, batch_id: str, seq: int) -> PairPart | None:
        found = await self._step("pair_part", batch_id, seq)
        return None if found is None else PairPart(*json.loads(found))

    async def set_reader(self, batch_id: str, reader: str, position: int | None) -> None:
        place = "" if position is None else position
        await self._step("set_reader", batch_id, reader, place, _ms(READER_TTL_S))

    async def _step(self, name: str, *args: Any) -> Any:
        return await self._client.script(self._prefix, name, *args)


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _text(reply: bytes | None) -> str | None:
    return None if reply is None else reply.decode()


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _file(doc: bytes) -> tuple[dict[str, Any], str]:
    found = json.loads(doc)
    return found["file"], found["blob"]


def _held(lease: Lease) -> tuple[str, int, int]:
    return lease.batch_id, lease.shard, lease.token


def _lease(reply: Any, worker: str) -> Lease | None:
    if reply is None:
        return None
    batch_id, shard, token, expires, spec, done, tries = reply
    first, rows, offset, size = (int(number) for number in spec.split(b","))
    return Lease(
        batch_id.decode(), int(shard), int(token), worker, int(expires) / 1000,
        first, rows, offset, size, frozenset(int(line) for line in done),
        {int(line): int(entry.split(b":")[0]) for line, entry in _pairs(tries)},
    )  # fmt: skip


def _refused(answer: bytes, other: Any) -> Any:
    return other if answer == other.encode() else "lost"


def _state(reply: Any) -> BatchState | None:
    flat, now = reply
    if not flat:
        return None
    fields = {name.decode(): value for name, value in _pairs(flat)}

    def group(mark: str) -> dict[str, int]:
        return {k[2:]: int(v) for k, v in fields.items() if k.startswith(mark)}

    doc = json.loads(fields["doc"])
    doc |= {f"{k}_at": int(fields[k]) // 1000 for k in ("created", "expires") if k in fields}
    doc["expires_at"] = doc.pop("expires_at")
    return BatchState(
        doc=doc,
        options=json.loads(fields["options"]),
        status=fields["status"].decode(),
        closed=fields["closed"] == b"1",
        **{name: int(fields.get(name, 0)) for name in COUNTERS},
        stamps=group("s:"),
        errors=json.loads(fields.get("errors", b"[]")),
        output_file_id=_text(fields.get("output_file_id")),
        error_file_id=_text(fields.get("error_file_id")),
        usage=group("u:"),
        classes=group("c:"),
        now=int(now) / 1000,
    )
