"""Inputs of every format become the same JSON lines, with bounded memory and named faults."""

from __future__ import annotations

import datetime
import gzip
import json
import os
import tracemalloc
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.inputs.columns import LineMaker
from actors.inputs.faults import InputFault
from actors.inputs.lines import input_pieces, stream
from actors.inputs.sources import Part, input_parts, is_plain
from mora_serve.errors import InvalidRequestError, StorageError
from mora_serve.requests import parse_batch_row
from mora_serve.store.blobs import FsspecBlobs

REWRITES, SCORES, DIAGNOSTICS = "/v1/rewrites", "/v1/scores", "/v1/diagnostics"
PROMPTS = [{"prompt": f"question {number}", "n": 8} for number in range(600)]
MAX_LINE_BYTES = 4 * 2**20
TURNS = [{"role": "user", "content": "why?"}]


def in_process(
    parts: Sequence[Part], blobs: FsspecBlobs, endpoint: str = REWRITES
) -> Generator[bytes, None, None]:
    return input_pieces(parts, lambda part: blobs.open_file(part.key), endpoint, MAX_LINE_BYTES)


async def lines(
    path: Path, endpoint: str = REWRITES, max_bytes: int = 10**8
) -> list[dict[str, Any]]:
    blobs = FsspecBlobs(str(path.parent / "blobs"), uri_prefixes=[str(path.parent)])
    parts = await input_parts(blobs, path.name, f"file://{path}")
    data = b"".join(
        [piece async for piece in stream(in_process(parts, blobs, endpoint), max_bytes)]
    )
    rows = [json.loads(line) for line in data.splitlines()]
    assert data == b"" or data.endswith(b"\n")
    return rows


def write_parquet(path: Path, rows: Sequence[dict[str, Any]], **kwargs: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, **kwargs)
    return path


async def fault(path: Path, endpoint: str = REWRITES, **kwargs: Any) -> InputFault:
    with pytest.raises(InputFault) as caught:
        await lines(path, endpoint, **kwargs)
    return caught.value


async def test_parquet_rows_are_bodies_and_get_ids(tmp_path: Path) -> None:
    rows = await lines(write_parquet(tmp_path / "x.parquet", PROMPTS, row_group_size=100))

    assert [row["custom_id"] for row in rows] == [f"row-{number}" for number in range(600)]
    assert [row["body"] for row in rows] == PROMPTS
    for row in rows[:3]:
        parse_batch_row(json.dumps(row), REWRITES)


@pytest.mark.parametrize("encoding", ["DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY", "PLAIN"])
async def test_text_is_read_however_it_is_encoded(tmp_path: Path, encoding: str) -> None:
    path = write_parquet(
        tmp_path / "rows.parquet",
        PROMPTS,
        use_dictionary=False,
        column_encoding={"prompt": encoding},
    )
    assert [row["body"]["prompt"] for row in await lines(path)] == [p["prompt"] for p in PROMPTS]


async def test_conversations_and_absent_values_survive(tmp_path: Path) -> None:
    rows = await lines(
        write_parquet(
            tmp_path / "x.parquet",
            [
                {"custom_id": "a", "prompt": TURNS, "n": 9, "dimensions": ["helpful"]},
                {"custom_id": "b", "prompt": TURNS, "n": None, "dimensions": None},
            ],
        )
    )

    assert [row["custom_id"] for row in rows] == ["a", "b"]
    assert rows[0]["body"] == {"prompt": TURNS, "n": 9, "dimensions": ["helpful"]}
    assert rows[1]["body"] == {"prompt": TURNS}


@pytest.mark.parametrize("as_text", [True, False])
async def test_table_of_batch_lines_is_taken_as_it_is(tmp_path: Path, as_text: bool) -> None:
    body = {"prompt": "x", "n": 8}
    row = {
        "custom_id": "a",
        "method": "POST",
        "url": REWRITES,
        "body": json.dumps(body) if as_text else body,
    }
    assert await lines(write_parquet(tmp_path / "x.parquet", [row])) == [{**row, "body": body}]


