"""Feeds over the stores: a batch's pair stream, and files in JSONL or Parquet.

The training loop is synchronous while the stores are asynchronous; :class:`StoreSession` runs their
event loop in a thread of its own and lets the loop wait for single answers.
"""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

from mora_serve.errors import InvalidRequestError
from mora_serve.ports import PairStream
from mora_serve.store import Stores
from trainer.source import Row

T = TypeVar("T")

ROW_FIELDS = ("prompt", "chosen", "rejected")


class StoreSession:
    """Stores with a running event loop, for synchronous callers, for example::

    with StoreSession(open_stores(settings)) as session:
        job = session.call(session.stores.jobs.get_job(job_id))
    """

    def __init__(self, stores: Stores) -> None:
        self.stores = stores
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="store-session", daemon=True
        )

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.call(self.stores.aclose())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine on the session's loop and return its result or raise its error."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()


@dataclass(frozen=True, slots=True)
class BatchFeed:
    """The pairs of one batch, as a :class:`~trainer.source.Feed`."""

    session: StoreSession
    pairs: PairStream
    batch_id: str

    def read(self, after: int, limit: int) -> Sequence[Row]:
        return self.session.call(self.pairs.read(self.batch_id, after, limit))

    def is_finished(self) -> bool:
        return self.session.call(self.pairs.is_finished(self.batch_id))


async def read_training_file(stores: Stores, file_id: str) -> list[dict[str, Any]]:
    """Preference rows of an uploaded file.

    Raises :class:`~mora_serve.errors.InvalidRequestError` naming the line that cannot be used.
    """
    _, key = await stores.batches.get_file(file_id)
    data = b"".join([chunk async for chunk in stores.blobs.open_read(key)])
    return parse_rows(data)


def parse_rows(data: bytes) -> list[dict[str, Any]]:
    """Rows of a Parquet or JSONL file; OpenAI's preference lines are understood as well."""
    if data.startswith(b"PAR1"):
        return [_checked(row, number) for number, row in enumerate(_parquet_rows(data), 1)]
    lines = enumerate(data.splitlines(), 1)
    return [_checked(_parse(line, number), number) for number, line in lines if line.strip()]


def _parquet_rows(data: bytes) -> list[dict[str, Any]]:
    from pyarrow import ArrowException, parquet

    try:
        rows: list[dict[str, Any]] = parquet.read_table(io.BytesIO(data)).to_pylist()
    except (ArrowException, OSError) as error:
        raise InvalidRequestError(
            f"training_file must be a whole Parquet file, got one that cannot be read "
            f"({type(error).__name__})",
            "training_file",
            "invalid_training_file",
        ) from None
    return rows


def _parse(line: bytes, number: int) -> Any:
    try:
        return json.loads(line, parse_constant=_refuse)
    except (ValueError, RecursionError):
        raise _bad(number, "must be JSON") from None


def _refuse(constant: str) -> Any:
    """Python reads NaN and Infinity, JSON has neither."""
    raise ValueError(constant)


def _checked(row: Any, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _bad(number, "must be an object")
    if "preferred_output" in row:
        source = row.get("input")
        row = {
            **row,
            "prompt": source.get("messages") if isinstance(source, dict) else None,
            "chosen": row["preferred_output"],
            "rejected": row.get("non_preferred_output"),
        }
    for name in ROW_FIELDS:
        turns = row.get(name)
        if not isinstance(turns, list) or not turns or not all(map(_is_message, turns)):
            raise _bad(number, f"must have a non-empty message list {name}")
        if not all(_is_encodable(turn["role"] + turn["content"]) for turn in turns):
            raise _bad(number, f"must have valid Unicode text in {name}")
    if _words(row["chosen"]) == _words(row["rejected"]):
        raise _bad(number, "must have a chosen answer that differs from the rejected one")
    if not _words(row["chosen"])[-1][1]:
        raise _bad(number, "must have a chosen answer that is not empty")
    return dict(row)


def _words(turns: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """What is said, whitespace aside."""
    return [(turn["role"], turn["content"].split()) for turn in turns]


def _is_message(turn: Any) -> bool:
    return (
        isinstance(turn, Mapping)
        and isinstance(turn.get("role"), str)
        and isinstance(turn.get("content"), str)
    )


def _is_encodable(text: str) -> bool:
    """JSON may spell out halves of surrogate pairs, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _bad(number: int, rule: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"training_file line {number} {rule}", "training_file", "invalid_training_file"
    )
