"""Cutting an input file into shards, and reading them back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.store.batch_input import InputScan, Line, NotUtf8Error, Shard, split_lines


def _scan(data: bytes, shard_rows: int = 2, chunk: int = 7, max_line: int = 1000) -> list[Shard]:
    with InputScan(shard_rows, max_line) as scan:
        shards = []
        for start in range(0, len(data), chunk):
            shards += scan.feed(data[start : start + chunk])
        shards += scan.finish()
        assert scan.num_rows == sum(shard.num_rows for shard in shards)
    return shards


def _row(custom_id: str) -> bytes:
    return json.dumps({"custom_id": custom_id}).encode()


async def _lines(data: bytes, shard: Shard, max_line: int = 1000) -> list[Line]:
    async def chunks() -> AsyncIterator[bytes]:
        piece = data[shard.offset_bytes : shard.offset_bytes + shard.num_bytes]
        for start in range(0, len(piece), 5):
            yield piece[start : start + 5]

    return [line async for line in split_lines(chunks(), shard.first_line, max_line)]


async def test_shards_cover_every_row_and_skip_blank_lines() -> None:
    rows = [_row(f"r{number}") for number in range(5)]
    data = b"\n".join([rows[0], b"", b"  ", *rows[1:]])
    shards = _scan(data)
    assert [shard.num_rows for shard in shards] == [2, 2, 1]
    lines = [line for shard in shards for line in await _lines(data, shard)]
    assert [line.data for line in lines] == rows
    assert [line.number for line in lines] == [0, 3, 4, 5, 6]


def test_a_file_without_rows_has_no_shard() -> None:
    assert _scan(b"") == []
    assert _scan(b"\n \n\r\n") == []


def test_repeated_custom_ids_are_found_across_shards() -> None:
    data = b"\n".join(_row(name) for name in ["a", "b", "a", "c", "b", "a"])
    assert [shard.duplicates for shard in _scan(data)] == [[], [2], [4, 5]]


def test_lines_without_custom_id_are_no_duplicates_of_each_other() -> None:
    data = b'{"x": 1}\nnot json\n{"custom_id": 3}\n[]\n' + _row("a")
    assert [shard.duplicates for shard in _scan(data)] == [[], [], []]


async def test_an_over_long_line_counts_as_a_row_without_data() -> None:
    data = _row("a") + b"\n" + b"x" * 500 + b"\n" + _row("b")
    shards = _scan(data, max_line=100)
    lines = [line for shard in shards for line in await _lines(data, shard, max_line=100)]
    assert [line.data for line in lines] == [_row("a"), None, _row("b")]


def test_bytes_that_are_not_utf8_name_the_line() -> None:
    with pytest.raises(NotUtf8Error) as caught:
        _scan(_row("a") + b"\n\n\xff\xfe\n")
    assert caught.value.line == 3


@given(
    st.lists(st.sampled_from([b"", b" ", b"{}", b"row", b"longer row"]), max_size=12),
    st.integers(1, 4),
    st.integers(1, 9),
    st.booleans(),
)
async def test_any_file_is_read_back_whole(
    rows: list[bytes], shard_rows: int, chunk: int, last_break: bool
) -> None:
    data = b"\n".join(rows) + (b"\n" if last_break else b"")
    shards = _scan(data, shard_rows, chunk)
    lines = [line for shard in shards for line in await _lines(data, shard)]
    expected = [(number, row) for number, row in enumerate(rows) if row.strip()]
    assert [(line.number, line.data) for line in lines] == expected
    assert all(0 < shard.num_rows <= shard_rows for shard in shards)
