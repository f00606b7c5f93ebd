"""The Redis connection: the only module that imports redis.

Owns the client, the retry policy and the error mapping. Every script and command that is sent
through here is safe to repeat, so a lost connection (a Redis that restarts on its append-only file,
for example) is waited out for ``patience_s`` before it becomes a ``StorageError``.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import Any
from weakref import WeakKeyDictionary

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoScriptError,
    ReadOnlyError,
    RedisError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from mora_serve.concurrency import MicroBatcher
from mora_serve.errors import ConfigError, StorageError

PATIENCE_S = 15.0
"""How long an unreachable server is waited for: several times what a restart takes."""
CONNECT_TIMEOUT_S = 5.0
REPLY_TIMEOUT_S = 10.0
"""Applied here and not as the client's ``socket_timeout``: with that set, redis 8.1 loses most
cancellations that arrive during a read, and a cancelled task goes on."""
MAX_PIPELINE = 64
"""Steps sent in one round trip: those that are wanted in the same turn of the event loop."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 0.02, 1.0
Command = tuple[Any, ...]


class RedisClient:
    """Commands and the ledger's script against one server; a client per event loop."""

    def __init__(self, url: str, *, patience_s: float = PATIENCE_S) -> None:
        self._url = url
        self._patience_s = patience_s
        self._clients: WeakKeyDictionary[asyncio.AbstractEventLoop, Redis] = WeakKeyDictionary()
        self._batchers: WeakKeyDictionary[asyncio.AbstractEventLoop, MicroBatcher[Command, Any]] = (
            WeakKeyDictionary()
        )
        self._script = resources.files(__package__).joinpath("ledger.lua").read_text("utf-8")
        self._sha = hashlib.sha1(self._script.encode(), usedforsecurity=False).hexdigest()
        self._new_client()

    async def command(self, *args: Any) -> Any:
        """One Redis command, for example ``command("PING")``."""
        return await self._patiently(lambda: self._send(*args))

    async def script(self, prefix: str, step: str, *args: Any) -> Any:
        """Run one step of ``ledger.lua`` atomically; replies are bytes, ints, lists or None."""

        async def call() -> Any:
            reply = await self._together().submit(("EVALSHA", self._sha, 1, prefix, step, *args))
            if isinstance(reply, NoScriptError):
                return await self._send("EVAL", self._script, 1, prefix, step, *args)
            if isinstance(reply, Exception):
                raise reply
            return reply

        return await self._patiently(call)

    async def ping(self) -> None:
        """One attempt without patience, for health checks."""
        try:
            await self._send("PING")
        except (RedisError, OSError) as error:
            raise _mapped(error) from error

    async def aclose(self) -> None:
        """Close the connections of the running loop."""
        client = self._clients.pop(asyncio.get_running_loop(), None)
        if client is not None:
            await client.aclose()

    async def _pipeline(self, commands: list[Command]) -> list[Any]:
        """Replies in order; a command's own error is its reply."""
        pipeline = self._client().pipeline(transaction=False)
        for command in commands:
            pipeline.execute_command(*command)
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def _send(self, *args: Any) -> Any:
        send: Callable[..., Awaitable[Any]] = self._client().execute_command
        async with asyncio.timeout(REPLY_TIMEOUT_S):
            return await send(*args)

    async def _patiently(self, call: Callable[[], Awaitable[Any]]) -> Any:
        deadline = time.monotonic() + self._patience_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await call()
            except AuthenticationError as error:
                raise _mapped(error) from error
            except (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OSError) as error:
                if time.monotonic() + pause_s > deadline:
                    raise _mapped(error) from error
            except RedisError as error:
                raise _mapped(error) from error
            await asyncio.sleep(pause_s * random.uniform(0.5, 1.0))
            pause_s = min(2 * pause_s, _LAST_PAUSE_S)

    def _together(self) -> MicroBatcher[Command, Any]:
        loop = asyncio.get_running_loop()
        found = self._batchers.get(loop)
        if found is None:
            found = self._batchers[loop] = MicroBatcher(
                self._pipeline, max_items=MAX_PIPELINE, window_s=0.0
            )
        return found

    def _client(self) -> Redis:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = self._new_client()
        return client

    def _new_client(self) -> Redis:
        try:
            return Redis.from_url(
                self._url,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=None,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                health_check_interval=30,
                protocol=2,
            )
        except ValueError as error:
            raise ConfigError(f"redis.url must be a redis URL: {error}") from None


def _mapped(error: Exception) -> StorageError:
    return StorageError(f"redis could not be used: {type(error).__name__}: {error}")
