"""Reading a batch's input file: lines, shards, and which lines repeat a ``custom_id``.

:class:`InputScan` looks at a file once, piece by piece, and cuts it into shards; memory does not
grow with the file: the ids seen are hashes in a temporary SQLite file. :func:`split_lines` reads a
shard back. Line numbers are physical and count from 0; blank lines are no rows. A byte order mark
is passed over at the start of the file, and nowhere else.
"""

from __future__ import annotations

import codecs
import hashlib
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from types import TracebackType

from mora_serve.identity import content_hash
from mora_serve.requests import custom_id_of
from mora_serve.store.steps import ShardSpec

MAX_SHARD_BYTES = 8 * 2**20
"""A shard ends after this many bytes even when it has fewer rows than configured."""


@dataclass(frozen=True, slots=True)
class Line:
    """One row of the input."""

    number: int
    data: bytes | None
    """Without the line break; ``None`` when the line is longer than the limit."""


@dataclass(slots=True)
class Shard:
    """Consecutive lines that one runner works through."""

    first_line: int
    offset_bytes: int
    num_rows: int = 0
    num_bytes: int = 0
    duplicates: list[int] = field(default_factory=list)
    """Lines whose ``custom_id`` was used on an earlier line of the file."""

    @property
    def spec(self) -> ShardSpec:
        return self.first_line, self.num_rows, self.offset_bytes, self.num_bytes


def row_id(prefix: str, batch_id: str, line: int) -> str:
    """Id of what became of a row, the same however often the row is worked on."""
    return f"{prefix}_{content_hash([batch_id, line])[:24]}"


class NotUtf8Error(ValueError):
    """The input is not UTF-8; ``line`` counts from 1."""

    def __init__(self, line: int) -> None:
        super().__init__(f"line {line} must be UTF-8")
        self.line = line


class LineSplitter:
    """Cuts chunks into lines; a line over ``max_bytes`` is dropped but still counted."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._pieces: list[bytes] = []
        self._length = 0

    def feed(self, chunk: bytes) -> Iterator[tuple[bytes | None, int]]:
        """``(line or None, its bytes with the break)`` for each line that ends in ``chunk``."""
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            self._add(chunk[start:end])
            yield self._take(1)
            start = end + 1
        self._add(chunk[start:])

    def finish(self) -> Iterator[tuple[bytes | None, int]]:
        """The last line, when it has no line break."""
        if self._length:
            yield self._take(0)

    def _add(self, piece: bytes) -> None:
        self._length += len(piece)
        if self._length <= self._max_bytes:
            self._pieces.append(piece)
        else:
            self._pieces.clear()

    def _take(self, line_break: int) -> tuple[bytes | None, int]:
        line = b"".join(self._pieces) if self._length <= self._max_bytes else None
        size = self._length + line_break
        self._pieces.clear()
        self._length = 0
        return line, size


class InputScan:
    """One pass over an input file. Feed it chunks, then ``finish`` it; both give finished shards.

    Blocking and CPU-bound: call it from a thread, one call at a time. Use it as a context manager,
    it holds a temporary file. Raises :class:`NotUtf8Error`.
    """

    def __init__(self, shard_rows: int, max_line_bytes: int) -> None:
        self._shard_rows = shard_rows
        self._splitter = LineSplitter(max_line_bytes)
        self._number = 0
        self._offset = 0
        self._shard: Shard | None = None
        self.num_rows = 0
        """Rows seen so far."""
        self._file = tempfile.NamedTemporaryFile(prefix="mora-ids-")  # noqa: SIM115
        self._ids = sqlite3.connect(self._file.name, check_same_thread=False, isolation_level=None)
        self._ids.execute("PRAGMA journal_mode = OFF")
        self._ids.execute("PRAGMA synchronous = OFF")
        self._ids.execute("CREATE TABLE seen (id BLOB PRIMARY KEY) WITHOUT ROWID")
        self._ids.execute("BEGIN")

    def __enter__(self) -> InputScan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ids.close()
        self._file.close()

    def feed(self, chunk: bytes) -> list[Shard]:
        """Shards that were completed by this chunk."""
        lines = self._splitter.feed(chunk)
        return [shard for line, size in lines if (shard := self._line(line, size)) is not None]

    def finish(self) -> list[Shard]:
        """The remaining shards."""
        lines = self._splitter.finish()
        done = [shard for line, size in lines if (shard := self._line(line, size)) is not None]
        if self._shard is not None and self._shard.num_rows:
            done.append(self._shard)
        return done

    def _line(self, line: bytes | None, size: int) -> Shard | None:
        number, offset = self._number, self._offset
        self._number += 1
        self._offset += size
        if self._shard is None:
            self._shard = Shard(number, offset)
        shard = self._shard
        shard.num_bytes += size
        line = _unmarked(line, number)
        if line is not None and not line.strip():
            return None
        shard.num_rows += 1
        self.num_rows += 1
        if line is not None and self._is_repeated(line, number):
            shard.duplicates.append(number)
        if shard.num_rows < self._shard_rows and shard.num_bytes < MAX_SHARD_BYTES:
            return None
        self._shard = None
        return shard

    def _is_repeated(self, line: bytes, number: int) -> bool:
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise NotUtf8Error(number + 1) from None
        custom_id = custom_id_of(text)
        if custom_id is None:
            return False
        digest = hashlib.blake2b(custom_id.encode("utf-8", "surrogatepass"), digest_size=16)
        insert = "INSERT OR IGNORE INTO seen VALUES (?)"
        return self._ids.execute(insert, (digest.digest(),)).rowcount == 0


async def split_lines(
    chunks: AsyncIterator[bytes], first_line: int, max_bytes: int
) -> AsyncIterator[Line]:
    """The rows of a shard; blank lines are skipped, over-long ones come without their data."""
    splitter = LineSplitter(max_bytes)
    number = first_line
    async for chunk in chunks:
        for line, _ in splitter.feed(chunk):
            data = _unmarked(line, number)
            if data is None or data.strip():
                yield Line(number, data)
            number += 1
    for line, _ in splitter.finish():
        data = _unmarked(line, number)
        if data is None or data.strip():
            yield Line(number, data)


def _unmarked(line: bytes | None, number: int) -> bytes | None:
    return line.removeprefix(codecs.BOM_UTF8) if line is not None and number == 0 else line
