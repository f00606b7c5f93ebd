"""Process environment of the engine: what must be set before its processes start.

The engine runs in child processes of the replica, so this is decided on the machine that hosts it,
from the cores it may use there. On CPU three things matter (measured, see the README):

- vLLM's automatic binding keeps one core for itself, which is half of a two-core machine: bind the
  OpenMP threads to every core instead;
- Intel's OpenMP runtime, which the PyTorch wheels' dependencies install beside the interpreter,
  is faster than the one that PyTorch bundles, and only works when preloaded;
- Ray sets ``OMP_NUM_THREADS`` to the CPUs it accounts for, which says nothing about the engine.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

KV_CACHE_GIB = "2"
OPENMP = Path("lib") / "libiomp5.so"


def cpu_engine_environment(
    overrides: Mapping[str, str],
    *,
    num_ranks: int = 1,
    cores: frozenset[int] | None = None,
    prefix: Path | None = None,
) -> dict[str, str]:
    """Variables for an engine on CPU; ``overrides`` (``policy.engine_env``) win.

    ``num_ranks`` is the number of worker processes; with more than one, vLLM's own binding by NUMA
    node is kept. ``cores`` are the cores to use (default: those this process may use), ``prefix``
    is where the interpreter's environment lives.
    """
    usable = cores if cores is not None else frozenset(os.sched_getaffinity(0))
    variables = {
        "VLLM_CPU_KVCACHE_SPACE": KV_CACHE_GIB,
        "OMP_NUM_THREADS": str(max(1, len(usable) // num_ranks)),
    }
    if num_ranks == 1:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(str(core) for core in sorted(usable))
    preload = (prefix or Path(sys.prefix)) / OPENMP
    if preload.exists():
        variables["LD_PRELOAD"] = str(preload)
    return {**variables, **overrides}


def torch_environment(num_threads: int) -> dict[str, str]:
    """Variables for a scorer that shares its cores with an engine.

    OpenMP threads spin for work after each parallel region; on shared cores that takes time from
    the others, so they sleep at once.
    """
    return {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive"}


@contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """``os.environ`` with ``variables`` while the block runs; everything is restored afterwards,
    also what the block changed itself."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in set(os.environ) - set(before):
            del os.environ[name]
        os.environ.update(before)
