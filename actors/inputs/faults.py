"""What is wrong with an input as a whole; the batch ends in ``failed`` with it."""

from __future__ import annotations


class InputFault(Exception):  # noqa: N818  the word of the API's contract
    """``code`` is stable, ``line`` counts from 1, ``param`` names a column."""

    def __init__(
        self, code: str, message: str, *, line: int | None = None, param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.line = line
        self.param = param
