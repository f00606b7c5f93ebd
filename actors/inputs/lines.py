"""The lines of an input, piece by piece: memory is bounded by a piece, not by the input.

Everything here but :func:`stream` blocks. Tables are read by :mod:`actors.inputs.sandbox` in a
process of their own.
"""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from itertools import count
from typing import IO, Any, Protocol

from actors.inputs.faults import InputFault
from actors.inputs.sources import Part
from actors.inputs.tables import PIECE_BYTES, arrow_batches, parquet_batches, table_lines
from mora_serve.errors import MoraError

KINDS = {"jsonl": "JSON Lines", "gzip": "gzip", "parquet": "Parquet", "arrow": "Arrow"}


class Pieces(Protocol):
    """Pieces of an input, made one at a time. Blocking."""

    def __next__(self) -> bytes: ...

    def close(self) -> None: ...


def _wait_it_out() -> None:
    pass


async def stream(
    pieces: Pieces, max_bytes: int, abort: Callable[[], None] = _wait_it_out
) -> AsyncIterator[bytes]:
    """The pieces, each made in a thread, which are closed at the end.

    ``abort`` is called from another thread to end the making of a piece when the caller is
    cancelled. Raises :class:`InputFault` for more than ``max_bytes``.
    """
    num_bytes = 0
    with closing(pieces):
        while (piece := await _finished(partial(next, pieces, None), abort)) is not None:
            num_bytes += len(piece)
            if num_bytes > max_bytes:
                raise too_large(max_bytes)
            yield piece


async def _finished(call: Callable[[], Any], abort: Callable[[], None]) -> Any:
    """The call in a thread; a cancellation aborts it and waits for its end, since a generator that
    runs cannot be closed."""
    running = asyncio.ensure_future(asyncio.to_thread(call))
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait([running])
        except asyncio.CancelledError as error:
            cancelled = error
            abort()
    if cancelled is not None:
        running.exception()  # what an aborted call fails with is nobody's concern
        raise cancelled
    return running.result()


def too_large(max_bytes: int) -> InputFault:
    """The fault of an input with more bytes than a batch may have."""
    return InputFault(
        "input_too_large",
        f"the rows must have at most {max_bytes} bytes as JSON lines (runner.max_input_bytes); "
        "split the input",
    )


def input_pieces(
    parts: Sequence[Part],
    open_part: Callable[[Part], AbstractContextManager[IO[bytes]]],
    endpoint: str,
    max_line_bytes: int,
) -> Generator[bytes, None, None]:
    """The parts one after the other as JSON lines. Raises :class:`InputFault`.

    Of a table no row may be over ``max_line_bytes``: memory is bounded by a few of them.
    """
    indices = count()
    for part in parts:
        with open_part(part) as file, _faults_of(part):
            if part.format == "jsonl":
                yield from _whole_lines(file)
            elif part.format == "gzip":
                with gzip.GzipFile(fileobj=file) as unzipped:
                    yield from _whole_lines(unzipped)
            else:
                is_parquet = part.format == "parquet"
                batches = parquet_batches(file) if is_parquet else arrow_batches(file)
                yield from table_lines(batches, part.name, endpoint, max_line_bytes, indices)


def _whole_lines(file: Any) -> Iterator[bytes]:
    """The file as it is, with a line break at its end."""
    last = b"\n"
    while piece := file.read(PIECE_BYTES):
        last = piece[-1:]
        yield piece
    if last != b"\n":
        yield b"\n"


@contextmanager
def _faults_of(part: Part) -> Iterator[None]:
    """Whatever a format's library raises over a file's bytes is the fault of that file."""
    name, kind = part.name, KINDS[part.format]
    try:
        yield
    except (InputFault, MoraError):
        raise
    except MemoryError:
        raise InputFault(
            "unpacks_too_large",
            f"{name}: too much has to be unpacked at once (runner.max_unpack_bytes); write it with "
            "smaller row groups or record batches",
        ) from None
    except UnicodeDecodeError:
        raise InputFault("invalid_encoding", f"{name}: text must be UTF-8") from None
    except Exception as error:  # noqa: BLE001  what they raise over broken bytes is not specified
        reason = type(error).__name__
        raise InputFault(
            "invalid_file", f"{name}: the file must be a whole {kind} file ({reason})"
        ) from None
