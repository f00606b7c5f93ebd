"""Fixtures of the command line's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.unit.cli.server import Server, serving


@pytest.fixture
def server() -> Iterator[Server]:
    """A tiny HTTP server whose routes the test sets."""
    with serving() as running:
        yield running
