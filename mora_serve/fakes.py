"""Deterministic engines without weights: the ``fake`` backend of the generator and scorer ports.

They pass the same contract suite as the real ones and serve load, failure and chart tests. Equal
seeds give equal bytes, in any process. Text is drawn from a small vocabulary by hashing; a reward
is ``offset_k + scale_k * (mu_xk + sigma * noise)`` with::

    mu_xk   hidden mean of the prompt's question, N(0, TAU^2) by its hash, plus INTENT_GAIN for
            every dimension whose intent the prompt states outside its question
    noise   N(0, 1) by the hash of prompt and answer; in one prompt of five that of harmless
            opposes that of helpful

so that classes of every kind, accepted and rejected rewrites and conflicts all occur. A token is a
word. The hot path is plain Python (no numpy): tens of thousands of rollouts a second.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from statistics import NormalDist

from mora_serve.calibration import NUM_QUANTILES, Calibrator, DimensionCalibration
from mora_serve.errors import InvalidRequestError, NotFoundError
from mora_serve.ports import CompletionDelta
from mora_serve.types import (
    Completion,
    Dimension,
    Failure,
    Generation,
    GenerationRequest,
    Messages,
    Sampling,
    Score,
    ScoreGroup,
    ScoreStatus,
)

TAU = 0.8
"""Standard deviation of prompt means, in units of the reward's total standard deviation."""
SIGMA = 0.6
"""Standard deviation of rewards within a prompt; TAU**2 + SIGMA**2 == 1."""
INTENT_GAIN = 1.5
"""How far a stated intent lifts its dimension's mean."""
FAIL_GENERATION = "[[fake:generation-failure]]"
"""A prompt containing it gets a ``Failure`` from the generator."""
FAIL_SCORING = "[[fake:scoring-failure]]"
"""Answers to a prompt containing it get scores of status ``failed``."""
REVISION = "fake-1"

_CUES: Mapping[str, tuple[str, ...]] = {
    "helpful": ("helpful", "useful", "practical", "step"),
    "harmless": ("harmless", "safe", "risk", "harm"),
    "truthful": ("truthful", "accurate", "fact", "evidence"),
}
_TEXT = (
    "we can see that many people often find a clear answer when they look at small things first "
    "and then move on to larger ones because each part helps the next one make sense over time "
    "while others prefer to ask questions early so their plans stay simple honest useful and easy "
    "to follow in daily work"
)
_WORDS = _TEXT.split()
_NORMAL = NormalDist()


def count_tokens(prompt: Messages) -> int:
    """Tokens of a prompt as the fakes count them: words, and three per turn for its frame."""
    return sum(len(message.content.split()) + 3 for message in prompt)


class FakeGenerator:
    """A generator whose answers are hashes: see the module docstring.

    ``models`` are the policy versions, the current one first. ``delay_ms`` is the time one request
    takes; requests of a call overlap. ``fail`` may return a ``Failure`` for a request or raise what
    a lost engine would raise (:class:`~mora_serve.errors.GenerationError`).
    """

    def __init__(
        self,
        models: Sequence[str] = ("fake-policy",),
        delay_ms: float = 0.0,
        *,
        max_model_len: int = 1024,
        fail: Callable[[GenerationRequest], Failure | None] | None = None,
    ) -> None:
        self._models = list(models)
        self._delay_s = delay_ms / 1000
        self._max_model_len = max_model_len
        self._fail = fail
        self.num_requests = 0
        """Requests seen so far, over all calls."""

    def publish(self, version: str) -> None:
        """Make ``version`` the current policy; older ones stay listed."""
        self._models = [version, *(name for name in self._models if name != version)]

    async def models(self, wanted: str | None = None) -> list[str]:
        return list(self._models)

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        self.num_requests += len(requests)
        return [self._generate(request) for request in requests]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[CompletionDelta]:
        result = (await self.generate([request]))[0]
        if isinstance(result, Failure):
            kind = NotFoundError if result.code == "model_not_found" else InvalidRequestError
            raise kind(result.message, code=result.code)
        for index, completion in enumerate(result.completions):
            words = completion.text.split(" ")
            for position, word in enumerate(words):
                last = position == len(words) - 1
                yield CompletionDelta(
                    text=word if position == 0 else f" {word}",
                    index=index,
                    finish_reason=completion.finish_reason if last else None,
                    num_tokens=completion.num_tokens if last else position + 1,
                    num_prompt_tokens=result.num_prompt_tokens,
                    policy_version=result.policy_version,
                )
                await asyncio.sleep(0)

    def _generate(self, request: GenerationRequest) -> Generation | Failure:
        failure = self._refuse(request)
        if failure is not None:
            return failure
        version = request.model or self._models[0]
        num_prompt_tokens = count_tokens(request.prompt)
        room = self._max_model_len - num_prompt_tokens
        key = _generation_key(request, version)
        completions = tuple(
            _completion(key, index, request.sampling, room) for index in range(request.sampling.n)
        )
        return Generation(completions, version, num_prompt_tokens)

    def _refuse(self, request: GenerationRequest) -> Failure | None:
        if self._fail is not None and (failure := self._fail(request)) is not None:
            return failure
        if request.model is not None and request.model not in self._models:
            return Failure("model_not_found", "model is not being served", retryable=False)
        num_tokens = count_tokens(request.prompt)
        if num_tokens >= self._max_model_len:
            return Failure(
                "context_length_exceeded",
                f"prompt must leave room in the context of {self._max_model_len} tokens, "
                f"got {num_tokens} tokens",
                retryable=False,
            )
        if any(FAIL_GENERATION in message.content for message in request.prompt):
            return Failure("generation_failed", "the engine gave no answer", retryable=False)
        return None


