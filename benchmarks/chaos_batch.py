"""One batch over REST as its user sees it: submitted, followed while it runs, read when it is done.

The official ``openai`` client submits, polls and reads the files; the pairs are followed over HTTP
with reconnects, each from the last ``seq`` that arrived.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx
import openai
import pyarrow.parquet as pq

from benchmarks.audit import Leavings
from mora_serve.requests import REWRITES_URL

T = TypeVar("T")

POLL_S = 0.5
READ_TIMEOUT_S = 30.0
PATIENCE_S = 120.0
"""How long a call is repeated while parts of the stack start again."""
TERMINAL = ("completed", "failed", "expired", "cancelled")


def custom_ids(num_rows: int) -> list[str]:
    return [f"row-{index:06d}" for index in range(num_rows)]


def input_lines(num_rows: int, body: dict[str, Any]) -> bytes:
    """Rewrites of questions that are all different; ``body`` is the rest of each request."""
    rows = (
        {
            "custom_id": name,
            "method": "POST",
            "url": REWRITES_URL,
            "body": {"prompt": f"How do I look after {index} cats in a small flat?", **body},
        }
        for index, name in enumerate(custom_ids(num_rows))
    )
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


class Follower(threading.Thread):
    """Reads pairs while the batch runs. Reconnects after whatever ends the connection."""

    def __init__(self, url: str, batch_id: str) -> None:
        super().__init__(name="follower", daemon=True)
        self._url = f"{url}/v1/batches/{batch_id}/pairs"
        self._over = threading.Event()
        self.pairs: list[dict[str, Any]] = []
        self.num_connections = 0

    def run(self) -> None:
        while not self._follow() and not self._over.wait(POLL_S):
            pass

    def finish(self) -> list[dict[str, Any]]:
        """All pairs, once the batch is over."""
        self._over.set()
        self.join()
        while not self._follow():
            time.sleep(POLL_S)
        return self.pairs

    def _follow(self) -> bool:
        """One connection; True when the server ended it in order after the batch was over."""
        self.num_connections += 1
        was_over = self._over.is_set()
        after = self.pairs[-1]["seq"] if self.pairs else -1
        params = {"follow": "true", "after": str(after)}
        try:
            with httpx.stream("GET", self._url, params=params, timeout=READ_TIMEOUT_S) as response:
                response.raise_for_status()
                for line in response.iter_lines():
                    self.pairs.append(json.loads(line))
        except (httpx.HTTPError, ValueError):
            return False
        return was_over


@dataclass(slots=True)
class Run:
    """A batch under way."""

    url: str
    batch_id: str
    num_rows: int
    client: openai.OpenAI
    follower: Follower
    num_done: int = 0

    def share(self) -> float:
        """Share of the rows that are done."""
        return self.num_done / self.num_rows

    def wait(self, tell: Callable[[int], None] = lambda done: None) -> None:
        """Poll until the batch has ended; failing polls are repeated."""
        while True:
            batch = patiently(lambda: self.client.batches.retrieve(self.batch_id))
            counts = batch.request_counts
            self.num_done = counts.completed + counts.failed if counts is not None else 0
            tell(self.num_done)
            if batch.status in TERMINAL:
                return
            time.sleep(POLL_S)

    def leavings(self) -> Leavings:
        """Everything the batch left, read now."""
        batch = patiently(lambda: self.client.batches.retrieve(self.batch_id))
        return Leavings(
            batch=batch.model_dump(),
            output=self._lines(batch.output_file_id),
            errors=self._lines(batch.error_file_id),
            followed=self.follower.finish(),
            pairs=[json.loads(line) for line in self._pairs("application/x-ndjson").splitlines()],
            table=pq.read_table(
                io.BytesIO(self._pairs("application/vnd.apache.parquet"))
            ).to_pylist(),
        )

    def _lines(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        text = patiently(lambda: self.client.files.content(file_id).text)
        return [json.loads(line) for line in text.splitlines()]

    def _pairs(self, accept: str) -> bytes:
        def get() -> bytes:
            path = f"{self.url}/v1/batches/{self.batch_id}/pairs"
            response = httpx.get(path, headers={"Accept": accept}, timeout=READ_TIMEOUT_S)
            response.raise_for_status()
            return response.content

        return patiently(get)


@contextmanager
def submitted(url: str, num_rows: int, body: dict[str, Any]) -> Iterator[Run]:
    """Upload, create, and follow from the start."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=5) as client:
        content = input_lines(num_rows, body)
        file = client.files.create(file=("rows.jsonl", content), purpose="batch")
        endpoint: Any = REWRITES_URL
        batch = client.batches.create(
            input_file_id=file.id, endpoint=endpoint, completion_window="24h"
        )
        follower = Follower(url, batch.id)
        follower.start()
        yield Run(url, batch.id, num_rows, client, follower)


def patiently(call: Callable[[], T]) -> T:
    """Repeat a call that may meet a stack half of which is starting again."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return call()
        except (openai.APIConnectionError, openai.InternalServerError, httpx.HTTPError):
            if time.monotonic() > deadline:
                raise
            time.sleep(POLL_S)
