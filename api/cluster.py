"""``api.cluster:build``: the application as a Ray Serve configuration file names it.

On a cluster that an operator runs (KubeRay), Serve builds the application itself, in a task inside
the cluster, from an import path and arguments. The arguments are what ``--profile`` and
``--config`` are elsewhere. They are part of the configuration file: Serve sees when they change,
and shows them. What must not be shown (keys, the store's password) is in the pods' environment.

Starts nothing: Ray, the proxies and whatever :mod:`api.deploy` does for one machine are the
operator's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ray.serve import Application

from api.deploy import without_haproxy
from api.ingress import build_application
from mora_serve.config import Settings, load_settings
from mora_serve.errors import ConfigError
from mora_serve.stack import require_calibrator, resolve_settings

ENV_HAPROXY = "RAY_SERVE_ENABLE_HA_PROXY"
ARGUMENTS = frozenset({"profile", "settings"})


def build(arguments: dict[str, Any]) -> Application:
    """The bound application of ``{"profile": ..., "settings": {...}}``.

    ``settings`` is a nested mapping as in a ``--config`` file. Raises ``ConfigError``, or
    ``CalibrationError`` for scorers that nothing calibrates; Serve reports the message as the
    application's.
    """
    return build_application(cluster_settings(arguments, os.environ))


def cluster_settings(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """The settings that every replica is started with, checked before one is."""
    unknown = sorted(set(arguments) - ARGUMENTS)
    if unknown:
        raise ConfigError(f"args must hold profile and settings only, got {unknown[0]}")
    settings = resolve_settings(
        load_settings(
            str(arguments.get("profile", "gpu")),
            overrides=arguments.get("settings"),
            environ=environ,
        )
    )
    if settings.redis.url is None:
        raise ConfigError("redis.url must be set on a cluster; give it as MORA_REDIS__URL")
    require_calibrator(settings)
    return settings if environ.get(ENV_HAPROXY) == "1" else without_haproxy(settings)
