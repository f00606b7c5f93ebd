"""Preference pairs as one Parquet file, with one fixed Arrow schema.

``provenance`` is a JSON string and absent strings are typed nulls, so that files of different
batches concatenate and load with ``datasets.load_dataset("parquet", ...)``.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import FileResponse

PARQUET = "application/vnd.apache.parquet"

ROWS_PER_GROUP = 2048


def pair_schema(dimensions: Sequence[str]) -> Any:
    """The Arrow schema of preference rows."""
    import pyarrow as pa

    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
    reward = pa.struct([("value", pa.float64()), ("raw", pa.float64())])
    scores = pa.struct([(dimension, reward) for dimension in dimensions])
    return pa.schema(
        [
            ("seq", pa.int64()),
            ("prompt_id", pa.string()),
            ("prompt", turns),
            ("chosen", turns),
            ("rejected", turns),
            ("margin", pa.float64()),
            ("mode", pa.string()),
            ("stage", pa.string()),
            ("chosen_scores", scores),
            ("rejected_scores", scores),
            ("policy_version", pa.string()),
            ("provenance", pa.string()),
        ]
    )


def arrow_row(pair: Mapping[str, Any]) -> dict[str, Any]:
    """A pair as a row of the schema."""
    provenance = json.dumps(pair["provenance"], ensure_ascii=False, sort_keys=True)
    return {**pair, "provenance": provenance}


async def parquet_response(
    pairs: AsyncIterator[Mapping[str, Any]], filename: str, dimensions: Sequence[str]
) -> FileResponse:
    """Write ``pairs`` row group by row group to a temporary file and send it."""
    with tempfile.NamedTemporaryFile(suffix=".parquet", delete=False) as handle:
        path = Path(handle.name)
    try:
        await _write(path, pairs, dimensions)
    except BaseException:
        await asyncio.to_thread(path.unlink, missing_ok=True)
        raise
    return FileResponse(
        path, media_type=PARQUET, filename=filename, background=BackgroundTask(path.unlink)
    )


async def _write(
    path: Path, pairs: AsyncIterator[Mapping[str, Any]], dimensions: Sequence[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pair_schema(dimensions)
    with pq.ParquetWriter(path, schema) as writer:
        rows: list[dict[str, Any]] = []
        async for pair in pairs:
            rows.append(arrow_row(pair))
            if len(rows) == ROWS_PER_GROUP:
                table = pa.Table.from_pylist(rows, schema)
                await asyncio.to_thread(writer.write_table, table)
                rows = []
        await asyncio.to_thread(writer.write_table, pa.Table.from_pylist(rows, schema))
