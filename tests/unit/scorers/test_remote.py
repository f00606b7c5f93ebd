"""The remote scorer against a real HTTP server in this process. No wait between tries is real."""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from actors.scoring.remote.retries import RESERVE, RetryBudget, delay_s
from actors.scoring.remote.scorer import RemoteScorer
from mora_serve.errors import ConfigError, ScoringError
from mora_serve.scorer_settings import ScorerSettings
from mora_serve.types import Message, Score, ScoreGroup
from tests.contract.scorer_contract import SCORER_CHECKS, ScorerCheck
from tests.model_fixtures import byte_tokenizer
from tests.scoring_server import (
    Misbehaviour,
    ScoringServer,
    broken_json,
    hang_up,
    reward_of,
    silence,
    status,
)

TEMPLATE = "Q: {prompt} A: {response} [end]"
SECRET = "xyzzy-secret"
MAX_TOKENS = 192
Opened = Callable[..., Any]


class Clock:
    """Stands in for ``asyncio.sleep``: remembers, and does not wait."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)


def settings(url: str, protocol: str = "classify", **fields: Any) -> ScorerSettings:
    remote = {"url": f"{url}/{protocol}", "protocol": protocol, **fields.pop("remote", {})}
    if "columns" not in fields:
        fields.setdefault("sign", 1)
    fields.setdefault("template", TEMPLATE)
    fields.setdefault("dimensions", ("helpful",))
    section = {"name": "rm", "backend": "remote", "remote": remote, **fields}
    return ScorerSettings.model_validate(section)


@asynccontextmanager
async def scoring(
    server: ScoringServer, protocol: str = "classify", /, **fields: Any
) -> AsyncIterator[tuple[RemoteScorer, Clock]]:
    """A started scorer of a running server, and the clock it waits by."""
    clock = Clock()
    async with server.running() as url:
        made = settings(url, protocol, **fields)
        scorer = RemoteScorer(made, sleep=clock, rng=random.Random(0))
        await scorer.start()
        server.bodies.clear()
        try:
            yield scorer, clock
        finally:
            await scorer.close()


def group(*responses: str, prompt: str = "Hi") -> ScoreGroup:
    return ScoreGroup((Message("user", prompt),), responses)


def expected(response: str, prompt: str = "Hi") -> float:
    return reward_of(f"Q: {prompt} A: {response} [end]")


async def scored(scorer: RemoteScorer, *responses: str) -> list[Score]:
    (rows,) = await scorer.score([group(*responses)])
    return [row["helpful"] for row in rows]


# --- what is sent, and how answers are read -------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("protocol", ["classify", "pooling"])
@pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
async def test_a_remote_scorer_keeps_the_contract(
    check: ScorerCheck, protocol: str, tokenizer_dir: Path
) -> None:
    fields = {"model": str(tokenizer_dir), "template": None, "max_tokens": MAX_TOKENS}
    async with scoring(ScoringServer(), protocol, **fields) as (scorer, _):
        await check(scorer, max_tokens=MAX_TOKENS, tolerance=0.0)


async def test_a_prompt_that_does_not_fit_loses_its_left_end(tokenizer_dir: Path) -> None:
    prompt = "".join(chr(ord("a") + place % 26) for place in range(150))

    async def sent(max_tokens: int) -> list[int]:
        server = ScoringServer()
        fields = {"model": str(tokenizer_dir), "template": None, "max_tokens": max_tokens}
        async with scoring(server, **fields) as (scorer, _):
            await scorer.score([group("Yes.", prompt=prompt)])
        (tokens,) = server.bodies[-1]["input"]
        return list(tokens)

    whole, cut = await sent(400), await sent(100)
    assert len(cut) <= 100 < len(whole)
    assert cut[:1] == whole[:1], "the token that starts every text stays"
    assert cut[1:] == whole[-len(cut) + 1 :]


async def test_get_reward_sends_what_openrlhf_sends() -> None:
    server = ScoringServer()
    async with scoring(server, "get_reward", sign=-1) as (scorer, _):
        assert [score.raw for score in await scored(scorer, "Yes.", "No.")] == [
            -expected("Yes."),
            -expected("No."),
        ]
    (body,) = server.bodies
    assert body == {
        "query": ["Q: Hi A: Yes. [end]", "Q: Hi A: No. [end]"],
        "prompts": ["Q: Hi A: ", "Q: Hi A: "],
        "labels": ["", ""],
    }


async def test_get_reward_reads_dimensions_out_of_extra_logs() -> None:
    columns = {"helpful": {"label": "rewards"}, "short": {"label": "length", "sign": -1}}
    fields = {"columns": columns, "dimensions": ("helpful", "short")}
    async with scoring(ScoringServer(), "get_reward", **fields) as (scorer, _):
        ((row,),) = await scorer.score([group("Yes.")])
    assert row["helpful"].raw == expected("Yes.")
    assert row["short"].raw == -float(len("Q: Hi A: Yes. [end]"))


async def test_vllm_is_asked_for_raw_logits() -> None:
    server = ScoringServer()
    async with scoring(server, "classify", remote={"model": "rm"}) as (scorer, _):
        assert (await scored(scorer, "Yes."))[0].raw == expected("Yes.")
    assert server.bodies == [
        {"model": "rm", "use_activation": False, "input": ["Q: Hi A: Yes. [end]"]}
    ]
    server = ScoringServer()
    async with scoring(server, "pooling") as (scorer, _):
        assert (await scored(scorer, "Yes."))[0].raw == expected("Yes.")
    assert server.bodies[0]["task"] == "classify"
    assert server.bodies[0]["use_activation"] is False


async def test_one_of_several_labels_is_read_as_log_odds() -> None:
    columns = {"helpful": {"label": 0, "read": "log_odds", "sign": -1}}
    async with scoring(ScoringServer(num_labels=3), columns=columns) as (scorer, _):
        (score,) = await scored(scorer, "Yes.")
    others = math.log(math.exp(1.0) + math.exp(2.0))
    assert score.raw == pytest.approx(-(expected("Yes.") - others))


async def test_without_a_template_the_server_writes_the_messages() -> None:
    server = ScoringServer()
    async with scoring(server, template=None) as (scorer, _):
        prompt = (Message("system", "Be brief."), Message("user", "Hi"))
        ((one, two),) = await scorer.score([ScoreGroup(prompt, (" Yes. ", "No!!"))])
    assert (one["helpful"].raw, two["helpful"].raw) == (0.07, 0.07)
    assert [body["messages"] for body in server.bodies] == [
        [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        for text in ("Yes.", "No!!")
    ]


async def test_rows_of_all_groups_share_requests_of_bounded_size() -> None:
    server = ScoringServer()
    async with scoring(server, remote={"rows_per_request": 4}) as (scorer, _):
        await scorer.score([group("a", "b", "c"), group("d", " ", "e"), group("f")])
    assert sorted(len(body["input"]) for body in server.bodies) == [2, 4]
    assert scorer.stats.texts == 6


# --- rows at fault --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "message", "found"),
    [
        (400, "The decoder prompt is longer than the maximum model length of 8.", "truncated"),
        (413, "payload", "truncated"),
        (400, "The prompt holds a forbidden token", "failed"),
        (422, "unprocessable", "failed"),
        (500, "NaN is not JSON compliant", "failed"),
    ],
)
async def test_a_row_at_fault_costs_its_neighbours_nothing(
    code: int, message: str, found: str
) -> None:
    server = ScoringServer()
    server.refused["BAD"] = (code, message)
    texts = [f"answer {number}" for number in range(30)]
    texts[17] = f"BAD {SECRET}"
    async with scoring(server) as (scorer, _):
        scores = await scored(scorer, *texts)
        await scorer.check_health()
    assert [score.status for score in scores] == ["ok"] * 17 + [found] + ["ok"] * 12
    assert all(
        score.raw == expected(text) for score, text in zip(scores, texts, strict=True) if score.raw
    )
    assert scores[17].raw is None
    assert scores[17].reason
    assert SECRET not in scores[17].reason
    assert len(server.bodies) < 20


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (math.nan, "no finite number"),
        (math.inf, "no finite number"),
        (None, "not a number"),
        ("0.5", "not a number"),
        (True, "not a number"),
        (10**400, "too large"),
        ([], "no numbers"),
        ([1.0, 2.0], "2 numbers"),
    ],
)
async def test_a_value_that_is_no_reward_is_a_failed_score_with_its_reason(
    value: Any, reason: str
) -> None:
    def spoil(answer: dict[str, Any]) -> dict[str, Any]:
        answer["data"][-1]["probs"] = value if isinstance(value, list) else [value]
        return answer

    server = ScoringServer()
    async with scoring(server) as (scorer, _):
        server.rewrite = spoil
        good, bad = await scored(scorer, "Yes.", "No.")
    assert (good.status, good.raw) == ("ok", expected("Yes."))
    assert (bad.status, bad.raw) == ("failed", None)
    assert reason in str(bad.reason)


@pytest.mark.parametrize(
    ("protocol", "rewrite", "reason"),
    [
        ("classify", lambda answer: {**answer, "data": answer["data"][:1]}, "for 2 rows"),
        ("classify", lambda answer: {"model": "rm"}, "no field data"),
        ("pooling", lambda answer: {**answer, "data": [{}, {}]}, "without its row's index"),
        ("get_reward", lambda answer: {"rewards": answer["rewards"][:1]}, "for 2 rows"),
        ("get_reward", lambda answer: [], "no field rewards"),
    ],
)
async def test_an_answer_whose_rows_cannot_be_told_apart_scores_none_of_them(
    protocol: str, rewrite: Callable[[Any], Any], reason: str
) -> None:
    server = ScoringServer()
    async with scoring(server, protocol) as (scorer, _):
        server.rewrite = lambda answer: rewrite(answer) if server.num_rows == 2 else answer
        scores = await scored(scorer, "Yes.", "No.")
    assert [score.status for score in scores] == ["failed", "failed"]
    assert all(score.raw is None and reason in str(score.reason) for score in scores)


async def test_values_out_of_order_find_their_rows() -> None:
    server = ScoringServer()
    server.rewrite = lambda answer: {**answer, "data": answer["data"][::-1]}
    async with scoring(server) as (scorer, _):
        scores = await scored(scorer, "Yes.", "Certainly not.")
    assert [score.raw for score in scores] == [expected("Yes."), expected("Certainly not.")]


async def test_a_row_that_gets_no_answer_in_time_says_so_and_its_neighbours_score() -> None:
    server = ScoringServer()
    remote = {"rows_per_request": 1, "timeout_s": 0.2, "max_tries": 1}
    async with scoring(server, remote=remote) as (scorer, _):
        server.script.append(silence)
        scores = await scored(scorer, "Yes.", "No.")
    late = [score for score in scores if score.status == "timeout"]
    assert [(score.raw, score.reason) for score in late] == [(None, "no answer within 0.2 s")]
    assert [score.status for score in scores].count("ok") == 1


# --- trying again ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault", [status(503), status(429), status(502), status(500), broken_json, hang_up]
)
async def test_a_passing_fault_is_tried_again_after_growing_waits(fault: Misbehaviour) -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, clock):
        server.script.extend([fault, fault])
        (score,) = await scored(scorer, "Yes.")
    assert score.raw == expected("Yes.")
    assert len(server.bodies) == 3
    first, second = clock.slept
    assert 0 < first < second


async def test_the_wait_that_a_server_asks_for_is_kept() -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, clock):
        server.script.append(status(503, **{"Retry-After": "7"}))
        assert (await scored(scorer, "Yes."))[0].status == "ok"
        assert clock.slept == [7.0]
        server.script.append(status(503, **{"Retry-After": "3600"}))
        with pytest.raises(ScoringError):
            await scored(scorer, "Yes.")
    assert len(clock.slept) == 1


async def test_an_outage_is_an_error_and_gets_no_multiple_of_the_load() -> None:
    server = ScoringServer()
    num_calls = 200
    async with scoring(server, remote={"retry_budget": 0.1, "max_tries": 5}) as (scorer, _):
        server.always = status(503)
        for _ in range(num_calls):
            with pytest.raises(ScoringError):
                await scored(scorer, "Yes.")
        with pytest.raises(ScoringError):
            await scorer.check_health()
    assert num_calls < len(server.bodies) <= num_calls * 1.1 + RESERVE + 1


async def test_a_server_that_fails_on_everything_is_an_error_not_a_list_of_failures() -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, _):
        server.always = status(500)
        with pytest.raises(ScoringError):
            await scored(scorer, *map(str, range(8)))


async def test_looking_for_a_row_at_fault_stays_within_the_budget() -> None:
    server = ScoringServer()
    async with scoring(server, remote={"retry_budget": 0.0}) as (scorer, _):
        server.refused["BAD"] = (500, "failed")
        scores = await scored(scorer, "BAD", "Yes.", "No.")
    assert [score.status for score in scores] == ["failed"] * 3
    assert len(server.bodies) == 2


@pytest.mark.parametrize("code", [307, 401, 403, 404, 405])
async def test_what_is_no_scoring_endpoint_is_an_error_at_once(code: int) -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, clock):
        server.always = status(code, Location="/classify")
        with pytest.raises(ScoringError, match=f"status {code}"):
            await scored(scorer, "Yes.")
        assert len(server.bodies) == 1
    assert clock.slept == []


def test_without_a_budget_nothing_is_tried_again() -> None:
    budget = RetryBudget(0.0)
    budget.earn()
    assert not budget.spend()


def test_a_budget_allows_its_share_of_retries_and_saves_up_no_more_than_its_reserve() -> None:
    budget = RetryBudget(0.5)
    for _ in range(1000):
        budget.earn()
    assert sum(budget.spend() for _ in range(1000)) == RESERVE
    allowed = 0
    for _ in range(100):
        budget.earn()
        allowed += budget.spend()
    assert allowed == 50


def test_waits_grow_vary_and_end_at_a_bound() -> None:
    rng = random.Random(0)
    first = [delay_s(1, None, rng) for _ in range(100)]
    assert 0.125 <= min(first) < max(first) <= 0.25
    assert max(delay_s(50, None, rng) for _ in range(100)) <= 8.0
    assert delay_s(1, 5.0, rng) == 5.0


# --- load -----------------------------------------------------------------------------------------


async def test_requests_at_a_time_are_bounded() -> None:
    server = ScoringServer()
    remote = {"rows_per_request": 1, "max_in_flight": 3}
    async with scoring(server, remote=remote) as (scorer, _):
        scores = await scored(scorer, *map(str, range(40)))
    assert all(score.status == "ok" for score in scores)
    assert server.most_inside <= 3


async def test_cancelling_a_call_cancels_its_requests() -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, _):
        server.arrived.clear()
        server.always = silence
        call = asyncio.create_task(scored(scorer, "Yes."))
        await server.arrived.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        async with asyncio.timeout(2):
            await server.cancelled.wait()


async def test_health_is_asked_for_while_all_slots_are_taken() -> None:
    server = ScoringServer()
    async with scoring(server, remote={"max_in_flight": 1}) as (scorer, _):
        server.arrived.clear()
        server.script.append(silence)
        call = asyncio.create_task(scored(scorer, "Yes."))
        await server.arrived.wait()
        async with asyncio.timeout(5):
            await scorer.check_health()
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)


# --- the server and its model ---------------------------------------------------------------------


async def test_another_model_name_in_an_answer_is_an_error_from_then_on() -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, _):
        server.model = "rm-2"
        for _ in range(2):
            with pytest.raises(ScoringError, match="has changed"):
                await scored(scorer, "Yes.")
        with pytest.raises(ScoringError, match="has changed"):
            await scorer.check_health()


async def test_other_weights_under_the_same_name_are_noticed_by_the_health_check() -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, _):
        await scorer.check_health()
        server.offset = 1.0
        with pytest.raises(ScoringError, match="has changed"):
            await scorer.check_health()
        with pytest.raises(ScoringError, match="has changed"):
            await scored(scorer, "Yes.")


async def test_scores_that_vary_are_healthy_without_the_parity_gate() -> None:
    server = ScoringServer()
    async with scoring(server, parity=False) as (scorer, _):
        server.offset = 1.0
        await scorer.check_health()


async def test_the_revision_names_the_remote_model_and_how_it_is_asked() -> None:
    async def revision(model: str, **fields: Any) -> str:
        server = ScoringServer()
        server.model = model
        async with scoring(server, **fields) as (scorer, _):
            return (await scorer.dimensions())["helpful"][1]

    first = await revision("rm")
    assert await revision("rm") == first
    others = [
        await revision("rm-2"),
        await revision("rm", sign=-1),
        await revision("rm", template="response_only"),
        await revision("rm", revision="2024-05"),
    ]
    assert len({first, *others}) == 5


async def test_a_server_that_ignores_use_activation_is_refused() -> None:
    server = ScoringServer()
    server.knows_activation = False
    with pytest.raises(ConfigError, match="raw logits"):
        async with scoring(server):
            pass


async def test_raw_logits_between_0_and_1_are_accepted() -> None:
    server = ScoringServer()
    async with scoring(server) as (scorer, _):
        assert 0 < expected("Yes.") < 1
        assert (await scored(scorer, "Yes."))[0].raw == expected("Yes.")


async def test_several_outputs_need_columns() -> None:
    with pytest.raises(ConfigError, match=r"scorers\.rm\.columns"):
        async with scoring(ScoringServer(num_labels=2)):
            pass


async def test_a_limit_above_the_servers_is_refused(tokenizer_dir: Path) -> None:
    server = ScoringServer()
    server.max_model_len = 100
    with pytest.raises(ConfigError, match=r"max_tokens must be at most 100"):
        async with scoring(server, model=str(tokenizer_dir), template=None, max_tokens=128):
            pass


async def test_a_server_that_is_not_there_cannot_be_started_with() -> None:
    scorer = RemoteScorer(settings("http://127.0.0.1:9", remote={"max_tries": 1}))
    with pytest.raises(ScoringError, match="cannot be reached"):
        await scorer.start()
    with pytest.raises(ScoringError, match="must be started"):
        await scorer.score([group("Yes.")])


async def test_the_key_is_sent_and_nothing_that_was_written_is_ever_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.DEBUG)
    server = ScoringServer()
    remote = {"api_key": "key-0815", "max_tries": 2, "timeout_s": 0.2}
    told: list[str] = []
    async with scoring(server, remote=remote) as (scorer, _):
        for fault in (status(400), status(500), status(503), status(404), broken_json, silence):
            server.always = fault
            try:
                told += [str(score.reason) for score in await scored(scorer, f"A {SECRET}", "B")]
            except ScoringError as error:
                told.append(f"{error!r} {error.__cause__!r}")
    assert server.headers[-1]["Authorization"] == "Bearer key-0815"
    assert len(told) >= 6
    assert not any(word in text for word in (SECRET, "key-0815") for text in (*told, caplog.text))


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"sign": None}, "either sign or columns"),
        ({"sign": 1, "columns": {"helpful": {}}}, "either sign or columns"),
        ({"dimensions": ("helpful", "harmless")}, "columns must be given"),
        ({"dimensions": ("helpful", "b"), "columns": {"helpful": {}}}, "name a column for 'b'"),
    ],
)
def test_settings_that_leave_the_reward_open_are_refused(fields: dict[str, Any], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        settings("http://rm", **fields)


def test_a_url_without_a_scheme_is_refused() -> None:
    with pytest.raises(ValidationError, match="url"):
        settings("rm:8000")


def test_outputs_of_get_reward_are_no_logits_of_one_choice() -> None:
    columns = {"helpful": {"label": "rewards", "read": "log_odds"}}
    with pytest.raises(ValidationError, match="must be logit"):
        settings("http://rm", "get_reward", columns=columns)


@pytest.mark.parametrize(
    ("protocol", "template"),
    [("get_reward", None), ("get_reward", "chat"), ("classify", "pku"), ("pooling", "pair")],
)
async def test_a_template_that_needs_a_tokenizer_asks_for_one(
    protocol: str, template: str | None
) -> None:
    with pytest.raises(ConfigError, match=r"scorers\.rm\.model must name"):
        async with scoring(ScoringServer(), protocol, template=template):
            pass
