"""A gateway over real HTTP with a batch runner beside it, on the fake engines, in one loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from actors.runner import BatchRunner
from api.app import create_app
from api.deps import Deps
from mora_serve.calibrators import load_calibrator
from mora_serve.config import Settings
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.ports import Generator, Scorer
from mora_serve.service import MoraService
from mora_serve.store import Stores
from mora_serve.types import (
    Dimension,
    Failure,
    Generation,
    GenerationRequest,
    Score,
    ScoreGroup,
)


class Gate:
    """Lets calls of engines through as they are allowed."""

    def __init__(self) -> None:
        self._permits = asyncio.Semaphore(0)

    def allow(self, calls: int = 10**6) -> None:
        for _ in range(min(calls, 10**4)):
            self._permits.release()

    async def wait(self) -> None:
        await self._permits.acquire()


class GatedGenerator(FakeGenerator):
    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        await self._gate.wait()
        return await super().generate(requests)


class GatedScorer(FakeScorer):
    def __init__(self, gate: Gate, dimensions: Sequence[Dimension]) -> None:
        super().__init__(dimensions)
        self._gate = gate

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[list[dict[Dimension, Score]]]:
        await self._gate.wait()
        return await super().score(groups, dimensions)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def http_server(app: FastAPI) -> AsyncIterator[str]:
    """URL of the application on a free loopback port."""
    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.005)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = server.force_exit = True
        await task


def gateway(stores: Stores, settings: Settings, **kwargs: Any) -> FastAPI:
    """The application over ungated fakes."""
    generator, scorer = FakeGenerator(), FakeScorer(settings.dimensions)
    service = MoraService(generator, scorer, load_calibrator(settings), settings)
    kwargs.setdefault("poll_interval_s", 0.01)
    return create_app(Deps(service, generator, scorer, stores, settings, **kwargs))


@asynccontextmanager
async def working(
    stores: Stores, settings: Settings, generator: Generator, scorer: Scorer
) -> AsyncIterator[BatchRunner]:
    """A runner that works for the length of the block."""
    runner = BatchRunner(generator, scorer, stores, settings, "runner-1")
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
