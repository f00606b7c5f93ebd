"""Ports of what samples, scores and rewrites."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mora_serve.types import (
    Dimension,
    Failure,
    Generation,
    GenerationRequest,
    Messages,
    Score,
    ScoreGroup,
)


@dataclass(frozen=True, slots=True)
class CompletionDelta:
    """A piece of a streamed completion; the last one carries ``finish_reason`` and counts."""

    text: str
    index: int = 0
    """Which of the ``n`` completions this piece belongs to."""
    finish_reason: str | None = None
    num_tokens: int = 0
    """Completion tokens so far."""
    num_prompt_tokens: int = 0
    policy_version: str = ""


@runtime_checkable
class Generator(Protocol):
    """Samples a policy."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        """One result per request, in order; an item's own fault is a ``Failure`` for it alone.

        Raises :class:`~mora_serve.errors.GenerationError` when the engine as a whole is gone.
        Cancelling the call frees the generation.
        """
        ...

    def stream(self, request: GenerationRequest) -> AsyncIterator[CompletionDelta]:
        """Deltas of one request. Raises ``InvalidRequestError`` when the request is at fault."""
        ...

    async def models(self, wanted: str | None = None) -> list[str]:
        """Policy versions that can be sampled, the current one first.

        ``wanted`` is a version that the caller asks for: one that was published but is not served
        yet is loaded first.
        """
        ...


@runtime_checkable
class Scorer(Protocol):
    """Scores answers on one or more dimensions. A score never depends on its batch."""

    async def dimensions(self) -> Mapping[Dimension, tuple[str, str]]:
        """Dimension -> (model, revision) of what scores it."""
        ...

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[list[dict[Dimension, Score]]]:
        """``result[g][r][dimension]`` for response ``r`` of group ``g``, raw (``value`` is None).

        Faults of single answers are scores whose status is not ``ok``. Raises
        :class:`~mora_serve.errors.ScoringError` when the scorer as a whole is gone.
        """
        ...


@dataclass(frozen=True, slots=True)
class RewriteContext:
    """What a strategy may know when it proposes rewrites of one prompt."""

    prompt: Messages
    present: tuple[Dimension, ...]
    """Dimensions the prompt already reaches."""
    missing: tuple[Dimension, ...]
    """Dimensions whose intent the rewrite should add."""
    seed: int
    """Makes proposals reproducible."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A proposed rewrite, not yet measured."""

    prompt: Messages
    strategy: str
    template_hash: str
    targets: tuple[Dimension, ...]
    """Dimensions the rewrite is meant to open."""
    rejected: str | None = None
    """A reason known before any measurement, for example ``drift``."""


@runtime_checkable
class Rewriter(Protocol):
    """One rewriting strategy."""

    name: str

    async def propose(self, context: RewriteContext, num_candidates: int) -> list[Candidate]:
        """At most ``num_candidates`` distinct candidates that keep the original question."""
        ...
