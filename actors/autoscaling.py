"""How many batch runners the backlog needs: the policy that Serve's controller evaluates.

The policy runs in the controller, also while there is no runner that could report anything, so it
reads the backlog from the store itself::

    daemon thread, own event loop --every POLL_S--> rows not done yet, and when that was read
    controller --call--> replicas for the last reading; the present target when it is out of date

A call neither waits nor fails, whatever the store does. The policy travels to the controller as
bytes, and again when that starts anew, so it is rebuilt from its arguments alone. The store's URL
is one of them: it is inside those bytes, and not among the arguments that Serve shows and logs.
Serve applies the bounds and delays of the autoscaling configuration.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any, Protocol

from pydantic import SecretStr
from ray import cloudpickle
from ray.serve.config import AutoscalingContext, AutoscalingPolicy

from mora_serve.config import RedisSettings
from mora_serve.errors import MoraError
from mora_serve.store.redis_client import RedisClient
from mora_serve.store.redis_store import RedisLedger

log = logging.getLogger(__name__)

POLL_S = 1.0
FRESH_S = 10.0
"""How long a reading counts; afterwards nothing is known and the number of replicas stays."""
PATIENCE_S = 3.0
"""How long one reading waits for an unreachable server."""


class BacklogSource(Protocol):
    """Where the backlog is read, on the event loop that reads it."""

    async def backlog(self) -> int:
        """Rows that are not done yet."""
        ...


class RedisBacklog:
    """The backlog of a Redis ledger; can be pickled, connects on first use."""

    def __init__(self, url: SecretStr, key_prefix: str) -> None:
        self._url = url
        self._key_prefix = key_prefix
        self._ledger: RedisLedger | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return RedisBacklog, (self._url, self._key_prefix)

    async def backlog(self) -> int:
        if self._ledger is None:
            client = RedisClient(self._url.get_secret_value(), patience_s=PATIENCE_S)
            self._ledger = RedisLedger(client, self._key_prefix)
        return (await self._ledger.backlog()).rows


class Reading:
    """The last backlog that was read."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last: tuple[int, float] | None = None

    def put(self, rows: int) -> None:
        self._last = rows, self._clock()

    def rows(self) -> int | None:
        """``None`` when nothing was read for ``FRESH_S``."""
        last = self._last
        return None if last is None or self._clock() - last[1] > FRESH_S else last[0]


class BacklogPolicy:
    """One replica per ``rows_per_replica`` rows of backlog, none without backlog."""

    def __init__(self, rows_per_replica: int, source: BacklogSource) -> None:
        self._rows_per_replica = rows_per_replica
        self._source = source
        self._reading: Reading | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return BacklogPolicy, (self._rows_per_replica, self._source)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        if self._reading is None:
            self._reading = Reading()
            watch(self._source, self._reading)
        rows = self._reading.rows()
        if rows is None:
            return context.target_num_replicas, {}
        return math.ceil(rows / self._rows_per_replica), {}


def backlog_policy(rows_per_replica: int, redis: RedisSettings) -> AutoscalingPolicy:
    """What Serve's autoscaling configuration takes. ``redis.url`` must be set."""
    assert redis.url is not None
    policy = BacklogPolicy(rows_per_replica, RedisBacklog(redis.url, redis.key_prefix))
    # Serve would write the arguments of a policy class into its status and its log.
    return AutoscalingPolicy.from_serialized_policy_def(
        {"policy_function": f"{__name__}:{BacklogPolicy.__name__}"}, cloudpickle.dumps(policy)
    )


def watch(source: BacklogSource, reading: Reading, poll_s: float = POLL_S) -> threading.Thread:
    """Read ``source`` into ``reading`` in a thread that ends once nobody holds ``reading``."""
    held = weakref.ref(reading)
    thread = threading.Thread(
        target=lambda: asyncio.run(_watch(source, held, poll_s)), name="backlog", daemon=True
    )
    thread.start()
    return thread


async def _watch(source: BacklogSource, held: weakref.ref[Reading], poll_s: float) -> None:
    failing = False
    while held() is not None:
        try:
            rows = await source.backlog()
        except MoraError as error:
            if not failing:
                log.warning("the backlog could not be read (%s)", type(error).__name__)
            failing = True
        else:
            failing = False
            reading = held()
            if reading is not None:
                reading.put(rows)
            del reading
        await asyncio.sleep(poll_s)
