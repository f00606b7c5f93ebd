"""Ports over Ray Serve handles: what the gateway and the batch runners call.

Everything that Ray can do to a call is translated here, once, into :mod:`mora_serve.errors`:

=============================================  ==================================================
a replica raised a ``MoraError``               that error
a replica or its node ended under the call     ``GenerationError`` / ``ScoringError`` with ``lost``
any other error inside a replica               ``GenerationError`` / ``ScoringError``; tried again
the queue is full (``BackPressureError``), or  ``OverloadedError``; never tried again here
no replica can be had
the caller's task is cancelled                 the call is cancelled on the replica too
=============================================  ==================================================

Lists are cut into chunks, so that one call carries work and several replicas share a list. A chunk
is tried a bounded number of times; Serve routes each try to a healthy replica, and waits for one
when a replacement is still starting. A chunk whose replica was lost may be what ended it: it is
repeated ``lost_repeats`` times only, so that one prompt cannot end engine after engine.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray.exceptions import (
    LocalRayletDiedError,
    NodeDiedError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.aio import gather
from mora_serve.errors import (
    GenerationError,
    InvalidRequestError,
    MoraError,
    OverloadedError,
    ScoringError,
)
from mora_serve.ports import CompletionDelta
from mora_serve.types import (
    Dimension,
    Failure,
    Generation,
    GenerationRequest,
    Score,
    ScoreGroup,
)

T = TypeVar("T")
Unavailable = type[GenerationError] | type[ScoringError]

LOST = (
    RayActorError,
    WorkerCrashedError,
    NodeDiedError,
    OutOfMemoryError,
    LocalRayletDiedError,
)
"""What Ray raises when the process that held a call is gone, or cannot be reached any more."""

DEFAULT_TRIES = 3
DEFAULT_LOST_REPEATS = 1
"""For callers that wait for an answer: a replica that was scaled down or replaced is not seen."""
DEFAULT_CHUNK = 8
RETRY_AFTER_S = 1.0
"""What a full queue tells clients when Serve does not say."""
FIRST_BACKOFF_S = 0.1
"""Half the longest pause after the first failure; doubles with each further one."""


def translate(error: Exception, unavailable: Unavailable) -> MoraError:
    """The mora-serve error for ``error``, see the table above. Never carries foreign messages,
    which could hold prompt text; the replica's log has the cause."""
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, MoraError):
        return cause
    if isinstance(cause, BackPressureError):
        return OverloadedError(
            "all replicas are busy and their queue is full; try again later",
            cause.retry_after_s or RETRY_AFTER_S,
        )
    if isinstance(cause, DeploymentUnavailableError):
        return OverloadedError("no replica can be started; try again later", RETRY_AFTER_S)
    if isinstance(cause, LOST):
        return unavailable(f"the replica ended under the call ({type(cause).__name__})", True)
    return unavailable(f"the replica could not answer ({type(cause).__name__})")


async def call(method: Any, *args: Any, unavailable: Unavailable) -> Any:
    """One awaited call of a deployment method; cancelling it cancels the work on the replica."""
    response = method.remote(*args)
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    except Exception as error:  # noqa: BLE001 - Serve may raise what the replica raised, unwrapped
        raise translate(error, unavailable) from None


@dataclass(frozen=True, slots=True)
class Tries:
    """How often one call is made."""

    most: int = DEFAULT_TRIES
    """Tries in all, the first one included."""
    lost_repeats: int = DEFAULT_LOST_REPEATS
    """Of these, repeats after the replica was lost under the call."""


async def retrying(
    attempt: Callable[[], Awaitable[T]], unavailable: Unavailable, tries: Tries
) -> T:
    """Run ``attempt`` until it succeeds, as often as ``tries`` allows, backing off in between.

    Only ``unavailable`` errors are tried again; the last one is raised when the budget is spent.
    """
    losses = 0
    for spent in range(1, tries.most):
        try:
            return await attempt()
        except unavailable as error:
            losses += error.lost
            if losses > tries.lost_repeats:
                raise
            await asyncio.sleep(random.uniform(0.0, FIRST_BACKOFF_S * 2.0**spent))
    return await attempt()


