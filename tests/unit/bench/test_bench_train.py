"""The audit of the training benchmark notices skipped, repeated and reordered pairs."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.train import Run, audited_rows, pair, ratio_interval, row_hash, summarise
from trainer.source import ListFeed, PairSource, Position

HASHES = [row_hash(pair(number)) for number in range(6)]
CLEAN = Run("stream", [0.1, 0.1], 0.0, 1.0, list(HASHES), 60, list(HASHES))


@pytest.mark.parametrize(
    ("trained", "says"),
    [
        (HASHES[:2] + HASHES[3:], "1 pairs were skipped"),
        ([*HASHES, HASHES[0]], "1 pairs were repeated"),
        (HASHES[::-1], "another order"),
        ([*HASHES, "foreign"], "other pairs"),
    ],
)
def test_rows_that_differ_from_what_was_committed_are_faults(trained: list[str], says: str) -> None:
    run = replace(CLEAN, trained=trained)
    assert says in " ".join(run.faults())
    assert summarise([[replace(CLEAN, source="memory"), run]])["faults"]


def test_unequal_numbers_of_tokens_are_a_fault() -> None:
    found = summarise([[replace(CLEAN, source="memory", tokens=59), CLEAN]])
    assert found["faults"] == ["both sources must train on equally many tokens"]


def test_only_rows_that_were_consumed_count_as_trained() -> None:
    rows = audited_rows(PairSource(ListFeed([pair(number) for number in range(6)])), Position())
    handed_out = rows()
    for _ in range(4):
        next(handed_out)
    rows.consumed(2)
    assert rows.trained == HASHES[:2]
    again = rows()
    next(again)
    rows.consumed(1)
    assert rows.trained == HASHES[:3]


def test_a_read_that_only_some_steps_pay_for_is_in_the_ratio() -> None:
    slow = replace(CLEAN, step_s=[0.1, 0.1, 0.1, 0.14])
    found = summarise([[replace(CLEAN, source="memory"), slow]] * 5)
    assert found["ratio"] == pytest.approx(1.1)
    low, high = ratio_interval([1.0, 1.1, 1.2, 0.9, 1.05])
    assert low <= 1.05 <= high