async def test_one_answer_a_row_is_scored_and_one_prompt_a_row_diagnosed(tmp_path: Path) -> None:
    pairs = write_parquet(tmp_path / "s.parquet", [{"prompt": TURNS, "response": "because"}])
    prompts = write_parquet(tmp_path / "d.parquet", [{"prompt": "x", "n": 8}])

    scored, diagnosed = await lines(pairs, SCORES), await lines(prompts, DIAGNOSTICS)

    assert scored[0]["body"] == {"rows": [{"prompt": TURNS, "response": "because"}]}
    assert diagnosed[0]["body"] == {"prompts": ["x"], "n": 8}
    parse_batch_row(json.dumps(scored[0]), SCORES)
    parse_batch_row(json.dumps(diagnosed[0]), DIAGNOSTICS)


@pytest.mark.parametrize(
    ("row", "endpoint", "code", "param"),
    [
        ({"prompt": "x", "label": 1}, REWRITES, "unknown_column", "label"),
        ({"body": "{}", "prompt": "x"}, REWRITES, "unknown_column", "prompt"),
        ({"n": 8}, REWRITES, "missing_column", "prompt"),
        ({"prompt": "x"}, SCORES, "missing_column", "response"),
        ({"prompt": datetime.date(2026, 1, 1)}, REWRITES, "invalid_column_type", "prompt"),
        ({"prompt": b"x"}, REWRITES, "invalid_column_type", "prompt"),
    ],
)
async def test_column_at_fault_is_named(
    tmp_path: Path, row: dict[str, Any], endpoint: str, code: str, param: str
) -> None:
    found = await fault(write_parquet(tmp_path / "x.parquet", [row]), endpoint)

    assert (found.code, found.param) == (code, param)
    assert "x.parquet" in str(found)


async def test_zipped_lines_are_unzipped_and_a_bomb_is_bounded(tmp_path: Path) -> None:
    good, bomb, torn = (tmp_path / f"{name}.jsonl.gz" for name in ("good", "bomb", "torn"))
    good.write_bytes(gzip.compress(b'{"a": 1}\n') + gzip.compress(b'{"a": 2}'))
    bomb.write_bytes(gzip.compress(bytes(200 * 2**20)))
    torn.write_bytes(gzip.compress(os.urandom(1000))[:-20])

    assert await lines(good) == [{"a": 1}, {"a": 2}]
    tracemalloc.start()
    try:
        exploded = await fault(bomb, max_bytes=20 * 2**20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert exploded.code == "input_too_large"
    assert peak < 60 * 2**20
    assert (await fault(torn)).code == "invalid_file"


@pytest.mark.parametrize("data", [b"", b"PAR1", b"PAR1" + bytes(500) + b"PAR1", os.urandom(300)])
async def test_broken_parquet_is_a_fault_of_the_input(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.parquet"
    path.write_bytes(data)

    assert (await fault(path)).code == "invalid_file"


def misspelt_text() -> pa.Array:
    """Two texts, the second of which is no UTF-8."""
    offsets = pa.py_buffer(b"\0\0\0\0\3\0\0\0\6\0\0\0")
    return pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"abc\xff\xfez"))


async def test_text_that_is_not_utf8_is_a_fault_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"prompt": misspelt_text()}), path)

    assert (await fault(path)).code == "invalid_encoding"


async def test_saved_dataset_with_text_that_is_not_utf8_is_a_fault(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    batch = pa.record_batch({"prompt": misspelt_text()})
    with pa.ipc.new_stream(str(data / "d.arrow"), batch.schema) as writer:
        writer.write_batch(batch)
    (data / "state.json").write_text('{"_data_files": [{"filename": "d.arrow"}]}')

    assert (await fault(data)).code in ("invalid_encoding", "invalid_file")


@pytest.mark.parametrize(
    "error", [ValueError("x"), TypeError("x"), RecursionError(), KeyError("x"), OSError("x")]
)
async def test_whatever_a_reader_raises_is_a_fault_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise error

    path = write_parquet(tmp_path / "x.parquet", PROMPTS)
    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", broken)

    assert (await fault(path)).code == "invalid_file"


@pytest.mark.parametrize(
    "files", ['[{"filename": {"a": 1}}]', '[{"filename": 3}]', "[" * 200_000, "7", '[""]']
)
async def test_state_that_is_not_that_of_a_dataset_is_a_fault(tmp_path: Path, files: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "state.json").write_text('{"_data_files": ' + files + "}")

    assert (await fault(data)).code == "invalid_dataset"


async def test_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["x"]), pa.array(["y"])], ["prompt"] * 2), path)

    found = await fault(path)

    assert (found.code, found.param) == ("duplicate_column", "prompt")


