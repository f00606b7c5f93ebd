"""From text to rewards: the pipeline over tiny real models, and its rules over a made-up engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from actors.scoring.build import model_scorer
from actors.scoring.engine import Arrangement, Encoded, Logits, ModelFacts, Outputs, Readout, Source
from actors.scoring.packing import Pack
from actors.scoring.scorer import BLANK, CUT, NOT_FINITE, ModelScorer
from actors.scoring.stats import ScoringStats
from mora_serve.errors import ConfigError, InvalidRequestError, ScoringError
from mora_serve.scorer_settings import ScorerSettings
from mora_serve.types import Message, Messages, ScoreGroup
from tests.contract.scorer_contract import SCORER_CHECKS, ScorerCheck
from tests.tokenizer_fixtures import (
    LLAMA3_TEMPLATE,
    bert_tokenizer,
    deberta_tokenizer,
    gpt2_tokenizer,
    llama_tokenizer,
    roberta_tokenizer,
)
from tests.unit.scorers.tiny_models import make_model

ASKED: Messages = (Message("user", "abc"),)
KINDS: Mapping[str, tuple[str, Callable[[], Any], Mapping[str, Any]]] = {
    "llama": ("llama", lambda: llama_tokenizer(chat=LLAMA3_TEMPLATE), {"pad_token_id": 3}),
    "qwen3": ("qwen3", lambda: llama_tokenizer(chat=LLAMA3_TEMPLATE), {"pad_token_id": 3}),
    "gpt2": ("gpt2", gpt2_tokenizer, {"template": "hh_dialog"}),
    "bert pair": ("bert", bert_tokenizer, {"template": "pair"}),
    "roberta": ("roberta", roberta_tokenizer, {"template": "openbmb"}),
    "deberta": ("deberta-v2", deberta_tokenizer, {"template": "pair"}),
}


@pytest.fixture(scope="module", params=KINDS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model with its tokenizer, of each kind in turn, and the settings it needs."""
    from transformers import AutoModelForSequenceClassification

    kind, make_tokenizer, extra = KINDS[request.param]
    directory = tmp_path_factory.mktemp("served")
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(directory)
    ids = {"pad_token_id": extra["pad_token_id"]} if "pad_token_id" in extra else {}
    make_model(
        directory,
        kind,
        AutoModelForSequenceClassification,
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        num_labels=1,
        **ids,
    )
    return directory, {k: v for k, v in extra.items() if k == "template"}


def settings(**changes: Any) -> ScorerSettings:
    values = {
        "name": "reward",
        "backend": "seqcls",
        "sign": 1,
        "dimensions": ("helpful",),
        "model": "made-up",
        "dtype": "float32",
        "max_tokens": 200,
        "num_threads": 1,
    }
    return ScorerSettings.model_validate(values | changes)


@pytest.mark.parametrize("check", SCORER_CHECKS, ids=lambda check: check.__name__)
async def test_models_of_all_kinds_keep_the_contract(check: ScorerCheck, served: Any) -> None:
    directory, extra = served
    scorer = model_scorer(settings(model=str(directory), **extra), "")
    await scorer.start()
    await check(scorer, max_tokens=200, tolerance=1e-4)


# --- the rules, over tokens that are letters ----------------------------------------------------


class LetterAdapter:
    """Letters are tokens; ``^`` leads. Two dimensions: the outputs as they are."""

    readout: Readout = Logits()

    def __init__(self, section: ScorerSettings, tokenizer: Any) -> None:
        self._names = section.dimensions

    def encode(self, prompt: Messages, responses: Sequence[str]) -> list[Encoded | None]:
        before = tuple(map(ord, prompt[-1].content))
        return [
            Encoded((ord("^"),), before, tuple(map(ord, text))) if text.strip() else None
            for text in responses
        ]

    def check(self, facts: ModelFacts) -> None:
        if facts.num_outputs != 2:
            raise ConfigError("two outputs are needed")

    def read(self, outputs: Outputs) -> Mapping[str, float]:
        return dict(zip(self._names, outputs, strict=True))


class RecordingEngine:
    """Outputs are the number of tokens, and NaN for answers that hold an ``!``."""

    def __init__(self, facts: ModelFacts) -> None:
        self._facts = facts
        self.stats = ScoringStats()
        self.packs: list[Pack] = []
        self.arrangement: Arrangement | None = None
        self.closed = False

    async def start(self) -> ModelFacts:
        return self._facts

    async def run(
        self, packs: Sequence[Pack], arrangement: Arrangement = "served"
    ) -> list[list[Outputs]]:
        self.packs, self.arrangement = list(packs), arrangement
        return [
            [
                (
                    math.nan if ord("!") in answer.tokens else float(len(pack.prompt)),
                    float(len(answer.tokens)),
                )
                for answer in pack.answers
            ]
            for pack in packs
        ]

    async def check_health(self) -> None:
        if self.closed:
            raise ScoringError("closed")

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def tokenizer_dir(tmp_path: Path) -> Path:
    gpt2_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    return tmp_path


