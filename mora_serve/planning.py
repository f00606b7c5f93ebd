"""What a valid request means here: defaults filled in, limits, dimensions and prompts checked.

:class:`Planner` knows the settings and nothing else; whether a model is being served is asked of
the generator by :mod:`mora_serve.service`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from mora_serve.config import PolicySettings, Settings
from mora_serve.errors import InvalidRequestError
from mora_serve.presampling import Plan
from mora_serve.requests import (
    DiagnosticsRequest,
    MoraRequest,
    PromptBody,
    RewriteRequest,
    SamplingBody,
    ScoresRequest,
    to_messages,
)
from mora_serve.rewrite_flow import RewriteOptions
from mora_serve.types import Dimension, Messages
from mora_serve.validation import shown

T = TypeVar("T")


class Planner:
    """Turns requests into plans. All methods raise ``InvalidRequestError`` naming the field."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def check(self, request: MoraRequest) -> None:
        """Everything that can be said against a request before any work."""
        self.dimensions(request.dimensions)
        if isinstance(request, SamplingBody):
            self.plan(request)
        server = self._settings.server
        if isinstance(request, DiagnosticsRequest):
            _at_most(len(request.prompts), server.max_prompts, "prompts")
            self._require_usable(request.prompts, "prompts")
        elif isinstance(request, ScoresRequest):
            _at_most(len(request.rows), server.max_rows, "rows")
            self._require_usable([row.prompt for row in request.rows], "rows", ".prompt")
        else:
            self.messages(request.prompt, "prompt")

    def plan(self, request: SamplingBody) -> Plan:
        """How the request's rollouts are drawn.

        Without ``n_max`` the configured one holds, raised to ``n`` where needed; with a smaller
        ``n_max`` than the configured ``n``, that is the size of the only round.
        """
        defaults = self._settings.sampling
        n = default(request.n, defaults.n)
        n_max = default(request.n_max, max(n, defaults.n_max))
        max_tokens = default(request.max_tokens, defaults.max_tokens)
        check_max_tokens(max_tokens, self._settings.policy)
        return Plan(
            n=min(n, n_max),
            n_max=n_max,
            temperature=default(request.temperature, defaults.temperature),
            top_p=default(request.top_p, defaults.top_p),
            max_tokens=max_tokens,
            stop=defaults.stop,
            seed=request.seed,
            model=request.model,
            dimensions=self.dimensions(request.dimensions),
        )

    def rewrite_options(self, request: RewriteRequest, *, include_rollouts: bool) -> RewriteOptions:
        """What a rewrite asks for; ``include_rollouts`` is the default of a null."""
        method = self._settings.method
        return RewriteOptions(
            num_candidates=default(request.candidates, method.num_candidates),
            strategies=tuple(request.strategies or method.strategies),
            mode=default(request.mode, method.mode),
            stages=tuple(request.dimensions or self._settings.dimensions),
            n_confirm=default(request.n_confirm, method.n_confirm),
            is_measured=default(request.acceptance, method.acceptance) == "confirmed",
            include_rollouts=default(request.include_rollouts, include_rollouts),
        )

    def dimensions(self, asked: Sequence[Dimension] | None) -> tuple[Dimension, ...]:
        """The dimensions asked for, in the configured order; all of them for ``None``."""
        known = self._settings.dimensions
        if asked is None:
            return known
        for index, name in enumerate(asked):
            if name not in known:
                raise InvalidRequestError(
                    f"dimensions.{index} must be one of {', '.join(known)}, got {name[:80]!r}",
                    f"dimensions.{index}",
                    "unknown_dimension",
                )
        if len(set(asked)) != len(asked):
            raise InvalidRequestError("dimensions must be distinct", "dimensions", "invalid_value")
        return tuple(name for name in known if name in asked)

    def messages(self, prompt: PromptBody, param: str) -> Messages:
        """The conversation to sample, opened by the configured system prompt."""
        return to_messages(prompt, param, self._settings.policy.system_prompt)

    def _require_usable(self, prompts: Sequence[PromptBody], param: str, field: str = "") -> None:
        """Raise the first prompt's fault when no prompt is usable."""
        first: InvalidRequestError | None = None
        for index, prompt in enumerate(prompts):
            try:
                self.messages(prompt, f"{param}.{index}{field}")
            except InvalidRequestError as error:
                first = first or error
            else:
                return
        if first is not None:
            raise first


def check_max_tokens(max_tokens: int, policy: PolicySettings, param: str = "max_tokens") -> None:
    """Raise ``InvalidRequestError`` naming ``param`` for more tokens than any answer can have."""
    limit = policy.max_model_len - 1
    if max_tokens > limit:
        raise InvalidRequestError(
            f"{param} must be at most {limit}, the policy's context less one, "
            f"got {shown(str(max_tokens))}",
            param,
            "invalid_value",
        )


def default(value: T | None, fallback: T) -> T:
    """``value``, or ``fallback`` where it is ``None`` (0 and False are values)."""
    return fallback if value is None else value


def _at_most(count: int, limit: int, param: str) -> None:
    if count > limit:
        raise InvalidRequestError(
            f"{param} must hold at most {limit} items, got {count}", param, "invalid_value"
        )
