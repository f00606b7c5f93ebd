"""The gateway over fakes and in-process stores, driven through ASGI."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from api.app import create_app
from api.deps import Deps
from mora_serve.calibrators import load_calibrator
from mora_serve.config import Settings, load_settings
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.service import MoraService
from mora_serve.store import Stores

MODEL = "fake-policy"


def make_settings(**overrides: Any) -> Settings:
    return load_settings("fake", overrides=overrides, environ={})


def make_deps(
    settings: Settings | None = None,
    *,
    generator: Any = None,
    scorer: Any = None,
    stores: Stores | None = None,
    **kwargs: Any,
) -> Deps:
    settings = settings or make_settings()
    generator = generator or FakeGenerator((MODEL,), max_model_len=settings.policy.max_model_len)
    scorer = scorer or FakeScorer(settings.dimensions)
    service = MoraService(generator, scorer, load_calibrator(settings), settings)
    stores = stores or Stores.memory()
    kwargs.setdefault("poll_interval_s", 0.01)
    return Deps(service, generator, scorer, stores, settings, **kwargs)


def make_client(app: FastAPI, headers: Mapping[str, str] | None = None) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        transport=httpx.ASGITransport(app), base_url="http://gateway", headers=headers
    )


ClientFactory = Callable[[Deps], httpx.AsyncClient]


@pytest.fixture
def deps() -> Deps:
    return make_deps()


@pytest.fixture
async def client(deps: Deps) -> AsyncIterator[httpx.AsyncClient]:
    async with make_client(create_app(deps)) as client:
        yield client


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The envelope's content; fails unless the body is exactly OpenAI's envelope."""
    body = response.json()
    assert set(body) == {"error"}, body
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])
