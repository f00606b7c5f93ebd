"""Request bodies: reading JSON, and the schemas of the resources that only the gateway knows.

Diagnostics, scores and rewrites are :mod:`mora_serve.requests`' (batch rows share them); chat,
files, batches and fine-tuning jobs are defined here, with OpenAI's field names. A field of
OpenAI's API that changes nothing here is accepted (``user``, ``store`` ...); one that would change
the answer and is not supported is refused by name, so that nobody believes it had an effect.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import (
    AfterValidator,
    BaseModel,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    field_validator,
)
from pydantic_core import PydanticCustomError

from mora_serve.dpo_loss import DpoLoss
from mora_serve.errors import InvalidRequestError
from mora_serve.requests import BODIES, MAX_SEED, Body, MessageBody, Text
from mora_serve.validation import request_error

ModelT = TypeVar("ModelT", bound=BaseModel)

MAX_CHAT_N = 128
MAX_STOPS = 4
MAX_METADATA = 16

Metadata = Annotated[
    dict[Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]],
    Field(max_length=MAX_METADATA),
]
"""OpenAI's metadata: at most 16 pairs, keys of 64 and values of 512 characters."""


async def read_json(request: Request) -> Any:
    """The request's JSON value. Any content type is accepted: ``curl -d`` sends a form's.

    Raises ``InvalidRequestError`` (code ``invalid_json``) without repeating any of the body.
    """
    return parse_json(await request.body())


def parse_json(data: bytes) -> Any:
    """Parse UTF-8 JSON; ``NaN``, ``Infinity`` and numbers beyond doubles (``1e999``) are refused.

    RFC 8259 has neither of the former, and what reads the latter as infinite cannot say it again.
    """
    if not data.strip():
        raise InvalidRequestError(
            "The request body must be JSON, got nothing.", None, "invalid_json"
        )
    try:
        return json.loads(data, parse_constant=_no_constant, parse_float=_finite)
    except json.JSONDecodeError as error:
        message = f"The request body must be valid JSON: {error.msg} at character {error.pos}."
        raise InvalidRequestError(message, None, "invalid_json") from None
    except (ValueError, RecursionError):
        message = "The request body must be valid JSON in UTF-8, with ordinary numbers and depth."
        raise InvalidRequestError(message, None, "invalid_json") from None


def _no_constant(name: str) -> None:
    raise ValueError(name)


