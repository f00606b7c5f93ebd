"""A stand-in for Serve handles: calls objects of this process and can fail like Ray does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any


class Response:
    """What ``handle.method.remote()`` returns: awaitable or iterable, and can be cancelled."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self.was_cancelled = False

    def __await__(self) -> Generator[Any, None, Any]:
        result: Generator[Any, None, Any] = self._work.__await__()
        return result

    def __aiter__(self) -> AsyncIterator[Any]:
        iterator: AsyncIterator[Any] = self._work.__aiter__()
        return iterator

    def cancel(self) -> None:
        self.was_cancelled = True


class Method:
    def __init__(self, handle: Handle, name: str) -> None:
        self._handle = handle
        self._name = name

    def remote(self, *args: Any) -> Response:
        self._handle.calls.append((self._name, args))
        if self._handle.failures:
            response = Response(_raise(self._handle.failures.pop(0)))
        else:
            response = Response(getattr(self._handle.target, self._name)(*args))
        self._handle.responses.append(response)
        return response


class Handle:
    """``target`` serves the calls, after the ``failures`` that are listed were raised."""

    def __init__(self, target: Any, failures: list[Exception] | None = None) -> None:
        self.target = target
        self.failures = failures or []
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.responses: list[Response] = []

    def options(self, **_: Any) -> Handle:
        return self

    def __getattr__(self, name: str) -> Method:
        return Method(self, name)


class _Raising:
    """Raises when it is awaited and when it is iterated."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __await__(self) -> Generator[Any, None, Any]:
        yield from asyncio.sleep(0).__await__()
        raise self._error

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[Any]:
        await asyncio.sleep(0)
        raise self._error
        yield


_raise: Callable[[Exception], _Raising] = _Raising
