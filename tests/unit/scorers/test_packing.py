"""How answers share prompts and passes: lengths, truncation and budgets."""

from __future__ import annotations

from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from actors.scoring.packing import Answer, Pack, batch_packs, kept_prompt_tokens, pack_group

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=12)


def answers(lengths: list[int], group: int = 0) -> list[Answer]:
    return [Answer(group, i, tuple(range(n))) for i, n in enumerate(lengths)]


def test_a_prompt_that_fits_is_kept_whole() -> None:
    assert kept_prompt_tokens(100, 28, max_tokens=128) == 100


def test_a_long_prompt_keeps_a_multiple_of_the_step() -> None:
    assert kept_prompt_tokens(1000, 24, max_tokens=512) == 448


def test_an_answer_that_leaves_no_step_for_the_prompt_does_not_fit() -> None:
    assert kept_prompt_tokens(1000, 449, max_tokens=512) is None
    assert kept_prompt_tokens(1000, 448, max_tokens=512) == 64


def test_the_prompt_loses_its_left_end() -> None:
    prompt = list(range(1000, 2000))
    packs, unfit = pack_group(prompt, answers([10]), max_tokens=256, token_budget=4096)
    assert not unfit
    assert packs[0].prompt == tuple(prompt[-192:])


@given(st.integers(1, 600), LENGTHS, st.integers(64, 512), st.integers(64, 1024))
def test_what_a_score_is_computed_from_does_not_depend_on_siblings(
    num_prompt: int, lengths: list[int], max_tokens: int, token_budget: int
) -> None:
    prompt = list(range(num_prompt))
    pack = partial(pack_group, prompt, max_tokens=max_tokens, token_budget=token_budget)
    packs, unfit = pack(answers(lengths))
    together = {a.index: (p.prompt, a.tokens) for p in packs for a in p.answers}
    assert sorted([*together, *(a.index for a in unfit)]) == list(range(len(lengths)))
    for answer in answers(lengths):
        alone, alone_unfit = pack([answer])
        if alone_unfit:
            assert answer in unfit
        else:
            assert together[answer.index] == (alone[0].prompt, answer.tokens)
            assert len(alone[0].prompt) + len(answer.tokens) <= max_tokens


@given(st.lists(LENGTHS, max_size=8), st.integers(64, 1024))
def test_batches_hold_every_pack_once_within_the_budget(
    groups: list[list[int]], token_budget: int
) -> None:
    packs = [Pack((1, 2, 3), tuple(answers(lengths, i))) for i, lengths in enumerate(groups)]
    batches = batch_packs(packs, token_budget)
    found = [pack.answers[0].group for batch in batches for pack in batch]
    assert sorted(found) == list(range(len(groups)))
    for batch in batches:
        assert len(batch) == 1 or sum(pack.num_tokens for pack in batch) <= token_budget


def test_siblings_share_one_encoding_of_their_prompt() -> None:
    (pack,), _ = pack_group([1] * 50, answers([10] * 8), max_tokens=512, token_budget=2048)
    assert pack.num_tokens == 50 + 80


def test_a_group_larger_than_the_budget_is_split() -> None:
    packs, _ = pack_group([1] * 50, answers([10] * 8), max_tokens=512, token_budget=80)
    assert [len(pack.answers) for pack in packs] == [3, 3, 2]
