"""One prompt through the method: diagnose, propose, select, confirm, accept, pair.

::

    presample original --> class --single (flat)--> propose --> sample each candidate
                                                                     | largest selection gain
    pairs <-- accepted, or the original <-- decide <-- fresh rollouts of that candidate and original

The class decides whether anything is proposed; acceptance is decided on the fresh rollouts alone.
Experiments may ask for no candidates, or to accept the first one unmeasured.
All groups of one flow come from one policy version: when it changes under way the flow starts over.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mora_serve import wire
from mora_serve.acceptance import Decision, choose, decide, selection_gain
from mora_serve.classification import FLAT, UNKNOWN
from mora_serve.config import MethodSettings
from mora_serve.diagnostics import Diagnostic, DimensionDiagnostic
from mora_serve.identity import content_hash, prompt_id
from mora_serve.pairs import Mode, NoPair, PairRules, select_pairs
from mora_serve.ports import Candidate, RewriteContext, Rewriter
from mora_serve.presampling import (
    MAX_VERSION_CHANGES,
    VERSION_CHANGED,
    Plan,
    PromptFailedError,
    Sampler,
    Usage,
    derive_seed,
    merge_groups,
)
from mora_serve.types import Dimension, Messages, ScoredGroup
from mora_serve.wire import JSON

Source = Literal["candidate", "original"]


@dataclass(frozen=True, slots=True)
class RewriteOptions:
    """What a rewrite request asks for, defaults filled in."""

    num_candidates: int
    """Candidates over all strategies, dealt to them in turn."""
    strategies: tuple[str, ...]
    mode: Mode
    stages: tuple[Dimension, ...]
    """The dimensions in the order in which sequential pairs align them: each stage protects those
    before it."""
    n_confirm: int
    is_measured: bool
    """False accepts the first candidate without looking at its rewards."""
    include_rollouts: bool


@dataclass(slots=True)
class _Trial:
    """A candidate on its way."""

    candidate: Candidate
    group: ScoredGroup | None = None
    """Selection rollouts, later joined by the confirmation's."""
    shown: ScoredGroup | None = None
    """What its diagnostic is of: the selection's rollouts, of the chosen one the confirmation's."""
    selection_gain: float | None = None
    decision: Decision | None = None
    accepted: bool = False
    reason: str | None = None


class _VersionChangedError(Exception):
    """The policy was replaced between two groups of the flow."""


