"""The fakes pass the contracts, and promise more: equal bytes for equal seeds."""

from __future__ import annotations

import pytest

from mora_serve.fakes import FakeGenerator, FakeScorer
from tests.contract.generator_contract import GENERATOR_CHECKS, GeneratorCheck, asking
from tests.contract.scorer_contract import SCORER_CHECKS, ScorerCheck


@pytest.mark.parametrize("check", GENERATOR_CHECKS, ids=lambda check: check.__name__)
async def test_fake_generator_keeps_the_contract(check: GeneratorCheck) -> None:
    await check(FakeGenerator(("new", "old"), max_model_len=128), max_model_len=128)


@pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
async def test_fake_scorer_keeps_the_contract(check: ScorerCheck) -> None:
    await check(FakeScorer(max_tokens=64), max_tokens=64, tolerance=0.0)


async def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not() -> None:
    first, again, other = [
        (await FakeGenerator().generate([asking("Hello.", n=3, seed=seed)]))[0]
        for seed in (5, 5, 6)
    ]
    assert first == again
    assert first != other


async def test_without_a_seed_two_calls_differ() -> None:
    generator = FakeGenerator()
    first, second = await generator.generate([asking("Hello.", n=3, seed=None)] * 2)
    assert first != second
