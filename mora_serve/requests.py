"""Request bodies of diagnostics, scores and rewrites, and the rows of a batch that carry them.

The schemas are strict: unknown fields, wrong types and values out of bounds are refused, and
``None`` means the configured default. :func:`parse_body` turns the first broken rule into an
:class:`~mora_serve.errors.InvalidRequestError` whose message names the field and the rule and
never contains prompt text. What needs the running service (known models and dimensions, limits) is
checked by :mod:`mora_serve.service`; a prompt whose *content* is at fault is found by
:func:`to_messages`, so that one bad prompt among many fails alone.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from mora_serve.errors import InvalidRequestError
from mora_serve.types import Message, Messages
from mora_serve.validation import broken_rule, request_error, shown

DIAGNOSTICS_URL: Final = "/v1/diagnostics"
SCORES_URL: Final = "/v1/scores"
REWRITES_URL: Final = "/v1/rewrites"

MAX_N: Final = 256
MAX_N_MAX: Final = 1024
MAX_CANDIDATES: Final = 16
MAX_SEED: Final = 2**63 - 1
MAX_CUSTOM_ID_CHARS: Final = 512
DUPLICATE_CUSTOM_ID: Final = "duplicate_custom_id"
"""Error code of a batch row whose ``custom_id`` was used on an earlier line."""


class Body(BaseModel):
    """Base of every schema: strict types, no unknown field, no NaN."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


