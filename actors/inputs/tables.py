"""Rows of Parquet and Arrow files as JSON lines, a few rows at a time.

Everything here blocks. Arrow is imported where it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import IO, Any

from actors.inputs.columns import LineMaker
from actors.inputs.faults import InputFault

PIECE_BYTES = 2**20
ROWS_PER_PIECE = 256
"""Rows of a table that are Arrow's at a time, and at most as many Python's."""
BATCH_BYTES = 4 * 2**20
"""About what the rows that are read at a time have; one row may have more."""
GROUP_BYTES = 32 * 2**20
"""Bytes of a column in a row group up to which its texts may be kept in a dictionary."""


def table_lines(
    batches: Iterator[Any], name: str, endpoint: str, max_line_bytes: int, indices: Iterator[int]
) -> Iterator[bytes]:
    """The rows of ``batches``, which begin with an empty one, as JSON lines in small pieces.

    ``name`` is the file's, for messages; ``indices`` number the rows that have no id. Raises
    :class:`InputFault` for columns that are not understood and for rows over the limit.
    """
    schema = next(batches).schema
    maker = LineMaker(endpoint, schema.names, name)
    _check_types(schema, name)
    for batch in batches:
        for rows in _small(batch, max_line_bytes, name):
            yield b"".join([maker.line(row, next(indices)) for row in rows.to_pylist()])


def parquet_batches(file: IO[bytes]) -> Iterator[Any]:
    """Record batches, an empty one first; only the pages that are being read are in memory.

    Text may stay in its dictionary (see :func:`_repeated_texts`). Long rows are read few at a time.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(file, pre_buffer=False, buffer_size=PIECE_BYTES) as table:
        metadata = table.metadata
        yield pa.RecordBatch.from_pylist([], schema=table.schema_arrow)
    groups = range(metadata.num_row_groups)
    for texts, run in groupby(groups, lambda group: _repeated_texts(metadata.row_group(group))):
        with pq.ParquetFile(
            file,
            metadata=metadata,
            read_dictionary=sorted(texts),
            pre_buffer=False,
            buffer_size=PIECE_BYTES,
        ) as table:
            for group in run:
                num_rows = _rows_at_a_time(metadata.row_group(group))
                yield from table.iter_batches(num_rows, row_groups=[group], use_threads=False)


def _repeated_texts(group: Any) -> frozenset[str]:
    """Columns that are left in their dictionaries: few bytes may say that one long text is that of
    every row.

    Arrow gathers such a dictionary over the whole row group, so only small columns are; and it
    cannot where a page is delta-encoded.
    """
    columns = (group.column(index) for index in range(group.num_columns))
    return frozenset(
        column.path_in_schema
        for column in columns
        if column.physical_type == "BYTE_ARRAY"
        and column.has_dictionary_page
        and column.total_uncompressed_size <= GROUP_BYTES
        and not any(encoding.startswith("DELTA") for encoding in column.encodings)
    )


def _rows_at_a_time(group: Any) -> int:
    row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
    return int(max(1, min(ROWS_PER_PIECE, BATCH_BYTES // row_bytes)))


def arrow_batches(file: IO[bytes]) -> Iterator[Any]:
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
