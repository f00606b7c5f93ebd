"""Figures of a run: paired changes with their noise, counts, before and after rewriting."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mora_serve.run_summary import change, summarise
from tests.unit.cli.made_up_run import DIMENSIONS, diagnostic, made_up_run, rewrite_result


def series(*means: float | None) -> list[dict[str, Any]]:
    return [
        diagnostic(dict.fromkeys(DIMENSIONS, mean)) if mean is not None else diagnostic({})
        for mean in means
    ]


def test_equal_versions_show_no_change_and_no_error() -> None:
    figures = change(series(0.1, 0.5, -1), series(0.1, 0.5, -1), "helpful", seed=0)
    assert (figures["change"], figures["se"], figures["within_noise"]) == (0.0, 0.0, True)


def test_change_is_paired_by_prompt() -> None:
    before, after = series(-5.0, 0.0, 5.0, 9.0), series(-4.5, 0.5, 5.5, 9.5)
    figures = change(before, after, "helpful", seed=0)
    assert figures["change"] == pytest.approx(0.5)
    assert figures["se"] == pytest.approx(0.0)
    assert figures["within_noise"] is False


def test_standard_error_is_that_of_the_mean_difference() -> None:
    differences = [(-1.0) ** i * (1 + i % 3) for i in range(60)]
    figures = change(series(*[0.0] * 60), series(*differences), "helpful", seed=1)
    mean = sum(differences) / 60
    variance = sum((d - mean) ** 2 for d in differences) / 60
    assert figures["se"] == pytest.approx((variance / 60) ** 0.5, rel=0.1)
    assert figures["within_noise"] is True


def test_prompts_without_a_mean_on_either_side_do_not_count() -> None:
    figures = change(series(0.0, None, 1.0), series(1.0, 9.0, None), "helpful", seed=0)
    assert (figures["num_prompts"], figures["change"]) == (1, 1.0)
    assert (figures["low"], figures["within_noise"]) == (None, True)


def test_nothing_measured_is_null_and_not_zero() -> None:
    figures = change(series(None), series(None), "helpful", seed=0)
    assert figures["change"] is None
    assert figures["within_noise"] is None
    assert figures["num_prompts"] == 0


def test_summary_is_strict_json() -> None:
    summary = summarise(made_up_run())
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


def test_classes_count_every_prompt_once_failures_included() -> None:
    summary = summarise(made_up_run())
    assert sum(summary["classes"].values()) == len(made_up_run().rows)
    assert summary["classes"]["failed"] == 1
    by_kind = summary["classes_by_kind"]
    assert sum(count for kind in by_kind.values() for count in kind.values()) == 6


def test_verdicts_name_what_became_of_each_rewritten_prompt() -> None:
    rewriting = summarise(made_up_run())["rewriting"]
    assert rewriting["num_rewritten"] == 3
    assert rewriting["num_accepted"] == 1
    assert rewriting["verdicts"] == {"accepted": 1, "gain": 1, "drift": 1}
    assert rewriting["candidate_reasons"]["not_selected"] == 2


def test_before_and_after_are_means_over_the_accepted_only() -> None:
    item = summarise(made_up_run())["rewriting"]["dimensions"]["harmless"]
    assert (item["mean_before"], item["mean_after"]) == (-0.5, 0.7)
    assert item["confirmed_change"] == 0.9
    assert item["num_confirmed"] == 1


def test_gain_reported_is_the_confirmed_one() -> None:
    summary = summarise(made_up_run())
    assert summary["rewriting"]["mean_gain"] == 0.8
    accepted = next(p for p in summary["prompts"] if p.get("rewrite"))
    assert accepted["rewrite"]["selection_gain"] == 1.4


def test_training_curve_takes_metric_events_alone() -> None:
    training = summarise(made_up_run())["training"]
    assert [point["step"] for point in training["curve"]] == [1, 2, 3]
    assert (training["loss_first"], training["loss_last"]) == (0.69, 0.61)
    assert training["curve"][0]["margin"] is None


def test_pairs_are_counted_by_where_they_come_from() -> None:
    pairs = summarise(made_up_run())["pairs"]
    assert pairs["count"] == 3
    assert pairs["mean_margin"] == pytest.approx(1.5)
    assert pairs["by_strategy"] == {"original": 2, "compose": 1}


def test_prompt_without_candidates_was_not_rewritten() -> None:
    run = made_up_run()
    results = {"row-0": rewrite_result("multi")}
    summary = summarise(type(run)(**{**_fields(run), "results": results}))
    assert summary["rewriting"]["verdicts"] == {}
    assert summary["prompts"][0]["verdict"] == "not rewritten"


def _fields(run: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in run.__slots__}
