"""Replicas by backlog: what the controller is told, and what it is told when nothing is known."""

from __future__ import annotations

import gc
import pickle
import queue
import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
from pydantic import SecretStr

from actors import autoscaling
from actors.autoscaling import FRESH_S, BacklogPolicy, Reading, RedisBacklog, watch
from mora_serve.errors import StorageError
from mora_serve.redis_server import RedisServer
from mora_serve.store.redis_client import RedisClient
from mora_serve.store.redis_store import RedisLedger
from tests.redis_fixtures import redis_server, redis_url

__all__ = ["redis_server", "redis_url"]


class Scripted:
    """A source that gives what it was told to, one reading after the other."""

    def __init__(self, *readings: int | Exception) -> None:
        self.left = list(readings)
        self.read = queue.SimpleQueue[int]()
        self.may_go_on = threading.Semaphore(0)

    async def backlog(self) -> int:
        self.may_go_on.acquire()
        self.read.put(len(self.left))
        found = self.left.pop(0) if self.left else 0
        if isinstance(found, Exception):
            raise found
        return found


def context(target: int = 1) -> Any:
    return cast(Any, SimpleNamespace(target_num_replicas=target))


def told(rows: int | None, target: int = 1, rows_per_replica: int = 10) -> int:
    policy = BacklogPolicy(rows_per_replica, Scripted())
    policy._reading = Reading()
    if rows is not None:
        policy._reading.put(rows)
    return policy(context(target))[0]


@pytest.mark.parametrize(
    ("rows", "replicas"), [(0, 0), (1, 1), (10, 1), (11, 2), (30, 3), (100_000, 10_000)]
)
def test_one_replica_per_share_of_the_backlog_and_none_without(rows: int, replicas: int) -> None:
    assert told(rows) == replicas


def test_the_number_of_replicas_stays_while_the_backlog_is_not_known() -> None:
    assert told(None, target=2) == 2
    assert told(None, target=0) == 0


def test_a_reading_counts_for_a_time() -> None:
    now = [0.0]
    reading = Reading(lambda: now[0])
    assert reading.rows() is None
    reading.put(7)
    now[0] = FRESH_S
    assert reading.rows() == 7
    now[0] = FRESH_S + 0.1
    assert reading.rows() is None


def test_a_call_never_waits_for_the_store() -> None:
    source = Scripted(25)
    policy = BacklogPolicy(10, source)
    assert policy(context(target=4))[0] == 4
    source.may_go_on.release()
    source.read.get(timeout=10)
    source.may_go_on.release()


def test_readings_go_on_after_failures_and_end_with_their_reader() -> None:
    source = Scripted(StorageError("away"), StorageError("away"), 42)
    reading = Reading()
    thread = watch(source, reading, poll_s=0.0)
    for _ in range(3):
        source.may_go_on.release()
        source.read.get(timeout=10)
    source.may_go_on.release()
    source.read.get(timeout=10)
    assert reading.rows() in {0, 42}
    del reading
    gc.collect()
    source.may_go_on.release(100)
    thread.join(10)
    assert not thread.is_alive()


def test_a_policy_that_has_run_can_be_pickled_and_starts_anew() -> None:
    policy = BacklogPolicy(10, RedisBacklog(SecretStr("redis://:hush@127.0.0.1:1"), "mora"))
    policy(context())
    again = pickle.loads(pickle.dumps(policy))
    assert again._rows_per_replica == 10
    assert again._reading is None
    assert again._source._url.get_secret_value() == "redis://:hush@127.0.0.1:1"


@pytest.mark.redis
async def test_the_backlog_of_a_real_ledger_is_read(redis_url: str) -> None:
    ledger = RedisLedger(RedisClient(redis_url), "scaling")
    limits = {"input_bytes": 100, "input_rows": 1, "max_rows": 1000, "max_bytes": 1000}
    await ledger.create_batch({"id": "batch_1"}, {}, None, "hash", 1000.0, **limits)
    await ledger.open_batch("batch_1", [(0, 25, 0, 100)], 25, "files/in")
    assert await RedisBacklog(SecretStr(redis_url), "scaling").backlog() == 25
    await ledger.aclose()


@pytest.mark.redis
def test_a_store_that_goes_away_leaves_the_last_target(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autoscaling, "PATIENCE_S", 0.0)
    gone = RedisBacklog(SecretStr("redis://127.0.0.1:1/0"), "mora")
    policy = BacklogPolicy(10, gone)
    assert [policy(context(target=3))[0] for _ in range(3)] == [3, 3, 3]
