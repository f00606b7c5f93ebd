"""Fine-tuning jobs, policy versions and replica metrics on Redis."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mora_serve.identity import new_id
from mora_serve.store.memory_jobs import (
    new_checkpoint,
    new_event,
    new_job,
    no_current_policy,
    refuse_other_policy,
)
from mora_serve.store.redis_client import RedisClient
from mora_serve.store.shapes import bad_cursor, no_such


class RedisJobs:
    """The :class:`~mora_serve.ports.JobStore` port under one key prefix."""

    def __init__(self, client: RedisClient, prefix: str) -> None:
        self._client = client
        self._prefix = prefix

    async def create_job(self, job: Mapping[str, Any]) -> dict[str, Any]:
        fields = _encode(new_job({"id": new_id("ftjob"), **job}, await self._now()))
        return _decode(await self._step("create_job", json.loads(fields["id"]), *_flat(fields)))

    async def get_job(self, job_id: str) -> dict[str, Any]:
        return self._found(job_id, await self._step("get_job", job_id))

    async def update_job(self, job_id: str, **fields: Any) -> dict[str, Any]:
        flat = _flat(_encode(fields))
        return self._found(job_id, await self._step("update_job", job_id, *flat))

    async def list_jobs(
        self, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        found = await self._step("list_jobs", after or "", limit + 1)
        if found is None:
            raise bad_cursor(str(after))
        return [_decode(flat) for flat in found[:limit]], len(found) > limit

    async def cancel_job(self, job_id: str) -> dict[str, Any]:
        return await self.update_job(job_id, status="cancelled")

    async def claim_job(self, worker: str, ttl_s: float) -> dict[str, Any] | None:
        return _decode(await self._step("claim_job", worker, round(ttl_s * 1000))) or None

    async def heartbeat_job(self, job_id: str, worker: str, ttl_s: float) -> bool:
        await self.get_job(job_id)
        return bool(await self._step("heartbeat_job", job_id, worker, round(ttl_s * 1000)))

    async def add_event(self, job_id: str, event: Mapping[str, Any]) -> None:
        await self.get_job(job_id)
        stored = new_event(event, await self._now())
        await self._step("put_new", f"job:{job_id}:events", stored["id"], json.dumps(stored))

    async def list_events(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        await self.get_job(job_id)
        return await self._page(f"job:{job_id}:events", after, limit)

    async def add_checkpoint(self, job_id: str, checkpoint: Mapping[str, Any]) -> None:
        await self.get_job(job_id)
        stored = new_checkpoint(job_id, checkpoint, await self._now())
        await self._step("put", f"job:{job_id}:checkpoints", stored["id"], json.dumps(stored))

    async def list_checkpoints(
        self, job_id: str, *, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        await self.get_job(job_id)
        return await self._page(f"job:{job_id}:checkpoints", after, limit)

    async def publish_policy(self, version: Mapping[str, Any], *, make_current: bool) -> None:
        stored = {"created": await self._now(), "parent": None, "job_id": None, **version}
        if not await self._step("put_new", "policies", stored["id"], json.dumps(stored)):
            known = json.loads(await self._step("get", "policies", stored["id"]))
            refuse_other_policy(known, stored)
        if make_current:
            await self.set_current_policy(stored["id"])

    async def list_policies(self) -> list[dict[str, Any]]:
        return (await self._page("policies", None, 10_000))[0]

    async def current_policy(self) -> tuple[str, int]:
        found = await self._client.command("HMGET", f"{self._prefix}:policy", "id", "epoch")
        if found[0] is None:
            raise no_current_policy()
        return found[0].decode(), int(found[1])

    async def set_current_policy(self, version_id: str) -> int:
        epoch = int(await self._step("set_policy", version_id))
        if epoch < 0:
            raise no_such("policy", version_id, "model", "policy_not_found")
        return epoch

    async def _page(
        self, name: str, after: str | None, limit: int
    ) -> tuple[list[dict[str, Any]], bool]:
        docs = await self._step("page", name, after or "", limit + 1, 0)
        if docs is None:
            raise bad_cursor(str(after))
        return [json.loads(doc) for doc in docs[:limit]], len(docs) > limit

    async def _now(self) -> int:
        return int((await self._client.command("TIME"))[0])

    async def _step(self, name: str, *args: Any) -> Any:
        return await self._client.script(self._prefix, name, *args)

    def _found(self, job_id: str, flat: Any) -> dict[str, Any]:
        if not flat:
            raise no_such(
                "fine-tuning job", job_id, "fine_tuning_job_id", "fine_tuning_job_not_found"
            )
        return _decode(flat)


class RedisMetrics:
    """Exposition texts at ``<prefix>:metrics:<replica>`` with a time to live."""

    def __init__(self, client: RedisClient, prefix: str) -> None:
        self._client = client
        self._prefix = f"{prefix}:metrics:"

    async def publish(self, replica: str, text: str, ttl_s: float) -> None:
        await self._client.command("SET", self._prefix + replica, text, "PX", round(ttl_s * 1000))

    async def collect(self) -> dict[str, str]:
        names: set[bytes] = set()
        cursor: Any = b"0"
        while True:
            cursor, page = await self._client.command(
                "SCAN", cursor, "MATCH", f"{self._prefix}*", "COUNT", 1000
            )
            names.update(page)
            if int(cursor) == 0:
                break
        if not names:
            return {}
        keys = sorted(names)
        texts = await self._client.command("MGET", *keys)
        return {
            key.decode().removeprefix(self._prefix): text.decode()
            for key, text in zip(keys, texts, strict=True)
            if text is not None
        }


def _encode(fields: Mapping[str, Any]) -> dict[str, str]:
    return {name: json.dumps(value) for name, value in fields.items()}


def _decode(flat: Any) -> dict[str, Any]:
    return {k.decode(): json.loads(v) for k, v in zip(flat[::2], flat[1::2], strict=True)}


def _flat(fields: Mapping[str, str]) -> list[str]:
    return [item for pair in fields.items() for item in pair]
