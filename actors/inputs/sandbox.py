"""Tables are read in a child process with bounded memory, and without access to storage.

A Parquet page or Arrow buffer of a few bytes may unpack to gigabytes, and a malformed one may crash
the library that reads it. Neither may end a runner, whose other batches would pay for it::

    runner                                            child: python -m actors.inputs.sandbox
      job (parts, endpoint, limits)          ------>  RLIMIT_DATA = what it has + memory_bytes
      opens part k of the batch's input      <------  OPEN k
      reads the file, at most a piece        <------  READ offset, size
      yields the lines                       <------  LINES
      InputFault, or the end                 <------  FAULT, END

What storage fails with is raised in the runner, as it would be without a child. A child that ends
without a word is the input's fault when the kernel or the C++ runtime ended it for what it did
(SIGSEGV, SIGABRT and the like), and an error to be tried again otherwise.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from actors.inputs.faults import InputFault
from actors.inputs.lines import input_pieces
from actors.inputs.sources import TABLES, Part
from actors.inputs.tables import PIECE_BYTES
from mora_serve.ports import BlobStore

OPEN, READ, LINES, FAULT, END = b"O", b"R", b"L", b"F", b"E"
OWN_DOING = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""Signals that say that a process did something wrong, and not that somebody ended it."""
MAX_SILENT_S = 120.0
"""A row takes milliseconds; dictionaries that no row refers to can keep a reader busy for hours."""
MAX_MESSAGE_BYTES = PIECE_BYTES + 1
END_TIMEOUT_S = 10.0
WATCH_PERIOD_S = 1.0

if TYPE_CHECKING:
    _Connection = Connection[bytes, bytes]
else:
    _Connection = Connection


class SandboxError(Exception):
    """The child ended without a word; another try may go well."""


class BatchPieces:
    """The input as JSON lines, piece by piece; a child reads it if a part is a table. Blocking.

    Raises :class:`InputFault`, ``StorageError``, and :class:`SandboxError`. The child may take
    ``memory_bytes`` beside its own modules, and ``silent_s`` seconds for the next lines; where it
    needs more, the input is at fault. :meth:`abort` may be called from another thread.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        blobs: BlobStore,
        endpoint: str,
        max_line_bytes: int,
        memory_bytes: int,
        *,
        silent_s: float = MAX_SILENT_S,
    ) -> None:
        self._parts = parts
        self._blobs = blobs
        self._job = {
            "parts": [asdict(part) for part in parts],
            "endpoint": endpoint,
            "max_line_bytes": max_line_bytes,
            "memory_bytes": memory_bytes,
        }
        self._silent_s = silent_s
        self._process: subprocess.Popen[bytes] | None = None
        in_child = any(part.format in TABLES for part in parts)
        self._pieces = (
            self._from_child()
            if in_child
            else input_pieces(
                parts, lambda part: blobs.open_file(part.key), endpoint, max_line_bytes
            )
        )

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces

    def __next__(self) -> bytes:
        return next(self._pieces)

    def close(self) -> None:
        """End the reading, between two pieces."""
        self._pieces.close()

    def abort(self) -> None:
        """End the reading while a piece is made; that call raises."""
        if self._process is not None:
            self._process.kill()

    def _from_child(self) -> Generator[bytes, None, None]:
        with _child() as (process, connection):
            self._process = process
            peer = _Peer(connection, self._silent_s)
            try:
                peer.send_bytes(json.dumps(self._job).encode())
                yield from _served(peer, self._parts, self._blobs)
            except _GoneError:
                raise _ended(process) from None


@contextmanager
def _child() -> Iterator[tuple[subprocess.Popen[bytes], _Connection]]:
    ours, theirs = Pipe()
    with closing(ours):
        with closing(theirs):
            command = [sys.executable, "-P", "-m", "actors.inputs.sandbox"]
            process = subprocess.Popen(
                [*command, str(theirs.fileno()), str(os.getpid())],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            yield process, ours
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """Where modules are, and no secrets; memory goes back to the system at once, so that the bound
    is on what is used."""
    root = str(Path(__file__).resolve().parents[2])
    return {
        "PYTHONPATH": os.pathsep.join([root, *filter(None, sys.path)]),
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "ARROW_IO_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


class _GoneError(Exception):
    """The process on the other end of the pipe has ended."""


class _Peer:
    """A connection whose every failure is :class:`_GoneError`, never taken for one of storage."""

    def __init__(self, connection: _Connection, silent_s: float) -> None:
        self._connection = connection
        self._silent_s = silent_s
        self._left_s = silent_s

    def send_bytes(self, data: bytes) -> None:
        try:
            self._connection.send_bytes(data)
        except OSError:
            raise _GoneError from None

    def recv_bytes(self) -> bytes:
        """The next message. Raises :class:`InputFault` when lines are too long in coming."""
        since = time.monotonic()
        try:
            if not self._connection.poll(self._left_s):
                raise InputFault(
                    "invalid_file",
                    f"reading the input's tables took over {self._silent_s:g} s without a row",
                )
            message = self._connection.recv_bytes(MAX_MESSAGE_BYTES)
        except (EOFError, OSError):
            raise _GoneError from None
        self._left_s -= time.monotonic() - since
        if message[:1] == LINES:
            self._left_s = self._silent_s
        return message


def _served(peer: _Peer, parts: Sequence[Part], blobs: BlobStore) -> Iterator[bytes]:
    """Answer the child's requests until it is done; its lines."""
    with ExitStack() as opened:
        file: IO[bytes] | None = None
        while (message := peer.recv_bytes()) != END:
            kind, payload = message[:1], message[1:]
            if kind == LINES:
                yield payload
            elif kind == READ and file is not None:
                offset, size = struct.unpack("<QI", payload)
                file.seek(offset)
                peer.send_bytes(file.read(min(size, PIECE_BYTES)))
            elif kind == OPEN:
                opened.close()
                part = parts[struct.unpack("<I", payload)[0]]
                file = opened.enter_context(blobs.open_file(part.key))
                peer.send_bytes(struct.pack("<Q", file.seek(0, os.SEEK_END)))
            elif kind == FAULT:
                raise InputFault(**json.loads(payload))
            else:
                raise SandboxError(f"the process that reads the input's tables sent {kind!r}")


