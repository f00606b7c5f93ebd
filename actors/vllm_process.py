"""vLLM's processes, as the generator and the scoring engine share them.

An ``AsyncLLM`` keeps its model in child processes. Here they are started with their environment,
tied to the life of this process, asked whether they live, and their errors become those of a port.
What is asked of them is not decided here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from actors.guard import ChildGuard, child_pids
from actors.runtime import engine_environment, environment
from mora_serve.errors import GenerationError, InvalidRequestError, ScoringError

PROBE_TIMEOUT_S = 20.0
"""A health probe is answered between two engine steps; slower than this, the engine hangs."""


class VllmProcess:
    """One engine. ``failure`` is what an engine that is gone raises."""

    def __init__(self, failure: type[GenerationError] | type[ScoringError]) -> None:
        self._failure = failure
        self._guard: ChildGuard | None = None
        self.llm: Any = None
        """The ``AsyncLLM``; ``None`` until started."""

    def start(
        self, arguments: Mapping[str, Any], overrides: Mapping[str, str], *, on_cpu: bool
    ) -> None:
        """Load the model; blocks for as long as that takes.

        ``arguments`` are ``AsyncEngineArgs``; ``overrides`` win over
        :func:`~actors.runtime.engine_environment`. vLLM's errors are passed on.
        """
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        num_ranks = int(arguments.get("tensor_parallel_size", 1))
        variables = engine_environment(overrides, on_cpu=on_cpu, num_ranks=num_ranks)
        before = child_pids()
        with environment(variables):
            self.llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._guard = ChildGuard(child_pids() - before)

    async def check_health(self) -> None:
        """Raise ``failure`` when the engine is gone or does not answer."""
        if self.llm is None or self.llm.errored:
            raise self._failure("the engine is not running")
        try:
            await asyncio.wait_for(self.llm.is_paused(), PROBE_TIMEOUT_S)
        except Exception as error:
            raise self._failure(f"the engine gave no answer ({type(error).__name__})") from error

    def stop(self) -> None:
        """End the processes; does nothing to an engine that never started."""
        if self.llm is not None:
            self.llm.shutdown()
        if self._guard is not None:
            self._guard.kill()

    async def outputs(self, stream: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
        """The outputs of one request. Leaving the iteration early ends the request.

        Raises ``InvalidRequestError`` when the engine refuses it, ``failure`` when it is gone.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            async for output in stream:
                yield output
        except VLLMClientError as error:
            raise InvalidRequestError(
                f"the engine refused the request ({type(error).__name__})"
            ) from error
        except EngineDeadError as error:
            raise self._failure("the engine died while it worked on the request", True) from error
        except EngineGenerateError as error:
            raise self._failure("the engine failed while it worked on the request") from error
        finally:
            await stream.aclose()


def runs_on_cpu() -> bool:
    """Whether the installed vLLM is the build for CPUs."""
    from vllm.platforms import current_platform

    is_cpu: bool = current_platform.is_cpu()
    return is_cpu
