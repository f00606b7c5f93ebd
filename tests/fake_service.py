"""The whole service on fake engines in one thread: gateway over HTTP, runner, a trainer that only
publishes. For blocking clients: the command line, the experiment."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from actors.fake_engine import FakeEngine
from actors.generator import GeneratorReplica, PolicyVersion
from api.app import create_app
from api.deps import Deps
from mora_serve.calibrators import load_calibrator
from mora_serve.config import Settings, load_settings
from mora_serve.fakes import FakeScorer
from mora_serve.service import MoraService
from mora_serve.store import Stores
from tests.contract.gateway_server import http_server, working


class OneVersionEngine(FakeEngine):
    """Holds one set of weights at a time, as an engine that merges adapters does."""

    async def publish(self, versions: Any, current: str) -> None:
        await super().publish([PolicyVersion(current, "merged", None)], current)


@dataclass
class FakeService:
    """A running service; ``call`` runs a coroutine where it runs."""

    url: str
    stores: Stores
    settings: Settings
    loop: asyncio.AbstractEventLoop

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def publish(self, version: str, *, make_current: bool = False) -> None:
        policy = {"id": version, "kind": "lora", "uri": f"/nowhere/{version}"}
        self.call(self.stores.jobs.publish_policy(policy, make_current=make_current))

    def current(self) -> str:
        return str(self.call(self.stores.jobs.current_policy())[0])


@contextmanager
def fake_service(*, one_version: bool = False, **overrides: Any) -> Iterator[FakeService]:
    """A service of its own on a free loopback port."""
    overrides.setdefault("runner", {}).setdefault("poll_interval_s", 0.02)
    settings = load_settings("fake", overrides=overrides, environ={})
    ready = threading.Event()
    holder: dict[str, Any] = {}

    async def serve() -> None:
        stores = Stores.memory()
        engine = (OneVersionEngine if one_version else FakeEngine)(settings.policy)
        replica = GeneratorReplica(engine, stores.jobs, settings.policy.model, poll_interval_s=0.02)
        await replica.start()
        scorer = FakeScorer(settings.dimensions)
        service = MoraService(replica, scorer, load_calibrator(settings), settings)
        deps = Deps(service, replica, scorer, stores, settings, poll_interval_s=0.01)
        stop = asyncio.Event()
        trainer = asyncio.create_task(_train(stores))
        async with http_server(create_app(deps)) as url, working(stores, settings, replica, scorer):
            holder["stop"] = stop
            holder["service"] = FakeService(url, stores, settings, asyncio.get_running_loop())
            ready.set()
            await stop.wait()
        trainer.cancel()
        await replica.stop()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    try:
        yield holder["service"]
    finally:
        holder["service"].loop.call_soon_threadsafe(holder["stop"].set)
        thread.join(30)


async def _train(stores: Stores) -> None:
    """Every queued job reads its pairs, if it has any, and publishes a version of its own."""
    while True:
        jobs, _ = await stores.jobs.list_jobs(after=None, limit=100)
        for job in jobs:
            if job["status"] != "queued":
                continue
            version = f"policy-{job['id'].removeprefix('ftjob-')}"
            policy = {"id": version, "kind": "lora", "uri": "/nowhere", "job_id": job["id"]}
            make_current = job["mora"].get("make_current", True)
            await stores.jobs.publish_policy(policy, make_current=make_current)
            file_id = f"file-{version}"
            await stores.blobs.put(file_id, b"weights")
            record = {
                "id": file_id, "object": "file", "bytes": 7, "created_at": 0,
                "filename": "adapter.bin", "purpose": "fine-tune-results", "status": "processed",
                "expires_at": None, "status_details": None,
            }  # fmt: skip
            await stores.batches.put_file(record, file_id)
            await stores.jobs.update_job(
                job["id"], status="succeeded", fine_tuned_model=version, result_files=[file_id]
            )
        await asyncio.sleep(0.01)
