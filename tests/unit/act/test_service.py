"""The core service over the fakes: diagnostics, scores, and what happens to bad prompts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from mora_serve.errors import (
    CalibrationError,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ScoringError,
)
from mora_serve.fakes import (
    FAIL_GENERATION,
    FAIL_SCORING,
    FakeGenerator,
    FakeScorer,
    fake_calibrator,
)
from mora_serve.presampling import ListCalls
from mora_serve.requests import (
    DIAGNOSTICS_URL,
    SCORES_URL,
    DiagnosticsRequest,
    ScoresRequest,
    parse_body,
)
from mora_serve.service import MoraService
from mora_serve.types import (
    Dimension,
    Failure,
    Generation,
    GenerationRequest,
    Score,
    ScoreGroup,
)
from tests.unit.act.act_builders import service, settings

QUESTIONS = [f"Question number {i}?" for i in range(20)]
LONG = "word " * 2000


def diagnostics(prompts: Sequence[Any], **fields: Any) -> DiagnosticsRequest:
    request = parse_body(DIAGNOSTICS_URL, {"prompts": list(prompts), "seed": 1, **fields})
    assert isinstance(request, DiagnosticsRequest)
    return request


def scores(rows: Sequence[dict[str, Any]], **fields: Any) -> ScoresRequest:
    request = parse_body(SCORES_URL, {"rows": list(rows), **fields})
    assert isinstance(request, ScoresRequest)
    return request


class GatedGenerator(FakeGenerator):
    """Holds back list calls with a prompt that says ``gated`` until ``gate`` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.waiting = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        if any("gated" in request.prompt[-1].content for request in requests):
            self.waiting.set()
            try:
                await self.gate.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
        return await super().generate(requests)


