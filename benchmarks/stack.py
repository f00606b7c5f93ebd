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
        model = load_settings(profile).policy.model
        path = str((CACHE / "models" / model).resolve())
        settings_overrides.setdefault("policy", {}).setdefault("path", path)
        _prepare(path)
    settings = load_settings(profile, overrides=settings_overrides)
    with StopSignals() as signals, Stack(settings, signals, _say) as stack:
        stack.wait_ready(progress=_say)
        # A measurement polls and sleeps; it must end at once, and the stack with it.
        with signals.raising():
            yield stack


def _prepare(path: str) -> None:
    from mora_serve.stack import prepare_model

    if not (Path(path) / "config.json").is_file():
        with StopSignals() as signals:
            prepare_model(Path(path), signals, _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
