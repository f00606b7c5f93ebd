"""Responses as JSON-ready dicts, field names as in the REST contract (DESIGN section 4).

Everything that leaves this module is finite: NaN and infinities become ``None``. Pair rows are TRL
conversational preference rows with their provenance. Nothing is computed here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from mora_serve.diagnostics import Aggregate, Diagnostic, DimensionDiagnostic
from mora_serve.errors import InvalidRequestError
from mora_serve.pairs import PairChoice
from mora_serve.types import Dimension, Failure, Messages, Rollout, Score, ScoredGroup

JSON = dict[str, Any]


def finite(value: Any) -> Any:
    """``value`` with every non-finite float at any depth made ``None``, and tuples made lists."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def messages_list(messages: Messages) -> list[JSON]:
    """A conversation as ``[{"role", "content"}]``."""
    return [{"role": message.role, "content": message.content} for message in messages]


def score_json(score: Score) -> JSON:
    """One ``Score`` object."""
    return {
        "value": finite(score.value),
        "raw": finite(score.raw),
        "status": score.status,
        "reason": score.reason,
        "model": score.model,
        "revision": score.revision,
    }


def scores_json(scores: Mapping[Dimension, Score]) -> JSON:
    """``{dimension: Score}``."""
    return {dimension: score_json(score) for dimension, score in scores.items()}


def score_row(index: int, scores: Mapping[Dimension, Score]) -> JSON:
    """One element of ``/v1/scores``."""
    return {"object": "score", "index": index, "scores": scores_json(scores)}


def rollout_json(rollout: Rollout, *, sampled: bool = True) -> JSON:
    """One rollout. An answer that was given has no finish reason and no token count."""
    completion = rollout.completion
    return {
        "index": rollout.index,
        "text": completion.text,
        "finish_reason": completion.finish_reason if sampled else None,
        "num_tokens": completion.num_tokens if sampled else None,
        "scores": scores_json(rollout.scores),
    }


def failure_json(failure: Failure, param: str | None = None) -> JSON:
    """The ``error`` of one prompt, in the inner shape of OpenAI's envelope.

    ``param`` is the request's field that holds the prompt; what infrastructure did names none.
    """
    kind = "server_error" if failure.retryable else "invalid_request_error"
    named = None if failure.retryable else param
    return {"message": failure.message, "type": kind, "param": named, "code": failure.code}


def invalid_json(error: InvalidRequestError) -> JSON:
    """Like :func:`failure_json` for a prompt whose content breaks a rule."""
    return {
        "message": error.message,
        "type": "invalid_request_error",
        "param": error.param,
        "code": error.code,
    }


def dimension_json(item: DimensionDiagnostic) -> JSON:
    """Statistics of one dimension."""
    return {
        "mean": finite(item.mean),
        "spread": finite(item.spread),
        "ceiling": finite(item.ceiling),
        "ceiling_n": item.ceiling_n,
        "floor": finite(item.floor),
        "n_valid": int(item.n_valid),
        "posterior_mean": finite(item.posterior_mean),
        "posterior_sd": finite(item.posterior_sd),
        "expected_ceiling": finite(item.expected_ceiling),
        "bound": finite(item.bound),
        "reach": finite(item.reach),
        "state": item.state,
        "reliability": finite(item.reliability),
    }


def diagnostic_json(
    diagnostic: Diagnostic,
    index: int,
    *,
    include_rollouts: bool,
    error: JSON | None = None,
) -> JSON:
    """One element of ``/v1/diagnostics``; ``prompt`` and ``rollouts`` are null unless asked for.

    ``prompt`` is the conversation that was sampled, the configured system turn included.

    A group of given answers has the empty policy version; what only sampling knows is then null.
    """
    if error is None and diagnostic.error is not None:
        error = failure_json(diagnostic.error)
    group = diagnostic.group
    sampled = bool(diagnostic.policy_version)
    prompt = rollouts = None
    if include_rollouts and group is not None:
        prompt = messages_list(group.prompt)
        rollouts = [rollout_json(item, sampled=sampled) for item in group.rollouts]
    return {
        "object": "diagnostic",
        "index": index,
        "prompt_id": diagnostic.prompt_id,
        "status": diagnostic.status,
        "error": error,
        "class": diagnostic.prompt_class,
        "class_probability": finite(diagnostic.class_probability),
        "conflicted": diagnostic.conflicted,
        "conflicts": [list(pair) for pair in diagnostic.conflicts],
        "dimensions": {k: dimension_json(v) for k, v in diagnostic.dimensions.items()},
        "correlation": finite(diagnostic.correlation),
        "pareto": list(diagnostic.pareto),
        "hypervolume": finite(diagnostic.hypervolume),
        "n_joint": diagnostic.n_joint,
        "num_rollouts": diagnostic.num_rollouts,
        "share_cut": finite(diagnostic.share_cut) if sampled else None,
        "warnings": list(diagnostic.warnings),
        "policy_version": diagnostic.policy_version or None,
        "prompt": prompt,
        "rollouts": rollouts,
    }


def aggregate_json(aggregate: Aggregate) -> JSON:
    """The ``aggregate`` of ``/v1/diagnostics``."""
    result: JSON = finite(asdict(aggregate))
    return result


def list_json(data: Sequence[JSON], **extra: Any) -> JSON:
    """OpenAI's list object."""
    return {"object": "list", "data": list(data), **extra}


def pair_json(
    choice: PairChoice,
    group: ScoredGroup,
    dimensions: Sequence[Dimension],
    provenance: Mapping[str, Any],
) -> JSON:
    """One preference row; ``seq`` is null until the row gets its place in a stream."""
    chosen, rejected = choice.chosen, choice.rejected
    return {
        "seq": None,
        "prompt_id": group.prompt_id,
        "prompt": messages_list(group.prompt),
        "chosen": [{"role": "assistant", "content": chosen.completion.text}],
        "rejected": [{"role": "assistant", "content": rejected.completion.text}],
        "margin": choice.margin,
        "mode": choice.mode,
        "stage": choice.stage,
        "chosen_scores": _rewards(chosen, dimensions),
        "rejected_scores": _rewards(rejected, dimensions),
        "policy_version": group.policy_version,
        "provenance": finite(provenance),
    }


def _rewards(rollout: Rollout, dimensions: Sequence[Dimension]) -> JSON:
    return {k: {"value": s.value, "raw": s.raw} for k in dimensions if (s := rollout.scores[k])}
