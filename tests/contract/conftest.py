"""Stores for the contract tests: in memory and on a real Redis."""

from tests.redis_fixtures import redis_server, redis_url
from tests.s3_fixtures import s3_bucket, s3_server
from tests.unit.store.conftest import stores

__all__ = ["redis_server", "redis_url", "s3_bucket", "s3_server", "stores"]
