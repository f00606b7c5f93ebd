"""Batching of concurrent calls, time limits and isolation of failures in the scorer replica."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import pytest
from prometheus_client import CollectorRegistry

from actors.generator import EXIT_DEAD_ENGINE
from actors.metrics import ScorerMetrics
from actors.scorer import HANG_FACTOR, MAX_BATCHES, GroupScores, ScorerReplica, estimated_tokens
from mora_serve.errors import InvalidRequestError, ScoringError
from mora_serve.fakes import FakeScorer
from mora_serve.types import Dimension, Message, ScoreGroup
from tests.contract.scorer_contract import SCORER_CHECKS, ScorerCheck


class Held:
    """A fake that records its batches and scores them when ``release`` is set."""

    def __init__(self) -> None:
        self.fake = FakeScorer()
        self.batches: list[list[ScoreGroup]] = []
        self.cancelled = 0
        self.release = asyncio.Event()

    async def dimensions(self) -> Mapping[Dimension, tuple[str, str]]:
        return await self.fake.dimensions()

    async def score(
        self, groups: Sequence[ScoreGroup], dimensions: Sequence[Dimension] | None = None
    ) -> list[GroupScores]:
        self.batches.append(list(groups))
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if any(group.responses == ("poison",) for group in groups):
            raise ValueError("a tensor is broken")
        return await self.fake.score(groups, dimensions)


def group(text: str = "Hi", *responses: str) -> ScoreGroup:
    return ScoreGroup((Message("user", text),), responses or ("yes", "no"))


async def started(
    scorer: Held | FakeScorer, *, timeout_s: float = 60.0, token_budget: int = 1000
) -> ScorerReplica:
    replica = ScorerReplica(scorer, timeout_s=timeout_s, token_budget=token_budget)
    await replica.start()
    return replica


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
async def test_a_replica_keeps_the_contract(check: ScorerCheck) -> None:
    await check(await started(FakeScorer(max_tokens=64)), max_tokens=64, tolerance=0.0)


async def test_calls_that_come_while_it_works_share_a_batch() -> None:
    scorer = Held()
    replica = await started(scorer)
    calls = [asyncio.create_task(replica.score([group(str(i))])) for i in range(10)]
    await settle()
    scorer.release.set()
    results = await asyncio.gather(*calls)
    assert [len(batch) for batch in scorer.batches] == [1] * MAX_BATCHES + [10 - MAX_BATCHES]
    assert results == [await FakeScorer().score([group(str(i))]) for i in range(10)]


async def test_a_batch_stays_within_the_token_budget() -> None:
    scorer = Held()
    scorer.release.set()
    budget = 3 * estimated_tokens(group("x" * 400))
    replica = await started(scorer, token_budget=budget)
    await replica.score([group("x" * 400) for _ in range(7)])
    assert [len(batch) for batch in scorer.batches] == [3, 3, 1]


async def test_a_group_over_the_budget_is_scored_alone() -> None:
    scorer = Held()
    scorer.release.set()
    replica = await started(scorer, token_budget=1)
    assert len(await replica.score([group("long " * 100), group()])) == 2
    assert [len(batch) for batch in scorer.batches] == [1, 1]


async def test_calls_for_other_dimensions_do_not_share_a_batch() -> None:
    scorer = Held()
    scorer.release.set()
    replica = await started(scorer)
    one, other = await asyncio.gather(
        replica.score([group()], ["helpful"]), replica.score([group()], ["truthful"])
    )
    assert set(one[0][0]) == {"helpful"}
    assert set(other[0][0]) == {"truthful"}


async def test_a_call_out_of_time_scores_timeout_with_model_and_reason() -> None:
    replica = await started(Held(), timeout_s=0.01)
    ((score_yes, score_no),) = await replica.score([group()], ["helpful"])
    assert score_yes["helpful"].status == score_no["helpful"].status == "timeout"
    assert score_yes["helpful"].raw is None
    assert "0.01 s" in (score_yes["helpful"].reason or "")
    assert score_yes["helpful"].model == "fake-helpful"


async def test_a_failing_group_fails_its_own_caller_only() -> None:
    scorer = Held()
    replica = await started(scorer)
    calls = [asyncio.create_task(replica.score([group(str(i))])) for i in range(5)]
    bad = asyncio.create_task(replica.score([group("bad", "poison")]))
    await settle()
    scorer.release.set()
    results = await asyncio.gather(*calls)
    assert len(results) == 5
    with pytest.raises(ValueError, match="broken"):
        await bad


async def test_a_replica_ends_with_its_engine_and_tells_every_caller_that_it_was_lost() -> None:
    def dead(*_: object) -> None:
        raise ScoringError("the engine died", lost=True)

    codes: list[int] = []
    fake = FakeScorer(status=dead)
    replica = ScorerReplica(fake, timeout_s=60.0, token_budget=1000, exit_process=codes.append)
    await replica.start()
    results = await asyncio.gather(
        *(replica.score([group(text)]) for text in "abc"), return_exceptions=True
    )
    assert codes
    assert set(codes) == {EXIT_DEAD_ENGINE}
    assert all(isinstance(error, ScoringError) and error.lost for error in results)


async def test_a_cancelled_call_stops_its_batch() -> None:
    scorer = Held()
    replica = await started(scorer)
    call = asyncio.create_task(replica.score([group()]))
    await settle()
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    await settle()
    assert scorer.cancelled == 1
    scorer.release.set()
    assert await replica.score([group()])


async def test_a_batch_that_others_wait_for_goes_on_when_one_leaves() -> None:
    scorer = Held()
    replica = await started(scorer)
    held = [asyncio.create_task(replica.score([group(str(i))])) for i in range(MAX_BATCHES)]
    leaving, staying = (asyncio.create_task(replica.score([group(t)])) for t in "ab")
    await settle()
    leaving.cancel()
    scorer.release.set()
    assert await staying == await FakeScorer().score([group("b")])
    await asyncio.gather(*held)


async def test_a_scorer_that_hangs_is_unhealthy() -> None:
    now = 0.0
    replica = ScorerReplica(Held(), timeout_s=0.01, token_budget=99, clock=lambda: now)
    await replica.start()
    await replica.score([group()])
    await replica.check_health()
    now = HANG_FACTOR * 0.01 + 0.001
    with pytest.raises(ScoringError):
        await replica.check_health()


async def test_an_unknown_dimension_is_refused() -> None:
    replica = await started(FakeScorer())
    with pytest.raises(InvalidRequestError):
        await replica.score([group()], ["brief"])


async def test_scores_are_counted_by_dimension_and_status() -> None:
    registry = CollectorRegistry()
    replica = ScorerReplica(
        FakeScorer(), timeout_s=9, token_budget=99, metrics=ScorerMetrics(registry)
    )
    await replica.start()
    await replica.score([group()], ["helpful"])
    labels = {"dimension": "helpful", "status": "ok"}
    assert registry.get_sample_value("mora_scorer_scores_total", labels) == 2
    assert registry.get_sample_value("mora_scorer_batch_groups_sum") == 1
