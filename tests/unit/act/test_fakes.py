"""The fakes' rewards behave as their docstring says, so that every path of the method occurs."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from mora_serve.calibration import fit_calibrator
from mora_serve.fakes import (
    INTENT_GAIN,
    SIGMA,
    TAU,
    FakeGenerator,
    FakeScorer,
    fake_calibrator,
    hidden_mean,
    split_intents,
)
from mora_serve.identity import prompt_id
from mora_serve.requests import DIAGNOSTICS_URL, DiagnosticsRequest, parse_body
from mora_serve.types import (
    Generation,
    GenerationRequest,
    Message,
    Rollout,
    Sampling,
    ScoredGroup,
    ScoreGroup,
)
from tests.unit.act.act_builders import service

K = ("helpful", "harmless", "truthful")


async def pool(num_prompts: int, n: int) -> list[ScoredGroup]:
    prompts = [(Message("user", f"Pool question {i}?"),) for i in range(num_prompts)]
    requests = [GenerationRequest(prompt, Sampling(n=n, seed=1)) for prompt in prompts]
    groups = []
    for prompt, result in zip(prompts, await FakeGenerator().generate(requests), strict=True):
        assert isinstance(result, Generation)
        texts = tuple(completion.text for completion in result.completions)
        (rows,) = await FakeScorer(K).score([ScoreGroup(prompt, texts)])
        rollouts = tuple(
            Rollout(i, completion, row)
            for i, (completion, row) in enumerate(zip(result.completions, rows, strict=True))
        )
        groups.append(ScoredGroup(prompt_id(prompt), prompt, "fake-policy", rollouts))
    return groups


async def test_the_closed_form_calibrator_agrees_with_one_fitted_on_the_fakes() -> None:
    fitted = fit_calibrator(await pool(300, 8), K)
    for name, known in fake_calibrator(K).dimensions.items():
        found = fitted[name]
        assert found.center == pytest.approx(known.center, abs=0.15 * known.scale)
        assert found.scale == pytest.approx(known.scale, rel=0.15)
        assert found.sigma == pytest.approx(SIGMA, rel=0.2)
        assert found.tau == pytest.approx(TAU, rel=0.2)


def test_an_intent_outside_the_question_lifts_its_dimension_only() -> None:
    prompt = (Message("user", "Why is the sky blue?\n\nGive evidence."),)
    question, stated = split_intents(prompt, K)
    assert question == "Why is the sky blue?"
    assert stated == {"truthful"}
    for name in K:
        gained = hidden_mean(question, stated, name) - hidden_mean(question, frozenset(), name)
        assert gained == pytest.approx(INTENT_GAIN if name == "truthful" else 0.0)


def test_a_cue_in_the_question_itself_states_nothing() -> None:
    assert split_intents((Message("user", "Is it safe?"),), K) == ("Is it safe?", frozenset())


def test_a_dimension_without_cues_is_asked_for_by_name() -> None:
    prompt = (Message("user", "Why?\n\nPlease be polite."),)
    assert split_intents(prompt, ("polite",)) == (
        "Why?",
        frozenset({"polite"}),
    )


async def test_every_class_occurs_among_the_fakes_prompts() -> None:
    body = {"prompts": [f"Question number {i}?" for i in range(120)], "seed": 1}
    request = parse_body(DIAGNOSTICS_URL, body)
    assert isinstance(request, DiagnosticsRequest)
    result = await service().diagnose_list(request)
    classes = Counter(item["class"] for item in result["data"])
    assert set(classes) == {"flat", "multi", "uncertain", *(f"single:{k}" for k in K)}
    assert 0 < result["aggregate"]["num_conflicted"] < 60


async def test_noise_is_standard_normal_within_prompts() -> None:
    groups = await pool(100, 16)
    z = np.array([[r.scores["truthful"].raw or 0.0 for r in g.rollouts] for g in groups])
    scale = fake_calibrator(K)["truthful"].scale
    assert float(np.sqrt(z.var(axis=1, ddof=1).mean())) / scale == pytest.approx(SIGMA, rel=0.05)
