"""Multipart uploads read as a stream: the file goes on as it arrives and never sits in memory.

The parser is pulled: whoever consumes :meth:`Upload.file_chunks` (the blob store) makes it read
more of the request, so a slow disk slows the client and nothing piles up in between.
"""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncIterator, Collection

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from api.errors import BodyTooLargeError
from mora_serve.errors import InvalidRequestError
from mora_serve.validation import shown

MAX_FIELD_BYTES = 4096
MAX_HEADERS = 16
MAX_HEADER_BYTES = 8192


class Upload:
    """One multipart form with one file part, named ``file``; other parts are ``fields``.

    Use: ``await find_file()``, consume ``file_chunks()``, then ``await finish()``; ``fields`` and
    ``filename`` are complete after that (fields may come after the file). A part that would be
    ignored is refused by name.
    """

    def __init__(
        self,
        content_type: str,
        body: AsyncIterator[bytes],
        max_bytes: int,
        *,
        file: str,
        fields: Collection[str] = (),
    ) -> None:
        _, options = parse_options_header(content_type)
        boundary = options.get(b"boundary", b"")
        if not boundary:
            raise _bad_form("its Content-Type must name a boundary")
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.num_bytes = 0
        self._max_bytes = max_bytes
        self._file_name = file
        self._field_names = fields
        self._body = body
        self._chunks: deque[bytes] = deque()
        self._in_file = False
        self._file_ended = False
        self._form_ended = False
        self._headers: dict[str, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._name = ""
        self._field = bytearray()
        self._parser = self._new_parser(boundary)

    def _new_parser(self, boundary: bytes) -> MultipartParser:
        try:
            return MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
            )
        except FormParserError:
            raise _bad_form("its boundary is not valid") from None

    async def find_file(self) -> None:
        """Read until the file part begins. Raises ``InvalidRequestError`` when there is none."""
        while self.filename is None:
            if not await self._read():
                name = self._file_name
                raise InvalidRequestError(
                    f"{name} is required.", name, "missing_required_parameter"
                )

    async def file_chunks(self) -> AsyncIterator[bytes]:
        """The file's bytes. Raises ``BodyTooLargeError`` above the limit."""
        while True:
            while self._chunks:
                yield self._chunks.popleft()
            if self._file_ended:
                return
            if not await self._read():
                raise _bad_form("it ends within the file")

    async def finish(self) -> None:
        """Read the rest of the form."""
        while await self._read():
            pass
        if not self._form_ended:
            raise _bad_form("it ends without a closing boundary")

    async def _read(self) -> bool:
        async for data in self._body:
            try:
                self._parser.write(data)
            except FormParserError:
                raise _bad_form("it cannot be parsed") from None
            return True
        return False

    # parser callbacks: (data, start, end) spans

    def _on_part_begin(self) -> None:
        self._headers = {}
        self._field = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._bound(len(self._header_name), MAX_HEADER_BYTES)

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._bound(len(self._header_value), MAX_HEADER_BYTES)

    def _on_header_end(self) -> None:
        name = self._header_name.decode("latin-1").lower()
        self._headers[name] = self._header_value
        self._header_name = self._header_value = b""
        self._bound(len(self._headers), MAX_HEADERS)

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get("content-disposition", b""))
        self._name = options.get(b"name", b"").decode("utf-8", "replace")
        self._in_file = self._name == self._file_name
        if not self._in_file and self._name not in self._field_names:
            name = shown(self._name)
            raise InvalidRequestError(
                f"{name} is not a field of this request", name or None, "unknown_parameter"
            )
        if self._in_file:
            if self.filename is not None:
                raise InvalidRequestError(
                    f"{self._name} must be given once.", self._name, "invalid_value"
                )
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace") or "upload"

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if not self._in_file:
            self._field += data[start:end]
            self._bound(len(self._field), MAX_FIELD_BYTES)
            return
        self.num_bytes += end - start
        if self.num_bytes > self._max_bytes:
            raise BodyTooLargeError(
                f"{self._name} must be at most {self._max_bytes} bytes.", self._name
            )
        self._chunks.append(data[start:end])

    def _on_part_end(self) -> None:
        if self._in_file:
            self._file_ended = True
        else:
            self.fields[self._name] = self._field.decode("utf-8", "replace")
        self._in_file = False

    def _on_end(self) -> None:
        self._form_ended = True

    def _bound(self, size: int, limit: int) -> None:
        if size > limit:
            raise _bad_form("a header or field of it is too large")


def _bad_form(why: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"The request body must be a multipart form: {why}.", None, "invalid_multipart"
    )