def made(
    directory: Path, facts: ModelFacts | None = None, **changes: Any
) -> tuple[ModelScorer, RecordingEngine]:
    engine = RecordingEngine(facts or ModelFacts("weights", 2))
    values = {"backend": "fake", "dimensions": ("a", "b"), "max_tokens": 64} | changes
    section = settings(**values, sign=None)
    scorer = ModelScorer(section, Source(str(directory)), LetterAdapter, lambda *_: engine)
    return scorer, engine


async def test_answers_share_their_prompt_behind_its_lead(tokenizer_dir: Path) -> None:
    scorer, engine = made(tokenizer_dir)
    await scorer.start()
    ((first, second),) = await scorer.score([ScoreGroup(ASKED, ("x", "yz"))])
    (pack,) = engine.packs
    assert "".join(map(chr, pack.prompt)) == "^abc"
    assert [first["b"].raw, second["b"].raw] == [1.0, 2.0]
    assert engine.arrangement == "served"


async def test_a_cut_prompt_keeps_its_lead_and_its_right_end(tokenizer_dir: Path) -> None:
    scorer, engine = made(tokenizer_dir)
    await scorer.start()
    long = (Message("user", "a" * 80 + "b" * 16),)
    ((score,),) = await scorer.score([ScoreGroup(long, ("x" * 40,))])
    assert "".join(map(chr, engine.packs[0].prompt)) == "^" + "b" * 15
    assert (score["a"].status, score["a"].reason) == ("ok", CUT)


async def test_what_has_no_score_says_why_and_has_no_number(tokenizer_dir: Path) -> None:
    scorer, _ = made(tokenizer_dir)
    await scorer.start()
    ((blank, long, odd, fine),) = await scorer.score([ScoreGroup(ASKED, (" ", "x" * 99, "!", "y"))])
    assert (blank["a"].status, blank["a"].raw, blank["a"].reason) == ("failed", None, BLANK)
    assert (long["a"].status, long["a"].raw) == ("truncated", None)
    assert "99 tokens" in str(long["a"].reason)
    assert (odd["a"].status, odd["a"].raw, odd["a"].reason) == ("failed", None, NOT_FINITE)
    assert (odd["b"].status, odd["b"].raw) == ("ok", 1.0)
    assert (fine["a"].status, fine["a"].reason) == ("ok", None)


async def test_only_what_is_asked_for_is_answered(tokenizer_dir: Path) -> None:
    scorer, _ = made(tokenizer_dir)
    await scorer.start()
    group = ScoreGroup(ASKED, ("x",))
    assert [list(row) for row in (await scorer.score([group], ["b"]))[0]] == [["b"]]
    assert await scorer.score([group], []) == [[{}]]
    with pytest.raises(InvalidRequestError, match="a, b"):
        await scorer.score([group], ["humor"])


async def test_the_arrangement_reaches_the_engine(tokenizer_dir: Path) -> None:
    scorer, engine = made(tokenizer_dir)
    await scorer.start()
    await scorer.measure([ScoreGroup(ASKED, ("x",))], "padded")
    assert engine.arrangement == "padded"


async def test_a_model_of_another_form_is_refused_and_let_go(tokenizer_dir: Path) -> None:
    scorer, engine = made(tokenizer_dir, ModelFacts("weights", 1))
    with pytest.raises(ConfigError, match="two outputs"):
        await scorer.start()
    assert engine.closed


async def test_a_limit_beyond_the_model_is_refused(tokenizer_dir: Path) -> None:
    scorer, engine = made(tokenizer_dir, ModelFacts("weights", 2, max_positions=63))
    with pytest.raises(ConfigError, match="at most 63"):
        await scorer.start()
    assert engine.closed


async def test_the_revision_covers_what_changes_a_score_and_nothing_else(
    tokenizer_dir: Path,
) -> None:
    async def revision(facts: ModelFacts | None = None, /, **changes: Any) -> str:
        scorer, _ = made(tokenizer_dir, facts, **changes)
        await scorer.start()
        return (await scorer.dimensions())["a"][1]

    base = await revision()
    same = {"token_budget": 64, "batching": "single", "num_threads": 2, "timeout_s": 1}
    assert await revision(**same) == base
    changes = {"dtype": "bfloat16", "engine": "vllm", "template": "pku", "max_tokens": 99}
    for name, value in changes.items():
        assert await revision(**{name: value}) != base
    assert await revision(ModelFacts("other weights", 2)) != base
    gpt2 = gpt2_tokenizer()
    gpt2.chat_template = "{{ messages[0]['content'] }}"
    gpt2.save_pretrained(tokenizer_dir)
    templated = await revision()
    assert templated != base
    config = (tokenizer_dir / "config.json").read_text()
    (tokenizer_dir / "config.json").write_text('{"model_type": "gpt2", "pad_token_id": 0}')
    assert await revision() != templated
    (tokenizer_dir / "config.json").write_text(config)
    assert await revision() == templated


async def test_a_scorer_is_healthy_between_start_and_close(tokenizer_dir: Path) -> None:
    scorer, engine = made(tokenizer_dir)
    with pytest.raises(ScoringError):
        await scorer.check_health()
    await scorer.start()
    await scorer.check_health()
    await scorer.close()
    assert engine.closed
    with pytest.raises(ScoringError):
        await scorer.check_health()


async def test_a_tokenizer_that_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    scorer, _ = made(tmp_path)
    with pytest.raises(ConfigError, match="tokenizer's files"):
        await scorer.start()
