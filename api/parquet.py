"""Preference pairs as one Parquet file, with one fixed Arrow schema.

``provenance`` is a JSON string and absent strings are typed nulls, so that files of different
batches concatenate and load with ``datasets.load_dataset("parquet", ...)``.
"""

from __future__ import annotations

import asyncio
import json
import re
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.background import BackgroundTask
from starlette.responses import FileResponse

from api.streaming import NDJSON

PARQUET = "application/vnd.apache.parquet"
_QUALITY = re.compile(r"0(\.[0-9]{0,3})?|1(\.0{0,3})?")

ROWS_PER_GROUP = 2048


def prefers_parquet(accept: str) -> bool:
    """Whether an ``Accept`` header names Parquet, and NDJSON at no higher quality.

    Wildcards mean NDJSON, which is what there is from the first pair on.
    """
    qualities = dict(_media_range(part) for part in accept.split(","))
    wanted = qualities.get(PARQUET, 0.0)
    return wanted > 0 and wanted >= qualities.get(NDJSON, 0.0)


def _media_range(text: str) -> tuple[str, float]:
    """One element of ``Accept`` with its quality (RFC 9110, 12.5.1); 0 for one that is broken."""
    media, *parameters = (part.strip().lower() for part in text.split(";"))
    quality = 1.0
    for parameter in parameters:
        name, _, value = parameter.partition("=")
        if name.strip() == "q":
            match = _QUALITY.fullmatch(value.strip())
            quality = float(value) if match else 0.0
    return media, quality


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
