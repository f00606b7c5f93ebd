"""The ``fake`` backend of the generator: a fake generator with the life cycle of an engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from actors.generator import PolicyVersion
from mora_serve.config import PolicySettings
from mora_serve.fakes import FakeGenerator
from mora_serve.ports import CompletionDelta
from mora_serve.types import Failure, Generation, GenerationRequest


class FakeEngine:
    """A :class:`~actors.generator.PolicyEngine` without weights."""

    def __init__(self, settings: PolicySettings) -> None:
        self._settings = settings
        self._generator = self._serving([settings.model])

    async def start(self) -> None:
        """Nothing to load."""

    async def check_health(self) -> None:
        """Always healthy."""

    async def publish(self, versions: Sequence[PolicyVersion], current: str) -> None:
        others = [version.id for version in versions if version.id != current]
        self._generator = self._serving([current, *others])

    async def stop(self) -> None:
        """Nothing to free."""

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        return await self._generator.generate(requests)

    def stream(self, request: GenerationRequest) -> AsyncIterator[CompletionDelta]:
        return self._generator.stream(request)

    async def models(self, wanted: str | None = None) -> list[str]:
        return await self._generator.models(wanted)

    def _serving(self, models: Sequence[str]) -> FakeGenerator:
        return FakeGenerator(
            models, self._settings.fake_delay_ms, max_model_len=self._settings.max_model_len
        )
