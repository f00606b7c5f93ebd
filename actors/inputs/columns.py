"""Rows of a table as lines of a batch.

Two kinds of tables are understood, told apart by their columns::

    with a column ``body``  each row is a batch line: body (a struct, or JSON text), and if there
                            are such columns custom_id, method and url
    without one             each column is a field of the endpoint's body, or custom_id

For ``/v1/scores`` the columns ``prompt`` and ``response`` make the only row of a body, for
``/v1/diagnostics`` the column ``prompt`` its only prompt. Without a ``custom_id`` column, ids are
``row-<index>``, counted from 0 over the whole input. Any other column fails the batch by name: what
it means is not known, and a misspelt field must not be taken for an absent one. Null is an absent
value. What a row holds is checked with the row, like that of any batch line.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from actors.inputs.faults import InputFault
from mora_serve.requests import BODIES, DIAGNOSTICS_URL, SCORES_URL

_LINE_COLUMNS = ("custom_id", "method", "url", "body")
_REQUIRED = {
    url: tuple(name for name, field in body.model_fields.items() if field.is_required())
    for url, body in BODIES.items()
}
_SINGLE = {SCORES_URL: ("prompt", "response"), DIAGNOSTICS_URL: ("prompt",)}
"""Columns that together stand for the endpoint's one required field."""


class LineMaker:
    """Turns rows with the given columns into lines for ``endpoint``.

    Raises :class:`InputFault` naming a column that is unknown, or one that is missing.
    """

    def __init__(self, endpoint: str, columns: Sequence[str], place: str) -> None:
        self._endpoint = endpoint
        self._has_ids = "custom_id" in columns
        self._lines = "body" in columns
        self._single = _SINGLE.get(endpoint, ()) if _is_single(endpoint, columns) else ()
        for column, times in Counter(columns).items():
            if times > 1:
                raise InputFault(
                    "duplicate_column",
                    f"{place}: column {column[:80]!r} must be there once; drop or rename it",
                    param=column[:80],
                )
        known = set(_LINE_COLUMNS) if self._lines else {"custom_id", *self._fields()}
        for column in columns:
            if column not in known:
                raise InputFault(
                    "unknown_column",
                    f"{place}: column {column[:80]!r} is not one of {', '.join(sorted(known))}; "
                    "drop or rename it",
                    param=column[:80],
                )
        self._require(columns, place)

    def line(self, row: Mapping[str, Any], index: int) -> bytes:
        """The row as a JSON line, line break included."""
        values = _present(row)
        custom_id = values.pop("custom_id", None) if self._has_ids else f"row-{index}"
        if self._lines:
            body = _parsed(values.get("body"))
            method, url = values.get("method", "POST"), values.get("url", self._endpoint)
        else:
            body, method, url = self._body(values), "POST", self._endpoint
        line = {"custom_id": custom_id, "method": method, "url": url, "body": body}
        try:
            return _json_line(line)
        except RecursionError:
            # As text it is no body, and fails with its row.
            return _json_line({**line, "body": values.get("body")})

    def _fields(self) -> set[str]:
        fields = set(BODIES[self._endpoint].model_fields)
        return (
            fields - set(_REQUIRED[self._endpoint]) | set(self._single) if self._single else fields
        )

    def _require(self, columns: Sequence[str], place: str) -> None:
        required = () if self._lines else self._single or _REQUIRED[self._endpoint]
        for column in required:
            if column not in columns:
                raise InputFault(
                    "missing_column",
                    f"{place}: column {column!r} must be given for {self._endpoint}",
                    param=column,
                )

    def _body(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self._single:
            return values
        given = {name: values.pop(name) for name in self._single if name in values}
        if self._endpoint == SCORES_URL:
            return {"rows": [given], **values}
        return {"prompts": [given["prompt"]] if given else [], **values}


def _is_single(endpoint: str, columns: Sequence[str]) -> bool:
    return not set(_REQUIRED[endpoint]) & set(columns)


def _json_line(line: dict[str, Any]) -> bytes:
    text = json.dumps(line, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "backslashreplace") + b"\n"


def _parsed(body: Any) -> Any:
    """A body that is JSON text as its value; text that is no JSON stays, and fails with its row."""
    if not isinstance(body, str):
        return body
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return body


def _present(value: Any) -> Any:
    """``value`` without nulls in structs, at any depth: Arrow has them where a field is absent."""
    if isinstance(value, dict):
        return {key: _present(item) for key, item in value.items() if item is not None}
    return [_present(item) for item in value] if isinstance(value, list) else value