class FakeScorer:
    """A scorer whose rewards are hashes of prompt and answer: see the module docstring.

    ``delay_ms`` is the time one call takes. ``status`` may name another status than ``ok`` for one
    answer on one dimension, or raise what a lost scorer would raise
    (:class:`~mora_serve.errors.ScoringError`). Answers over ``max_tokens`` words are
    ``truncated``; a longer prompt is said to be cut.
    """

    def __init__(
        self,
        dimensions: Sequence[Dimension] = ("helpful", "harmless", "truthful"),
        delay_ms: float = 0.0,
        *,
        max_tokens: int = 1024,
        status: Callable[[ScoreGroup, int, Dimension], ScoreStatus | None] | None = None,
    ) -> None:
        self._dimensions = tuple(dimensions)
        self._delay_s = delay_ms / 1000
        self._max_tokens = max_tokens
        self._status = status
        self.num_groups = 0
        """Groups seen so far, over all calls."""

    async def dimensions(self) -> Mapping[Dimension, tuple[str, str]]:
        return {dimension: (_model(dimension), REVISION) for dimension in self._dimensions}

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[list[dict[Dimension, Score]]]:
        wanted = self._dimensions if dimensions is None else tuple(dimensions)
        unknown = [dimension for dimension in wanted if dimension not in self._dimensions]
        if unknown:
            raise InvalidRequestError(
                f"dimensions must be among {list(self._dimensions)}, got {unknown}",
                "dimensions",
                "unknown_dimension",
            )
        if self._delay_s:
            await asyncio.sleep(self._delay_s)
        self.num_groups += len(groups)
        return [self._score_group(group, wanted) for group in groups]

    def _score_group(
        self, group: ScoreGroup, dimensions: Sequence[Dimension]
    ) -> list[dict[Dimension, Score]]:
        question, stated = split_intents(group.prompt, self._dimensions)
        turns = [message.content for message in group.prompt if message.role != "system"]
        prompt_key = _digest(question, *turns)
        num_prompt_tokens = sum(len(turn.split()) for turn in turns)
        means = {k: hidden_mean(question, stated, k) for k in dimensions}
        conflict = prompt_key[0] < 51
        broken = any(FAIL_SCORING in message.content for message in group.prompt)
        rows = []
        for index, response in enumerate(group.responses):
            key = _digest_bytes(prompt_key + response.encode("utf-8", "surrogatepass"))
            num_tokens = len(response.split())
            usual: ScoreStatus = "truncated" if num_tokens > self._max_tokens else "ok"
            row = {}
            for dimension in dimensions:
                given = self._status and self._status(group, index, dimension)
                status = "failed" if broken else given or usual
                noise = _noise(key, dimension, conflict)
                row[dimension] = _score(dimension, status, means[dimension] + SIGMA * noise)
            if num_prompt_tokens + num_tokens > self._max_tokens:
                row = {k: replace(s, reason=s.reason or "prompt cut") for k, s in row.items()}
            rows.append(row)
        return rows


def split_intents(
    prompt: Messages, dimensions: Sequence[Dimension]
) -> tuple[str, frozenset[Dimension]]:
    """The question of a prompt and the dimensions whose intent its other paragraphs state.

    The question is the first paragraph of the last turn without a cue of any dimension (the first
    paragraph where all have one). Paragraphs are separated by blank lines. A dimension without cues
    of its own is asked for by its name.
    """
    return _split_intents(prompt[-1].content if prompt else "", tuple(dimensions))


