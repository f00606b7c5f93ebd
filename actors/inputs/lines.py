"""The lines of an input, piece by piece: memory is bounded by a piece, not by the input.

Everything here blocks; :func:`stream` runs it in threads. Arrow is imported where it is needed.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import count
from typing import IO, Any

from actors.inputs.columns import LineMaker
from actors.inputs.faults import InputFault
from actors.inputs.sources import Part
from mora_serve.errors import MoraError
from mora_serve.ports import BlobStore

PIECE_BYTES = 2**20
ROWS_PER_PIECE = 256
"""Rows of a table that are Arrow's at a time, and at most as many Python's."""
GROUP_BYTES = 32 * 2**20
"""Row groups of at most this many bytes are read ``ROWS_PER_PIECE`` rows at a time."""


async def stream(
    parts: Sequence[Part], blobs: BlobStore, endpoint: str, max_bytes: int, max_line_bytes: int
) -> AsyncIterator[bytes]:
    """The input as JSON lines. Raises :class:`InputFault`, also when it is over ``max_bytes``.

    Of a table no row may be over ``max_line_bytes``: memory is bounded by a few of them.
    """
    num_bytes = 0
    with closing(_pieces(parts, blobs, endpoint, max_line_bytes)) as pieces:
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


def _pieces(
    parts: Sequence[Part], blobs: BlobStore, endpoint: str, max_line_bytes: int
) -> Generator[bytes, None, None]:
    indices = count()
    for part in parts:
        with blobs.open_file(part.key) as file:
            if part.format == "jsonl":
                yield from _whole_lines(file)
            elif part.format == "gzip":
                yield from _unzipped(file, part.name)
            else:
                yield from _table(file, part, endpoint, max_line_bytes, indices)


def _whole_lines(file: Any) -> Iterator[bytes]:
    """The file as it is, with a line break at its end."""
    last = b"\n"
    while piece := file.read(PIECE_BYTES):
        last = piece[-1:]
        yield piece
    if last != b"\n":
        yield b"\n"


def _unzipped(file: IO[bytes], name: str) -> Iterator[bytes]:
    with _faults_of("gzip", name), gzip.GzipFile(fileobj=file) as unzipped:
        yield from _whole_lines(unzipped)


@contextmanager
def _faults_of(kind: str, name: str) -> Iterator[None]:
    """Whatever a format's library raises over a file's bytes is the fault of that file."""
    try:
        yield
    except (InputFault, MoraError):
        raise
    except UnicodeDecodeError:
        raise InputFault("invalid_encoding", f"{name}: text must be UTF-8") from None
    except Exception as error:  # noqa: BLE001  what they raise over broken bytes is not specified
        reason = type(error).__name__
        raise InputFault(
            "invalid_file", f"{name}: the file must be a whole {kind} file ({reason})"
        ) from None


def _table(
    file: IO[bytes], part: Part, endpoint: str, max_line_bytes: int, indices: Iterator[int]
) -> Iterator[bytes]:
    is_parquet = part.format == "parquet"
    with _faults_of("Parquet" if is_parquet else "Arrow", part.name):
        batches = _parquet(file, max_line_bytes) if is_parquet else _arrow(file)
        schema = next(batches).schema
        maker = LineMaker(endpoint, schema.names, part.name)
        _check_types(schema, part.name)
        for batch in batches:
            for rows in _small(batch, max_line_bytes, part.name):
                yield b"".join([maker.line(row, next(indices)) for row in rows.to_pylist()])


def _parquet(file: IO[bytes], max_line_bytes: int) -> Iterator[Any]:
    """Record batches, an empty one first; only the pages that are being read are in memory.

    Text stays in its dictionary: a page of few bytes may say that one long text is that of every
    row. Rows of a large row group are read few at a time, for any of them may be long.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False, buffer_size=PIECE_BYTES) as table:
        metadata = table.metadata
        yield pa.RecordBatch.from_pylist([], schema=table.schema_arrow)
    columns = [metadata.schema.column(index) for index in range(metadata.num_columns)]
    texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
    few = max(1, min(ROWS_PER_PIECE, GROUP_BYTES // max_line_bytes))
    with pq.ParquetFile(
        file, metadata=metadata, read_dictionary=texts, pre_buffer=False, buffer_size=PIECE_BYTES
    ) as table:
        for group in range(metadata.num_row_groups):
            small = metadata.row_group(group).total_byte_size <= GROUP_BYTES
            yield from table.iter_batches(
                ROWS_PER_PIECE if small else few, row_groups=[group], use_threads=False
            )


def _arrow(file: IO[bytes]) -> Iterator[Any]:
    """Record batches, an empty one first."""
    import pyarrow as pa

    with pa.ipc.open_stream(file) as table:
        yield pa.RecordBatch.from_pylist([], schema=table.schema)
        for batch in table:
            batch.validate(full=True)
            for start in range(0, batch.num_rows, ROWS_PER_PIECE):
                yield batch.slice(start, ROWS_PER_PIECE)


def _small(batch: Any, max_line_bytes: int, place: str) -> Iterator[Any]:
    """The batch in slices whose values have at most ``PIECE_BYTES``, or of one row."""
    num_bytes = sum(_value_bytes(column) for column in batch.columns)
    if num_bytes <= PIECE_BYTES:
        yield batch
    elif batch.num_rows > 1:
        half = batch.num_rows // 2
        yield from _small(batch.slice(0, half), max_line_bytes, place)
        yield from _small(batch.slice(half), max_line_bytes, place)
    elif num_bytes <= max_line_bytes:
        yield batch
    else:
        raise InputFault(
            "row_too_large",
            f"{place}: a row must have at most {max_line_bytes} bytes, got {num_bytes}",
        )


def _value_bytes(values: Any) -> int:
    """Bytes of the values once each is there by itself, which in a dictionary they are not."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = values.type
    if pa.types.is_dictionary(kind):
        known = values.dictionary
        if not (pa.types.is_string(known.type) or pa.types.is_large_string(known.type)):
            return _value_bytes(values.dictionary_decode())
        return pc.sum(pc.binary_length(known).take(values.indices)).as_py() or 0
    if pa.types.is_struct(kind):
        return sum(_value_bytes(field) for field in values.flatten())
    if pa.types.is_nested(kind):
        return _value_bytes(values.flatten())
    return int(values.nbytes)


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
