"""A real local Ray with Serve, started once for all tests that ask for it."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator

import pytest_asyncio

from api.proxy import common_environment, python_proxy_environment

# Serve reads its environment when it is imported, which test modules do; so it is set here, as the
# service sets it for itself.
os.environ.update({**common_environment(local=True), **python_proxy_environment()})


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def ray_local() -> AsyncIterator[None]:
    """Ray and Serve in a cluster of this process's own, without an HTTP proxy.

    Serve's handles belong to the event loop that first uses them and are shut down with Serve, so
    tests that call handles run in the session's loop, which outlives this fixture.
    """
    import ray
    from ray import serve

    # Unix socket paths are limited to 107 bytes, so Ray's directory must be a short one.
    with tempfile.TemporaryDirectory(prefix="mora-ray-", dir="/tmp") as directory:
        ray.init(
            address="local",
            num_cpus=8,
            include_dashboard=False,
            object_store_memory=100 * 2**20,
            _temp_dir=directory,
            log_to_driver=False,
        )
        serve.start(proxy_location="Disabled")
        yield
        await asyncio.to_thread(serve.shutdown)
        ray.shutdown()
