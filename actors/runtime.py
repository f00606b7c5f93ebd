"""What the engine is started with: its arguments, its seeds, and its processes' environment.

The engine runs in child processes of the replica, so their environment is decided on the machine
that hosts it, from the cores it may use there. On CPU three things matter (measured, see README):

- vLLM's automatic binding keeps one core for itself, which is half of a two-core machine: bind the
  OpenMP threads to every core instead;
- Intel's OpenMP runtime, which the PyTorch wheels' dependencies install beside the interpreter,
  is faster than the one that PyTorch bundles, and only works when preloaded;
- Ray sets ``OMP_NUM_THREADS`` to the CPUs it accounts for, which says nothing about the engine.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mora_serve.config import PolicySettings
from mora_serve.errors import ConfigError

KV_CACHE_GIB = "2"
CPU_BLOCK_TOKENS = 32
"""Smallest KV block of vLLM's CPU kernels. Only full blocks are shared between the samples of a
prompt, and vLLM's default of 128 tokens is longer than most prompts."""
OPENMP = Path("lib") / "libiomp5.so"
MAX_CPU_LORAS = 16
"""Adapters kept in memory. One that was evicted is read again from its directory."""


def engine_arguments(settings: PolicySettings, model: str, *, on_cpu: bool) -> dict[str, Any]:
    """Keyword arguments of vLLM's ``AsyncEngineArgs``; ``settings.engine`` wins.

    On CPU chunked prefill is off: vLLM 0.32 rewinds the random generator of a seeded request whose
    prompt was prefilled in part (``Generator.get_offset``), which CPU generators do not support,
    and the error ends the engine. Without chunks a prompt is prefilled in one step, so the step's
    token budget must hold the longest one.

    Raises :class:`~mora_serve.errors.ConfigError` where adapters are to be applied per request on
    CPU: vLLM 0.32 gives requests without an adapter the index -1, which its CPU kernels take for
    the last adapter (``bgmv_expand`` in ``vllm/lora/ops/torch_ops``), so that the base version
    would answer as another one as soon as both are in one batch.
    """
    arguments: dict[str, Any] = {
        "model": model,
        "served_model_name": settings.model,
        "max_model_len": settings.max_model_len,
        "enable_lora": settings.lora and not on_cpu,
        "enable_log_requests": False,
    }
    if on_cpu:
        arguments |= cpu_arguments(max(2048, settings.max_model_len))
    arguments |= settings.engine
    if arguments["enable_lora"]:
        if on_cpu:
            raise ConfigError(
                "policy.engine.enable_lora must be false on CPU, got true: vLLM would apply the "
                "last adapter to the base version too; adapters are merged instead"
            )
        arguments.setdefault("max_loras", settings.max_loras)
        arguments.setdefault("max_lora_rank", settings.max_lora_rank)
        arguments.setdefault("max_cpu_loras", max(MAX_CPU_LORAS, settings.max_loras))
    return arguments


def cpu_arguments(step_tokens: int) -> dict[str, Any]:
    """Engine arguments that CPUs need. ``step_tokens`` is what one engine step computes at most;
    prompts are not prefilled in chunks, so it must hold the longest."""
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": step_tokens,
        "enforce_eager": True,
        "block_size": CPU_BLOCK_TOKENS,
    }


def engine_seed(seed: int, token_ids: Sequence[int]) -> int:
    """Seed of the first sample of a prompt; vLLM gives sample ``i`` this plus ``i``.

    Hashed with the prompt, so that neighbouring seeds do not repeat each other's samples (seed 1,
    sample 0 would be seed 0, sample 1) and different prompts do not share their random numbers.
    """
    key = f"{seed}:{','.join(map(str, token_ids))}".encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") >> 2


def engine_environment(
    overrides: Mapping[str, str],
    *,
    on_cpu: bool,
    num_ranks: int = 1,
    cores: frozenset[int] | None = None,
    prefix: Path | None = None,
) -> dict[str, str]:
    """Variables of the engine's processes; ``overrides`` (``policy.engine_env``) win.

    ``num_ranks`` is the number of worker processes; with more than one, vLLM's own binding by NUMA
    node is kept. ``cores`` are the cores to use (default: those this process may use), ``prefix``
    is where the interpreter's environment lives.
    """
    variables = {"VLLM_NO_USAGE_STATS": "1"}
    if on_cpu:
        usable = cores if cores is not None else frozenset(os.sched_getaffinity(0))
        variables["VLLM_CPU_KVCACHE_SPACE"] = KV_CACHE_GIB
        variables["OMP_NUM_THREADS"] = str(max(1, len(usable) // num_ranks))
        if num_ranks == 1:
            variables["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, sorted(usable)))
        preload = (prefix or Path(sys.prefix)) / OPENMP
        if preload.exists():
            variables["LD_PRELOAD"] = str(preload)
    return {**variables, **overrides}


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
