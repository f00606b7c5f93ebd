"""The lines of an input, piece by piece: memory is bounded by a piece, not by the input.

Everything here blocks; :func:`stream` runs it in threads. Arrow is imported where it is needed.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import closing
from itertools import count
from typing import IO, Any

from actors.inputs.columns import LineMaker
from actors.inputs.faults import InputFault
from actors.inputs.sources import Part
from mora_serve.ports import BlobStore

PIECE_BYTES = 2**20
ROWS_PER_PIECE = 256
"""Rows of a table that are Python objects at a time."""


async def stream(
    parts: Sequence[Part], blobs: BlobStore, endpoint: str, max_bytes: int
) -> AsyncIterator[bytes]:
    """The input as JSON lines. Raises :class:`InputFault`, also when it is over ``max_bytes``."""
    num_bytes = 0
    with closing(_pieces(parts, blobs, endpoint)) as pieces:
        while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise too_large(max_bytes)
            yield piece


def too_large(max_bytes: int) -> InputFault:
    """The fault of an input with more bytes than a batch may have."""
    return InputFault(
        "input_too_large",
        f"the rows must have at most {max_bytes} bytes as JSON lines (runner.max_input_bytes); "
        "split the input",
    )


def _pieces(parts: Sequence[Part], blobs: BlobStore, endpoint: str) -> Generator[bytes, None, None]:
    indices = count()
    for part in parts:
        with blobs.open_file(part.key) as file:
            if part.format == "jsonl":
                yield from _whole_lines(file)
            elif part.format == "gzip":
                yield from _unzipped(file, part.name)
            else:
                yield from _table(file, part, endpoint, indices)


def _whole_lines(file: Any) -> Iterator[bytes]:
    """The file as it is, with a line break at its end."""
    last = b"\n"
    while piece := file.read(PIECE_BYTES):
        last = piece[-1:]
        yield piece
    if last != b"\n":
        yield b"\n"


def _unzipped(file: IO[bytes], name: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as unzipped:
            yield from _whole_lines(unzipped)
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise InputFault("invalid_file", f"{name}: the file must be a whole gzip file") from None


def _table(file: IO[bytes], part: Part, endpoint: str, indices: Iterator[int]) -> Iterator[bytes]:
    import pyarrow as pa

    try:
        maker: LineMaker | None = None
        for batch in _parquet(file) if part.format == "parquet" else _arrow(file):
            if maker is None:
                maker = LineMaker(endpoint, batch.schema.names, part.name)
                _check_types(batch.schema, part.name)
            rows = batch.to_pylist()
            yield b"".join([maker.line(row, index) for row, index in zip(rows, indices)])  # noqa: B905
    except (pa.ArrowException, OSError) as error:
        kind = "Parquet" if part.format == "parquet" else "Arrow"
        reason = type(error).__name__
        raise InputFault(
            "invalid_file", f"{part.name}: the file must be a whole {kind} file ({reason})"
        ) from None


def _parquet(file: IO[bytes]) -> Iterator[Any]:
    """Record batches; of a row group, only the pages that are being read are in memory."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False, buffer_size=PIECE_BYTES) as table:
        yield pa.RecordBatch.from_pylist([], schema=table.schema_arrow)
        yield from table.iter_batches(batch_size=ROWS_PER_PIECE, use_threads=False)


def _arrow(file: IO[bytes]) -> Iterator[Any]:
    import pyarrow as pa

    with pa.ipc.open_stream(file) as table:
        yield pa.RecordBatch.from_pylist([], schema=table.schema)
        for batch in table:
            for start in range(0, batch.num_rows, ROWS_PER_PIECE):
                yield batch.slice(start, ROWS_PER_PIECE)


def _check_types(schema: Any, place: str) -> None:
    """Refuse columns whose values JSON cannot say, such as dates and bytes."""
    for field in schema:
        if not _is_json(field.type):
            raise InputFault(
                "invalid_column_type",
                f"{place}: column {field.name[:80]!r} must hold text, numbers, booleans, lists or "
                f"structs, got {field.type}"[:400],
                param=field.name[:80],
            )


def _is_json(kind: Any) -> bool:
    import pyarrow as pa

    is_a = pa.types
    if is_a.is_dictionary(kind):
        return _is_json(kind.value_type)
    if is_a.is_list(kind) or is_a.is_large_list(kind) or is_a.is_fixed_size_list(kind):
        return _is_json(kind.value_type)
    if is_a.is_struct(kind):
        return all(_is_json(field.type) for field in kind)
    simple = (is_a.is_string, is_a.is_large_string, is_a.is_integer, is_a.is_floating)
    return any(test(kind) for test in (*simple, is_a.is_boolean, is_a.is_null))