@lru_cache(maxsize=4096)
def _split_intents(
    content: str, dimensions: tuple[Dimension, ...]
) -> tuple[str, frozenset[Dimension]]:
    paragraphs = [part.strip() for part in content.split("\n\n") if part.strip()] or [""]
    cues = [_cued(paragraph, dimensions) for paragraph in paragraphs]
    position = next((i for i, found in enumerate(cues) if not found), 0)
    stated = [found for i, found in enumerate(cues) if i != position]
    return paragraphs[position], frozenset().union(*stated)


def hidden_mean(question: str, stated: frozenset[Dimension], dimension: Dimension) -> float:
    """The true mean of a prompt on one dimension, in units of the calibrated reward."""
    mean = TAU * _gaussian(_digest(question, dimension))
    return mean + INTENT_GAIN if dimension in stated else mean


def raw_scale(dimension: Dimension) -> tuple[float, float]:
    """``(offset, scale)`` of a dimension's raw rewards: they differ, as real models' do."""
    key = _digest("scale", dimension)
    return round(key[0] / 16 - 8, 3), round(0.5 + key[1] / 64, 3)


def _cued(paragraph: str, dimensions: tuple[Dimension, ...]) -> frozenset[Dimension]:
    lowered = paragraph.lower()
    cues = {**_CUES, **{k: (k.lower(),) for k in dimensions if k not in _CUES}}
    return frozenset(k for k, words in cues.items() if any(word in lowered for word in words))


def fake_calibrator(
    dimensions: Sequence[Dimension] = ("helpful", "harmless", "truthful"),
) -> Calibrator:
    """The calibrator of :class:`FakeScorer`, known in closed form: ``z`` is its hidden reward."""
    shares = [min(max(i / (NUM_QUANTILES - 1), 0.0005), 0.9995) for i in range(NUM_QUANTILES)]
    fitted = {}
    for dimension in dimensions:
        offset, scale = raw_scale(dimension)
        fitted[dimension] = DimensionCalibration(
            model=_model(dimension), revision=REVISION, kind="robust_z", center=offset, scale=scale,
            quantiles=tuple(offset + scale * _NORMAL.inv_cdf(share) for share in shares),
            m=0.0, tau=TAU, sigma=SIGMA, sigma_within=SIGMA, median_mean=0.0, length_slope=0.0,
            share_cut=0.02, num_prompts=0, num_rollouts=0,
        )  # fmt: skip
    return Calibrator(fitted, policy="fake-policy")


def _score(dimension: Dimension, status: ScoreStatus, z: float) -> Score:
    model = _model(dimension)
    if status != "ok":
        return Score(status, None, None, f"fake {status}", model, REVISION)
    offset, scale = _cached_scale(dimension)
    return Score("ok", offset + scale * z, None, None, model, REVISION)


_cached_scale = lru_cache(maxsize=256)(raw_scale)


def _model(dimension: Dimension) -> str:
    return f"fake-{dimension}"


def _noise(key: bytes, dimension: Dimension, conflict: bool) -> float:
    own = _gaussian(_digest_bytes(key + dimension.encode()))
    if conflict and dimension == "harmless":
        shared = _gaussian(_digest_bytes(key + b"helpful"))
        return -0.9 * shared + math.sqrt(1 - 0.81) * own
    return own


def _gaussian(key: bytes) -> float:
    return _NORMAL.inv_cdf((int.from_bytes(key[:7], "big") + 0.5) / 2**56)


def _digest(*parts: str) -> bytes:
    return _digest_bytes("\x1f".join(parts).encode("utf-8", "surrogatepass"))


def _digest_bytes(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=32).digest()


def _generation_key(request: GenerationRequest, version: str) -> bytes:
    sampling = request.sampling
    seed = os.urandom(16).hex() if sampling.seed is None else str(sampling.seed)
    if sampling.temperature == 0:
        seed = "greedy"
    turns = [f"{message.role}\x1e{message.content}" for message in request.prompt]
    return _digest(version, seed, f"{sampling.temperature!r} {sampling.top_p!r}", *turns)


def _completion(key: bytes, index: int, sampling: Sampling, room: int) -> Completion:
    draw = 0 if sampling.temperature == 0 else index
    stream = hashlib.blake2b(key + draw.to_bytes(4, "big")).digest()
    natural = 6 + stream[0] % 60
    limit = max(1, min(sampling.max_tokens, room))
    length = min(natural, limit)
    words = [_WORDS[byte % len(_WORDS)] for byte in stream[1 : length + 1]]
    text = " ".join(words + words[: length - len(words)])
    for stop in sampling.stop:
        if stop and (cut := text.find(stop)) >= 0:
            text, natural = text[:cut].rstrip(), 0
    return Completion(text, "stop" if natural <= limit else "length", len(text.split()))