def _finite(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise ValueError(digits)
    return value


def parse(schema: type[ModelT], data: Any) -> ModelT:
    """Validate a body. Raises ``InvalidRequestError`` naming the field and the rule."""
    if not isinstance(data, Mapping):
        raise InvalidRequestError("The request body must be a JSON object.", None, "invalid_type")
    try:
        return schema.model_validate(dict(data))
    except ValidationError as error:
        raise request_error(error) from None


def _broken(rule: str) -> PydanticCustomError:
    return PydanticCustomError("rule", "{rule}", {"rule": rule})


def _text_or_list(value: Any) -> str | None:
    if isinstance(value, str):
        return "string"
    return "turns" if isinstance(value, list) else None


def _either(rule: str) -> Discriminator:
    """Chooses between text and a list by type, so that errors do not name union branches."""
    return Discriminator(_text_or_list, custom_error_type="content_type", custom_error_message=rule)


# --- chat ---------------------------------------------------------------------------------------


class TextPart(Body):
    """A piece of a message; only text is understood."""

    type: Literal["text"]
    text: Text


class ChatMessage(Body):
    """One turn; ``developer`` is read as ``system``."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("string")] | Annotated[list[TextPart], Tag("turns")],
        _either("must be a string or a list of text parts"),
    ]
    name: Text | None = None

    def plain(self) -> MessageBody:
        """The turn with its parts joined."""
        text = (
            self.content
            if isinstance(self.content, str)
            else "".join(part.text for part in self.content)
        )
        role: Any = "system" if self.role == "developer" else self.role
        return MessageBody(role=role, content=text)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class ResponseFormat(Body):
    type: Literal["text"]


class ChatRequest(Body):
    """``POST /v1/chat/completions``. ``model`` absent or null is the current policy version."""

    messages: list[ChatMessage] = Field(min_length=1)
    model: Text | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHAT_N)
    temperature: float | None = Field(None, ge=0.0, le=2.0)
    top_p: float | None = Field(None, gt=0.0, le=1.0)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: (
        Annotated[
            Annotated[Text, Tag("string")] | Annotated[list[Text], Tag("turns")],
            _either("must be a string or a list of strings"),
        ]
        | None
    ) = None
    seed: int | None = Field(None, ge=-MAX_SEED - 1, le=MAX_SEED)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # accepted, without effect
    user: Text | None = None
    metadata: Metadata | None = None
    store: bool | None = None
    safety_identifier: Text | None = None
    prompt_cache_key: Text | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    # accepted at the value that asks for nothing
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None
    logprobs: Literal[False] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = Field(None, max_length=0)
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None

    @field_validator("presence_penalty", "frequency_penalty")
    @classmethod
    def _no_penalty(cls, value: float | None) -> float | None:
        if value:
            raise _broken("must be 0: penalties are not supported")
        return value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS or not all(stops):
            raise _broken(f"must hold at most {MAX_STOPS} strings, none of them empty")
        return value


# --- files, batches -----------------------------------------------------------------------------

FilePurpose = Literal["batch", "fine-tune"]


class Expiry(Body):
    """When a file ends: between an hour and thirty days after it was created."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=3600, le=2_592_000)


class FileForm(Body):
    """The fields of an upload beside the file. Without ``expires_after`` it stays until deleted."""

    purpose: FilePurpose
    expires_after: Expiry | None = None


class FileRegistration(FileForm):
    """``POST /v1/files`` with a JSON body: a file that is already in shared storage."""

    uri: Text = Field(min_length=1, max_length=2048)


MimeType = Literal[
    "application/gzip", "application/json", "application/jsonl", "application/octet-stream",
    "application/vnd.apache.parquet", "application/x-gzip", "application/x-ndjson", "text/jsonl",
    "text/plain",
]  # fmt: skip


class UploadRequest(FileForm):
    """``POST /v1/uploads``: announces a file that will come in parts."""

    bytes: int = Field(ge=1)
    filename: Text = Field(min_length=1)
    mime_type: MimeType


class UploadCompletion(Body):
    """``POST /v1/uploads/{id}/complete``: the parts in the order in which they form the file."""

    part_ids: list[Text] = Field(min_length=1)
    md5: Text | None = Field(None, pattern="^[0-9a-fA-F]{32}$")


class BatchRequest(Body):
    """``POST /v1/batches``. ``defaults`` are merged under the body of every row."""

    input_file_id: Text = Field(min_length=1)
    endpoint: Text
    completion_window: Text = "24h"
    metadata: Metadata | None = None
    output_expires_after: Expiry | None = None
    defaults: dict[str, Any] | None = None

    @field_validator("endpoint")
    @classmethod
    def _known_endpoint(cls, value: str) -> str:
        if value not in BODIES:
            raise _broken(f"must be one of {', '.join(sorted(BODIES))}")
        return value

    @field_validator("completion_window")
    @classmethod
    def _window(cls, value: str) -> str:
        if window_seconds(value) is None:
            raise _broken("must be a number of minutes, hours or days such as 30m, 24h or 7d")
        return value


def window_seconds(text: str) -> float | None:
    """``"24h"`` -> 86400.0; ``None`` when the text is not a positive window of at most 30 days."""
    unit = {"m": 60, "h": 3600, "d": 86_400}.get(text[-1:])
    if unit is None or not text[:-1].isascii() or not text[:-1].isdecimal() or len(text) > 8:
        return None
    seconds = int(text[:-1]) * unit
    return float(seconds) if 0 < seconds <= 30 * 86_400 else None


# --- fine-tuning --------------------------------------------------------------------------------

MAX_BETA = 1000.0
MAX_LEARNING_RATE_MULTIPLIER = 1e6
MAX_BATCH_SIZE = 4096
MAX_EPOCHS = 1000
MAX_STEPS = 10**9
MAX_LORA_RANK = 1024
MAX_LENGTH = 2**20
"""Far beyond what trains anything: a run that a typing error asks for must not occupy a trainer."""


def _auto_or(most: float, *, whole: bool) -> AfterValidator:
    """Refuses what is neither ``"auto"``, null nor a number above 0 and at most ``most``."""
    types = int if whole else (int, float)
    kind = "an integer" if whole else "a number"

    def check(value: Any) -> Any:
        if value is None or value == "auto":
            return value
        if isinstance(value, bool) or not isinstance(value, types) or not 0 < value <= most:
            raise _broken(f'must be "auto" or {kind} above 0 and at most {most:g}')
        return value

    return AfterValidator(check)


def _auto_or_schema(most: float, *, whole: bool) -> WithJsonSchema:
    integer = {"type": "integer", "minimum": 1, "maximum": most}
    number = {"type": "number", "exclusiveMinimum": 0, "maximum": most}
    return WithJsonSchema({"anyOf": [{"const": "auto"}, integer if whole else number]})


Beta = Annotated[Any, _auto_or(MAX_BETA, whole=False), _auto_or_schema(MAX_BETA, whole=False)]
BatchSize = Annotated[
    Any, _auto_or(MAX_BATCH_SIZE, whole=True), _auto_or_schema(MAX_BATCH_SIZE, whole=True)
]
LearningRateMultiplier = Annotated[
    Any,
    _auto_or(MAX_LEARNING_RATE_MULTIPLIER, whole=False),
    _auto_or_schema(MAX_LEARNING_RATE_MULTIPLIER, whole=False),
]
NumEpochs = Annotated[
    Any, _auto_or(MAX_EPOCHS, whole=True), _auto_or_schema(MAX_EPOCHS, whole=True)
]
Steps = Annotated[int, Field(ge=1, le=MAX_STEPS)]


class DpoHyperparameters(Body):
    """OpenAI's DPO hyperparameters; ``"auto"`` and null take the configured default."""

    beta: Beta | None = None
    batch_size: BatchSize | None = None
    """Pairs per step and training worker (``trainer.num_workers``, one by default)."""
    learning_rate_multiplier: LearningRateMultiplier | None = None
    n_epochs: NumEpochs | None = None


class DpoMethod(Body):
    hyperparameters: DpoHyperparameters | None = None


class Method(Body):
    """Only ``dpo`` is trained here."""

    type: Literal["dpo"]
    dpo: DpoMethod | None = None


class MoraTraining(Body):
    """What a job may ask for beyond OpenAI's fields (``extra_body={"mora": {...}}``)."""

    mode: Literal["simultaneous", "sequential"] | None = None
    dimensions: list[Text] | None = Field(None, min_length=1)
    """Stages of a sequential run, in order; null takes the configured dimensions in theirs."""
    resample: bool | None = None
    """Sequential only. By default each stage samples the prompts of ``training_file`` from the
    version that the stage before published; false trains all stages on the pairs it has."""
    lora: bool | None = None
    lora_rank: Annotated[int, Field(ge=1, le=MAX_LORA_RANK)] | None = None
    loss: DpoLoss | None = None
    """Variant of DPO; replaces the configured one as a whole."""
    max_steps: Steps | None = None
    max_length: Annotated[int, Field(ge=16, le=MAX_LENGTH)] | None = None
    checkpoint_steps: Steps | None = None
    make_current: bool | None = None


class FineTuningRequest(Body):
    """``POST /v1/fine_tuning/jobs``."""

    model: Text = Field(min_length=1)
    training_file: Text = Field(min_length=1)
    method: Method | None = None
    seed: int | None = Field(None, ge=0, le=2**31 - 1)
    suffix: str | None = Field(None, min_length=1, max_length=18, pattern=r"^[A-Za-z0-9-]+$")
    metadata: Metadata | None = None
    mora: MoraTraining | None = None
    validation_file: None = None
    integrations: list[Any] | None = Field(None, max_length=0)
    hyperparameters: DpoHyperparameters | None = None
    """Deprecated by OpenAI in favour of ``method``; read when ``method`` has none."""
