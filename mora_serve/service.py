"""The core service: diagnose, score and rewrite over the generator and scorer ports.

:class:`MoraService` holds the orchestration of the method for synchronous requests and batch rows
alike; the mathematics live in the modules it calls. Prompts run side by side::

    request --> plan --> per prompt: [generate -> score -> calibrate -> diagnose]  (rounds)
                              |            every step in list calls, mora_serve.presampling
                              `--> results as they finish (NDJSON) or all together

A prompt at fault, or one whose infrastructure failed, has ``status: failed`` and fails alone; a
request none of whose prompts has a result raises instead. Limits on concurrency between requests,
deadlines and retries belong to the callers.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from mora_serve import wire
from mora_serve.calibration import Calibrator, calibrate_score
from mora_serve.concurrency import bounded
from mora_serve.config import Settings
from mora_serve.diagnostics import Diagnostic, aggregate, failed_diagnostic
from mora_serve.errors import (
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ScoringError,
)
from mora_serve.identity import content_hash, prompt_id
from mora_serve.planning import Planner, default
from mora_serve.ports import Generator, Rewriter, Scorer
from mora_serve.presampling import ListCalls, Plan, PromptFailedError, Sampler, Usage
from mora_serve.requests import (
    DiagnosticsRequest,
    MoraRequest,
    PromptBody,
    RewriteRequest,
    SamplingBody,
    ScoreRow,
    ScoresRequest,
    in_body,
    to_messages,
)
from mora_serve.rewrite_flow import RewriteFlow
from mora_serve.rewriting import build_rewriters
from mora_serve.row_codes import ENGINE_LOST
from mora_serve.types import Completion, Dimension, Failure, Messages, Score
from mora_serve.wire import JSON

PROMPTS_IN_FLIGHT = 64
"""Prompts of one request being worked on at a time: keeps engines full and memory bounded."""
RETRY_AFTER_S = 1.0
"""What a request is told when every prompt of it met full queues."""
ROWS_PER_WINDOW = 256
"""Rows of ``/v1/scores`` looked at together, to score the answers to one prompt in one pass."""


@dataclass(frozen=True, slots=True)
class RowResult:
    """Outcome of one batch row."""

    body: JSON
    """The response body; ``pairs`` in it have ``seq`` null."""
    pairs: tuple[JSON, ...] = ()
    """Preference rows without ``seq``, in order, for the stream."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """``input_tokens``, ``output_tokens``, ``total_tokens``, ``rollouts``."""
    classes: Mapping[str, int] = field(default_factory=dict)
    """Prompts by class."""


@dataclass(frozen=True, slots=True)
class _Outcome:
    """One prompt's diagnostic, with the error of a failed one."""

    index: int
    diagnostic: Diagnostic
    error: InvalidRequestError | None = None


