"""What every scorer must do, whatever models are behind it.

``SCORER_CHECKS`` holds the checks; a suite runs each over its own scorer::

    @pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
    async def test_contract(check, scorer):
        await check(scorer, max_tokens=1024, tolerance=1e-3)
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Awaitable
from typing import Protocol

import pytest

from mora_serve.errors import InvalidRequestError
from mora_serve.ports import Scorer
from mora_serve.types import Message, ScoreGroup


class ScorerCheck(Protocol):
    """One property; ``max_tokens`` is the limit, ``tolerance`` how equal raw rewards must be."""

    __name__: str

    def __call__(self, scorer: Scorer, *, max_tokens: int, tolerance: float) -> Awaitable[None]: ...


def group(prompt: str, *responses: str) -> ScoreGroup:
    return ScoreGroup((Message("user", prompt),), responses)


COLOURS = group("Name a colour.", "Red.", "Blue is a colour that many people like.", "I refuse.")
WATER = group("Is water wet? Explain at length, please.", "Yes, it is.", "No. " * 30)


async def one_row_per_answer_with_every_dimension(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    dimensions = await scorer.dimensions()
    assert dimensions
    result = await scorer.score([COLOURS, WATER])
    assert [len(rows) for rows in result] == [3, 2]
    assert all(set(row) == set(dimensions) for rows in result for row in rows)


async def ok_scores_carry_a_finite_raw_reward_and_their_model(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    dimensions = await scorer.dimensions()
    for row in (await scorer.score([COLOURS]))[0]:
        for name, score in row.items():
            assert score.status == "ok"
            assert score.raw is not None
            assert math.isfinite(score.raw)
            assert score.value is None
            assert (score.model, score.revision) == dimensions[name]


async def an_empty_list_gives_an_empty_list(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    assert await scorer.score([]) == []
    assert await scorer.score([group("Name a colour.")]) == [[]]


async def a_score_does_not_depend_on_its_batch(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    together = (await scorer.score([WATER, COLOURS]))[1]
    for index, response in enumerate(COLOURS.responses):
        alone = (await scorer.score([ScoreGroup(COLOURS.prompt, (response,))]))[0][0]
        for name, score in together[index].items():
            assert score.raw == pytest.approx(alone[name].raw, abs=tolerance)


async def only_the_dimensions_asked_for_are_scored(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    name = list(await scorer.dimensions())[-1]
    everything = await scorer.score([COLOURS])
    some = await scorer.score([COLOURS], [name])
    assert all(list(row) == [name] for row in some[0])
    assert some[0][0][name].raw == pytest.approx(everything[0][0][name].raw, abs=tolerance)


async def an_unknown_dimension_is_refused(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        await scorer.score([COLOURS], ["no-such-dimension"])
    assert caught.value.code == "unknown_dimension"


async def an_answer_that_does_not_fit_is_truncated_alone(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    rows = (await scorer.score([group("Name a colour.", "Red.", "red " * 2 * max_tokens)]))[0]
    for name in await scorer.dimensions():
        assert rows[0][name].status == "ok"
        assert rows[1][name].status == "truncated"
        assert rows[1][name].raw is None
        assert rows[1][name].reason


async def a_prompt_cut_from_the_left_is_ok_with_a_reason(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    (rows,) = await scorer.score([group("word " * 2 * max_tokens + "Name a colour.", "Red.")])
    for score in rows[0].values():
        assert score.status == "ok"
        assert score.raw is not None
        assert score.reason


async def an_empty_answer_never_breaks_its_neighbours(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    rows = (await scorer.score([group("Name a colour.", "", "Red.")]))[0]
    alone = (await scorer.score([group("Name a colour.", "Red.")]))[0][0]
    for name, score in rows[1].items():
        assert score.raw == pytest.approx(alone[name].raw, abs=tolerance)
        assert (rows[0][name].raw is None) == (rows[0][name].status != "ok")


async def system_turns_change_no_score(
    scorer: Scorer, *, max_tokens: int, tolerance: float
) -> None:
    with_system = ScoreGroup((Message("system", "Be brief."), *COLOURS.prompt), COLOURS.responses)
    plain = (await scorer.score([COLOURS]))[0]
    steered = (await scorer.score([with_system]))[0]
    for before, after in zip(plain, steered, strict=True):
        for name, score in before.items():
            assert after[name].raw == pytest.approx(score.raw, abs=tolerance)


async def results_survive_pickling(scorer: Scorer, *, max_tokens: int, tolerance: float) -> None:
    result = await scorer.score([COLOURS])
    assert pickle.loads(pickle.dumps(result)) == result


SCORER_CHECKS: tuple[ScorerCheck, ...] = (
    one_row_per_answer_with_every_dimension,
    ok_scores_carry_a_finite_raw_reward_and_their_model,
    an_empty_list_gives_an_empty_list,
    a_score_does_not_depend_on_its_batch,
    only_the_dimensions_asked_for_are_scored,
    an_unknown_dimension_is_refused,
    an_answer_that_does_not_fit_is_truncated_alone,
    a_prompt_cut_from_the_left_is_ok_with_a_reason,
    an_empty_answer_never_breaks_its_neighbours,
    system_turns_change_no_score,
    results_survive_pickling,
)
