"""The generator replica: one engine, the policy versions it serves, and its health.

Does not own sampling (the engine does) nor placement (Serve does). The replica follows the policy
versions that the job store lists::

    JobStore --poll--> watcher --publish(versions, current)--> engine --> models(), default version

and it dies with its engine: when the engine is gone, the health check raises and the process exits,
so that Serve starts a new replica and no retry meets a corpse.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

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
        poll_interval_s: float = POLL_INTERVAL_S,
        exit_process: Callable[[int], Any] = os._exit,
    ) -> None:
        self._engine = engine
        self._policies = policies
        self._base = PolicyVersion(base, "base", None)
        self._poll_interval_s = poll_interval_s
        self._exit_process = exit_process
        self._seen: tuple[str, tuple[PolicyVersion, ...]] | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Load the engine, serve the versions known now, and watch for new ones."""
        await self._engine.start()
        await self._engine.publish([self._base], self._base.id)
        if self._policies is not None:
            await self.refresh()
            self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await self._engine.stop()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        return await self._engine.generate(requests)

    async def stream(self, request: GenerationRequest) -> AsyncIterator[CompletionDelta]:
        async for delta in self._engine.stream(request):
            yield delta

    async def models(self) -> list[str]:
        return await self._engine.models()

    async def check_health(self) -> None:
        """Raises when the engine is dead, and ends the process so that Serve replaces it."""
        try:
            await self._engine.check_health()
        except GenerationError:
            logger.critical("the engine died; this replica exits with it")
            self._exit_process(EXIT_DEAD_ENGINE)
            raise

    async def refresh(self) -> None:
        """Read the policy versions once and publish them to the engine if they changed."""
        assert self._policies is not None
        try:
            listed = await self._policies.list_policies()
            current = await self._current()
        except StorageError as error:
            logger.warning("policy versions could not be read: %s", error)
            return
        versions = self._versions(listed)
        if current not in {version.id for version in versions}:
            logger.error("current policy %s is not listed; keeping the served one", current)
            return
        if (current, versions) != self._seen:
            await self._engine.publish(versions, current)
            self._seen = (current, versions)
            logger.info("serving %d policy versions, current %s", len(versions), current)

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
            try:
                await self.refresh()
            except GenerationError as error:
                logger.error("a policy version could not be loaded: %s", error)
