"""Pair source: partition between ranks, resume, waiting, stages, unequal ends."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mora_serve.errors import StorageError
from trainer.source import (
    MAX_WAIT_S,
    ListFeed,
    PairSource,
    Position,
    ResumableRows,
    Row,
    margins,
)


def pair(seq: int, stage: str | None = None) -> dict[str, Any]:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": f"{text} {seq}"}]

    return {
        "seq": seq,
        "prompt": turn("user", "question"),
        "chosen": turn("assistant", "good"),
        "rejected": turn("assistant", "bad"),
        "stage": stage,
    }


class GrowingFeed:
    """Rows appear as an injected clock passes; the clock moves only when somebody waits."""

    def __init__(self, appears_at: Sequence[float], finishes_at: float) -> None:
        self.appears_at = appears_at
        self.finishes_at = finishes_at
        self.now = 0.0
        self.pauses: list[float] = []

    def read(self, after: int, limit: int) -> Sequence[Row]:
        there = [seq for seq, at in enumerate(self.appears_at) if at <= self.now]
        return [pair(seq) for seq in there if seq > after][:limit]

    def is_finished(self) -> bool:
        return self.now >= self.finishes_at

    def clock(self) -> float:
        return self.now

    def wait(self, pause_s: float) -> None:
        self.pauses.append(pause_s)
        self.now += pause_s


def seqs(source: PairSource, start: Position | None = None) -> list[int]:
    """Numbers of the rows that a source hands out, read off their prompts."""
    rows = source.rows(start or Position())
    return [int(row["prompt"][0]["content"].split()[1]) for row, _ in rows]


def test_rank_takes_every_row_whose_seq_is_congruent_to_it() -> None:
    feed = ListFeed([pair(i) for i in range(9)])
    assert seqs(PairSource(feed, rank=1, world_size=3)) == [1, 4, 7]


@given(num_rows=st.integers(0, 50), world_size=st.integers(1, 5), page=st.integers(1, 7))
def test_ranks_take_equally_many_rows_and_share_none(
    num_rows: int, world_size: int, page: int
) -> None:
    feed = ListFeed([pair(i) for i in range(num_rows)])
    taken = [
        seqs(PairSource(feed, rank=rank, world_size=world_size, page=page))
        for rank in range(world_size)
    ]
    complete = num_rows - num_rows % world_size
    assert {len(rows) for rows in taken} == {complete // world_size}
    assert sorted(seq for rows in taken for seq in rows) == list(range(complete))


def test_rows_that_do_not_fill_a_group_are_counted_as_left_over() -> None:
    source = PairSource(ListFeed([pair(i) for i in range(8)]), rank=2, world_size=3)
    assert seqs(source) == [2, 5]
    assert source.counts.left_over == 2


@given(
    num_rows=st.integers(1, 40),
    stop=st.integers(0, 39),
    before=st.integers(1, 4),
    epochs=st.integers(1, 3),
)
def test_resume_skips_and_repeats_nothing(
    num_rows: int, stop: int, before: int, epochs: int
) -> None:
    feed = ListFeed([pair(i) for i in range(num_rows)])
    whole = seqs(PairSource(feed, world_size=1, num_epochs=epochs))
    first = list(PairSource(feed, num_epochs=epochs).rows(Position()))[: stop + 1]
    position = Position.from_json(first[-1][1].to_json())
    rest = seqs(PairSource(feed, num_epochs=epochs), position)
    assert [row["seq"] for row, _ in first] + rest == whole


def test_position_resumes_under_another_number_of_ranks() -> None:
    feed = ListFeed([pair(i) for i in range(12)])
    _, position = next(iter(PairSource(feed, rank=0, world_size=2).rows(Position())))
    taken = [seqs(PairSource(feed, rank=r, world_size=5), position) for r in range(5)]
    assert sorted(seq for rows in taken for seq in rows) == list(range(2, 12))


def test_late_rows_are_waited_for_and_the_time_is_counted() -> None:
    feed = GrowingFeed(appears_at=[0.0, 5.0, 5.0], finishes_at=9.0)
    source = PairSource(feed, clock=feed.clock, wait=feed.wait)
    seen: list[tuple[float, float]] = []
    source.check = lambda: seen.append((source.counts.waited_s, feed.now))
    assert seqs(source) == [0, 1, 2]
    assert source.counts.waited_s == pytest.approx(feed.now)
    assert feed.now >= 9.0
    # Half a wait is counted half way through it.
    assert max(abs(waited - now) for waited, now in seen) <= MAX_WAIT_S
    assert len(seen) > 5
    assert max(feed.pauses) <= MAX_WAIT_S


def test_rows_that_are_there_cause_no_wait() -> None:
    feed = GrowingFeed(appears_at=[0.0] * 5, finishes_at=0.0)
    source = PairSource(feed, clock=feed.clock, wait=feed.wait, page=2)
    assert len(seqs(source)) == 5
    assert feed.pauses == []


def test_a_row_appended_just_before_the_feed_finishes_is_not_lost() -> None:
    class FinishesAfterAsking(GrowingFeed):
        """A row and the end arrive between the question and the read."""

        def is_finished(self) -> bool:
            answer = self.now >= self.finishes_at
            self.now = 1.0
            return answer

    feed = FinishesAfterAsking(appears_at=[1.0], finishes_at=1.0)
    assert seqs(PairSource(feed, clock=feed.clock, wait=feed.wait)) == [0]


def test_waiting_gives_up_when_the_check_raises() -> None:
    feed = GrowingFeed(appears_at=[], finishes_at=1e9)

    def check() -> None:
        if feed.now > 3.0:
            raise InterruptedError

    source = PairSource(feed, clock=feed.clock, wait=feed.wait, check=check)
    with pytest.raises(InterruptedError):
        seqs(source)
    assert source.counts.waited_s > 3.0


def test_a_gap_in_the_stream_is_an_error() -> None:
    class Gappy(GrowingFeed):
        def read(self, after: int, limit: int) -> Sequence[Row]:
            return [pair(after + 2)]

    with pytest.raises(StorageError, match="gapless"):
        seqs(PairSource(Gappy([], 0.0)))


def test_stages_are_trained_one_after_another() -> None:
    stages = ["helpful", "harmless"]
    feed = ListFeed([pair(i, stages[i % 2]) for i in range(6)])
    assert seqs(PairSource(feed, stages=("harmless", "helpful"))) == [1, 3, 5, 0, 2, 4]


def test_a_stage_has_all_its_epochs_before_the_next_one_begins() -> None:
    feed = ListFeed([pair(i, ("helpful", "harmless")[i % 2]) for i in range(4)])
    source = PairSource(feed, num_epochs=2, stages=("harmless", "helpful"))
    assert seqs(source) == [1, 3, 1, 3, 0, 2, 0, 2]
    assert seqs(source, Position(1, 1)) == [3, 0, 2, 0, 2]


def test_refused_rows_are_skipped_alike_on_every_rank() -> None:
    feed = ListFeed([pair(i) for i in range(10)])

    def source(rank: int) -> PairSource:
        return PairSource(feed, rank, 2, accept=lambda row: row["seq"] not in (0, 3))

    assert seqs(source(0)) == [1, 4, 6, 8]
    assert seqs(source(1)) == [2, 5, 7, 9]


def test_a_refused_row_counts_once_however_often_it_comes() -> None:
    stages = ("helpful", "harmless")
    feed = ListFeed([pair(i, stages[i % 2]) for i in range(6)])
    for names in ((), stages):
        source = PairSource(feed, num_epochs=3, stages=names, accept=lambda row: row["seq"] > 1)
        assert len(seqs(source)) == 12
        assert source.counts.skipped == 2


def test_rank_outside_of_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        PairSource(ListFeed([]), rank=2, world_size=2)


def test_looking_at_the_first_row_consumes_nothing() -> None:
    rows = ResumableRows(PairSource(ListFeed([pair(i) for i in range(4)])), Position())
    assert next(iter(rows())) == next(iter(rows()))
    assert rows.position == Position()


def test_position_follows_consumed_rows_not_those_read_ahead() -> None:
    rows = ResumableRows(PairSource(ListFeed([pair(i) for i in range(6)])), Position())
    running = rows()
    for _ in range(5):
        next(running)
    rows.consumed(2)
    assert rows.position == Position(0, 1)


def test_iterating_again_continues_behind_what_was_consumed() -> None:
    rows = ResumableRows(PairSource(ListFeed([pair(i) for i in range(6)])), Position())
    assert len(list(rows())) == 6
    rows.consumed(6)
    assert list(rows()) == []


def test_consuming_more_than_was_handed_out_is_an_error() -> None:
    rows = ResumableRows(PairSource(ListFeed([pair(0)])), Position())
    list(rows())
    with pytest.raises(ValueError, match="handed out"):
        rows.consumed(2)


def test_rows_carry_only_what_trl_reads() -> None:
    rows = ResumableRows(PairSource(ListFeed([pair(0)])), Position())
    assert set(next(rows())) == {"prompt", "chosen", "rejected"}


def test_rows_over_a_live_connection_can_be_fingerprinted() -> None:
    class Connected(ListFeed):
        def __reduce__(self) -> tuple[Any, ...]:
            raise TypeError("a connection cannot be pickled")

    rows = ResumableRows(PairSource(Connected([pair(0)])), Position(0, 4))
    assert pickle.dumps(rows)


def test_margins_are_of_the_dimensions_on_which_both_answers_have_a_reward() -> None:
    row = {
        "chosen_scores": {"a": {"value": 1.5}, "b": {"value": None}, "c": 2.0, "d": {"value": 1}},
        "rejected_scores": {"a": {"value": 0.5}, "b": {"value": 1.0}, "c": 0.5},
    }
    assert margins(row) == {"a": 1.0, "c": 1.5}
    assert margins({"chosen_scores": "a string"}) == {}


def test_consumed_rows_tell_what_they_teach_in_order() -> None:
    scored = [
        {**pair(i), "chosen_scores": {"a": float(i)}, "rejected_scores": {"a": 0.0}}
        for i in range(3)
    ]
    rows = ResumableRows(PairSource(ListFeed(scored)), Position())
    list(rows())
    assert rows.consumed(2) == [{"a": 0.0}, {"a": 1.0}]
    assert rows.consumed(1) == [{"a": 2.0}]
