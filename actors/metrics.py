"""Metrics of a replica: what it counts, and how its numbers reach ``/metrics``.

A replica has its own Prometheus registry and no port. It posts the exposition text to the metrics
board with a time to live; the gateway merges what is there. An engine in the same process (vLLM)
registers its ``vllm:*`` metrics in the default registry, which is posted too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from mora_serve.errors import StorageError
from mora_serve.store import MetricsBoard

logger = logging.getLogger(__name__)

PUBLISH_INTERVAL_S = 3.0
TTL_S = 15.0
"""A replica that stopped posting vanishes from ``/metrics`` after this."""


class GeneratorMetrics:
    """What a generator replica counts."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.requests = Counter(
            "mora_generator_requests",
            "Prompts answered, by outcome",
            ["outcome"],
            registry=registry,
        )
        self.completions = Counter(
            "mora_generator_completions",
            "Completions drawn, by finish reason",
            ["finish_reason"],
            registry=registry,
        )
        self.tokens = Counter(
            "mora_generator_tokens", "Tokens, by kind", ["kind"], registry=registry
        )
        self.in_flight = Gauge(
            "mora_generator_in_flight", "Prompts being generated", registry=registry
        )
        self.versions = Gauge(
            "mora_generator_policy_versions",
            "Policy versions that can be sampled",
            registry=registry,
        )
        self.serves_current = Gauge(
            "mora_generator_serves_current",
            "1 while the current policy version is the one sampled by default, else 0",
            registry=registry,
        )


class ScorerMetrics:
    """What a scorer replica counts."""

    def __init__(self, registry: CollectorRegistry = REGISTRY) -> None:
        self.scores = Counter(
            "mora_scorer_scores",
            "Scores by dimension and status",
            ["dimension", "status"],
            registry=registry,
        )
        self.batch_groups = Histogram(
            "mora_scorer_batch_groups",
            "Groups merged into one batch",
            buckets=(1, 2, 4, 8, 16, 32, 64),
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "mora_scorer_queue_seconds", "Time a group waits for its batch", registry=registry
        )
        self.batch_seconds = Histogram(
            "mora_scorer_batch_seconds",
            "Time of one batch, tokenisation included",
            registry=registry,
        )


class StatsCollector(Collector):
    """Exposes the numeric fields of a dataclass of totals as ``<prefix>_<field>_total``."""

    def __init__(self, stats: Any, prefix: str) -> None:
        self._stats = stats
        self._prefix = prefix

    def collect(self) -> Iterator[Metric]:
        for field in fields(self._stats):
            value = float(getattr(self._stats, field.name))
            name = f"{self._prefix}_{field.name}"
            yield CounterMetricFamily(name, f"Total {field.name} since start", value=value)


class MetricsPublisher:
    """Posts a registry to the metrics board every few seconds until it is stopped."""

    def __init__(
        self,
        board: MetricsBoard,
        replica: str,
        registry: CollectorRegistry = REGISTRY,
        *,
        interval_s: float = PUBLISH_INTERVAL_S,
    ) -> None:
        self._board = board
        self._replica = replica
        self._registry = registry
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def publish(self) -> None:
        """Post once. A board that cannot be reached costs this post, nothing else."""
        text = generate_latest(self._registry).decode()
        try:
            await self._board.publish(self._replica, text, TTL_S)
        except StorageError as error:
            logger.warning("metrics could not be posted: %s", error)

    async def _run(self) -> None:
        while True:
            await self.publish()
            await asyncio.sleep(self._interval_s)
