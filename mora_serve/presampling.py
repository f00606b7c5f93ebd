"""Drawing scored rollouts of one prompt: single groups and adaptive rounds.

A round is one generation of ``n`` answers, scored and calibrated. :meth:`Sampler.presample` adds
rounds while :func:`mora_serve.diagnostics.needs_more` says that another one can settle something.
Prompts do not wait for each other: each has its own chain of rounds, whose generations and scorings
meet those of other prompts only inside the list calls of a :class:`MicroBatcher`. Rollouts of two
policy versions are never mixed: when it changes between rounds, earlier rounds are discarded.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mora_serve.calibration import Calibrator, calibrate_group
from mora_serve.concurrency import MicroBatcher
from mora_serve.config import MethodSettings
from mora_serve.diagnostics import (
    Assessment,
    Diagnostic,
    assess_group,
    diagnose,
    needs_more,
)
from mora_serve.errors import (
    GenerationError,
    MoraError,
    OverloadedError,
    ReplicaError,
    ScoringError,
)
from mora_serve.identity import prompt_id
from mora_serve.ports import Generator, Scorer
from mora_serve.row_codes import ENGINE_LOST
from mora_serve.types import (
    Completion,
    Dimension,
    Failure,
    Generation,
    GenerationRequest,
    Messages,
    Rollout,
    Sampling,
    Score,
    ScoredGroup,
    ScoreGroup,
)


@dataclass(frozen=True, slots=True)
class ListCalls:
    """How prompts are gathered into calls of a generator or scorer."""

    max_items: int = 8
    """Prompts in one call: enough to carry its overhead, few enough that a slow answer delays
    little."""
    window_s: float = 0.001
    """How long the first prompt of a call waits for company."""


MAX_VERSION_CHANGES = 3
"""Policy swaps during one prompt's rounds after which it fails as retryable."""


