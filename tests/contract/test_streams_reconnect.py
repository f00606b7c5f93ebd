"""Pairs and events over connections that are cut anywhere: nothing is missing or comes twice."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api import schemas
from api.routes.batches import progress_events
from mora_serve.config import load_settings
from mora_serve.store import Stores, pair_stream
from tests.contract.gateway_server import gateway, http_server
from tests.unit.store.ledger_driver import lease, open_batch, row

ROWS = 40


@dataclass
class Service:
    url: str
    stores: Stores


@pytest.fixture
async def service(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Service]:
    monkeypatch.setattr(pair_stream, "PAIRS_PER_PART", 8)
    monkeypatch.setattr(stores.pairs, "_interval_s", 0.002)
    settings = load_settings("fake", environ={})
    app = gateway(stores, settings, poll_interval_s=0.002, keep_alive_s=0.004)
    async with http_server(app) as url:
        yield Service(url, stores)


async def work_through(stores: Stores, batch_id: str, pauses: random.Random) -> None:
    """Commit rows of 0 to 2 pairs in two shards, sealing as a runner does, then finish."""
    for _ in range(2):
        held = await lease(stores)
        for number in range(held.first_line, held.first_line + held.num_rows):
            await stores.batches.commit_row(held, row(number, number % 3))
            await asyncio.sleep(pauses.choice([0, 0, 0.001, 0.004]))
        await stores.batches.seal_shard(held)
    await stores.batches.finalize_ready("w", 60.0)


async def cut_after(
    client: httpx.AsyncClient, url: str, num_bytes: int, headers: dict[str, str]
) -> tuple[bytes, int, bool]:
    """What arrived before the connection was cut, the status, and whether it had ended by then."""
    got = b""
    async with client.stream("GET", url, headers=headers) as response:
        async for chunk in response.aiter_raw():
            got += chunk
            if len(got) >= num_bytes:
                return got[:num_bytes], response.status_code, False
    return got, response.status_code, True


@pytest.mark.parametrize("seed", range(4))
async def test_pairs_are_gapless_over_cut_connections(service: Service, seed: int) -> None:
    cuts = random.Random(seed)
    batch_id = await open_batch(service.stores, [ROWS // 2, ROWS // 2])
    worker = asyncio.create_task(work_through(service.stores, batch_id, random.Random(seed)))
    seqs: list[int] = []
    ended = False
    async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(60):
        while not ended:
            after = seqs[-1] if seqs else -1
            url = f"/v1/batches/{batch_id}/pairs?follow=true&after={after}"
            data, _, ended = await cut_after(client, url, cuts.randrange(1, 700), {})
            lines = data.split(b"\n")[:-1]
            seqs += [json.loads(line)["seq"] for line in lines]
    await worker

    assert seqs == list(range(sum(number % 3 for number in range(ROWS))))


@pytest.mark.parametrize("seed", range(4))
async def test_events_rise_over_cut_connections_and_end_with_the_batch(
    service: Service, seed: int
) -> None:
    cuts = random.Random(seed)
    batch_id = await open_batch(service.stores, [ROWS // 2, ROWS // 2])
    worker = asyncio.create_task(work_through(service.stores, batch_id, random.Random(seed)))
    events: list[tuple[int, schemas.BatchEvent]] = []
    status = 200
    async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(60):
        while status == 200:
            last = {"Last-Event-ID": str(events[-1][0])} if events else {}
            url = f"/v1/batches/{batch_id}/events"
            data, status, _ = await cut_after(client, url, cuts.randrange(1, 2000), last)
            events += parse_events(data)
    await worker

    assert status == 204, "a client that has the last event is told to stay away"
    ids = [number for number, _ in events]
    assert ids == sorted(set(ids)), "an event came twice or out of order"
    done = [event.request_counts.completed for _, event in events]
    assert done == sorted(done)
    assert (events[-1][1].status, done[-1]) == ("completed", ROWS)
    assert events[-1][1].classes == {"multi": ROWS}


def parse_events(data: bytes) -> list[tuple[int, schemas.BatchEvent]]:
    """Complete events; comments are skipped as the standard says."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line[0] != ":")
        if fields:
            assert fields["event"] == "progress"
            event = schemas.BatchEvent.model_validate_json(fields["data"])
            found.append((int(fields["id"]), event))
    return found