class RewriteFlow:
    """Runs the method on one prompt; made for one request and used once."""

    def __init__(
        self,
        sampler: Sampler,
        rewriters: Mapping[str, Rewriter],
        *,
        method: MethodSettings,
        plan: Plan,
        options: RewriteOptions,
        usage: Usage,
    ) -> None:
        self._sampler = sampler
        self._rewriters = rewriters
        self._method = method
        self._plan = plan
        self._options = options
        self._usage = usage

    async def run(self, prompt: Messages) -> JSON:
        """The ``rewrite`` object. Raises :class:`PromptFailedError` when the prompt fails."""
        identity = prompt_id(prompt)
        for attempt in range(MAX_VERSION_CHANGES + 1):
            before = self._usage.rollouts
            try:
                return await self._run(prompt, f"rewrite/{identity}/{attempt}")
            except _VersionChangedError:
                self._usage.discarded_rollouts += self._usage.rollouts - before
        raise PromptFailedError(VERSION_CHANGED)

    async def _run(self, prompt: Messages, stream: str) -> JSON:
        sampler, plan = self._sampler, self._plan
        original = await sampler.presample(prompt, plan, self._usage, stream=f"{stream}/original")
        assert original.group is not None
        group = original.group
        trials: list[_Trial] = []
        if self._should_rewrite(original):
            trials = await self._propose(prompt, original, stream)
            if self._options.is_measured:
                await self._select(trials, group, stream)
                group = await self._confirm(trials, original, group, stream)
            else:
                await self._accept_first(trials, group, stream)
        accepted = next((i for i, trial in enumerate(trials) if trial.accepted), None)
        pairs, source, missing = self._pairs(original, group, trials, accepted)
        return self._result(original, trials, accepted, pairs=pairs, source=source, missing=missing)

    def _should_rewrite(self, original: Diagnostic) -> bool:
        label = original.prompt_class or UNKNOWN
        if label == FLAT:
            return self._method.rewrite_flat
        # The single reward may be all that is asked for: then there is nothing to open.
        return label.startswith("single:") and bool(self._missing(original))

    def _missing(self, original: Diagnostic) -> tuple[Dimension, ...]:
        reached = _reachable(original)
        return tuple(k for k in self._plan.dimensions if k not in reached)

    async def _propose(self, prompt: Messages, original: Diagnostic, stream: str) -> list[_Trial]:
        context = RewriteContext(
            prompt=prompt,
            present=_reachable(original),
            missing=self._missing(original),
            seed=derive_seed(self._plan.seed, f"{stream}/propose")
            or int(content_hash([original.prompt_id])[:8], 16),
        )
        shares = Counter(
            self._options.strategies[i % len(self._options.strategies)]
            for i in range(self._options.num_candidates)
        )
        proposals = [await self._rewriters[k].propose(context, num) for k, num in shares.items()]
        return [
            _Trial(candidate, reason=candidate.rejected)
            for found in proposals
            for candidate in found
        ]

    async def _select(self, trials: Sequence[_Trial], original: ScoredGroup, stream: str) -> None:
        """Sample every candidate that was not rejected and measure its selection gain."""

        async def measure(index: int, trial: _Trial) -> None:
            trial.shown = trial.group = await self._draw(
                trial.candidate.prompt, self._plan.n, f"{stream}/select/{index}", original
            )
            trial.selection_gain = selection_gain(
                trial.group, original, trial.candidate.targets, self._sampler.calibrator,
                self._plan.n,
            )  # fmt: skip
            trial.reason = "missing_scores" if trial.selection_gain is None else "not_selected"

        open_trials = [(i, t) for i, t in enumerate(trials) if t.reason is None]
        await _all(*(measure(index, trial) for index, trial in open_trials))

    async def _accept_first(
        self, trials: Sequence[_Trial], original: ScoredGroup, stream: str
    ) -> None:
        """Take the first candidate that was not rejected unseen.

        Its pairs are chosen among as many answers as those of a confirmed candidate.
        """
        count = self._plan.n + self._options.n_confirm
        for index, trial in enumerate(trials):
            if trial.reason is None:
                trial.shown = trial.group = await self._draw(
                    trial.candidate.prompt, count, f"{stream}/select/{index}", original
                )
                trial.accepted, trial.reason = True, "unmeasured"
                break
        for trial in trials:
            trial.reason = trial.reason or "not_selected"

    async def _confirm(
        self, trials: Sequence[_Trial], original: Diagnostic, group: ScoredGroup, stream: str
    ) -> ScoredGroup:
        """Decide on the best candidate with fresh rollouts; the original's group, extended."""
        best = choose([trial.selection_gain for trial in trials])
        if best is None:
            return group
        trial = trials[best]
        n_confirm = self._options.n_confirm
        fresh, again = await _all(
            self._draw(trial.candidate.prompt, n_confirm, f"{stream}/confirm/candidate", group),
            self._draw(group.prompt, n_confirm, f"{stream}/confirm/original", group),
        )
        trial.decision = decide(
            fresh, again, trial.candidate.targets, _reachable(original),
            calibrator=self._sampler.calibrator, method=self._method, n=self._plan.n,
        )  # fmt: skip
        trial.accepted, trial.reason = trial.decision.accepted, trial.decision.reason
        trial.shown = fresh
        assert trial.group is not None
        trial.group = merge_groups(trial.group, fresh)
        return merge_groups(group, again)

    async def _draw(
        self, prompt: Messages, count: int, stream: str, like: ScoredGroup
    ) -> ScoredGroup:
        group = await self._sampler.draw(
            prompt, self._plan, self._usage, count=count, stream=stream
        )
        if group.policy_version != like.policy_version:
            raise _VersionChangedError
        return group

    # --- pairs and the result -------------------------------------------------------------------

    def _pairs(
        self,
        original: Diagnostic,
        group: ScoredGroup,
        trials: Sequence[_Trial],
        accepted: int | None,
    ) -> tuple[list[JSON], Source | None, Counter[str]]:
        """Pair rows, where they come from, and the reasons of those that could not be made."""
        if accepted is None and original.prompt_class == UNKNOWN:
            return [], None, Counter({"unknown_class": 1})
        source: Source = "original"
        trial: _Trial | None = None
        if accepted is not None:
            trial, source = trials[accepted], "candidate"
            assert trial.group is not None
            group, group_before = trial.group, group
        else:
            group_before = group
        rules = self._rules()
        rows: list[JSON] = []
        missing: Counter[str] = Counter()
        for outcome in select_pairs(group, self._options.stages, self._options.mode, rules):
            if isinstance(outcome, NoPair):
                missing[outcome.reason] += 1
                continue
            provenance = self._provenance(original, group_before, group, trial)
            provenance |= {
                "aligned": list(outcome.aligned),
                "chosen_finish_reason": outcome.chosen.completion.finish_reason,
                "rejected_finish_reason": outcome.rejected.completion.finish_reason,
            }
            rows.append(wire.pair_json(outcome, group, self._plan.dimensions, provenance))
        return rows, source, missing

    def _rules(self) -> PairRules:
        method, calibrator = self._method, self._sampler.calibrator
        slopes = {k: calibrator[k].length_slope for k in self._plan.dimensions}
        return PairRules(
            weights=method.weights,
            min_margin=method.min_margin,
            tolerance=method.tolerance,
            length_slopes=slopes if method.length_control else None,
        )

    def _provenance(
        self,
        original: Diagnostic,
        before: ScoredGroup,
        group: ScoredGroup,
        trial: _Trial | None,
    ) -> dict[str, Any]:
        calibrator, dimensions = self._sampler.calibrator, self._plan.dimensions
        return {
            "parent_prompt": None if trial is None else wire.messages_list(before.prompt),
            "parent_prompt_id": None if trial is None else before.prompt_id,
            "parent_class": original.prompt_class,
            "strategy": None if trial is None else trial.candidate.strategy,
            "template_hash": None if trial is None else trial.candidate.template_hash,
            "targets": [] if trial is None else list(trial.candidate.targets),
            "gain": None if trial is None or not trial.decision else trial.decision.gain,
            "rewards_before": _means(
                original.dimensions
                if before is original.group
                else self._sampler.assess(before, self._plan).describe()
            ),
            "rewards_after": None
            if trial is None
            else _means(self._sampler.assess(group, self._plan).describe()),
            "policy_version": group.policy_version,
            "scorers": {k: [calibrator[k].model, calibrator[k].revision] for k in dimensions},
            "calibrator": calibrator.version,
            "seeds": list(group.seeds),
            "num_rollouts": len(group.rollouts),
        }

    def _result(
        self,
        original: Diagnostic,
        trials: Sequence[_Trial],
        accepted: int | None,
        *,
        pairs: Sequence[JSON],
        source: Source | None,
        missing: Mapping[str, int],
    ) -> JSON:
        include = self._options.include_rollouts
        return {
            "object": "rewrite",
            "original": wire.diagnostic_json(original, 0, include_rollouts=include),
            "candidates": [self._trial_json(index, trial) for index, trial in enumerate(trials)],
            "accepted": accepted,
            "pairs": [{**row, "seq": seq} for seq, row in enumerate(pairs)],
            "pairs_from": source if pairs else None,
            "no_pairs": dict(missing),
            "usage": self._usage.to_dict(),
        }

    def _trial_json(self, index: int, trial: _Trial) -> JSON:
        decision, shown = trial.decision, None
        if trial.shown is not None:
            diagnostic = self._sampler.diagnose(trial.shown, self._plan)
            include = self._options.include_rollouts
            shown = wire.diagnostic_json(diagnostic, index, include_rollouts=include)
        return {
            "prompt": wire.messages_list(trial.candidate.prompt),
            "strategy": trial.candidate.strategy,
            "template_hash": trial.candidate.template_hash,
            "targets": list(trial.candidate.targets),
            "diagnostic": shown,
            "selection_gain": wire.finite(trial.selection_gain),
            "gain": None if decision is None else wire.finite(decision.gain),
            "confirmation": None if decision is None else _decision_json(decision),
            "accepted": trial.accepted,
            "reason": trial.reason,
        }


def _reachable(diagnostic: Diagnostic) -> tuple[Dimension, ...]:
    return tuple(k for k, item in diagnostic.dimensions.items() if item.state == "reachable")


def _means(dimensions: Mapping[Dimension, DimensionDiagnostic]) -> dict[str, Any]:
    return {
        k: {"mean": item.mean, "ceiling": item.ceiling, "n_valid": item.n_valid}
        for k, item in dimensions.items()
    }


def _decision_json(decision: Decision) -> JSON:
    result: JSON = wire.finite(
        {
            "gain_lower": decision.gain_lower,
            "gains": decision.gains,
            "kept": decision.kept,
            "kept_lower": decision.kept_lower,
            "num_candidate": decision.num_candidate,
            "num_original": decision.num_original,
        }
    )
    return result


async def _all(*coroutines: Any) -> list[Any]:
    """Results in order; the first error cancels the rest and is raised as itself."""
    tasks = [asyncio.ensure_future(item) for item in coroutines]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
