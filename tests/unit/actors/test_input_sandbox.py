"""Tables that unpack to too much, or crash their reader, cost a child process and no runner."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.inputs.faults import InputFault
from actors.inputs.lines import input_pieces, stream
from actors.inputs.sandbox import BatchPieces, SandboxError
from actors.inputs.sources import Part, input_parts
from mora_serve.errors import StorageError
from mora_serve.store.blobs import FsspecBlobs

REWRITES = "/v1/rewrites"
MAX_LINE_BYTES = 4 * 2**20
MEMORY_BYTES = 96 * 2**20
BOMB = pa.table({"prompt": ["x" * (2 * 2**20)] * 128})


class Blobs(FsspecBlobs):
    """Local files; ``on_open`` is called with every file that is opened."""

    def __init__(self, root: Path, on_open: Callable[[IO[bytes]], object] = lambda file: None):
        super().__init__(str(root / "blobs"), uri_prefixes=[str(root)])
        self._on_open = on_open

    @contextmanager
    def open_file(self, key: str) -> Iterator[IO[bytes]]:
        with super().open_file(key) as file:
            self._on_open(file)
            yield file


def pieces(parts: list[Part], blobs: FsspecBlobs, memory_bytes: int = MEMORY_BYTES) -> Any:
    return BatchPieces(parts, blobs, REWRITES, MAX_LINE_BYTES, memory_bytes)


def table(tmp_path: Path, rows: pa.Table | None = None, **kwargs: Any) -> list[Part]:
    path = tmp_path / "rows.parquet"
    pq.write_table(rows if rows is not None else pa.table({"prompt": ["a", "b"]}), path, **kwargs)
    return [Part(path.name, f"file://{path}", "parquet")]


def children() -> list[int]:
    """Pids of the sandboxes of this process."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        for pid in (task / "children").read_text().split():
            if b"actors.inputs.sandbox" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(int(pid))
    return found


async def test_directory_with_tables_gives_the_lines_that_it_gives_in_this_process(
    tmp_path: Path,
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    pq.write_table(pa.table({"prompt": [f"a {n}" for n in range(3000)]}), data / "1.parquet")
    line = json.dumps({"custom_id": "x", "method": "POST", "url": REWRITES, "body": {}})
    (data / "2.jsonl").write_text(line)
    (data / "3.jsonl.gz").write_bytes(gzip.compress(line.encode()))
    pq.write_table(pa.table({"prompt": ["b", None]}), data / "4.parquet")
    blobs = Blobs(tmp_path)
    parts = await input_parts(blobs, "data", f"file://{data}")
    here = input_pieces(parts, lambda part: blobs.open_file(part.key), REWRITES, MAX_LINE_BYTES)

    lines = b"".join(pieces(parts, blobs))

    assert lines == b"".join(here)
    assert lines.count(b"\n") == 3004
    assert b'"row-3001"' in lines


def test_lines_alone_need_no_child(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("{}\n")
    part = Part("rows.jsonl", f"file://{tmp_path}/rows.jsonl", "jsonl")
    read = pieces([part], Blobs(tmp_path))
    assert next(read) == b"{}\n"
    assert children() == []


def test_parquet_page_that_unpacks_to_too_much_is_a_fault_of_the_input(tmp_path: Path) -> None:
    parts = table(tmp_path, BOMB, compression="zstd", use_dictionary=False)
    assert (tmp_path / "rows.parquet").stat().st_size < 2**17
    with pytest.raises(InputFault) as caught:
        list(pieces(parts, Blobs(tmp_path)))
    assert caught.value.code == "unpacks_too_large"
    assert "runner.max_unpack_bytes" in str(caught.value)
    assert children() == []


def test_arrow_buffer_that_unpacks_to_too_much_is_a_fault_of_the_input(tmp_path: Path) -> None:
    path = tmp_path / "rows.arrow"
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(str(path), BOMB.schema, options=options) as writer:
        writer.write_table(BOMB)
    with pytest.raises(InputFault) as caught:
        list(pieces([Part(path.name, f"file://{path}", "arrow")], Blobs(tmp_path)))
    assert caught.value.code == "unpacks_too_large"


def test_the_same_table_is_read_where_there_is_memory_for_it(tmp_path: Path) -> None:
    parts = table(tmp_path, BOMB, compression="zstd", use_dictionary=False)
    read = pieces(parts, Blobs(tmp_path), 2**30)
    assert sum(piece.count(b"\n") for piece in read) == 128


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (signal.SIGSEGV, InputFault),
        (signal.SIGABRT, InputFault),
        (signal.SIGBUS, InputFault),
        (signal.SIGKILL, SandboxError),
        (signal.SIGTERM, SandboxError),
    ],
)
def test_child_that_ends_is_the_inputs_fault_only_if_it_did_it_itself(
    tmp_path: Path, number: int, error: type[Exception]
) -> None:
    def end_child(file: IO[bytes]) -> None:
        os.kill(children()[0], number)

    with pytest.raises(error):
        list(pieces(table(tmp_path), Blobs(tmp_path, end_child)))