class MoraService:
    """MORA over ports. ``settings`` supplies what a request leaves null; see the module docstring.

    ``rewriter`` is the generator that the ``llm`` strategy asks; by default the policy's. One
    instance serves many concurrent requests of one event loop.
    """

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        calibrator: Calibrator,
        settings: Settings,
        *,
        rewriter: Generator | None = None,
        lists: ListCalls = ListCalls(),  # noqa: B008  frozen
    ) -> None:
        self._generator = generator
        self._scorer = scorer
        self._method = settings.method
        self._planner = Planner(settings)
        self._sampler = Sampler(generator, scorer, calibrator, settings.method, lists)
        self._rewriters: Mapping[str, Rewriter] = build_rewriters(
            rewriter or generator, settings.method.rewriter_model
        )

    async def start(self) -> None:
        """Check that the calibrator belongs to the scorers; raises ``CalibrationError``."""
        self._sampler.calibrator.check(await self._scorer.dimensions())

    async def validate(self, request: MoraRequest) -> None:
        """Raise what the request would raise before any work: for callers that stream.

        :class:`~mora_serve.errors.InvalidRequestError` for limits, unknown dimensions and requests
        without a usable prompt, :class:`~mora_serve.errors.NotFoundError` for unknown models.
        """
        self._planner.check(request)
        if isinstance(request, SamplingBody) and request.model is not None:
            await self._require_model(request.model)

    # --- diagnostics ----------------------------------------------------------------------------

    async def diagnose(
        self, request: DiagnosticsRequest, *, include_rollouts: bool = True
    ) -> AsyncGenerator[JSON, None]:
        """Diagnostics as they finish, each with ``index``, then one ``diagnostic.summary``.

        The summary holds ``aggregate`` and ``usage``. ``include_rollouts`` is the default for a
        request that leaves it null. Closing the iterator cancels what still runs.
        """
        await self.validate(request)
        plan = self._planner.plan(request)
        usage = Usage()
        done: list[Diagnostic] = []
        wanted = default(request.include_rollouts, include_rollouts)
        async with aclosing(self._outcomes(request, plan, usage)) as outcomes:
            async for item in outcomes:
                done.append(replace(item.diagnostic, group=None))
                yield _outcome_json(item, include_rollouts=wanted)
        given = request.responses is not None
        summary = wire.aggregate_json(aggregate(done, None if given else plan.n_max))
        if given:
            summary["share_cut"] = None
        yield {
            "object": "diagnostic.summary",
            "aggregate": summary,
            "usage": usage.to_dict(),
        }

    async def diagnose_list(
        self, request: DiagnosticsRequest, *, include_rollouts: bool = True
    ) -> JSON:
        """All diagnostics in the order of the prompts, with ``aggregate`` and ``usage``.

        Raises when no prompt has a result: :class:`~mora_serve.errors.InvalidRequestError` where
        the prompts are at fault, ``GenerationError`` or ``ScoringError`` otherwise.
        """
        items: list[JSON] = []
        summary: JSON = {}
        async with aclosing(self.diagnose(request, include_rollouts=include_rollouts)) as stream:
            async for item in stream:
                if item["object"] == "diagnostic.summary":
                    summary = item
                else:
                    items.append(item)
        items.sort(key=lambda item: item["index"])
        _raise_if_all_failed(items)
        return wire.list_json(items, aggregate=summary["aggregate"], usage=summary["usage"])

    async def _outcomes(
        self, request: DiagnosticsRequest, plan: Plan, usage: Usage
    ) -> AsyncGenerator[_Outcome, None]:
        def jobs() -> Iterator[Callable[[], Coroutine[Any, Any, _Outcome]]]:
            for index, prompt in enumerate(request.prompts):
                given = None if request.responses is None else request.responses[index]
                yield partial(self._outcome, index, prompt, given, plan, usage)

        async with aclosing(bounded(jobs(), PROMPTS_IN_FLIGHT)) as results:
            async for item in results:
                yield item

    async def _outcome(
        self,
        index: int,
        prompt: PromptBody,
        responses: list[str] | None,
        plan: Plan,
        usage: Usage,
    ) -> _Outcome:
        try:
            messages = self._planner.messages(prompt, f"prompts.{index}")
        except InvalidRequestError as error:
            failure = Failure(error.code or "invalid_prompt", error.message, retryable=False)
            return _Outcome(index, failed_diagnostic(_raw_prompt_id(prompt), failure), error)
        try:
            if responses is None:
                diagnostic = await self._sampler.presample(messages, plan, usage, stream=str(index))
            else:
                diagnostic = await self._diagnose_given(messages, responses, plan)
        except PromptFailedError as error:
            diagnostic = failed_diagnostic(prompt_id(messages), error.failure)
        return _Outcome(index, diagnostic)

    async def _diagnose_given(
        self, prompt: Messages, responses: Sequence[str], plan: Plan
    ) -> Diagnostic:
        completions = [Completion(text, "stop", 0) for text in responses]
        group = await self._sampler.score_completions(prompt, completions, plan.dimensions)
        return self._sampler.diagnose(group, plan)

    # --- scores ---------------------------------------------------------------------------------

    async def score(self, request: ScoresRequest) -> AsyncGenerator[JSON, None]:
        """Score rows as they finish, in any order, each with ``index``; bounded memory."""
        await self.validate(request)
        dimensions = self._planner.dimensions(request.dimensions)
        async with aclosing(bounded(self._score_jobs(request, dimensions), 16)) as results:
            async for rows in results:
                for index, scores in rows:
                    yield wire.score_row(index, scores)

    async def score_list(self, request: ScoresRequest) -> JSON:
        """All rows in order. Raises ``ScoringError`` when the scorer is gone."""
        async with aclosing(self.score(request)) as stream:
            items = [item async for item in stream]
        return wire.list_json(sorted(items, key=lambda item: int(item["index"])))

    def _score_jobs(
        self, request: ScoresRequest, dimensions: tuple[Dimension, ...]
    ) -> Iterator[Callable[[], Coroutine[Any, Any, list[tuple[int, dict[Dimension, Score]]]]]]:
        for start in range(0, len(request.rows), ROWS_PER_WINDOW):
            window = request.rows[start : start + ROWS_PER_WINDOW]
            groups: dict[Messages, list[int]] = {}
            for index, row in enumerate(window, start):
                try:
                    prompt = to_messages(row.prompt, f"rows.{index}.prompt")
                except InvalidRequestError as error:
                    yield partial(self._failed_row, index, str(error), dimensions)
                    continue
                groups.setdefault(prompt, []).append(index)
            for prompt, indices in groups.items():
                yield partial(self._score_rows, request.rows, prompt, indices, dimensions)

    async def _score_rows(
        self,
        rows: Sequence[ScoreRow],
        prompt: Messages,
        indices: Sequence[int],
        dimensions: tuple[Dimension, ...],
    ) -> list[tuple[int, dict[Dimension, Score]]]:
        texts = tuple(rows[index].response for index in indices)
        try:
            scored = await self._sampler.score_texts(prompt, texts, dimensions)
        except PromptFailedError as error:
            raise _as_request_error(error.failure, "rows") from error
        calibrator = self._sampler.calibrator
        values = [
            {k: calibrate_score(score, k, calibrator) for k, score in scores.items()}
            for scores in scored
        ]
        return list(zip(indices, values, strict=True))

    async def _failed_row(
        self, index: int, reason: str, dimensions: tuple[Dimension, ...]
    ) -> list[tuple[int, dict[Dimension, Score]]]:
        served = await self._scorer.dimensions()
        return [(index, {k: Score("failed", None, None, reason, *served[k]) for k in dimensions})]

    # --- rewrites -------------------------------------------------------------------------------

    async def rewrite(self, request: RewriteRequest, *, include_rollouts: bool = True) -> JSON:
        """Diagnose one prompt, rewrite it where its class asks for it, and select pairs.

        Raises :class:`~mora_serve.errors.InvalidRequestError` when the prompt is at fault,
        ``GenerationError`` or ``ScoringError`` when the infrastructure is.
        """
        await self.validate(request)
        plan = self._planner.plan(request)
        prompt = self._planner.messages(request.prompt, "prompt")
        options = self._planner.rewrite_options(request, include_rollouts=include_rollouts)
        usage = Usage()
        flow = RewriteFlow(
            self._sampler, self._rewriters,
            method=self._method, plan=plan, options=options, usage=usage,
        )  # fmt: skip
        try:
            return await flow.run(prompt)
        except PromptFailedError as error:
            raise _as_request_error(error.failure, "prompt") from error

    # --- batch rows -----------------------------------------------------------------------------

    async def run_row(self, request: MoraRequest) -> RowResult:
        """One batch row; rollouts are left out unless asked for. Raises as the calls above.

        A retryable fault of any prompt raises, so that the row is tried again as a whole. What is
        wrong with the row is named from its ``body`` on, as :func:`~mora_serve.requests.parse_body`
        names it there.
        """
        try:
            return await self._run_row(request)
        except InvalidRequestError as error:
            raise in_body(error) from error

    async def _run_row(self, request: MoraRequest) -> RowResult:
        if isinstance(request, ScoresRequest):
            return RowResult(await self.score_list(request))
        if isinstance(request, RewriteRequest):
            body = await self.rewrite(request, include_rollouts=False)
            pairs = tuple({k: v for k, v in row.items() if k != "seq"} for row in body["pairs"])
            body = {**body, "pairs": [{**row, "seq": None} for row in pairs]}
            classes = {body["original"]["class"]: 1}
            return RowResult(body, pairs, _batch_usage(body["usage"]), classes)
        body = await self.diagnose_list(request, include_rollouts=False)
        failed = [item["error"] for item in body["data"] if item["error"] is not None]
        for error in sorted(failed, key=lambda error: error["code"] != ENGINE_LOST):
            if error["type"] == "server_error":
                raise GenerationError(error["message"], lost=error["code"] == ENGINE_LOST)
        return RowResult(body, (), _batch_usage(body["usage"]), body["aggregate"]["classes"])

    async def _require_model(self, model: str) -> None:
        known = await self._generator.models(model)
        if model not in known:
            raise NotFoundError(
                f"model must be one of {', '.join(known)}, got {model[:80]!r}",
                "model",
                "model_not_found",
            )


