"""Process environment of engines: what must be set before the engine's process starts."""

from __future__ import annotations

import sys
from pathlib import Path

from mora_serve.config import PolicySettings


def engine_environment(settings: PolicySettings) -> dict[str, str]:
    """Environment variables of a generator replica; ``settings.engine_env`` wins."""
    if settings.backend != "vllm":
        return dict(settings.engine_env)
    environment: dict[str, str] = {}
    preload = Path(sys.prefix) / "lib" / "libiomp5.so"
    if preload.exists():
        environment["LD_PRELOAD"] = str(preload)
    return {**environment, **settings.engine_env}
