"""The scorer replica: merges concurrent calls into batches, and gives each call its time limit.

Groups wait in one queue. While fewer than ``MAX_BATCHES`` batches are being scored, the head of the
queue becomes a batch: as many groups as fit into the token budget, all asked for the same
dimensions. Nothing waits for company: an idle scorer starts at once, and batches form by themselves
under load. Two batches at a time let the second be tokenised while the first computes.

    score() --groups--> queue --batch--> scorer --scores--> futures --> score() returns
       |                                                       |
       '-- its time is up: groups still queued are dropped <---'   (status ``timeout``)

The replica ends with its engine, as the generator's does: no retry meets a corpse.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from actors.generator import EXIT_DEAD_ENGINE
from actors.metrics import ScorerMetrics
from mora_serve.errors import ScoringError
from mora_serve.ports import Scorer
from mora_serve.types import Dimension, Score, ScoreGroup

logger = logging.getLogger(__name__)

MAX_BATCHES = 2
CHARS_PER_TOKEN = 4
"""Only an estimate is needed to size a batch; the scorer itself cuts by real tokens."""
HANG_FACTOR = 3.0
"""A batch that takes this many time limits counts as a hung scorer."""

GroupScores = list[dict[Dimension, Score]]


@dataclass(slots=True, eq=False)
class _Waiting:
    group: ScoreGroup
    dimensions: tuple[Dimension, ...]
    result: asyncio.Future[GroupScores]
    since: float


@dataclass(frozen=True, slots=True)
class _Batch:
    items: Sequence[_Waiting]
    since: float


class ScorerReplica:
    """Serves a :class:`~mora_serve.ports.Scorer` to many callers at once."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        timeout_s: float,
        token_budget: int,
        metrics: ScorerMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._exit_process = exit_process
        self._scorer = scorer
        self._timeout_s = timeout_s
        self._token_budget = token_budget
        self._metrics = metrics
        self._clock = clock
        self._served: dict[Dimension, tuple[str, str]] = {}
        self._queue: deque[_Waiting] = deque()
        self._batches: dict[asyncio.Task[None], _Batch] = {}

    async def start(self) -> None:
        """Load the model, if the scorer has one to load."""
        load = getattr(self._scorer, "start", None)
        if load is not None:
            await load()
        self._served = dict(await self._scorer.dimensions())

    async def stop(self) -> None:
        close = getattr(self._scorer, "close", None)
        if close is not None:
            await close()

    async def dimensions(self) -> Mapping[Dimension, tuple[str, str]]:
        return await self._scorer.dimensions()

    async def check_health(self) -> None:
        """Raise ``ScoringError`` when no further call can be served."""
        limit = HANG_FACTOR * self._timeout_s
        if any(self._clock() - batch.since > limit for batch in self._batches.values()):
            raise ScoringError("the scorer hangs")
        check = getattr(self._scorer, "check_health", None)
        if check is not None:
            await check()

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[GroupScores]:
        """See :class:`~mora_serve.ports.Scorer`; groups that take too long score ``timeout``."""
        wanted = tuple(self._served if dimensions is None else dimensions)
        if any(name not in self._served for name in wanted):
            return await self._scorer.score(groups, wanted)
        loop = asyncio.get_running_loop()
        waiting = [_Waiting(group, wanted, loop.create_future(), self._clock()) for group in groups]
        self._queue.extend(waiting)
        self._fill()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._timeout_s):
                    await asyncio.gather(*(item.result for item in waiting))
        except asyncio.CancelledError:
            self._abandon()
            raise
        finally:
            for item in waiting:
                item.result.cancel()
        scores = [self._scores_of(item) for item in waiting]
        self._count(scores)
        return scores

    def _scores_of(self, item: _Waiting) -> GroupScores:
        if not item.result.cancelled():
            return item.result.result()
        reason = f"no score within {self._timeout_s:g} s"
        late = {
            name: Score("timeout", None, None, reason, *self._served[name])
            for name in item.dimensions
        }
        return [dict(late) for _ in item.group.responses]

    def _abandon(self) -> None:
        """Stop batches that nobody waits for any more. (Those whose callers ran out of time go on:
        their age tells a hung scorer.)"""
        for task, batch in self._batches.items():
            if all(item.result.cancelled() for item in batch.items):
                task.cancel()

    # --- batches ----------------------------------------------------------------------------------

    def _fill(self) -> None:
        while self._queue and len(self._batches) < MAX_BATCHES:
            batch = self._take()
            if batch:
                task = asyncio.create_task(self._run(batch))
                self._batches[task] = _Batch(batch, self._clock())
                task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[None]) -> None:
        del self._batches[task]
        self._fill()

    def _take(self) -> list[_Waiting]:
        """The next batch: at least one group that somebody still waits for, if there is one."""
        batch: list[_Waiting] = []
        tokens = 0
        while self._queue:
            item = self._queue[0]
            if item.result.done():
                self._queue.popleft()
                continue
            tokens += estimated_tokens(item.group)
            if batch and (tokens > self._token_budget or item.dimensions != batch[0].dimensions):
                break
            batch.append(self._queue.popleft())
        return batch

    async def _run(self, batch: Sequence[_Waiting]) -> None:
        started = self._clock()
        try:
            scores = await self._scorer.score([item.group for item in batch], batch[0].dimensions)
        except Exception as error:  # noqa: BLE001 - whatever it is, the caller must be told
            await self._isolate(batch, error)
        else:
            for item, result in zip(batch, scores, strict=True):
                _resolve(item, result)
        if self._metrics is not None:
            self._metrics.batch_groups.observe(len(batch))
            self._metrics.batch_seconds.observe(self._clock() - started)
            for item in batch:
                self._metrics.queue_seconds.observe(started - item.since)

    async def _isolate(self, batch: Sequence[_Waiting], error: Exception) -> None:
        """A batch failed: score its groups one by one, so that only the culprit's caller knows."""
        if isinstance(error, ScoringError) and error.lost:
            logger.critical("the engine died; this replica exits with it")
            self._exit_process(EXIT_DEAD_ENGINE)
        elif len(batch) > 1:
            for item in batch:
                await self._run([item])
            return
        logger.error("scoring failed (%s)", type(error).__name__, exc_info=error)
        for item in batch:
            if not item.result.done():
                item.result.set_exception(error)

    def _count(self, scores: Sequence[GroupScores]) -> None:
        if self._metrics is None:
            return
        for row in (row for group in scores for row in group):
            for name, score in row.items():
                self._metrics.scores.labels(name, score.status).inc()


def _resolve(item: _Waiting, result: GroupScores) -> None:
    if not item.result.done():
        item.result.set_result(result)


def estimated_tokens(group: ScoreGroup) -> int:
    """About how many tokens a group costs: its prompt once, and its answers."""
    chars = sum(len(turn.content) for turn in group.prompt) + sum(map(len, group.responses))
    return chars // CHARS_PER_TOKEN + 1
