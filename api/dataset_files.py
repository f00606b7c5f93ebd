"""``python -m api.dataset_files``: Parquet files of a dataset directory, and pushing it to a hub.

For the command line, whose package imports neither Arrow nor a hub client::

    write --kind pairs|groups --rows ROWS.jsonl --out FILE.parquet
    push DIRECTORY NAME [--public]

Pushing uses the hub client's own settings (``HF_TOKEN``, ``HF_ENDPOINT``).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from api.parquet import ROWS_PER_GROUP, arrow_row, pair_schema


def main(arguments: list[str] | None = None) -> int:
    """Exit status 1, with one line on stderr, when it cannot be done."""
    parser = argparse.ArgumentParser(prog="python -m api.dataset_files", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser("write")
    write.add_argument("--kind", choices=("pairs", "groups"), required=True)
    write.add_argument("--rows", type=Path, required=True)
    write.add_argument("--out", type=Path, required=True)
    push = commands.add_parser("push")
    push.add_argument("directory", type=Path)
    push.add_argument("name")
    push.add_argument("--public", action="store_true")
    args = parser.parse_args(arguments)
    try:
        if args.command == "write":
            write_parquet(args.kind, args.rows, args.out)
        else:
            print(push_dataset(args.directory, args.name, private=not args.public))  # noqa: T201
    except Exception as error:  # noqa: BLE001 - one line for the parent process
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    return 0


def group_schema(dimensions: Sequence[str]) -> Any:
    """The Arrow schema of scored groups; lists run over a group's answers."""
    import pyarrow as pa

    text, texts = pa.string(), pa.list_(pa.string())
    turns = pa.list_(pa.struct([("role", text), ("content", text)]))
    numbers = pa.list_(pa.float64())
    reward = pa.struct([("value", numbers), ("raw", numbers), ("status", texts), ("reason", texts)])
    scorer = pa.struct([("model", text), ("revision", text)])
    return pa.schema(
        [
            ("custom_id", text),
            ("prompt_id", text),
            ("prompt", turns),
            ("responses", texts),
            ("finish_reasons", texts),
            ("num_tokens", pa.list_(pa.int64())),
            ("rewards", pa.struct([(dimension, reward) for dimension in dimensions])),
            ("scorers", pa.struct([(dimension, scorer) for dimension in dimensions])),
            ("class", text),
            ("policy_version", text),
            ("role", text),
            ("accepted", pa.bool_()),
            ("strategy", text),
            ("targets", texts),
            ("parent_prompt_id", text),
        ]
    )


def write_parquet(kind: str, rows: Path, out: Path) -> None:
    """JSON lines to Parquet, a row group at a time.

    Rows may be scored on different dimensions; where one has none of another's, it is null.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = _rows(rows)
    column = "rewards" if kind == "groups" else "chosen_scores"
    # Arrow leaves out keys that its schema does not have, without a word.
    dimensions = list(dict.fromkeys(name for row in _rows(rows) for name in row[column]))
    schema = (group_schema if kind == "groups" else pair_schema)(dimensions)
    with pq.ParquetWriter(out, schema) as writer:
        while piece := list(islice(lines, ROWS_PER_GROUP)):
            made = [_pair_row(row) for row in piece] if kind == "pairs" else piece
            writer.write_table(pa.Table.from_pylist(made, schema))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)


def _pair_row(row: dict[str, Any]) -> dict[str, Any]:
    """``provenance`` is a JSON string already in rows that come from a Parquet file."""
    provenance = row.get("provenance")
    if isinstance(provenance, str):
        return row
    return arrow_row({**row, "provenance": provenance or {}})


def push_dataset(directory: Path, name: str, *, private: bool) -> str:
    """Create the dataset repository unless it is there, and upload; returns where it is."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, repo_type="dataset", private=private, exist_ok=True)
    commit = api.upload_folder(
        folder_path=directory,
        repo_id=name,
        repo_type="dataset",
        allow_patterns=["README.md", "*/*.parquet"],
        commit_message="Export of mora-serve",
    )
    return str(commit.commit_url)


if __name__ == "__main__":
    sys.exit(main())