async def test_quiet_stream_is_kept_alive(service: Service) -> None:
    batch_id = await open_batch(service.stores, [1])
    async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(30):
        data, _, _ = await cut_after(client, f"/v1/batches/{batch_id}/events", 600, {})

    assert data.count(b": keep-alive\n\n") > 3
    assert len(parse_events(data)) == 1


@pytest.mark.parametrize(("header", "status"), [("x", 400), ("-1", 400), ("999999", 200)])
async def test_last_event_id_that_no_event_had(service: Service, header: str, status: int) -> None:
    batch_id = await open_batch(service.stores, [1])
    async with httpx.AsyncClient(base_url=service.url) as client, asyncio.timeout(30):
        url = f"/v1/batches/{batch_id}/events"
        data, found, _ = await cut_after(client, url, 100, {"Last-Event-ID": header})

    assert found == status
    assert (b"event: progress" in data) == (status == 200), "one from the future starts anew"


Actions = Sequence[tuple[str, int]]
ACTIONS = st.lists(
    st.tuples(st.sampled_from(["commit", "commit", "seal", "read", "cut"]), st.integers(0, 5)),
    max_size=40,
)


@given(ACTIONS)
def test_no_interleaving_of_work_and_cuts_shows_a_gap_or_a_repeat(actions: Actions) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pair_stream, "PAIRS_PER_PART", 3)
        asyncio.run(_interleave(actions))


async def _interleave(actions: Actions) -> None:
    stores = Stores.memory()
    batch_id = await open_batch(stores, [len(actions) + 1])
    held, committed = await lease(stores), 0
    reader = _Reader(stores, batch_id)
    for action, size in actions:
        if action == "commit":
            await stores.batches.commit_row(held, row(committed, size))
            committed += 1
        elif action == "seal":
            await stores.pairs.seal(batch_id, everything=size > 2)
        elif action == "read":
            await reader.read_on(size)
        else:
            reader.cut(size)
    for number in range(committed, held.num_rows):
        await stores.batches.commit_row(held, row(number, 1))
    await stores.batches.seal_shard(held)
    await stores.batches.finalize_ready("w", 60.0)
    await reader.read_to_the_end()


class _Reader:
    """A client of both streams that may lose what it was sent last."""

    def __init__(self, stores: Stores, batch_id: str) -> None:
        self._stores = stores
        self._batch_id = batch_id
        self._seqs: list[int] = []
        self._events: list[tuple[int, dict[str, Any]]] = []

    async def read_on(self, num_pairs: int) -> None:
        after = self._seqs[-1] if self._seqs else -1
        pairs = await self._stores.pairs.read(self._batch_id, after, num_pairs + 1)
        self._seqs += [pair["seq"] for pair in pairs]
        await self._next_event()

    def cut(self, lost: int) -> None:
        self._seqs = self._seqs[: max(0, len(self._seqs) - lost)]
        self._events = self._events[: max(0, len(self._events) - lost)]

    async def _next_event(self) -> bool:
        """Read one event; False when the stream has none that this client has not."""
        seen = self._events[-1][0] if self._events else None
        first = await self._stores.batches.progress(self._batch_id)
        if first["version"] == seen:
            return False
        stream = progress_events(
            self._stores.batches, self._batch_id, first, seen, poll_s=0.0, keep_alive_s=60.0
        )
        async with aclosing(stream) as chunks:
            (found,) = parse_events(await anext(chunks))
        assert seen is None or found[0] > seen
        self._events.append((found[0], found[1].model_dump()))
        return True

    async def read_to_the_end(self) -> None:
        while await self._next_event():
            pass
        async with aclosing(
            self._stores.pairs.follow(self._batch_id, self._seqs[-1] if self._seqs else -1)
        ) as pairs:
            async for pair in pairs:
                self._seqs.append(pair["seq"])
        batch = await self._stores.batches.get_batch(self._batch_id)
        last = self._events[-1][1]
        assert (last["status"], last["request_counts"]) == ("completed", batch["request_counts"])
        assert self._seqs == list(range(last["pairs"]))
