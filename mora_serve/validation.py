"""What broken schema rules are called: one plain sentence each, for bodies and URLs alike.

:func:`request_error` turns pydantic's report into an
:class:`~mora_serve.errors.InvalidRequestError` that names the field and the rule, and
:func:`rule_text` is the rule alone. Nothing here repeats prompt text, and what a caller sent is cut
to :data:`MAX_SHOWN_CHARS` wherever it is repeated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from pydantic import ValidationError

from mora_serve.errors import InvalidRequestError

MAX_SHOWN_CHARS: Final = 80
"""Longest piece of a request that an error repeats."""

_TAGS: Final = frozenset({"string", "turns", "[key]"})
"""Parts of a path that pydantic adds and no caller wrote."""
_SHOWN_FIELDS: Final = frozenset(
    {"model", "mode", "strategies", "dimensions", "role", "loss_type", "f_divergence_type"}
)
"""Fields whose text may be repeated in a message; all other text could be a prompt."""
_RULES: Final[Mapping[str, str]] = {
    "missing": "must be given",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be below {lt}",
    "too_short": "must hold at least {min_length} item(s)",
    "too_long": "must hold at most {max_length} items",
    "literal_error": "must be {expected}",
    "none_required": "must be null",
    "string_type": "must be a string",
    "string_unicode": "must be valid Unicode text",
    "string_too_short": "must be at least {min_length} character(s) long",
    "string_too_long": "must be at most {max_length} characters long",
    "string_pattern_mismatch": "must match {pattern}",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "int_parsing": "must be an integer",
    "int_parsing_size": "must be an integer of at most 64 bits",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
}
_CODES: Final[Mapping[str, str]] = {
    "missing": "missing_required_parameter",
    "extra_forbidden": "unknown_parameter",
    "prompt_type": "invalid_type",
}
_JSON_NAMES: Final = {"str": "a string", "dict": "an object", "list": "a list"}
_JSON_CONSTANTS: Final = {"True": "true", "False": "false", "None": "null"}


class RuleError(ValueError):
    """A rule across fields; carries the field's path, which pydantic cannot know."""

    def __init__(self, param: str, rule: str) -> None:
        super().__init__(f"{param} {rule}")
        self.param = param


def broken_rule(param: str, rule: str) -> RuleError:
    """For validators across fields: ``raise broken_rule("n_max", "must be at least n")``."""
    return RuleError(param, rule)


def request_error(error: ValidationError, *, prefix: str = "") -> InvalidRequestError:
    """The first broken rule as an error with ``param`` (dotted path) and a stable ``code``.

    Codes: ``missing_required_parameter``, ``unknown_parameter``, ``invalid_type``,
    ``invalid_value``.
    """
    item = error.errors(include_url=False)[0]
    broken = item.get("ctx", {}).get("error")
    parts = [str(part) for part in item["loc"] if part not in _TAGS]
    if isinstance(broken, RuleError):
        section = prefix + "".join(f"{part}." for part in parts)
        return InvalidRequestError(f"{section}{broken}", section + broken.param, "invalid_value")
    kind = item["type"]
    path = shown(prefix + ".".join(parts) if parts else prefix.removesuffix("."))
    if kind == "extra_forbidden":
        message = f"{path} is not a field of this request"
    else:
        message = f"{path or 'body'} {rule_text(item)}{_got(item, kind)}"
    is_type = kind.endswith("_type") or kind == "int_from_float"
    code = _CODES.get(kind, "invalid_type" if is_type else "invalid_value")
    return InvalidRequestError(message, path or None, code)


def rule_text(item: Mapping[str, Any]) -> str:
    """The rule that one of pydantic's error items says was broken, as ``must ...``."""
    kind = str(item["type"])
    if isinstance(item.get("input"), str) and kind in ("too_short", "too_long"):
        kind = f"string_{kind}"
    context = dict(item.get("ctx", {}))
    if "expected" in context:
        context["expected"] = _JSON_CONSTANTS.get(context["expected"], context["expected"])
    rule = _RULES[kind].format(**context) if kind in _RULES else str(item["msg"])
    if "[key]" in item["loc"]:
        return rule.replace("must be", "must have a name that is", 1)
    return rule


def shown(text: str) -> str:
    """``text`` as a message may repeat it: cut, and without anything UTF-8 cannot say."""
    if len(text) > MAX_SHOWN_CHARS:
        text = text[:MAX_SHOWN_CHARS] + "..."
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _got(item: Any, kind: str) -> str:
    value = item.get("input")
    if kind == "missing":
        return ""
    if isinstance(value, bool | int | float) or value is None:
        return f", got {shown(json.dumps(value))}"
    named = {part for part in item["loc"] if isinstance(part, str)}
    if isinstance(value, str) and named & _SHOWN_FIELDS:
        return f", got {shown(value)!r}"
    return f", got {_JSON_NAMES.get(type(value).__name__, type(value).__name__)}"
