"""Which files an input consists of, and in which format each of them is.

::

    rows.jsonl, any other name        one file of JSON lines
    rows.jsonl.gz, rows.parquet       one file, by its name
    directory with state.json         a dataset that ``datasets`` saved with ``save_to_disk``
    any other directory               its ``.jsonl``, ``.jsonl.gz`` and ``.parquet`` files, by name

In a directory, names that begin with ``.`` or ``_`` and other kinds of files are passed over: such
directories hold a card, checksums or markers beside their data.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from actors.inputs.faults import InputFault
from mora_serve.ports import BlobStore

Format = Literal["jsonl", "gzip", "parquet", "arrow"]
TABLES: frozenset[Format] = frozenset({"parquet", "arrow"})

_DATA_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
_STATE, _SPLITS = "state.json", "dataset_dict.json"
_MAX_STATE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Part:
    """One file of an input."""

    name: str
    """For messages: the path below the input's directory, or the file's name."""
    key: str
    """What the blob store opens."""
    format: Format


async def input_parts(blobs: BlobStore, filename: str, key: str) -> list[Part]:
    """The files of an input in order. Raises :class:`InputFault` for a directory without data."""
    files = await blobs.tree(key)
    if files is None:
        return [Part(filename, key, _format(filename))]
    if _SPLITS in files:
        raise InputFault(
            "several_splits",
            "the directory holds a dataset of several splits; register the directory of one",
        )
    if _STATE in files:
        chunks = blobs.open_read(f"{key}/{_STATE}", length=_MAX_STATE_BYTES)
        state = b"".join([chunk async for chunk in chunks])
        names = _saved_files(state, files)
        return [Part(name, f"{key}/{name}", "arrow") for name in names]
    parts = [Part(name, f"{key}/{name}", _format(name)) for name in _data_files(files)]
    if not parts:
        raise InputFault(
            "empty_directory",
            f"the directory must hold files ending in {', '.join(_DATA_SUFFIXES)}",
        )
    return parts


def is_plain(parts: list[Part]) -> bool:
    """Whether the input is JSON lines already."""
    return len(parts) == 1 and parts[0].format == "jsonl"


def _format(name: str) -> Format:
    lower = name.lower()
    if lower.endswith(".gz"):
        return "gzip"
    return "parquet" if lower.endswith(".parquet") else "jsonl"


def _data_files(names: Iterable[str]) -> list[str]:
    return sorted(
        name
        for name in names
        if name.lower().endswith(_DATA_SUFFIXES)
        and not any(segment.startswith((".", "_")) for segment in name.split("/"))
    )


def _saved_files(state: bytes, files: Mapping[str, int]) -> list[str]:
    try:
        names = [item["filename"] for item in json.loads(state)["_data_files"]]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise InputFault("invalid_dataset", f"{_STATE} must be that of a saved dataset") from None
    for name in names:
        if not isinstance(name, str) or name not in files:
            raise InputFault(
                "invalid_dataset", f"{_STATE} must name files of the dataset's directory"
            )
    return names
