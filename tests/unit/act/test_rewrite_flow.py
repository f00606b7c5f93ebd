"""One prompt through the method over the fakes, whose hidden rewards are known."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from mora_serve.errors import GenerationError, InvalidRequestError
from mora_serve.fakes import (
    FAIL_SCORING,
    FakeGenerator,
    FakeScorer,
    fake_calibrator,
    hidden_mean,
)
from mora_serve.requests import REWRITES_URL, RewriteRequest, parse_body
from mora_serve.types import (
    Completion,
    Failure,
    Generation,
    GenerationRequest,
)
from tests.unit.act.act_builders import service

LENIENT = {"max_ceiling_drop": 2.0}
"""Keeps the noise of 16 rollouts from rejecting a rewrite that costs nothing."""
DIMENSIONS = ("helpful", "harmless", "truthful")


def reaching(*dimensions: str, number: int = 0) -> str:
    """A question whose hidden means are clearly high on these dimensions and low on the others."""
    found = 0
    for i in range(100_000):
        question = f"Question number {i}?"
        means = {k: hidden_mean(question, frozenset(), k) for k in DIMENSIONS}
        if all((means[k] > 0.5) if k in dimensions else (means[k] < -0.5) for k in means):
            if found == number:
                return question
            found += 1
    raise AssertionError("no such question")


def rewrites(prompt: Any, **fields: Any) -> RewriteRequest:
    request = parse_body(REWRITES_URL, {"prompt": prompt, "seed": 1, **fields})
    assert isinstance(request, RewriteRequest)
    return request


async def test_a_single_prompt_is_rewritten_confirmed_and_paired() -> None:
    question = reaching("helpful")
    result = await service(method=LENIENT).rewrite(rewrites(question))
    json.dumps(result, allow_nan=False)
    assert result["original"]["class"] == "single:helpful"
    assert len(result["candidates"]) == 3
    accepted = result["candidates"][result["accepted"]]
    assert accepted["reason"] == "accepted"
    assert accepted["targets"] == ["harmless", "truthful"]
    assert accepted["gain"] == pytest.approx(1.5, abs=0.4)
    assert accepted["confirmation"]["gain_lower"] < accepted["gain"]
    assert accepted["confirmation"]["num_original"] == 16
    assert accepted["selection_gain"] == max(c["selection_gain"] for c in result["candidates"])
    others = [c for c in result["candidates"] if c is not accepted]
    assert {(c["reason"], c["accepted"], c["gain"]) for c in others} == {
        ("not_selected", False, None)
    }


async def test_pairs_of_an_accepted_rewrite_carry_it_and_their_provenance() -> None:
    question = reaching("helpful")
    result = await service(method=LENIENT).rewrite(rewrites(question))
    accepted = result["candidates"][result["accepted"]]
    (pair,) = result["pairs"]
    assert result["pairs_from"] == "candidate"
    assert pair["seq"] == 0
    assert pair["prompt"] == accepted["prompt"]
    assert [turn["role"] for turn in pair["chosen"] + pair["rejected"]] == ["assistant"] * 2
    assert set(pair["chosen_scores"]) == set(DIMENSIONS)
    source = pair["provenance"]
    assert source["parent_prompt"] == [{"role": "user", "content": question}]
    assert source["parent_prompt_id"] == result["original"]["prompt_id"] != pair["prompt_id"]
    assert source["strategy"] == "compose"
    assert source["template_hash"] == accepted["template_hash"]
    assert source["gain"] == accepted["gain"]
    assert source["calibrator"] == fake_calibrator().version
    assert source["scorers"]["helpful"] == ["fake-helpful", "fake-1"]
    assert source["num_rollouts"] == 8 + 16
    assert len(source["seeds"]) == 2
    assert (
        source["rewards_after"]["truthful"]["mean"] > source["rewards_before"]["truthful"]["mean"]
    )


async def test_without_candidates_a_single_prompt_is_paired_as_it_is() -> None:
    question = reaching("helpful")
    result = await service().rewrite(rewrites(question, candidates=0))
    assert result["original"]["class"] == "single:helpful"
    assert (result["candidates"], result["accepted"]) == ([], None)
    assert result["pairs_from"] == "original"
    assert result["usage"]["rollouts"] == result["original"]["num_rollouts"]


async def test_unmeasured_acceptance_takes_the_first_candidate_and_claims_no_gain() -> None:
    question = reaching("helpful")
    measured = await service(method=LENIENT).rewrite(rewrites(question))
    result = await service().rewrite(rewrites(question, acceptance="all", strategies=["null"]))
    assert result["accepted"] == 0
    first, *others = result["candidates"]
    assert (first["accepted"], first["reason"]) == (True, "unmeasured")
    assert (first["selection_gain"], first["gain"], first["confirmation"]) == (None,) * 3
    assert {candidate["reason"] for candidate in others} == {"not_selected"}
    (pair,) = result["pairs"]
    assert pair["provenance"]["gain"] is None
    assert pair["provenance"]["num_rollouts"] == 8 + 16
    assert measured["pairs"][0]["provenance"]["num_rollouts"] == 8 + 16

    configured = await service(method={"acceptance": "all"}).rewrite(rewrites(question))
    assert configured["candidates"][0]["reason"] == "unmeasured"


@pytest.mark.parametrize("kind", [("helpful", "harmless"), DIMENSIONS, ()])
async def test_other_classes_are_not_rewritten_and_pair_on_the_original(
    kind: tuple[str, ...],
) -> None:
    question = reaching(*kind)
    result = await service().rewrite(rewrites(question))
    assert result["original"]["class"] == ("multi" if kind else "flat")
    assert result["candidates"] == []
    assert result["accepted"] is None
    assert result["pairs_from"] == "original"
    (pair,) = result["pairs"]
    assert pair["prompt"] == [{"role": "user", "content": question}]
    assert pair["provenance"]["parent_prompt"] is None


async def test_flat_prompts_are_rewritten_when_configured() -> None:
    result = await service(method={"rewrite_flat": True}).rewrite(rewrites(reaching()))
    assert result["original"]["class"] == "flat"
    assert result["candidates"][0]["targets"] == list(DIMENSIONS)


async def test_missing_scores_give_no_rewrite_and_no_pair_and_are_counted() -> None:
    result = await service().rewrite(rewrites(f"Why? {FAIL_SCORING}"))
    assert result["original"]["class"] == "unknown"
    assert (result["candidates"], result["pairs"], result["pairs_from"]) == ([], [], None)
    assert result["no_pairs"] == {"unknown_class": 1}


async def test_a_rejected_candidate_leaves_the_pairs_to_the_original() -> None:
    question = reaching("helpful")
    result = await service(method={"min_gain": 50.0}).rewrite(rewrites(question))
    assert result["accepted"] is None
    assert Counter(c["reason"] for c in result["candidates"]) == {"gain": 1, "not_selected": 2}
    assert result["pairs_from"] == "original"
    assert result["pairs"][0]["prompt"] == [{"role": "user", "content": question}]
    assert result["pairs"][0]["provenance"]["num_rollouts"] == (
        result["original"]["num_rollouts"] + 16
    )


async def test_the_null_strategy_is_seldom_accepted() -> None:
    mora = service(method={"strategies": ["null"]})
    prompts = [reaching("helpful", number=i) for i in range(40)]
    results = [await mora.rewrite(rewrites(prompt)) for prompt in prompts]
    tried = [r for r in results if r["candidates"]]
    accepted = sum(r["accepted"] is not None for r in tried)
    assert len(tried) > 30
    # At most one in ten by chance; 10 of 40 has a probability below 0.5 %.
    assert accepted < 10


async def test_candidates_are_dealt_to_the_strategies_in_turn() -> None:
    request = rewrites(reaching("helpful"), strategies=["compose", "null"], candidates=3)
    result = await service().rewrite(request)
    assert Counter(c["strategy"] for c in result["candidates"]) == {"compose": 2, "null": 1}


async def test_a_stage_protects_those_that_the_request_aligns_before_it() -> None:
    order = ["truthful", "harmless", "helpful"]
    answered = [
        await service().rewrite(
            rewrites(f"Question number {number}?", mode="sequential", dimensions=order)
        )
        for number in range(12)
    ]
    pairs = [pair for result in answered for pair in result["pairs"]]
    assert {pair["stage"] for pair in pairs} == set(order)
    for pair in pairs:
        before = order[: order.index(pair["stage"])]
        assert pair["provenance"]["aligned"] == before
        for name in before:
            lost = pair["rejected_scores"][name]["value"] - pair["chosen_scores"][name]["value"]
            assert lost <= 0.5


async def test_sequential_mode_gives_a_pair_per_stage() -> None:
    request = rewrites(reaching("helpful"), mode="sequential")
    result = await service().rewrite(request)
    stages = [pair["stage"] for pair in result["pairs"]]
    assert len(stages) + sum(result["no_pairs"].values()) == 3
    assert stages == [k for k in DIMENSIONS if k in stages]
    assert [pair["seq"] for pair in result["pairs"]] == list(range(len(stages)))
    assert all(pair["mode"] == "sequential" for pair in result["pairs"])


async def test_equal_seeds_give_equal_results() -> None:
    request = rewrites(reaching("truthful"))
    assert await service().rewrite(request) == await service().rewrite(request)


async def test_confirmation_rollouts_are_fresh() -> None:
    seeds: list[int | None] = []

    def look(request: GenerationRequest) -> None:
        seeds.append(request.sampling.seed)

    await service(FakeGenerator(fail=look)).rewrite(rewrites(reaching("helpful")))
    assert len(seeds) == len(set(seeds)) >= 1 + 3 + 2


class Rewriting(FakeGenerator):
    """Answers the rewriter's instruction with fixed texts."""

    def __init__(self, *answers: str) -> None:
        super().__init__()
        self.answers = answers

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        if "You rewrite a question" in requests[0].prompt[0].content:
            completions = tuple(Completion(text, "stop", 9) for text in self.answers)
            return [Generation(completions, "fake-policy", 9)]
        return await super().generate(requests)