def _ended(process: subprocess.Popen[bytes]) -> Exception:
    try:
        status = process.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return SandboxError("the process that reads the input's tables broke its connection")
    if -status in OWN_DOING:
        name = signal.Signals(-status).name
        return InputFault(
            "invalid_file",
            f"the input's tables must be whole and must not unpack to more than "
            f"runner.max_unpack_bytes at once; reading them ended in {name}",
        )
    return SandboxError(f"the process that reads the input's tables ended with status {status}")


class _RemoteFile(io.RawIOBase):
    """A part, read by the runner for us."""

    def __init__(self, connection: _Connection, index: int) -> None:
        super().__init__()
        connection.send_bytes(OPEN + struct.pack("<I", index))
        (self._size,) = struct.unpack("<Q", connection.recv_bytes())
        self._connection = connection
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        size = min(len(buffer), PIECE_BYTES)
        self._connection.send_bytes(READ + struct.pack("<QI", self._at, size))
        data = self._connection.recv_bytes()
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def main(connection: _Connection) -> None:
    """The child: does the job that it is sent, and says so."""
    job = json.loads(connection.recv_bytes())
    parts = [Part(**part) for part in job["parts"]]
    indices = {part.name: index for index, part in enumerate(parts)}
    _limit_memory(job["memory_bytes"])

    @contextmanager
    def open_part(part: Part) -> Iterator[IO[bytes]]:
        with io.BufferedReader(_RemoteFile(connection, indices[part.name]), PIECE_BYTES) as file:
            yield file

    try:
        pieces = input_pieces(parts, open_part, job["endpoint"], job["max_line_bytes"])
        for piece in pieces:
            for start in range(0, len(piece), PIECE_BYTES):
                connection.send_bytes(LINES + piece[start : start + PIECE_BYTES])
    except InputFault as fault:
        said = {"code": fault.code, "message": str(fault), "line": fault.line, "param": fault.param}
        connection.send_bytes(FAULT + json.dumps(said).encode())
    else:
        connection.send_bytes(END)


def _leave_with(parent: int) -> None:
    """End with the runner, also in the middle of a computation."""
    while os.getppid() == parent:
        time.sleep(WATCH_PERIOD_S)
    os._exit(1)


def _limit_memory(num_bytes: int) -> None:
    """Bound the data of this process to what it has, all modules loaded, and ``num_bytes``."""
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401  loaded before it is measured

    status = Path("/proc/self/status").read_text()
    held_kib = int(status.partition("VmData:")[2].split()[0])
    bound = held_kib * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    threading.Thread(target=_leave_with, args=[int(sys.argv[2])], daemon=True).start()
    try:
        main(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError):
        sys.exit("the runner went away")