def chunked(items: Sequence[T], size: int) -> list[list[T]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


class ServeGenerator:
    """:class:`~mora_serve.ports.Generator` over a generator deployment."""

    def __init__(
        self,
        handle: DeploymentHandle[Any],
        *,
        tries: Tries = Tries(),
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        self._handle = handle
        self._tries = tries
        self._chunk = chunk

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        parts = await gather([self._generate(part) for part in chunked(requests, self._chunk)])
        return [result for part in parts for result in part]

    async def _generate(self, requests: list[GenerationRequest]) -> list[Generation | Failure]:
        async def attempt() -> list[Generation | Failure]:
            results: list[Generation | Failure] = await call(
                self._handle.generate, requests, unavailable=GenerationError
            )
            return results

        return await retrying(attempt, GenerationError, self._tries)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[CompletionDelta, None]:
        """A stream is not tried again once a delta was handed out."""
        response = self._handle.options(stream=True).stream.remote(request)
        try:
            async for delta in response:
                yield delta
        except Exception as error:  # noqa: BLE001 - as in call()
            raise translate(error, GenerationError) from None
        finally:
            response.cancel()

    async def models(self, wanted: str | None = None) -> list[str]:
        async def attempt() -> list[str]:
            names: list[str] = await call(self._handle.models, wanted, unavailable=GenerationError)
            return names

        return await retrying(attempt, GenerationError, self._tries)


class ServeScorer:
    """:class:`~mora_serve.ports.Scorer` over several scorer deployments, asked in parallel."""

    def __init__(
        self,
        handles: Mapping[str, DeploymentHandle[Any]],
        *,
        tries: Tries = Tries(),
        chunk: int = DEFAULT_CHUNK,
    ) -> None:
        self._handles = dict(handles)
        self._tries = tries
        self._chunk = chunk
        self._served: dict[str, frozenset[Dimension]] = {}

    async def dimensions(self) -> Mapping[Dimension, tuple[str, str]]:
        merged: dict[Dimension, tuple[str, str]] = {}
        answers = await gather([self._dimensions(name) for name in self._handles])
        for name, answer in zip(self._handles, answers, strict=True):
            self._served[name] = frozenset(answer)
            merged.update(answer)
        return merged

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[list[dict[Dimension, Score]]]:
        if len(self._served) < len(self._handles):
            await self.dimensions()
        parts = chunked(groups, self._chunk)
        asked = self._split(dimensions)
        calls = [self._score(name, part, wanted) for name, wanted in asked for part in parts]
        answers = await gather(calls)
        result: list[list[dict[Dimension, Score]]] = [[{} for _ in g.responses] for g in groups]
        for position in range(len(asked)):
            mine = answers[position * len(parts) : (position + 1) * len(parts)]
            for into, scored in zip(result, (g for part in mine for g in part), strict=True):
                for target, scores in zip(into, scored, strict=True):
                    target.update(scores)
        return result

    def _split(self, wanted: Sequence[Dimension] | None) -> list[tuple[str, list[Dimension]]]:
        """Which deployment is asked for which dimensions."""
        asked = []
        for name, served in self._served.items():
            mine = sorted(served if wanted is None else served.intersection(wanted))
            if mine:
                asked.append((name, mine))
        unknown = set(wanted or ()).difference(*self._served.values())
        if unknown:
            known = sorted(set().union(*self._served.values()))
            raise InvalidRequestError(
                f"dimensions must be among {known}, got {sorted(unknown)}",
                "dimensions",
                "unknown_dimension",
            )
        return asked

    async def _score(
        self, name: str, groups: list[ScoreGroup], wanted: list[Dimension]
    ) -> list[list[dict[Dimension, Score]]]:
        async def attempt() -> list[list[dict[Dimension, Score]]]:
            scores: list[list[dict[Dimension, Score]]] = await call(
                self._handles[name].score, groups, wanted, unavailable=ScoringError
            )
            return scores

        return await retrying(attempt, ScoringError, self._tries)

    async def _dimensions(self, name: str) -> Mapping[Dimension, tuple[str, str]]:
        async def attempt() -> Mapping[Dimension, tuple[str, str]]:
            answer: Mapping[Dimension, tuple[str, str]] = await call(
                self._handles[name].dimensions, unavailable=ScoringError
            )
            return answer

        return await retrying(attempt, ScoringError, self._tries)