def test_body_too_deep_to_be_written_stays_text() -> None:
    maker = LineMaker(REWRITES, ["custom_id", "body"], "x")
    for depth in range(900, 1000):
        text = '{"a":' + "[" * depth + "]" * depth + "}"
        assert maker.line({"custom_id": "a", "body": text}, 0).endswith(b"\n")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("in_dictionary", [False, True])
async def test_one_long_text_in_every_row_is_made_lines_row_by_row(
    tmp_path: Path, nested: bool, in_dictionary: bool
) -> None:
    path = tmp_path / "x.parquet"
    text = "x" * 2**20
    prompts: Any = pa.array([text])
    if nested:
        prompts = pa.array([[{"role": "user", "content": text}]])
    elif in_dictionary:
        prompts = prompts.dictionary_encode()
    pq.write_table(pa.table({"prompt": prompts.take(pa.array([0] * 256))}), path)
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[str(tmp_path)])
    parts = await input_parts(blobs, path.name, f"file://{path}")
    before, most, longest = pa.total_allocated_bytes(), 0, 0
    tracemalloc.start()
    try:
        async for piece in stream(in_process(parts, blobs), 10**9):
            most = max(most, pa.total_allocated_bytes() - before)
            longest = max(longest, len(piece))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert longest < 2 * 2**20
    assert max(most, peak) < 32 * 2**20


async def test_row_over_the_limit_of_a_line_is_refused_before_it_is_made(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"prompt": "x" * (MAX_LINE_BYTES + 1)}])

    assert (await fault(path)).code == "row_too_large"


async def test_large_parquet_is_read_in_pieces(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    with pq.ParquetWriter(path, pa.schema([("prompt", pa.string())])) as writer:
        for number in range(40):
            texts = [f"{number} {index} " + "word " * 200 for index in range(2000)]
            writer.write_table(pa.table({"prompt": texts}))
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[str(tmp_path)])
    parts = await input_parts(blobs, path.name, f"file://{path}")
    pa.default_memory_pool().release_unused()
    before, most, total, num_rows = pa.total_allocated_bytes(), 0, 0, 0

    async for piece in stream(in_process(parts, blobs), 10**9):
        most = max(most, pa.total_allocated_bytes() - before)
        total += len(piece)
        num_rows += piece.count(b"\n")

    assert num_rows == 80_000
    assert total > 80 * 2**20
    assert most < 12 * 2**20


async def test_saved_dataset_is_read_in_its_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(PROMPTS).shuffle(seed=1)
    saved.save_to_disk(str(tmp_path / "data"), num_shards=3)
    datasets.DatasetDict({"train": saved}).save_to_disk(str(tmp_path / "splits"))

    rows = await lines(tmp_path / "data")

    assert [row["body"]["prompt"] for row in rows] == saved["prompt"]
    assert [row["custom_id"] for row in rows] == [f"row-{number}" for number in range(600)]
    assert (await fault(tmp_path / "splits")).code == "several_splits"


async def test_directory_of_shards_is_read_by_name(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_parquet(data / "b" / "1.parquet", PROMPTS[:2])
    write_parquet(data / "b" / "0.parquet", PROMPTS[2:4])
    (data / "a.jsonl").write_text('{"custom_id": "first"}')
    (data / "README.md").write_text("a card")
    (data / "_SUCCESS").write_text("")
    write_parquet(data / ".hidden" / "0.parquet", [{"bad": 1}])

    rows = await lines(data)

    assert [row["custom_id"] for row in rows] == ["first", "row-0", "row-1", "row-2", "row-3"]
    assert [row["body"] for row in rows[1:]] == [*PROMPTS[2:4], *PROMPTS[:2]]


async def test_directory_without_data_is_a_fault(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "README.md").write_text("a card")
    assert (await fault(data)).code == "empty_directory"
    (data / "state.json").write_text('{"_data_files": [{"filename": "../secret"}]}')
    assert (await fault(data)).code == "invalid_dataset"


async def test_link_swapped_in_after_registration_is_refused_when_opened(tmp_path: Path) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    (allowed / "data").mkdir(parents=True)
    secret.mkdir()
    for folder in (allowed / "data", secret):
        (folder / "rows.jsonl").write_bytes(b"{}\n")
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[f"file://{allowed}"])
    key = f"file://{allowed}/data/rows.jsonl"
    assert [chunk async for chunk in blobs.open_read(key)] == [b"{}\n"]

    (allowed / "data" / "rows.jsonl").unlink()
    (allowed / "data").rmdir()
    (allowed / "data").symlink_to(secret)

    with pytest.raises(InvalidRequestError):
        [chunk async for chunk in blobs.open_read(key)]
    with pytest.raises(InvalidRequestError), blobs.open_file(key):
        pass


