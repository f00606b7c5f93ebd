"""Durable state: files, batches and their ledger, pair streams, jobs, policy versions, blobs.

:func:`open_stores` builds the real stores from settings (Redis and blob storage);
:meth:`Stores.memory` builds the same ports within one process. Clients connect on first use and
belong to the event loop that uses them first.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mora_serve.config import Settings
from mora_serve.errors import ConfigError
from mora_serve.ports import BatchStore, BlobStore, JobStore
from mora_serve.store.backlog import BacklogLimits
from mora_serve.store.batches import LedgerBatches
from mora_serve.store.blobs import FsspecBlobs
from mora_serve.store.memory import MemoryLedger
from mora_serve.store.memory_blobs import MemoryBlobs
from mora_serve.store.memory_jobs import MemoryJobs, MemoryMetrics
from mora_serve.store.pair_stream import LedgerPairs
from mora_serve.store.redis_client import RedisClient
from mora_serve.store.redis_jobs import RedisJobs, RedisMetrics
from mora_serve.store.redis_store import RedisLedger

__all__ = ["MetricsBoard", "Stores", "open_stores"]


class MetricsBoard(Protocol):
    """Where replicas post their metrics as Prometheus exposition text."""

    async def publish(self, replica: str, text: str, ttl_s: float) -> None:
        """Replace the replica's text; it vanishes after ``ttl_s`` without a new one."""
        ...

    async def collect(self) -> dict[str, str]:
        """Replica -> its latest text."""
        ...


@dataclass(frozen=True, slots=True)
class Stores:
    """Everything durable, as ports."""

    batches: BatchStore
    jobs: JobStore
    pairs: LedgerPairs
    """A :class:`~mora_serve.ports.PairStream` that also tells its ``tail_length(batch_id)``."""
    blobs: BlobStore
    metrics: MetricsBoard

    @classmethod
    def memory(
        cls,
        clock: Callable[[], float] = time.time,
        completion_window_s: float = 86_400.0,
        limits: BacklogLimits | None = None,
    ) -> Stores:
        """Stores within this process, for tests and simulations."""
        jobs, blobs = MemoryJobs(clock), MemoryBlobs()
        ledger = MemoryLedger(clock, jobs.files_trained_on)
        batches = LedgerBatches(
            ledger, blobs, completion_window_s=completion_window_s, limits=limits
        )
        return cls(
            batches=batches,
            jobs=jobs,
            pairs=LedgerPairs(ledger, blobs),
            blobs=blobs,
            metrics=MemoryMetrics(clock),
        )

    async def aclose(self) -> None:
        """Close connections."""
        await self.batches.aclose()


def open_stores(settings: Settings) -> Stores:
    """Stores over ``settings.redis`` and ``settings.blobs``; connects on first use.

    Raises ``ConfigError`` when ``redis.url`` is not set: whoever starts the stack resolves it.
    """
    if settings.redis.url is None:
        raise ConfigError("redis.url must be set; `mora-serve up` starts a server and sets it")
    client = RedisClient(settings.redis.url.get_secret_value())
    ledger = RedisLedger(client, settings.redis.key_prefix)
    root = settings.blobs.url or str(settings.data_dir.absolute() / "blobs")
    blobs = FsspecBlobs(root, settings.blobs.options, settings.server.file_uri_prefixes)
    runner = settings.runner
    limits = BacklogLimits(runner.max_backlog_rows, runner.max_backlog_bytes)
    window_s = runner.completion_window_s
    return Stores(
        batches=LedgerBatches(ledger, blobs, completion_window_s=window_s, limits=limits),
        jobs=RedisJobs(client, settings.redis.key_prefix),
        pairs=LedgerPairs(ledger, blobs),
        blobs=blobs,
        metrics=RedisMetrics(client, settings.redis.key_prefix),
    )
