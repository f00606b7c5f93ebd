"""A served stack for the length of a measurement."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mora_serve.config import load_settings
from mora_serve.free_ports import free_port
from mora_serve.processes import StopSignals
from mora_serve.stack import Stack

CACHE = Path(".cache")
"""Keeps the prepared model between runs."""


@contextmanager
def served(profile: str, overrides: Mapping[str, Any] | None = None) -> Iterator[str]:
    """URL of a stack of its own on a free loopback port, stopped at the end."""
    with running(profile, overrides) as stack:
        yield stack.url


@contextmanager
def running(profile: str, overrides: Mapping[str, Any] | None = None) -> Iterator[Stack]:
    """A ready stack of its own on a free loopback port, stopped at the end."""
    settings_overrides: dict[str, Any] = {
        "data_dir": tempfile.mkdtemp(prefix="mora-bench-"),
        "server": {"port": free_port()},
        **(overrides or {}),
    }
    if profile == "embedded":
        path = str(prepared_model())
        settings_overrides.setdefault("policy", {}).setdefault("path", path)
    settings = load_settings(profile, overrides=settings_overrides)
    with StopSignals() as signals, Stack(settings, signals, _say) as stack:
        stack.wait_ready(progress=_say)
        # A measurement polls and sleeps; it must end at once, and the stack with it.
        with signals.raising():
            yield stack


def prepared_model() -> Path:
    """Directory of the embedded policy's weights, prepared once and kept in the cache."""
    from mora_serve.stack import prepare_model

    path = (CACHE / "models" / load_settings("embedded").policy.model).resolve()
    if not (path / "config.json").is_file():
        with StopSignals() as signals:
            prepare_model(path, signals, _say)
    return path


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
