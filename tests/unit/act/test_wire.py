"""Responses have the contract's field names and nothing that JSON cannot say."""

from __future__ import annotations

import json
import math
from dataclasses import replace

from mora_serve import wire
from mora_serve.calibration import Calibrator
from mora_serve.config import MethodSettings
from mora_serve.diagnostics import aggregate, diagnose_group, failed_diagnostic
from mora_serve.pairs import PairChoice, PairRules, select_simultaneous
from mora_serve.types import Failure, Score
from tests.unit.act.act_builders import scored

CALIBRATOR = Calibrator.identity(dict.fromkeys(("a", "b"), ("model", "rev")))
GROUP = scored({"a": [1.0, 0.5, -1.0, 0.0, 2.0], "b": [0.0, None, 1.0, -2.0, 1.0]})
DIAGNOSTIC = diagnose_group(GROUP, CALIBRATOR, MethodSettings(), ("a", "b"), 5)


def test_a_diagnostic_has_the_fields_of_the_contract() -> None:
    item = wire.diagnostic_json(DIAGNOSTIC, 3, include_rollouts=True)
    assert {
        "object", "index", "prompt_id", "status", "error", "class", "class_probability",
        "conflicted", "dimensions", "correlation", "pareto", "hypervolume", "policy_version",
        "rollouts",
    } <= set(item)  # fmt: skip
    assert (item["object"], item["index"], item["status"]) == ("diagnostic", 3, "ok")
    assert {
        "mean", "spread", "ceiling", "floor", "n_valid", "posterior_mean", "posterior_sd", "reach",
        "state",
    } <= set(item["dimensions"]["a"])  # fmt: skip
    assert item["dimensions"]["b"]["n_valid"] == 4
    assert item["prompt"] == wire.messages_list(GROUP.prompt)
    rollout = item["rollouts"][1]
    assert set(rollout) == {"index", "text", "finish_reason", "num_tokens", "scores"}
    assert rollout["scores"]["b"] == {
        "value": None, "raw": None, "status": "failed", "reason": "broken", "model": "model",
        "revision": "rev",
    }  # fmt: skip
    json.dumps(item, allow_nan=False)


def test_a_failed_diagnostic_has_an_error_in_openai_shape() -> None:
    failure = Failure("context_length_exceeded", "too long", retryable=False)
    item = wire.diagnostic_json(failed_diagnostic("id", failure), 0, include_rollouts=True)
    assert item["status"] == "failed"
    assert item["error"] == {
        "message": "too long", "type": "invalid_request_error", "param": None,
        "code": "context_length_exceeded",
    }  # fmt: skip
    assert item["class"] is item["rollouts"] is item["policy_version"] is None


def test_an_aggregate_is_json() -> None:
    failed = failed_diagnostic("id", Failure("x", "y", retryable=True))
    data = wire.aggregate_json(aggregate([DIAGNOSTIC, failed], 8))
    assert data["num_failed"] == 1
    assert json.loads(json.dumps(data, allow_nan=False)) == data


def test_nothing_that_is_not_finite_leaves() -> None:
    broken = Score("ok", math.inf, math.nan, None, "model", "rev")
    assert wire.score_json(broken)["raw"] is wire.score_json(broken)["value"] is None
    assert wire.finite({"a": (1.0, math.nan, [-math.inf])}) == {"a": [1.0, None, [None]]}
    poisoned = replace(DIAGNOSTIC, hypervolume=math.nan, class_probability=math.inf)
    json.dumps(wire.diagnostic_json(poisoned, 0, include_rollouts=True), allow_nan=False)


def test_a_pair_is_a_conversational_preference_row() -> None:
    choice = select_simultaneous(GROUP, ("a", "b"), PairRules(tolerance=9.0))
    assert isinstance(choice, PairChoice)
    row = wire.pair_json(choice, GROUP, ("a", "b"), {"strategy": None, "gain": math.nan})
    assert set(row) == {
        "seq", "prompt_id", "prompt", "chosen", "rejected", "margin", "mode", "stage",
        "chosen_scores", "rejected_scores", "policy_version", "provenance",
    }  # fmt: skip
    assert row["prompt"] == [{"role": "user", "content": "Why?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "answer 4"}]
    assert row["chosen_scores"]["a"] == {"value": 2.0, "raw": 2.0}
    assert row["provenance"]["gain"] is None
    json.dumps(row, allow_nan=False)