def _encodable(value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", "must be valid Unicode text") from None
    return value


Text = Annotated[str, AfterValidator(_encodable)]
"""A string without lone surrogates, which no tokenizer or store could take."""


class MessageBody(Body):
    """One chat turn of a prompt."""

    role: Literal["system", "user", "assistant"]
    content: Text


def _prompt_tag(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    return "turns" if isinstance(value, list | tuple) else None


PromptBody = Annotated[
    Annotated[Text, Tag("string")] | Annotated[list[MessageBody], Tag("turns")],
    Discriminator(
        _prompt_tag,
        custom_error_type="prompt_type",
        custom_error_message="must be a string or a list of messages",
    ),
]
"""A prompt as callers write it: the user's text, or a conversation ending with the user's turn."""


class SamplingBody(Body):
    """Fields shared by every request that samples the policy."""

    model: Text | None = None
    n: int | None = Field(None, ge=1, le=MAX_N)
    """Rollouts per prompt and round."""
    n_max: int | None = Field(
        None,
        ge=1,
        le=MAX_N_MAX,
        description="Rollouts per prompt at most, over all rounds. Without n, a value below the "
        "configured n is the size of the only round.",
    )
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    dimensions: list[Text] | None = Field(None, min_length=1)
    include_rollouts: bool | None = None

    @model_validator(mode="after")
    def _rounds_fit(self) -> SamplingBody:
        if self.n is not None and self.n_max is not None and self.n_max < self.n:
            raise broken_rule("n_max", f"must be at least n ({self.n}), got {self.n_max}")
        return self


class DiagnosticsRequest(SamplingBody):
    """``POST /v1/diagnostics``: diagnose prompts by sampling, or by the ``responses`` given."""

    prompts: list[PromptBody] = Field(min_length=1)
    responses: list[list[Text]] | None = None
    stream: bool | None = None

    @model_validator(mode="after")
    def _responses_fit(self) -> DiagnosticsRequest:
        if self.responses is None:
            return self
        if len(self.responses) != len(self.prompts):
            raise broken_rule(
                "responses",
                f"must hold one list per prompt ({len(self.prompts)}), got {len(self.responses)}",
            )
        for index, group in enumerate(self.responses):
            if not 1 <= len(group) <= MAX_N_MAX:
                raise broken_rule(
                    f"responses.{index}", f"must hold 1 to {MAX_N_MAX} answers, got {len(group)}"
                )
        for name in ("n", "n_max", "model", "temperature", "top_p", "max_tokens", "seed"):
            if getattr(self, name) is not None:
                raise broken_rule(name, "must be absent beside responses, which are not sampled")
        return self


class ScoreRow(Body):
    """One answer to score."""

    prompt: PromptBody
    response: Text


class ScoresRequest(Body):
    """``POST /v1/scores``."""

    rows: list[ScoreRow] = Field(min_length=1)
    dimensions: list[Text] | None = Field(None, min_length=1)
    stream: bool | None = None


class RewriteRequest(SamplingBody):
    """``POST /v1/rewrites``."""

    prompt: PromptBody
    candidates: int | None = Field(None, ge=0, le=MAX_CANDIDATES)
    """Rewrites to propose; 0 diagnoses and pairs the prompt as it is."""
    strategies: list[Literal["compose", "llm", "null"]] | None = Field(None, min_length=1)
    mode: Literal["simultaneous", "sequential"] | None = None
    n_confirm: int | None = Field(None, ge=4, le=MAX_N)
    """Fresh rollouts of candidate and original on which acceptance is decided."""
    acceptance: Literal["confirmed", "all"] | None = None
    """``all`` takes the first candidate unmeasured: what experiments compare with."""


MoraRequest = DiagnosticsRequest | ScoresRequest | RewriteRequest
BODIES: Final[Mapping[str, type[MoraRequest]]] = {
    DIAGNOSTICS_URL: DiagnosticsRequest,
    SCORES_URL: ScoresRequest,
    REWRITES_URL: RewriteRequest,
}
"""Schema by endpoint; its keys are the endpoints a batch may name."""


def parse_body(url: str, data: Any, *, prefix: str = "") -> MoraRequest:
    """Validate the body of an endpoint in :data:`BODIES`.

    ``prefix`` is put before the field's path in errors, for example ``body.``. Raises
    :class:`~mora_serve.errors.InvalidRequestError` with ``param`` and ``code``.
    """
    if not isinstance(data, Mapping):
        raise InvalidRequestError(
            f"{prefix.rstrip('.') or 'body'} must be a JSON object",
            prefix.rstrip(".") or None,
            "invalid_type",
        )
    try:
        return BODIES[url].model_validate(dict(data))
    except ValidationError as error:
        raise request_error(error, prefix=prefix) from None


def to_messages(
    prompt: str | Sequence[MessageBody], param: str, system_prompt: str | None = None
) -> Messages:
    """The conversation to sample; ``system_prompt`` opens it unless it has a system turn.

    Raises :class:`~mora_serve.errors.InvalidRequestError` (code ``empty_prompt`` or
    ``invalid_prompt``) naming ``param`` when the content breaks a rule.
    """
    turns: Messages
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InvalidRequestError(f"{param} must not be empty", param, "empty_prompt")
        turns = (Message("user", prompt),)
    else:
        turns = tuple(Message(turn.role, turn.content) for turn in prompt)
        _check_turns(turns, param)
    if system_prompt and turns[0].role != "system":
        return (Message("system", system_prompt), *turns)
    return turns


def _check_turns(turns: Messages, param: str) -> None:
    if not turns:
        raise InvalidRequestError(f"{param} must hold at least one message", param, "empty_prompt")
    for index, turn in enumerate(turns):
        where = f"{param}.{index}"
        if not turn.content.strip():
            raise InvalidRequestError(
                f"{where}.content must not be empty", f"{where}.content", "empty_prompt"
            )
        if turn.role == "system" and index > 0:
            raise InvalidRequestError(
                f"{where}.role must be user or assistant after the first message, got system",
                f"{where}.role",
                "invalid_prompt",
            )
    if turns[-1].role != "user":
        raise InvalidRequestError(
            f"{param} must end with a user message, got {turns[-1].role}", param, "invalid_prompt"
        )


# --- batch rows ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A valid input line of a batch."""

    custom_id: str
    url: str
    body: MoraRequest


def parse_batch_row(line: bytes | str, endpoint: str) -> BatchRow:
    """Validate one JSONL line of a batch for ``endpoint``.

    Raises :class:`~mora_serve.errors.InvalidRequestError` whose ``code`` is one of
    ``invalid_json``, ``invalid_row``, ``invalid_custom_id``, ``invalid_method``, ``invalid_url``,
    ``missing_body`` or a code of :func:`parse_body`. Duplicate ``custom_id`` values are the
    runner's to find (:data:`DUPLICATE_CUSTOM_ID`).
    """
    row = _parse_line(line)
    _custom_id(row)
    extra = sorted(set(row) - {"custom_id", "method", "url", "body"})
    if extra:
        name = shown(extra[0])
        raise InvalidRequestError(
            f"{name} is not a field of a batch row", name, "unknown_parameter"
        )
    if row.get("method") != "POST":
        raise InvalidRequestError("method must be POST", "method", "invalid_method")
    if row.get("url") != endpoint:
        raise InvalidRequestError(
            f"url must be the batch's endpoint {endpoint}", "url", "invalid_url"
        )
    if "body" not in row:
        raise InvalidRequestError("body must be given", "body", "missing_body")
    return BatchRow(row["custom_id"], endpoint, parse_body(endpoint, row["body"], prefix="body."))


def in_body(error: InvalidRequestError) -> InvalidRequestError:
    """``error`` of a row's body as the row's: its field and message begin with ``body.``."""
    if error.param is None:
        return error
    place = "" if error.message.startswith(f"{error.param} ") else f"{error.param}: "
    return type(error)(f"body.{place}{error.message}", f"body.{error.param}", error.code)


def custom_id_of(line: bytes | str) -> str | None:
    """The ``custom_id`` of a line however broken the rest is, or ``None`` when it has none."""
    try:
        return _custom_id(_parse_line(line))
    except InvalidRequestError:
        return None


def _parse_line(line: bytes | str) -> dict[str, Any]:
    try:
        # Bytes would be taken for UTF-16, and their byte order mark be passed over.
        text = line if isinstance(line, str) else line.decode("utf-8")
        row = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise InvalidRequestError("the line must be valid JSON", None, "invalid_json") from None
    if not isinstance(row, dict):
        raise InvalidRequestError("the line must be a JSON object", None, "invalid_row")
    return row


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _custom_id(row: Mapping[str, Any]) -> str:
    value = row.get("custom_id")
    if not isinstance(value, str) or not 0 < len(value) <= MAX_CUSTOM_ID_CHARS:
        raise InvalidRequestError(
            f"custom_id must be a string of 1 to {MAX_CUSTOM_ID_CHARS} characters",
            "custom_id",
            "invalid_custom_id",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequestError(
            "custom_id must be valid Unicode text", "custom_id", "invalid_custom_id"
        ) from None
    return value