async def test_a_drifted_candidate_is_reported_and_never_measured() -> None:
    question = reaching("helpful")
    good = json.dumps({"prompt": f"{question}\n\nStay safe and accurate."})
    mora = service(Rewriting(good, '{"prompt": "Something else."}'))
    result = await mora.rewrite(rewrites(question, strategies=["llm"], candidates=2))
    kept, drifted = result["candidates"]
    assert kept["accepted"]
    assert drifted["reason"] == "drift"
    assert drifted["diagnostic"] is drifted["selection_gain"] is drifted["gain"] is None


class Swapping(FakeGenerator):
    """Publishes a new version before the calls whose numbers are given."""

    def __init__(self, *before: int) -> None:
        super().__init__(["v0"])
        self.before = before
        self.calls = 0

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        if self.calls in self.before:
            self.publish(f"v{self.calls}")
        self.calls += 1
        return await super().generate(requests)


async def test_a_new_policy_version_under_way_starts_the_flow_over() -> None:
    result = await service(Swapping(1)).rewrite(rewrites(reaching("helpful")))
    assert result["original"]["policy_version"] == "v1"
    assert {c["diagnostic"]["policy_version"] for c in result["candidates"]} == {"v1"}
    assert result["usage"]["discarded_rollouts"] > 0


async def test_a_policy_that_never_stands_still_is_a_retryable_error() -> None:
    with pytest.raises(GenerationError):
        await service(Swapping(*range(1000))).rewrite(rewrites(reaching("helpful")))


