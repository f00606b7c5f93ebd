"""Chat completions and models, as OpenAI answers them."""

from __future__ import annotations

from typing import Literal

from api.schemas.common import Wire


class ChatMessageOut(Wire):
    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(Wire):
    index: int
    message: ChatMessageOut
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class PromptTokensDetails(Wire):
    cached_tokens: int


class ChatUsage(Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class ChatCompletion(Wire):
    """``model`` is the policy version that answered."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: ChatUsage
    system_fingerprint: None = None


class ChatDelta(Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(Wire):
    index: int
    delta: ChatDelta
    finish_reason: Literal["stop", "length"] | None
    logprobs: None = None


class ChatChunk(Wire):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: ChatUsage | None = None
    system_fingerprint: None = None


class Model(Wire):
    """A policy version that can be sampled."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    current: bool
    """Whether requests without a model sample it."""
    kind: str
    base: str
    """The version that no job made: what is served before anything was published."""
    parent: str | None
    job_id: str | None


class ModelList(Wire):
    object: Literal["list"]
    data: list[Model]
