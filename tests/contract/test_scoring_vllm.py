"""The scoring engine on real vLLM against transformers, on tiny random Llamas in float32.

One engine per readout serves the whole module; the last test ends one.
"""

from __future__ import annotations

import asyncio
import os
import random
import shutil
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch

from actors.scoring.adapters import make_adapter
from actors.scoring.engine import Logits, ModelFacts, NextTokens, Outputs, Readout, Source
from actors.scoring.packing import Answer, Pack
from actors.scoring.parity import certify
from actors.scoring.scorer import ModelScorer
from actors.scoring.stats import ScoringStats
from actors.vllm_pooling import VllmScoringEngine
from benchmarks import kills
from mora_serve.errors import ConfigError, InvalidRequestError, ScoringError
from mora_serve.scorer_settings import ScorerSettings
from tests.contract.scorer_contract import SCORER_CHECKS, ScorerCheck
from tests.model_fixtures import byte_tokenizer, llama_sizes

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

TOLERANCE = 5e-4
"""Of float32 logits with a standard deviation of about 3, after four layers."""
LABELS = 3
JUDGED = (40, 77, 250)
VOCABULARY = 256
MAX_TOKENS = 192
END = 2
"""Pad and end-of-turn token of the fixtures' models."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A classification model and a causal one; vLLM's kernels need heads of 32 dimensions."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    root = tmp_path_factory.mktemp("models")
    sizes = {**llama_sizes(VOCABULARY + 3), "hidden_size": 128, "num_labels": LABELS}
    made: dict[str, Any] = {"root": root}
    for name, kind in (
        ("classifier", LlamaForSequenceClassification),
        ("judge", LlamaForCausalLM),
    ):
        torch.manual_seed(0)
        made[name] = kind(LlamaConfig(**sizes)).eval()
        made[name].save_pretrained(root / name)
        byte_tokenizer().save_pretrained(root / name)
    return made


def settings(directory: Path, **changes: Any) -> ScorerSettings:
    values: dict[str, Any] = {
        "name": "tiny",
        "backend": "seqcls",
        "engine": "vllm",
        "model": str(directory),
        "sign": 1,
        "dimensions": ("helpful",),
        "dtype": "float32",
        "max_tokens": MAX_TOKENS,
        "engine_env": {"VLLM_CPU_KVCACHE_SPACE": "1"},
    }
    return ScorerSettings.model_validate(values | changes)


def engine_for(directory: Path, readout: Readout) -> VllmScoringEngine:
    return VllmScoringEngine(settings(directory), Source(str(directory)), readout, ScoringStats())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def classifier(models: dict[str, Any]) -> AsyncIterator[VllmScoringEngine]:
    engine = engine_for(models["root"] / "classifier", Logits())
    facts = await engine.start()
    assert (facts.num_outputs, facts.labels) == (LABELS, ("LABEL_0", "LABEL_1", "LABEL_2"))
    assert facts.max_positions == 512
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def judge(models: dict[str, Any]) -> AsyncIterator[VllmScoringEngine]:
    engine = engine_for(models["root"] / "judge", NextTokens(JUDGED))
    assert (await engine.start()).num_outputs == len(JUDGED)
    yield engine
    await engine.close()


def packs(seed: int) -> list[Pack]:
    """Prompts of 70 and 20 tokens with answers of very different lengths."""
    rng = random.Random(seed)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(count))

    return [
        Pack(draw(70), tuple(Answer(0, i, draw(n)) for i, n in enumerate((1, 9, 33, 90)))),
        Pack(draw(20), tuple(Answer(1, i, draw(n)) for i, n in enumerate((40, 3)))),
    ]


def rows(made: list[Pack]) -> list[tuple[int, ...]]:
    return [(*pack.prompt, *answer.tokens) for pack in made for answer in pack.answers]


def flat(outputs: list[list[Outputs]]) -> torch.Tensor:
    return torch.tensor([row for pack in outputs for row in pack])


@torch.inference_mode()
def logits(model: Any, tokens: tuple[int, ...]) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([tokens])).logits[0]
    return result


async def test_logits_are_those_of_transformers(
    classifier: VllmScoringEngine, models: dict[str, Any]
) -> None:
    made = packs(1)
    outputs = await classifier.run(made)
    assert [len(pack) for pack in outputs] == [4, 2]
    expected = torch.stack([logits(models["classifier"], row) for row in rows(made)])
    torch.testing.assert_close(flat(outputs), expected, atol=TOLERANCE, rtol=0)
    assert expected.std() > 1


async def test_the_prefix_cache_is_used_and_changes_no_score(
    classifier: VllmScoringEngine,
) -> None:
    made = packs(2)
    before = classifier.stats.shared_prompt_tokens, classifier.stats.tokens
    alone = flat(await classifier.run(made, "alone"))
    assert classifier.stats.shared_prompt_tokens == before[0]
    assert classifier.stats.tokens - before[1] == sum(map(len, rows(made)))
    fresh = packs(3)
    served = flat(await classifier.run(fresh))
    shared = classifier.stats.shared_prompt_tokens - before[0]
    assert shared >= 3 * 64
    again = flat(await classifier.run(fresh))
    torch.testing.assert_close(again, served, atol=TOLERANCE, rtol=0)
    for arrangement in ("served", "padded"):
        other = flat(await classifier.run(made, arrangement))  # type: ignore[arg-type]
        torch.testing.assert_close(other, alone, atol=TOLERANCE, rtol=0)
    assert classifier.stats.forward_s > 0


async def test_a_text_that_ends_with_the_pad_token_scores_before_it(
    classifier: VllmScoringEngine, models: dict[str, Any]
) -> None:
    ended = Pack((5, 6, 7), (Answer(0, 0, (8, 9, END)), Answer(0, 1, (8, END, 9))))
    expected = torch.stack([logits(models["classifier"], row) for row in rows([ended])])
    found = flat(await classifier.run([ended]))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


async def test_an_input_that_is_too_long_is_refused_and_the_engine_lives(
    classifier: VllmScoringEngine,
) -> None:
    over = Pack((5,) * MAX_TOKENS, (Answer(0, 0, (6,)),))
    with pytest.raises(InvalidRequestError):
        await classifier.run([over])
    await classifier.check_health()
    fits = Pack((5,) * (MAX_TOKENS - 1), (Answer(0, 0, (6,)),))
    assert len(flat(await classifier.run([fits]))) == 1


async def test_a_cancelled_call_leaves_nothing_in_the_engine(
    classifier: VllmScoringEngine,
) -> None:
    call = asyncio.create_task(classifier.run(packs(4) * 8))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert len(flat(await classifier.run(packs(4)))) == 6


async def test_next_token_logits_are_those_of_transformers(
    judge: VllmScoringEngine, models: dict[str, Any]
) -> None:
    made = packs(1)
    expected = torch.stack([logits(models["judge"], row)[-1, list(JUDGED)] for row in rows(made)])
    for arrangement in ("alone", "served", "served"):
        found = flat(await judge.run(made, arrangement))  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert judge.stats.shared_prompt_tokens > 0
    full = Pack((5,) * (MAX_TOKENS - 1), (Answer(0, 0, (6,)),))
    assert len(flat(await judge.run([full]))) == 1


class Borrowed:
    """A started engine, for a scorer that would start and close one of its own."""

    def __init__(self, engine: VllmScoringEngine, facts: ModelFacts) -> None:
        self._facts = facts
        self.stats = engine.stats
        self.run = engine.run
        self.check_health = engine.check_health

    async def start(self) -> ModelFacts:
        return self._facts

    async def close(self) -> None:
        """It goes back as it is."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scorer(
    classifier: VllmScoringEngine, models: dict[str, Any]
) -> AsyncIterator[ModelScorer]:
    directory = models["root"] / "classifier"
    columns = {"helpful": {"label": 0}, "harmless": {"label": "LABEL_2", "sign": -1}}
    chosen = settings(
        directory, backend="attributes", sign=None, columns=columns, dimensions=tuple(columns)
    )
    facts = ModelFacts("weights", LABELS, ("LABEL_0", "LABEL_1", "LABEL_2"), 512)
    made = ModelScorer(
        chosen, Source(str(directory)), make_adapter, lambda *_: Borrowed(classifier, facts)
    )
    await made.start()
    yield made
    await made.close()


@pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
async def test_a_scorer_on_vllm_keeps_the_contract(scorer: ModelScorer, check: ScorerCheck) -> None:
    await check(scorer, max_tokens=MAX_TOKENS, tolerance=TOLERANCE)


async def test_a_scorer_on_vllm_passes_the_parity_gate(scorer: ModelScorer) -> None:
    certificate = await certify(scorer, settings(Path("unused")))
    assert certificate.passed, certificate.refusal()


async def test_models_that_are_not_what_is_asked_for_are_refused_before_anything_starts(
    models: dict[str, Any], tmp_path: Path
) -> None:
    causal = engine_for(models["root"] / "judge", Logits())
    with pytest.raises(ConfigError, match="must be a trained ForSequenceClassification"):
        await causal.start()
    headless = tmp_path / "headless"
    shutil.copytree(models["root"] / "judge", headless)
    shutil.copy(models["root"] / "classifier" / "config.json", headless)
    with pytest.raises(ConfigError, match=r"no weights for score\.weight"):
        await engine_for(headless, Logits()).start()
    full = settings(models["root"] / "judge", max_tokens=512)
    with pytest.raises(ConfigError, match="max_tokens must be at most 511"):
        await VllmScoringEngine(
            full, Source(str(full.model)), NextTokens(JUDGED), ScoringStats()
        ).start()


async def test_a_killed_engine_is_an_error_and_unhealthy(judge: VllmScoringEngine) -> None:
    await judge.check_health()
    for pid in kills.find(os.getpid(), "engine"):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(ScoringError):
        await judge.run(packs(5))
    with pytest.raises(ScoringError):
        await judge.check_health()
    with pytest.raises(ScoringError):
        await judge.run(packs(5))
