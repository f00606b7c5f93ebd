"""``mora-serve up`` as a process of its own, for runs that kill or watch parts of the stack."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_serve.answers import UnreachableError
from mora_serve.client import Client
from mora_serve.free_ports import free_port
from mora_serve.processes import Child

START_TIMEOUT_S = 240.0
STOP_GRACE_S = 90.0
POLL_S = 0.5


@dataclass(frozen=True, slots=True)
class Up:
    """A served stack."""

    url: str
    pid: int
    """Of ``mora-serve up``, from which every process of the stack descends."""
    data_dir: Path
    log: Path
    """What ``mora-serve up`` printed; the service's own log is under the data directory."""


@contextmanager
def running(
    settings: Mapping[str, Any], *, profile: str = "fake", data_dir: Path | None = None
) -> Iterator[Up]:
    """A stack with its own data directory on a free loopback port; stopped in order at the end.

    ``settings`` is what the configuration file says. Raises ``RuntimeError`` when the stack does
    not start, or when it ends by itself meanwhile.
    """
    data_dir = data_dir or Path(tempfile.mkdtemp(prefix="mora-up-"))
    port = free_port()
    config, log = data_dir / "settings.yaml", data_dir / "up.log"
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "mora_serve", "up", "--profile", profile]
    where = ["--config", str(config), "--port", str(port), "--data-dir", str(data_dir)]
    with log.open("wb") as output:
        child = Child([*command, *where], env=dict(os.environ), output=output)
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_ready(child, url, log)
        yield Up(url, child.pid, data_dir, log)
        if child.poll() is not None:
            raise RuntimeError(f"mora-serve up ended by itself: {_tail(log)}")
    finally:
        child.stop(STOP_GRACE_S)


def _wait_ready(child: Child, url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    client = Client(url, timeout_s=5.0)
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"mora-serve up did not start: {_tail(log)}")
        try:
            if client.ready()[0]:
                return
        except UnreachableError:
            pass
        time.sleep(POLL_S)
    raise RuntimeError(f"mora-serve up was not ready after {START_TIMEOUT_S:g} s: {_tail(log)}")


def _tail(log: Path) -> str:
    return " | ".join(log.read_text("utf-8", "replace").splitlines()[-5:])
