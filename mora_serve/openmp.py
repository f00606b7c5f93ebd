"""OpenMP in processes that share their cores with an engine.

OpenMP threads spin for work after each parallel region and wait for the slowest at its end. Where
cores are shared, the spinning takes the time that the slowest needs; threads that sleep at once
give it back.
"""

from __future__ import annotations


def torch_environment(num_threads: int) -> dict[str, str]:
    """Variables for a process that computes with torch on ``num_threads`` shared cores."""
    return {"OMP_NUM_THREADS": str(num_threads), "OMP_WAIT_POLICY": "passive"}
