"""Stores for the contract tests, in memory and on a real Redis; which tests are left out.

``make test`` leaves out adapters on a real engine, which take minutes on CPU and are not served
there; ``--adapters`` (``make adapters-test``) runs them.
"""

from pathlib import Path

import pytest

from tests.redis_fixtures import redis_server, redis_url
from tests.s3_fixtures import s3_bucket, s3_server
from tests.unit.store.conftest import stores

__all__ = ["redis_server", "redis_url", "s3_bucket", "s3_server", "stores"]

ADAPTERS = "adapters"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--adapters", dest=ADAPTERS, action="store_true", help="on a real engine")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_long = collection_path.name == "test_adapters_side_by_side.py"
    return True if is_long and not config.getoption(ADAPTERS, default=False) else None