def test_storage_that_fails_is_no_fault_of_the_input(tmp_path: Path) -> None:
    def fail(file: IO[bytes]) -> None:
        raise StorageError("away")

    with pytest.raises(StorageError, match="away"):
        list(pieces(table(tmp_path), Blobs(tmp_path, fail)))
    assert children() == []


def test_fault_that_the_child_finds_keeps_its_code_and_column(tmp_path: Path) -> None:
    parts = table(tmp_path, pa.table({"prompt": ["a"], "colour": ["b"]}))
    with pytest.raises(InputFault) as caught:
        list(pieces(parts, Blobs(tmp_path)))
    assert (caught.value.code, caught.value.param) == ("unknown_column", "colour")


def test_child_ends_with_the_reading_and_knows_none_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MORA_SERVER__API_KEYS", "hush")
    read = pieces(table(tmp_path), Blobs(tmp_path))
    next(read)
    (child,) = children()
    assert b"hush" not in Path(f"/proc/{child}/environ").read_bytes()
    read.close()
    assert children() == []


def test_child_ends_when_its_runner_is_killed(tmp_path: Path) -> None:
    (part,) = table(tmp_path, pa.table({"prompt": ["x" * 1000] * 20_000}), row_group_size=100)
    code = (
        "from pathlib import Path; from actors.inputs.sources import Part\n"
        "from tests.unit.actors.test_input_sandbox import Blobs, children, pieces\n"
        f"part = Part({part.name!r}, {part.key!r}, 'parquet')\n"
        f"read = pieces([part], Blobs(Path({str(tmp_path)!r})))\n"
        "next(read); print(children()[0], flush=True); input()"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert runner.stdout is not None
    child = Path("/proc") / runner.stdout.readline().strip()
    assert b"sandbox" in (child / "cmdline").read_bytes()
    runner.kill()
    runner.communicate()
    deadline = time.monotonic() + 20.0
    while _is_running(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _is_running(process: Path) -> bool:
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def endless(tmp_path: Path) -> list[Part]:
    """An Arrow stream of a few KB whose dictionary is sent again and again before its one row."""
    column = pa.DictionaryArray.from_arrays(pa.array([0], pa.int32()), pa.array(["x" * 2**20] * 64))
    written = pa.table({"prompt": column})
    sink = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_stream(sink, written.schema, options=options) as writer:
        writer.write_table(written)
    reader = pa.ipc.MessageReader.open_stream(pa.BufferReader(sink.getvalue()))
    schema, dictionary, rows = (message.serialize().to_pybytes() for message in reader)
    path = tmp_path / "rows.arrow"
    path.write_bytes(schema + dictionary * 5000 + rows)
    return [Part(path.name, f"file://{path}", "arrow")]


def test_reading_that_comes_to_no_row_is_ended(tmp_path: Path) -> None:
    reading = BatchPieces(
        endless(tmp_path), Blobs(tmp_path), REWRITES, MAX_LINE_BYTES, 2**30, silent_s=3.0
    )
    with pytest.raises(InputFault, match="took over 3 s without a row"):
        list(reading)
    assert children() == []


async def test_cancelled_reading_ends_its_child_in_the_middle_of_a_piece(tmp_path: Path) -> None:
    loop, opened = asyncio.get_running_loop(), asyncio.Event()
    blobs = Blobs(tmp_path, lambda file: loop.call_soon_threadsafe(opened.set))
    reading = pieces(endless(tmp_path), blobs, 2**30)

    async def read() -> int:
        return sum([len(piece) async for piece in stream(reading, 10**9, reading.abort)])

    task = asyncio.create_task(read())
    await opened.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert children() == []


def test_child_may_take_what_it_is_given_and_no_more() -> None:
    code = (
        "from actors.inputs.sandbox import _limit_memory\n"
        "_limit_memory(64 * 2**20)\n"
        "held = bytearray(32 * 2**20)\n"
        "try: bytearray(64 * 2**20)\n"
        "except MemoryError: print('refused')"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"refused\n"


def test_legal_table_of_one_large_row_group_is_read(tmp_path: Path) -> None:
    texts = [str(number) * (2**20) for number in range(40)]
    read = list(pieces(table(tmp_path, pa.table({"prompt": texts})), Blobs(tmp_path), 2**28))
    assert b"".join(read).count(b"\n") == 40
    assert max(map(len, read)) <= 2**20


def test_one_part_is_open_at_a_time(tmp_path: Path) -> None:
    files: list[IO[bytes]] = []

    def note(file: IO[bytes]) -> None:
        assert all(other.closed for other in files)
        files.append(file)

    (part,) = table(tmp_path)
    again = Part("other.parquet", part.key, "parquet")
    assert b"".join(pieces([part, again], Blobs(tmp_path, note))).count(b"\n") == 4
    assert len(files) == 2


def test_modules_in_the_working_directory_are_not_the_childs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "struct.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)
    assert len(list(pieces(table(tmp_path), Blobs(tmp_path)))) == 1
