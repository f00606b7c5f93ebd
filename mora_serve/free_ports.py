"""TCP ports for servers that are started some seconds after their port was chosen.

A port from the kernel's ephemeral range, which is what binding to port 0 gives, can be taken in
between as the source of any outgoing connection, and Ray opens hundreds while it starts. So ports
come from outside that range, and from outside the one that Ray gives to its workers.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST, LAST = 20_000, 65_535
"""Ray's workers listen below these, on 10002 to 19999."""
MIN_CHOICE = 1_000


def free_port() -> int:
    """A port that nothing uses now, on any address of this machine."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Distinct ports that nothing uses now, on any address of this machine."""
    candidates = stable_ports()
    found: list[int] = []
    for port in random.sample(candidates, len(candidates)):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
        if len(found) == count:
            return found
    raise OSError(f"no {count} free ports among {len(candidates)}")


def stable_ports(ephemeral: Path = EPHEMERAL_RANGE) -> list[int]:
    """Ports that the kernel gives to nobody who did not ask for them by number.

    All from ``FIRST`` on where the ephemeral range, read from the given file, leaves too few.
    """
    ports = range(FIRST, LAST + 1)
    try:
        low, high = map(int, ephemeral.read_text().split())
    except (OSError, ValueError):
        return list(ports)
    outside = [port for port in ports if not low <= port <= high]
    return outside if len(outside) >= MIN_CHOICE else list(ports)
