"""A real Redis server for tests: one per session, a key prefix per test.

Import what is needed into a ``conftest.py``; tests that use it carry the marker ``redis``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from mora_serve.redis_server import RedisServer


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_url(redis_server: RedisServer) -> str:
    return redis_server.url
