"""A batch runner over stores, with services that answer as a test tells them."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from actors.aio import Gate
from actors.isolation import Isolation, RowService
from actors.quarantine import Quarantine
from actors.runner import BatchRunner
from mora_serve.config import Settings, load_settings
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.requests import MoraRequest, RewriteRequest
from mora_serve.service import RowResult
from mora_serve.store import Stores

Hook = Callable[[str, int], Any]


class EchoService:
    """Answers a row with its prompt and one pair. ``hook(prompt, call)`` may raise or wait."""

    def __init__(self, hook: Hook | None = None) -> None:
        self.calls: Counter[str] = Counter()
        self.requests: list[RewriteRequest] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self._hook = hook

    async def run_row(self, request: MoraRequest) -> RowResult:
        assert isinstance(request, RewriteRequest)
        prompt = str(request.prompt)
        self.requests.append(request)
        self.calls[prompt] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(0)
            if self._hook is not None:
                waiting = self._hook(prompt, self.calls[prompt])
                if waiting is not None:
                    await waiting
        finally:
            self.in_flight -= 1
        return RowResult({"prompt": prompt}, ({"prompt": prompt},), {"output_tokens": 1})


def make_settings(**runner: Any) -> Settings:
    section = {"poll_interval_s": 0.01, "shard_rows": 4, "lease_ttl_s": 30.0, **runner}
    return load_settings("fake", overrides={"runner": section}, environ={})


def make_runner(
    stores: Stores, service: RowService, name: str = "w1", **runner: Any
) -> BatchRunner:
    settings = make_settings(**runner)
    generator, scorer = FakeGenerator(), FakeScorer(settings.dimensions)
    return BatchRunner(generator, scorer, stores, settings, name, service=service)


def make_isolation(
    service: RowService, apart: RowService | None = None, *, max_in_flight_rows: int = 1
) -> Isolation:
    """The places of a runner that has no other one beside it."""
    gate = Gate()
    quarantine = Quarantine(Stores.memory().batches, "w1", gate, period_s=0.001)
    return Isolation(
        service, apart or service, gate, quarantine, max_in_flight_rows=max_in_flight_rows
    )


@asynccontextmanager
async def running(*runners: BatchRunner, timeout_s: float = 60.0) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(runner.run()) for runner in runners]
    try:
        async with asyncio.timeout(timeout_s):
            yield
    finally:
        await asyncio.gather(*(runner.stop() for runner in runners))
        await asyncio.gather(*tasks)


def row_line(number: int, **fields: Any) -> bytes:
    row = {
        "custom_id": f"r{number}",
        "method": "POST",
        "url": "/v1/rewrites",
        "body": {"prompt": f"p{number}"},
        **fields,
    }
    return json.dumps(row).encode()


async def submit(stores: Stores, lines: Sequence[bytes], name: str = "in", **options: Any) -> str:
    data = b"\n".join(lines)
    await stores.blobs.put(f"files/{name}", data)
    file = {
        "id": f"file-{name}",
        "purpose": "batch",
        "bytes": len(data),
        "filename": f"{name}.jsonl",
    }
    await stores.batches.put_file(file, f"files/{name}")
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": f"file-{name}"}, options, None, "hash"
    )
    return str(batch["id"])


async def ended(stores: Stores, batch_id: str) -> dict[str, Any]:
    while True:
        batch = await stores.batches.get_batch(batch_id)
        if batch["status"] in ("completed", "failed", "cancelled", "expired"):
            return batch
        await asyncio.sleep(0.01)
