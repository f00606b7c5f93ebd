"""A real local Ray with Serve, started once for all tests that ask for it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_local() -> Iterator[None]:
    """Ray and Serve in this process's own cluster, without an HTTP proxy."""
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
        serve.shutdown()
        ray.shutdown()
