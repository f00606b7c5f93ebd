"""Stores under test: the same suite runs in memory and on a real Redis."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mora_serve.config import load_settings
from mora_serve.identity import new_id
from mora_serve.store import Stores, open_stores
from tests.redis_fixtures import redis_server, redis_url
from tests.s3_fixtures import s3_bucket, s3_server

__all__ = ["redis_server", "redis_url", "s3_bucket", "s3_server", "stores"]


@pytest.fixture(params=["memory", pytest.param("redis", marks=pytest.mark.redis)])
async def stores(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stores]:
    if request.param == "memory":
        opened = Stores.memory()
    else:
        url = request.getfixturevalue("redis_url")
        overrides = {
            "data_dir": str(tmp_path),
            "redis": {"url": url, "key_prefix": new_id("test")},
        }
        opened = open_stores(load_settings("fake", overrides=overrides, environ={}))
    yield opened
    await opened.aclose()