class PromptFailedError(MoraError):
    """One prompt has no result; its neighbours are not concerned."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure)
        self.failure = failure

    def __str__(self) -> str:
        return self.failure.message


@dataclass(slots=True)
class Usage:
    """Work done for a request so far."""

    prompt_tokens: int = 0
    """Tokens of sampled prompts, each counted once per round."""
    completion_tokens: int = 0
    rollouts: int = 0
    discarded_rollouts: int = 0
    """Rollouts thrown away because the policy version changed under way; counted above too."""

    def to_dict(self) -> dict[str, int]:
        """The counts as OpenAI names them, ``total_tokens`` added."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "rollouts": self.rollouts,
            "discarded_rollouts": self.discarded_rollouts,
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rollouts of a request are drawn."""

    n: int
    """Rollouts per round; ceilings refer to it."""
    n_max: int
    """Rollouts per prompt at most."""
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...]
    seed: int | None
    model: str | None
    """Policy version asked for; ``None`` is the current one."""
    dimensions: tuple[Dimension, ...]


class Sampler:
    """Draws scored groups over a generator and a scorer; safe for concurrent use on one loop."""

    def __init__(
        self,
        generator: Generator,
        scorer: Scorer,
        calibrator: Calibrator,
        method: MethodSettings,
        lists: ListCalls = ListCalls(),
    ) -> None:
        self.calibrator = calibrator
        self.method = method
        self._scorer = scorer
        self._lists = lists
        self._generations: MicroBatcher[GenerationRequest, Generation | Failure] = MicroBatcher(
            generator.generate, max_items=lists.max_items, window_s=lists.window_s
        )
        self._scorings: dict[
            tuple[Dimension, ...], MicroBatcher[ScoreGroup, list[dict[Dimension, Score]]]
        ] = {}

    async def presample(
        self, prompt: Messages, plan: Plan, usage: Usage, *, stream: str = ""
    ) -> Diagnostic:
        """Diagnose a prompt on as many rounds as it needs, at most ``plan.n_max`` rollouts.

        ``stream`` separates the seeds of this prompt from others of the request. Raises
        :class:`PromptFailedError`.
        """
        group: ScoredGroup | None = None
        changes = 0
        for number in itertools.count():
            drawn = 0 if group is None else len(group.rollouts)
            count = min(plan.n, plan.n_max - drawn)
            fresh = await self.draw(prompt, plan, usage, count=count, stream=f"{stream}/{number}")
            if group is not None and group.policy_version != fresh.policy_version:
                usage.discarded_rollouts += drawn
                changes += 1
                if changes > MAX_VERSION_CHANGES:
                    raise PromptFailedError(VERSION_CHANGED)
                group = None
            group = fresh if group is None else merge_groups(group, fresh)
            found = self.assess(group, plan)
            if not needs_more(found, plan.n_max):
                return diagnose(found, self.calibrator, self.method)
        raise AssertionError("the rounds of a prompt end within the loop")

    async def draw(
        self, prompt: Messages, plan: Plan, usage: Usage, *, count: int, stream: str
    ) -> ScoredGroup:
        """One round: ``count`` rollouts, scored. Raises :class:`PromptFailedError`."""
        seed = derive_seed(plan.seed, stream)
        sampling = Sampling(count, plan.temperature, plan.top_p, plan.max_tokens, seed, plan.stop)
        request = GenerationRequest(prompt, sampling, plan.model)
        try:
            generation = await self._generations.submit(request)
        except (GenerationError, OverloadedError) as error:
            raise _failed("generation_failed", error) from error
        if isinstance(generation, Failure):
            raise PromptFailedError(generation)
        usage.prompt_tokens += generation.num_prompt_tokens
        usage.completion_tokens += sum(item.num_tokens for item in generation.completions)
        usage.rollouts += len(generation.completions)
        return await self.score_completions(
            prompt,
            generation.completions,
            plan.dimensions,
            policy_version=generation.policy_version,
            seed=seed,
            num_prompt_tokens=generation.num_prompt_tokens,
        )

    async def score_completions(
        self,
        prompt: Messages,
        completions: Sequence[Completion],
        dimensions: tuple[Dimension, ...],
        *,
        policy_version: str = "",
        seed: int | None = None,
        num_prompt_tokens: int = 0,
    ) -> ScoredGroup:
        """Scored, calibrated answers to one prompt. Raises :class:`PromptFailedError`."""
        texts = tuple(item.text for item in completions)
        rows = await self.score_texts(prompt, texts, dimensions)
        group = ScoredGroup(
            prompt_id=prompt_id(prompt),
            prompt=prompt,
            policy_version=policy_version,
            rollouts=tuple(
                Rollout(index, completion, scores)
                for index, (completion, scores) in enumerate(zip(completions, rows, strict=True))
            ),
            seeds=(seed,),
            num_prompt_tokens=num_prompt_tokens,
        )
        return calibrate_group(group, self.calibrator)

    async def score_texts(
        self, prompt: Messages, texts: tuple[str, ...], dimensions: tuple[Dimension, ...]
    ) -> list[dict[Dimension, Score]]:
        """Raw scores of answers to one prompt. Raises :class:`PromptFailedError`."""
        try:
            return await self._scoring(dimensions).submit(ScoreGroup(prompt, texts))
        except (ScoringError, OverloadedError) as error:
            raise _failed("scoring_failed", error) from error

    def assess(self, group: ScoredGroup, plan: Plan) -> Assessment:
        """Judge a calibrated group dimension by dimension, at the plan's ``n``."""
        return assess_group(group, self.calibrator, self.method, plan.dimensions, plan.n)

    def diagnose(self, group: ScoredGroup, plan: Plan) -> Diagnostic:
        """Diagnose a calibrated group at the plan's ``n``."""
        return diagnose(self.assess(group, plan), self.calibrator, self.method)

    def _scoring(
        self, dimensions: tuple[Dimension, ...]
    ) -> MicroBatcher[ScoreGroup, list[dict[Dimension, Score]]]:
        if dimensions not in self._scorings:

            async def call(groups: list[ScoreGroup]) -> list[list[dict[Dimension, Score]]]:
                return await self._scorer.score(groups, dimensions)

            self._scorings[dimensions] = MicroBatcher(
                call, max_items=self._lists.max_items, window_s=self._lists.window_s
            )
        return self._scorings[dimensions]


VERSION_CHANGED = Failure(
    "policy_version_changed", "the policy was replaced again and again while sampling", True
)


def _failed(code: str, error: MoraError) -> PromptFailedError:
    if isinstance(error, OverloadedError):
        code = "overloaded"
    elif isinstance(error, ReplicaError) and error.lost:
        code = ENGINE_LOST
    return PromptFailedError(Failure(code, str(error), True))


def merge_groups(first: ScoredGroup, second: ScoredGroup) -> ScoredGroup:
    """Both groups' rollouts, ``second``'s indices following ``first``'s. Same prompt and policy."""
    assert first.prompt_id == second.prompt_id
    assert first.policy_version == second.policy_version
    offset = 1 + max((rollout.index for rollout in first.rollouts), default=-1)
    moved = tuple(Rollout(r.index + offset, r.completion, r.scores) for r in second.rollouts)
    return replace(first, rollouts=first.rollouts + moved, seeds=first.seeds + second.seeds)


def derive_seed(seed: int | None, stream: str) -> int | None:
    """A seed of its own for each round of each prompt, in [0, 2**48); ``None`` stays ``None``."""
    if seed is None:
        return None
    digest = hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")