def _outcome_json(item: _Outcome, *, include_rollouts: bool) -> JSON:
    error = None
    if item.error is not None:
        error = wire.invalid_json(item.error)
    elif item.diagnostic.error is not None:
        error = wire.failure_json(item.diagnostic.error, f"prompts.{item.index}")
    return wire.diagnostic_json(
        item.diagnostic, item.index, include_rollouts=include_rollouts, error=error
    )


def _raise_if_all_failed(items: Sequence[JSON]) -> None:
    if any(item["status"] == "ok" for item in items):
        return
    errors = [item["error"] for item in items]
    errors.sort(key=lambda e: (e["code"] != ENGINE_LOST, e["type"] != "server_error"))
    error = errors[0]
    failure = Failure(error["code"], error["message"], error["type"] == "server_error")
    raise _as_request_error(failure, error["param"])


def _as_request_error(failure: Failure, param: str | None) -> Exception:
    if failure.code == "overloaded":
        return OverloadedError(failure.message, RETRY_AFTER_S)
    if failure.code == ENGINE_LOST:
        return GenerationError(failure.message, lost=True)
    if failure.code == "scoring_failed":
        return ScoringError(failure.message)
    if failure.retryable:
        return GenerationError(failure.message)
    if failure.code == "model_not_found":
        return NotFoundError(failure.message, "model", failure.code)
    return InvalidRequestError(failure.message, param, failure.code)


def _raw_prompt_id(prompt: PromptBody) -> str:
    """Id of a prompt as it was given, for diagnostics of prompts that were never sampled."""
    if isinstance(prompt, str):
        return content_hash([["user", prompt]])
    return content_hash([[turn.role, turn.content] for turn in prompt])


def _batch_usage(usage: Mapping[str, int]) -> dict[str, int]:
    return {
        "input_tokens": usage["prompt_tokens"],
        "output_tokens": usage["completion_tokens"],
        "total_tokens": usage["total_tokens"],
        "rollouts": usage["rollouts"],
    }
