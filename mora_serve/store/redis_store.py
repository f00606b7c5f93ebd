"""The ledger's steps on Redis: each is one call of ``ledger.lua``, hence atomic and durable."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mora_serve.ports import Lease, RowCommit
from mora_serve.store.rate import recent_rate
from mora_serve.store.redis_files import RedisFiles, dump, file_arguments, pairs, text
from mora_serve.store.shapes import bad_cursor, idempotency_conflict
from mora_serve.store.steps import (
    READER_TTL_S,
    Backlog,
    BatchState,
    PairPart,
    RateState,
    SealedShard,
    ShardSpec,
    StoredRow,
)

COUNTERS = ("total", "completed", "failed", "pairs", "pairs_sealed")


class RedisLedger(RedisFiles):
    """:class:`~mora_serve.store.steps.LedgerSteps` under one key prefix."""

    async def ping(self) -> None:
        await self._client.ping()

    async def aclose(self) -> None:
        await self._client.aclose()

    # batches

    async def create_batch(
        self,
        doc: Mapping[str, Any],
        options: Mapping[str, Any],
        idempotency_key: str | None,
        body_hash: str,
        window_s: float,
        *,
        input_bytes: int,
        input_rows: int,
        max_rows: int,
        max_bytes: int,
    ) -> str | Backlog:
        outcome, found = await self._step(
            "create_batch", doc["id"], dump(doc), dump(options), _ms(window_s),
            idempotency_key or "", body_hash, input_bytes, input_rows, max_rows, max_bytes,
        )  # fmt: skip
        if outcome == b"full":
            return _backlog(found)
        if outcome == b"conflict":
            raise idempotency_conflict()
        return str(found.decode())

    async def known_batch(self, idempotency_key: str, body_hash: str) -> str | None:
        reply = await self._step("known_batch", idempotency_key, body_hash)
        if reply is None:
            return None
        if reply[0] == b"conflict":
            raise idempotency_conflict()
        return str(reply[1].decode())

    async def get_state(self, batch_id: str) -> BatchState | None:
        return _state(await self._step("state", batch_id))

    async def list_batches(self, *, after: str | None, limit: int) -> list[BatchState]:
        replies = await self._step("list_batches", after or "", limit)
        if replies is None:
            raise bad_cursor(str(after))
        return [state for reply in replies if (state := _state(reply)) is not None]

    async def cancel(self, batch_id: str) -> bool:
        return bool(await self._step("cancel", batch_id))

    async def backlog(self) -> Backlog:
        return _backlog(await self._step("backlog"))

    async def progress(self, batch_id: str) -> tuple[BatchState, RateState] | None:
        reply, ring = await self._step("progress", batch_id)
        state = _state(reply)
        return None if state is None else (state, _rate(ring))

    async def unfinished(self) -> list[BatchState]:
        replies = await self._step("unfinished")
        return [state for reply in replies if (state := _state(reply)) is not None]

    async def claim_validation(self, worker: str, ttl_s: float) -> tuple[str, int, int] | None:
        reply = await self._step("claim_validation", worker, _ms(ttl_s))
        return None if reply is None else (str(reply[0].decode()), int(reply[1]), int(reply[2]))

    async def renew_validation(self, batch_id: str, claim: int, ttl_s: float) -> bool:
        return bool(await self._step("renew_validation", batch_id, claim, _ms(ttl_s)))

    async def postpone_validation(self, batch_id: str, claim: int) -> float:
        return float(await self._step("postpone_validation", batch_id, claim)) / 1000

    async def renew_claim(self, batch_id: str, worker: str, ttl_s: float) -> bool:
        return bool(await self._step("renew_claim", batch_id, worker, _ms(ttl_s)))

    async def open_batch(
        self, batch_id: str, shards: Sequence[ShardSpec], total: int, input_blob: str | None
    ) -> bool:
        specs = [",".join(str(number) for number in spec) for spec in shards]
        opened = await self._step("open_batch", batch_id, dump(specs), total, input_blob or "")
        return bool(opened)

    async def fail(self, batch_id: str, error: Mapping[str, Any]) -> bool:
        return bool(await self._step("fail", batch_id, dump([error])))

    # shards

    async def lease_shard(
        self, worker: str, ttl_s: float, exclude: Sequence[str] = ()
    ) -> Lease | None:
        return _lease(await self._step("lease_shard", worker, _ms(ttl_s), *exclude), worker)

    async def lease_leftover(self, batch_id: str, worker: str, ttl_s: float) -> Lease | None:
        return _lease(await self._step("lease_leftover", batch_id, worker, _ms(ttl_s)), worker)

    async def heartbeat(self, lease: Lease, ttl_s: float) -> Literal["ok", "stop", "lost"]:
        answer = text(await self._step("heartbeat", *_held(lease), _ms(ttl_s)))
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

    async def claim_quarantine(self, claim: str, ttl_s: float) -> bool:
        return bool(await self._step("claim_quarantine", claim, _ms(ttl_s)))

    async def leave_quarantine(self, claim: str) -> None:
        await self._step("leave_quarantine", claim)

    async def report_runner(self, worker: str, ttl_s: float, quiet_for: str | None) -> str | None:
        return text(await self._step("report_runner", worker, _ms(ttl_s), quiet_for or ""))

    async def num_unquiet(self, worker: str, claim: str) -> int:
        return int(await self._step("num_unquiet", worker, claim))

    async def shard_rows(self, lease: Lease) -> list[StoredRow]:
        found = pairs(await self._step("shard_rows", lease.batch_id, lease.shard))
        rows = [StoredRow(int(k), v[:1] == b"e", v[1:]) for k, v in found]
        return sorted(rows, key=lambda row: row.line)

    async def seal_shard(
        self, lease: Lease, sealed: SealedShard, num_rows: int, num_extra: int
    ) -> Literal["sealed", "changed", "lost"]:
        parts = dump([sealed.output, sealed.error])
        answer = await self._step("seal_shard", *_held(lease), parts, num_rows, num_extra)
        return "sealed" if answer == b"sealed" else _refused(answer, "changed")

    async def sealed_shards(self, batch_id: str) -> list[SealedShard]:
        found = pairs(await self._step("sealed_shards", batch_id))
        shards = [SealedShard(int(k), *json.loads(v)) for k, v in found]
        return sorted(shards, key=lambda shard: shard.shard)

    async def claim_finalize(self, worker: str, ttl_s: float) -> str | None:
        return text(await self._step("claim_finalize", worker, _ms(ttl_s)))

    async def finish(
        self,
        batch_id: str,
        output: tuple[dict[str, Any], str] | None,
        error: tuple[dict[str, Any], str] | None,
    ) -> str:
        args: list[Any] = []
        for name, found in (("output_file_id", output), ("error_file_id", error)):
            if found is not None:
                args += [name, *file_arguments(*found), found[1]]
        return str(text(await self._step("finish", batch_id, *args)))

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
        doc = dump([part.first, part.last, part.key])
        return bool(await self._step("add_pair_part", batch_id, part.first, part.last, doc))

    async def pair_part(self, batch_id: str, seq: int) -> PairPart | None:
        found = await self._step("pair_part", batch_id, seq)
        return None if found is None else PairPart(*json.loads(found))

    async def set_reader(self, batch_id: str, reader: str, position: int | None) -> None:
        place = "" if position is None else position
        await self._step("set_reader", batch_id, reader, place, _ms(READER_TTL_S))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


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
        {int(line): int(entry.split(b":")[0]) for line, entry in pairs(tries)},
    )  # fmt: skip


def _rate(reply: Any) -> RateState:
    since, values = reply
    buckets = ((int(bucket), int(count)) for bucket, count in (v.split(b":") for v in values))
    return RateState(int(since) / 1000, tuple(buckets))


def _backlog(reply: Any) -> Backlog:
    rows, num_bytes, rings, now = reply
    rates = [_rate(ring) for ring in rings]
    moving = (recent_rate(rate.buckets, int(now) / 1000, rate.working_since) for rate in rates)
    return Backlog(int(rows), int(num_bytes), sum(rate or 0.0 for rate in moving))


def _refused(answer: bytes, other: Any) -> Any:
    return other if answer == other.encode() else "lost"


def _state(reply: Any) -> BatchState | None:
    flat, now = reply
    if not flat:
        return None
    fields = {name.decode(): value for name, value in pairs(flat)}

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
        output_file_id=text(fields.get("output_file_id")),
        error_file_id=text(fields.get("error_file_id")),
        usage=group("u:"),
        classes=group("c:"),
        version=int(fields.get("version", 1)),
        input_blob=text(fields.get("input")) or None,
        pairs_removed=fields.get("pairs_removed") == b"1",
        now=int(now) / 1000,
    )
