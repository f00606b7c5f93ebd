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
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from actors.inputs.faults import InputFault
from actors.inputs.lines import input_pieces
from actors.inputs.sources import TABLES, Part
from actors.inputs.tables import PIECE_BYTES
from mora_serve.ports import BlobStore

OPEN, READ, LINES, FAULT, END = b"O", b"R", b"L", b"F", b"E"
OWN_DOING = {signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}
"""Signals that say that a process did something wrong, and not that somebody ended it."""


class SandboxError(Exception):
    """The child ended without a word; another try may go well."""


def batch_pieces(
    parts: Sequence[Part], blobs: BlobStore, endpoint: str, max_line_bytes: int, memory_bytes: int
) -> Generator[bytes, None, None]:
    """The input as JSON lines; a child reads it if a part is a table. Blocking.

    Raises :class:`InputFault`, ``StorageError``, and :class:`SandboxError`. The child may take
    ``memory_bytes`` beside its own modules; where it needs more, the input is at fault.
    """
    if not any(part.format in TABLES for part in parts):
        yield from input_pieces(
            parts, lambda part: blobs.open_file(part.key), endpoint, max_line_bytes
        )
        return
    job = {
        "parts": [asdict(part) for part in parts],
        "endpoint": endpoint,
        "max_line_bytes": max_line_bytes,
        "memory_bytes": memory_bytes,
    }
    with _child() as (process, peer):
        try:
            peer.send_bytes(json.dumps(job).encode())
            yield from _served(peer, parts, blobs)
        except _GoneError:
            raise _ended(process) from None


@contextmanager
def _child() -> Iterator[tuple[subprocess.Popen[bytes], _Peer]]:
    ours, theirs = Pipe()
    with closing(ours):
        with closing(theirs):
            process = subprocess.Popen(
                [sys.executable, "-m", "actors.inputs.sandbox", str(theirs.fileno())],
                env=_environment(),
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        try:
            yield process, _Peer(ours)
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    """No secrets; memory goes back to the system at once, so that the bound is on what is used."""
    return {
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "ARROW_IO_THREADS": "1",
        "OMP_NUM_THREADS": "1",
    }


class _GoneError(Exception):
    """The process on the other end of the pipe has ended."""


class _Peer:
    """A connection whose every failure is :class:`_GoneError`, never taken for one of storage."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def send_bytes(self, data: bytes) -> None:
        try:
            self._connection.send_bytes(data)
        except OSError:
            raise _GoneError from None

    def recv_bytes(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except (EOFError, OSError):
            raise _GoneError from None


def _served(peer: _Peer, parts: Sequence[Part], blobs: BlobStore) -> Iterator[bytes]:
    """Answer the child's requests until it is done; its lines."""
    with ExitStack() as opened:
        file: IO[bytes] | None = None
        while True:
            message = peer.recv_bytes()
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
            elif kind == END:
                return


def _ended(process: subprocess.Popen[bytes]) -> Exception:
    status = process.wait()
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

    def __init__(self, connection: Connection, index: int) -> None:
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


def main(connection: Connection) -> None:
    """The child: does the job that it is sent, and says so."""
    job = json.loads(connection.recv_bytes())
    parts = [Part(**part) for part in job["parts"]]
    _limit_memory(job["memory_bytes"])

    @contextmanager
    def open_part(part: Part) -> Iterator[IO[bytes]]:
        with io.BufferedReader(_RemoteFile(connection, parts.index(part)), PIECE_BYTES) as file:
            yield file

    try:
        pieces = input_pieces(parts, open_part, job["endpoint"], job["max_line_bytes"])
        for piece in pieces:
            connection.send_bytes(LINES + piece)
    except InputFault as fault:
        said = {"code": fault.code, "message": str(fault), "line": fault.line, "param": fault.param}
        connection.send_bytes(FAULT + json.dumps(said).encode())
    else:
        connection.send_bytes(END)


def _limit_memory(num_bytes: int) -> None:
    """Bound the data of this process to what it has, all modules loaded, and ``num_bytes``."""
    import pyarrow.compute
    import pyarrow.parquet  # noqa: F401  loaded before it is measured

    status = Path("/proc/self/status").read_text()
    held_kib = int(status.partition("VmData:")[2].split()[0])
    bound = held_kib * 1024 + num_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (bound, bound))


if __name__ == "__main__":
    try:
        main(Connection(int(sys.argv[1])))
    except (EOFError, BrokenPipeError):
        sys.exit("the runner went away")