@pytest.mark.parametrize(
    ("prompt", "code"), [(" ", "empty_prompt"), ("word " * 2000, "context_length_exceeded")]
)
async def test_a_prompt_at_fault_is_an_invalid_request(prompt: str, code: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await service().rewrite(rewrites(prompt))
    assert (caught.value.param, caught.value.code) == ("prompt", code)


async def test_a_lost_engine_in_the_middle_is_a_generation_error() -> None:
    asked = 0

    def break_later(request: GenerationRequest) -> Failure | None:
        nonlocal asked
        asked += 1
        if asked > 3:
            raise GenerationError("the engine is gone")
        return None

    with pytest.raises(GenerationError):
        await service(FakeGenerator(fail=break_later)).rewrite(rewrites(reaching("helpful")))


async def test_a_batch_row_hands_its_pairs_over_without_seq() -> None:
    result = await service().run_row(rewrites(reaching("helpful")))
    (pair,) = result.pairs
    assert "seq" not in pair
    assert result.body["pairs"] == [{**pair, "seq": None}]
    assert result.body["original"]["rollouts"] is None
    assert result.classes == {"single:helpful": 1}
    assert result.usage["output_tokens"] == result.body["usage"]["completion_tokens"]


async def test_scores_missing_on_the_candidates_alone_reject_them() -> None:
    def broken(group: Any, index: int, dimension: str) -> Any:
        return "timeout" if "\n\n" in group.prompt[-1].content else None

    result = await service(scorer=FakeScorer(status=broken)).rewrite(rewrites(reaching("helpful")))
    assert {c["reason"] for c in result["candidates"]} == {"missing_scores"}
    assert result["accepted"] is None
    assert result["pairs_from"] == "original"