async def test_link_swapped_in_between_check_and_opening_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed, secret = tmp_path / "allowed", tmp_path / "secret"
    allowed.mkdir()
    secret.write_bytes(b"secret\n")
    target = allowed / "rows.jsonl"
    target.symlink_to(secret)
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[f"file://{allowed}"])
    monkeypatch.setattr("mora_serve.store.blobs.resolve_uri", lambda uri, _: uri)

    with pytest.raises(InvalidRequestError) as refused:
        [chunk async for chunk in blobs.open_read(f"file://{target}")]
    assert refused.value.code == "uri_not_allowed"


async def test_link_out_of_a_dataset_directory_is_refused(tmp_path: Path) -> None:
    data, secret = tmp_path / "allowed" / "data", tmp_path / "secret"
    data.mkdir(parents=True)
    secret.mkdir()
    write_parquet(secret / "1.parquet", PROMPTS[:1])
    write_parquet(data / "0.parquet", PROMPTS[:1])
    (data / "1.parquet").symlink_to(secret / "1.parquet")
    (data / "more").symlink_to(secret)
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[str(tmp_path / "allowed")])
    parts = await input_parts(blobs, "data", f"file://{data}")

    with pytest.raises(InvalidRequestError) as refused:
        [piece async for piece in stream(in_process(parts, blobs), 10**6)]
    assert refused.value.code == "uri_not_allowed"


async def test_size_of_a_file_behind_a_link_out_of_the_prefixes_is_not_told(tmp_path: Path) -> None:
    data, secret = tmp_path / "allowed" / "data", tmp_path / "secret"
    data.mkdir(parents=True)
    for path in (secret, tmp_path / "allowed" / "rows"):
        path.write_bytes(bytes(1000))
    (data / "a.jsonl").symlink_to(secret)
    (data / "b.jsonl").symlink_to("../rows")
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[str(tmp_path / "allowed")])

    assert await blobs.tree(f"file://{data}") == {"a.jsonl": 0, "b.jsonl": 1000}


async def test_pipe_and_device_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[str(tmp_path), "file:///dev"])
    for path in (f"{tmp_path}/pipe", "/dev/zero"):
        with pytest.raises((InvalidRequestError, StorageError)):
            [chunk async for chunk in blobs.open_read(f"file://{path}")]


async def test_storage_that_fails_while_a_table_is_read_is_not_the_inputs_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_parquet(tmp_path / "x.parquet", PROMPTS)
    blobs = FsspecBlobs(str(tmp_path / "blobs"), uri_prefixes=[str(tmp_path)])
    parts = await input_parts(blobs, path.name, f"file://{path}")

    def broken(*_: Any) -> int:
        raise StorageError("the network is gone")

    monkeypatch.setattr("mora_serve.store.blobs._Mapped.readinto", broken)

    with pytest.raises(StorageError):
        [piece async for piece in stream(in_process(parts, blobs), 10**6)]


@pytest.mark.parametrize(
    ("filename", "plain"),
    [("rows.jsonl", True), ("rows", True), ("rows.jsonl.gz", False), ("ROWS.PARQUET", False)],
)
async def test_names_tell_what_is_json_lines_already(
    tmp_path: Path, filename: str, plain: bool
) -> None:
    blobs = FsspecBlobs(str(tmp_path / "blobs"))

    assert is_plain(await input_parts(blobs, filename, "files/file-1")) is plain


def test_rows_without_ids_are_numbered() -> None:
    maker = LineMaker(REWRITES, ["prompt"], "x")

    assert json.loads(maker.line({"prompt": "why?"}, 3))["custom_id"] == "row-3"
