"""The generator replica: one engine, the policy versions it serves, and its health.

Does not own sampling (the engine does) nor placement (Serve does). The replica follows the policy
versions that the job store lists::

    JobStore --poll--> watcher --publish(versions, current)--> engine --> models(), default version

A request that names a version which is not served makes the replica look into the store at once,
so a version can be sampled from the moment it is published. Such requests wait for one look that
begins after they came, and share it; changes of the served versions happen one at a time.

The replica dies with its engine: when the engine is gone, the health check raises and the process
exits, so that Serve starts a new replica and no retry meets a corpse.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from actors.metrics import GeneratorMetrics
from mora_serve.errors import GenerationError, NotFoundError, StorageError
from mora_serve.ports import CompletionDelta, Generator
from mora_serve.types import Failure, Generation, GenerationRequest

logger = logging.getLogger(__name__)

POLL_INTERVAL_S = 1.0
"""How often the policy versions are read."""
EXIT_DEAD_ENGINE = 70
"""Exit status of a replica whose engine died."""


@dataclass(frozen=True, slots=True)
class PolicyVersion:
    """A sampled policy, for example ``PolicyVersion("policy-1f", "lora", "/data/adapters/1f")``."""

    id: str
    kind: str
    """``base``, ``lora`` (an adapter of the base) or ``merged`` (a full model directory)."""
    uri: str | None
    """Directory of the adapter or model; ``None`` for ``base``."""


class PolicySource(Protocol):
    """The part of :class:`~mora_serve.ports.JobStore` that names policy versions."""

    async def list_policies(self) -> list[dict[str, Any]]: ...
    async def current_policy(self) -> tuple[str, int]: ...


class PolicyEngine(Generator, Protocol):
    """A generator whose policy versions can be changed while it runs."""

    async def start(self) -> None:
        """Load the model. Raises ``GenerationError`` when it cannot be served."""
        ...

    async def check_health(self) -> None:
        """Raise ``GenerationError`` when the engine can serve no further request."""
        ...

    async def publish(self, versions: Sequence[PolicyVersion], current: str) -> None:
        """Serve ``versions``; requests without a model get ``current`` from now on."""
        ...

    async def stop(self) -> None: ...


class GeneratorReplica:
    """Serves a :class:`PolicyEngine` and keeps its policy versions current."""

    def __init__(
        self,
        engine: PolicyEngine,
        policies: PolicySource | None,
        base: str,
        *,
        metrics: GeneratorMetrics | None = None,
        poll_interval_s: float = POLL_INTERVAL_S,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._engine = engine
        self._policies = policies
        self._base = PolicyVersion(base, "base", None)
        self._metrics = metrics
        self._poll_interval_s = poll_interval_s
        self._exit_process = exit_process
        self._seen: tuple[str, tuple[PolicyVersion, ...]] | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._next_look: asyncio.Task[None] | None = None
        """A look into the store that has not begun: who asks now may share it."""
        self._looks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Load the engine, serve the versions known now, and watch for new ones."""
        await self._engine.start()
        await self._engine.publish([self._base], self._base.id)
        if self._policies is not None:
            await self._try_refresh()
            self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        for look in self._looks:
            look.cancel()
        await self._engine.stop()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        with self._tracked(len(requests)):
            await self._look_for(request.model for request in requests)
            try:
                results = await self._engine.generate(requests)
            except GenerationError:
                await self.check_health()
                raise
        self._count(results)
        return results

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[CompletionDelta, None]:
        with self._tracked(1):
            await self._look_for([request.model])
            try:
                async for delta in self._engine.stream(request):
                    yield delta
            except GenerationError:
                await self.check_health()
                raise

    async def models(self, wanted: str | None = None) -> list[str]:
        await self._look_for([wanted])
        return await self._engine.models()

    async def check_health(self) -> None:
        """Raises when the engine is dead, and ends the process so that Serve replaces it."""
        try:
            await self._engine.check_health()
        except GenerationError:
            logger.critical("the engine died; this replica exits with it")
            self._exit_process(EXIT_DEAD_ENGINE)
            raise

    @contextmanager
    def _tracked(self, num_prompts: int) -> Iterator[None]:
        if self._metrics is None:
            yield
            return
        self._metrics.in_flight.inc(num_prompts)
        try:
            yield
        finally:
            self._metrics.in_flight.dec(num_prompts)

    def _count(self, results: Sequence[Generation | Failure]) -> None:
        if self._metrics is None:
            return
        for result in results:
            if isinstance(result, Failure):
                self._metrics.requests.labels(result.code).inc()
                continue
            self._metrics.requests.labels("ok").inc()
            self._metrics.tokens.labels("prompt").inc(result.num_prompt_tokens)
            self._metrics.tokens.labels("cached_prompt").inc(result.num_cached_tokens)
            for item in result.completions:
                self._metrics.tokens.labels("completion").inc(item.num_tokens)
                self._metrics.completions.labels(item.finish_reason).inc()

    async def refresh(self) -> None:
        """Read the policy versions once and publish them to the engine if they changed."""
        async with self._changing:
            await self._refresh()

    async def _refresh(self) -> None:
        assert self._policies is not None
        try:
            listed = await self._policies.list_policies()
            current = await self._current()
        except StorageError as error:
            logger.warning("policy versions could not be read: %s", error)
            return
        versions = self._versions(listed)
        try:
            if current not in {version.id for version in versions}:
                logger.error("current policy %s is not listed; keeping the served one", current)
            elif (current, versions) != self._seen:
                await self._engine.publish(versions, current)
                self._seen = (current, versions)
                logger.info("serving %d policy versions, current %s", len(versions), current)
        finally:
            await self._tell_served(current)

    async def _tell_served(self, current: str) -> None:
        if self._metrics is None:
            return
        served = await self._engine.models()
        self._metrics.versions.set(len(served))
        self._metrics.serves_current.set(served[0] == current)

    async def _current(self) -> str:
        assert self._policies is not None
        try:
            current, _epoch = await self._policies.current_policy()
        except NotFoundError:
            return self._base.id
        return current or self._base.id

    def _versions(self, listed: Sequence[Mapping[str, Any]]) -> tuple[PolicyVersion, ...]:
        others = (
            PolicyVersion(str(item["id"]), str(item["kind"]), item.get("uri"))
            for item in listed
            if item["id"] != self._base.id
        )
        return (self._base, *others)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._poll_interval_s)
            await self._try_refresh()

    async def _try_refresh(self) -> None:
        """A version that cannot be loaded costs nothing but itself; it is tried again."""
        async with self._changing:
            self._next_look = None
            try:
                await self._refresh()
            except GenerationError as error:
                logger.error("a policy version could not be loaded: %s", error)

    async def _look_for(self, names: Iterable[str | None]) -> None:
        """Return once the named versions are served, as far as the store has them."""
        wanted = {name for name in names if name is not None}
        if self._policies is None or wanted.issubset(await self._engine.models()):
            return
        if self._next_look is None:
            # A task of its own: a caller that goes away must not cut a change of weights short.
            self._next_look = asyncio.create_task(self._try_refresh())
            self._looks.add(self._next_look)
            self._next_look.add_done_callback(self._looks.discard)
        await asyncio.shield(self._next_look)