class BrokenGenerator(FakeGenerator):
    """Raises ``error`` for every call."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        raise self.error


class BrokenScorer(FakeScorer):
    """Raises for every call."""

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[list[dict[Dimension, Score]]]:
        raise ScoringError("the scorer is gone")


class SwappingGenerator(FakeGenerator):
    """Publishes another policy version before each of its first ``changes`` calls after one."""

    def __init__(self, changes: int) -> None:
        super().__init__(["v0"])
        self.changes = changes
        self.calls = 0

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        if 1 <= self.calls <= self.changes:
            self.publish(f"v{self.calls}")
        self.calls += 1
        return await super().generate(requests)


async def test_every_prompt_is_diagnosed_in_order_with_aggregate_and_usage() -> None:
    result = await service().diagnose_list(diagnostics(QUESTIONS))
    items = result["data"]
    assert [item["index"] for item in items] == list(range(20))
    assert all(item["status"] == "ok" for item in items)
    assert result["aggregate"]["num_prompts"] == 20
    assert sum(result["aggregate"]["classes"].values()) == 20
    usage = result["usage"]
    rollouts = [rollout for item in items for rollout in item["rollouts"]]
    assert usage["rollouts"] == len(rollouts) == result["aggregate"]["num_rollouts"]
    assert usage["completion_tokens"] == sum(rollout["num_tokens"] for rollout in rollouts)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    json.dumps(result, allow_nan=False)


async def test_equal_seeds_give_equal_diagnostics_and_equal_prompts_their_own_rollouts() -> None:
    request = diagnostics(["Why?", "Why?"], n_max=8)
    first, again = [(await service().diagnose_list(request))["data"] for _ in range(2)]
    assert first == again
    texts = [[rollout["text"] for rollout in item["rollouts"]] for item in first]
    assert texts[0] != texts[1]
    assert first[0]["prompt_id"] == first[1]["prompt_id"]


async def test_undecided_prompts_get_more_rounds_and_decided_ones_none() -> None:
    result = await service().diagnose_list(diagnostics(QUESTIONS, n=8, n_max=24))
    drawn = [item["num_rollouts"] for item in result["data"]]
    assert set(drawn) <= {8, 16, 24}
    assert len(set(drawn)) > 1
    for item in result["data"]:
        undecided = any(k["state"] == "undecided" for k in item["dimensions"].values())
        assert undecided <= (item["num_rollouts"] == 24)
        indices = [rollout["index"] for rollout in item["rollouts"]]
        assert indices == list(range(item["num_rollouts"]))
    assert result["aggregate"]["num_rollouts_fixed"] == 24 * 20
    assert 0 < result["aggregate"]["share_saved"] < 1


async def test_results_stream_as_they_finish_and_end_with_a_summary() -> None:
    generator = GatedGenerator()
    prompts = ["gated", *QUESTIONS]
    stream = service(generator).diagnose(diagnostics(prompts))
    seen = [(await anext(stream))["index"] for _ in range(13)]
    assert 0 not in seen
    generator.gate.set()
    rest = [item async for item in stream]
    assert rest[-1]["object"] == "diagnostic.summary"
    assert sorted(seen + [item["index"] for item in rest[:-1]]) == list(range(21))


async def test_leaving_a_stream_cancels_its_generation() -> None:
    generator = GatedGenerator()
    stream = service(generator).diagnose(diagnostics(["gated"]))
    task = asyncio.ensure_future(anext(stream))
    await generator.waiting.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.wait_for(generator.cancelled.wait(), 5)


async def test_bad_prompts_fail_alone_with_a_code() -> None:
    prompts = ["Why?", " ", LONG, f"Why? {FAIL_GENERATION}", "How?"]
    result = await service().diagnose_list(diagnostics(prompts))
    statuses = [item["status"] for item in result["data"]]
    assert statuses == ["ok", "failed", "failed", "failed", "ok"]
    codes = [item["error"] and item["error"]["code"] for item in result["data"]]
    assert codes == [
        None, "empty_prompt", "context_length_exceeded", "generation_failed", None
    ]  # fmt: skip
    params = [item["error"] and item["error"]["param"] for item in result["data"]]
    assert params == [None, "prompts.1", "prompts.2", "prompts.3", None]
    assert result["aggregate"]["num_failed"] == 3


@pytest.mark.parametrize(
    ("prompts", "param", "code"),
    [
        ([" "], "prompts.0", "empty_prompt"),
        ([" ", ""], "prompts.0", "empty_prompt"),
        ([LONG], "prompts.0", "context_length_exceeded"),
        ([LONG, ""], "prompts.0", "context_length_exceeded"),
    ],
)
async def test_a_request_without_a_usable_prompt_is_invalid(
    prompts: list[str], param: str, code: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await service().diagnose_list(diagnostics(prompts))
    assert (caught.value.param, caught.value.code) == (param, code)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (GenerationError("gone"), GenerationError),
        (OverloadedError("full", 2.0), OverloadedError),
    ],
)
async def test_a_request_whose_engine_is_gone_says_so(
    error: Exception, expected: type[Exception]
) -> None:
    broken = service(BrokenGenerator(error))
    with pytest.raises(expected):
        await broken.diagnose_list(diagnostics(["Why?"]))
    (item, _) = [item async for item in broken.diagnose(diagnostics(["Why?"]))]
    assert item["status"] == "failed"
    assert item["error"]["type"] == "server_error"
    assert item["error"]["param"] is None


@pytest.mark.parametrize("prompts", [["lost", "gone"], ["gone", "lost"]])
async def test_a_request_with_any_prompt_that_an_engine_ended_under_is_lost(
    prompts: list[str],
) -> None:
    class Half(FakeGenerator):
        async def generate(
            self, requests: Sequence[GenerationRequest]
        ) -> list[Generation | Failure]:
            text = requests[0].prompt[-1].content
            raise GenerationError(text, lost=text == "lost")

    each = MoraService(
        Half(),
        FakeScorer(settings().dimensions),
        fake_calibrator(settings().dimensions),
        settings(),
        lists=ListCalls(max_items=1, window_s=0.0),
    )
    with pytest.raises(GenerationError) as caught:
        await each.diagnose_list(diagnostics(prompts))
    assert caught.value.lost


async def test_a_lost_scorer_is_a_scoring_error() -> None:
    broken = service(scorer=BrokenScorer())
    with pytest.raises(ScoringError):
        await broken.diagnose_list(diagnostics(["Why?"]))
    with pytest.raises(ScoringError):
        await broken.score_list(scores([{"prompt": "a", "response": "b"}]))


async def test_failed_scores_make_the_class_unknown_and_are_never_numbers() -> None:
    result = await service().diagnose_list(diagnostics([f"Why? {FAIL_SCORING}", "How?"]))
    failed = result["data"][0]
    assert failed["status"] == "ok"
    assert failed["class"] == "unknown"
    assert failed["num_rollouts"] == 8
    for dimension in failed["dimensions"].values():
        assert dimension["n_valid"] == 0
        assert dimension["mean"] is dimension["reach"] is dimension["ceiling"] is None
    for rollout in failed["rollouts"]:
        assert {score["status"] for score in rollout["scores"].values()} == {"failed"}
        assert {score["value"] for score in rollout["scores"].values()} == {None}


async def test_rollouts_of_two_policy_versions_are_never_mixed() -> None:
    generator = SwappingGenerator(changes=1)
    result = await service(generator).diagnose_list(diagnostics(QUESTIONS[:6], n=4, n_max=12))
    assert result["usage"]["discarded_rollouts"] > 0
    for item in result["data"]:
        assert item["policy_version"] in ("v0", "v1")
        assert item["num_rollouts"] <= 12
    assert any(item["policy_version"] == "v1" for item in result["data"])


async def test_a_policy_that_never_stands_still_fails_the_prompt_as_retryable() -> None:
    busy = service(SwappingGenerator(changes=1000))
    prompts = QUESTIONS[:12]
    items = [item async for item in busy.diagnose(diagnostics(prompts, n=4, n_max=24))][:-1]
    failed = [item for item in items if item["status"] == "failed"]
    assert all(item["error"]["code"] == "policy_version_changed" for item in failed)
    assert failed


async def test_the_model_asked_for_is_sampled_and_an_unknown_one_is_not_found() -> None:
    mora = service(FakeGenerator(["new", "old"]))
    result = await mora.diagnose_list(diagnostics(["Why?"], model="old"))
    assert result["data"][0]["policy_version"] == "old"
    with pytest.raises(NotFoundError) as caught:
        await mora.diagnose_list(diagnostics(["Why?"], model="none"))
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


async def test_dimensions_are_checked_and_kept_in_the_configured_order() -> None:
    mora = service()
    result = await mora.diagnose_list(diagnostics(["Why?"], dimensions=["truthful", "helpful"]))
    assert list(result["data"][0]["dimensions"]) == ["helpful", "truthful"]
    for names, code in ((["kind"], "unknown_dimension"), (["helpful"] * 2, "invalid_value")):
        with pytest.raises(InvalidRequestError) as caught:
            await mora.validate(diagnostics(["Why?"], dimensions=names))
        assert caught.value.code == code


async def test_limits_of_the_server_and_the_context_are_named() -> None:
    mora = service(server={"max_prompts": 2, "max_rows": 1})
    for request, param in (
        (diagnostics(["a", "b", "c"]), "prompts"),
        (diagnostics(["a"], max_tokens=1024), "max_tokens"),
        (scores([{"prompt": "a", "response": "b"}] * 2), "rows"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            await mora.validate(request)
        assert caught.value.param == param


async def test_nothing_counts_dimensions_to_three() -> None:
    names = ["polite", "brief", "kind", "clear", "fair"]
    scorers = [{"name": "one", "backend": "fake", "dimensions": names}]
    mora = service(dimensions=names, scorers=scorers)
    result = await mora.diagnose_list(diagnostics(QUESTIONS[:4]))
    assert all(list(item["dimensions"]) == names for item in result["data"])
    assert result["data"][0]["hypervolume"] is None


async def test_given_responses_are_diagnosed_without_sampling() -> None:
    generator = FakeGenerator()
    answers = [f"answer {i}" for i in range(8)]
    request = parse_body(DIAGNOSTICS_URL, {"prompts": ["Why?"], "responses": [answers]})
    assert isinstance(request, DiagnosticsRequest)
    result = await service(generator).diagnose_list(request)
    item = result["data"][0]
    assert generator.num_requests == 0
    assert [rollout["text"] for rollout in item["rollouts"]] == answers
    assert item["policy_version"] is item["share_cut"] is result["aggregate"]["share_cut"] is None
    assert item["rollouts"][0]["finish_reason"] is None
    assert result["aggregate"]["share_saved"] is None


async def test_rollouts_are_left_out_on_request() -> None:
    mora = service()
    request = diagnostics(["Why?"], include_rollouts=False)
    assert (await mora.diagnose_list(request))["data"][0]["rollouts"] is None
    default = diagnostics(["Why?"])
    hidden = await mora.diagnose_list(default, include_rollouts=False)
    assert hidden["data"][0]["rollouts"] is None


async def test_the_system_prompt_opens_what_is_sampled() -> None:
    seen = []

    def look(request: GenerationRequest) -> None:
        seen.append(request.prompt)

    mora = service(FakeGenerator(fail=look), policy={"system_prompt": "Be brief."})
    await mora.diagnose_list(diagnostics(["Why?"], n_max=8))
    assert [message.role for message in seen[0]] == ["system", "user"]


async def test_scores_come_back_per_row_with_values() -> None:
    rows = [{"prompt": f"p{i % 3}", "response": f"r{i}"} for i in range(10)]
    scorer = FakeScorer()
    result = await service(scorer=scorer).score_list(scores(rows))
    assert [row["index"] for row in result["data"]] == list(range(10))
    assert scorer.num_groups == 3
    alone = await service().score_list(scores(rows[4:5]))
    assert alone["data"][0]["scores"] == result["data"][4]["scores"]
    assert all(score["value"] is not None for score in result["data"][4]["scores"].values())


async def test_a_score_row_with_an_empty_prompt_fails_alone() -> None:
    good, bad = {"prompt": "a", "response": "b"}, {"prompt": "", "response": "b"}
    result = await service().score_list(scores([good, bad]))
    assert {score["status"] for score in result["data"][0]["scores"].values()} == {"ok"}
    for score in result["data"][1]["scores"].values():
        assert score["status"] == "failed"
        assert score["value"] is None
        assert "rows.1.prompt" in score["reason"]
    with pytest.raises(InvalidRequestError) as caught:
        await service().score_list(scores([bad]))
    assert caught.value.param == "rows.0.prompt"


async def test_a_calibrator_of_other_scorers_is_refused_at_start() -> None:
    await service().start()
    with pytest.raises(CalibrationError):
        await service(scorer=FakeScorer(("helpful", "other"))).start()


async def test_a_batch_row_hides_rollouts_and_names_usage_as_batches_do() -> None:
    result = await service().run_row(diagnostics(["Why?", "How?"]))
    assert result.body["data"][0]["rollouts"] is None
    assert set(result.usage) == {"input_tokens", "output_tokens", "total_tokens", "rollouts"}
    assert sum(result.classes.values()) == 2
    assert result.pairs == ()
    scored = await service().run_row(scores([{"prompt": "a", "response": "b"}]))
    assert scored.body["object"] == "list"


async def test_a_batch_row_with_a_retryable_fault_is_tried_again_as_a_whole() -> None:
    def flaky(request: GenerationRequest) -> Failure | None:
        broken = "number 1?" in request.prompt[-1].content
        return Failure("generation_failed", "gone", True) if broken else None

    with pytest.raises(GenerationError):
        await service(FakeGenerator(fail=flaky)).run_row(diagnostics(QUESTIONS[:3]))
    result = await service().run_row(diagnostics(["Why?", ""]))
    assert [item["status"] for item in result.body["data"]] == ["ok", "failed"]


@pytest.mark.parametrize(
    ("fields", "param", "start"),
    [
        ({"prompts": [" "]}, "body.prompts.0", "body.prompts.0 must not be empty"),
        ({"prompts": [LONG]}, "body.prompts.0", "body.prompts.0: prompt must leave room"),
        ({"prompts": ["a"], "model": "nope"}, "body.model", "body.model must be one of"),
        ({"prompts": ["a"], "dimensions": ["kind"]}, "body.dimensions.0",
         "body.dimensions.0 must be one of"),
        ({"prompts": ["a"], "max_tokens": 10**6}, "body.max_tokens", "body.max_tokens must be"),
    ],
)  # fmt: skip
async def test_faults_of_a_batch_row_are_named_from_its_body_on(
    fields: dict[str, Any], param: str, start: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await service().run_row(diagnostics(**fields))
    assert caught.value.param == param
    assert caught.value.message.startswith(start)
