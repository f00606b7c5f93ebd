"""Strategies: what they propose, and what counts as having lost the question."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence

import pytest

from mora_serve.errors import GenerationError
from mora_serve.ports import CompletionDelta, Generator, RewriteContext
from mora_serve.rewriting import (
    ComposeRewriter,
    LlmRewriter,
    NullRewriter,
    build_rewriters,
    parse_rewrite,
    preserves_question,
)
from mora_serve.templates import FRAMES, QUALITIES, wanted_answer
from mora_serve.types import Completion, Failure, Generation, GenerationRequest, Message, Messages

QUESTION = "Why does {bread} rise, and does it matter if I do not add 2 spoons of sugar?"
PROMPT: Messages = (
    Message("system", "Be brief."),
    Message("user", "Hello."),
    Message("assistant", "Hi."),
    Message("user", QUESTION),
)


class Parrot(Generator):
    """Gives the answers it was made with, and keeps the requests it got."""

    def __init__(self, *answers: str, failure: Failure | None = None) -> None:
        self.answers = answers
        self.failure = failure
        self.requests: list[GenerationRequest] = []

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        self.requests += requests
        if self.failure is not None:
            return [self.failure for _ in requests]
        completions = tuple(Completion(text, "stop", 5) for text in self.answers)
        return [Generation(completions, "chat-model", 10) for _ in requests]

    async def stream(self, request: GenerationRequest) -> AsyncIterator[CompletionDelta]:
        for answer in self.answers:
            yield CompletionDelta(answer)

    async def models(self, wanted: str | None = None) -> list[str]:
        return ["chat-model"]


def context(*missing: str, seed: int = 1, prompt: Messages = PROMPT) -> RewriteContext:
    return RewriteContext(prompt, ("helpful",), missing or ("harmless", "truthful"), seed)


async def test_compose_keeps_the_question_verbatim_in_a_paragraph_of_its_own() -> None:
    for candidate in await ComposeRewriter().propose(context(), 6):
        *before, last = candidate.prompt
        assert tuple(before) == PROMPT[:-1]
        assert QUESTION in last.content.split("\n\n")
        assert last.role == "user"
        assert candidate.rejected is None
        assert candidate.targets == ("harmless", "truthful")
        assert preserves_question(QUESTION, last.content)


async def test_compose_names_what_is_missing_and_what_is_there_and_no_other_dimension() -> None:
    for candidate in await ComposeRewriter().propose(context("truthful"), 6):
        wish = candidate.prompt[-1].content.replace(QUESTION, "")
        words = set(wish.replace(".", "").split())
        assert words & set(QUALITIES["truthful"])
        assert words & set(QUALITIES["helpful"])
        assert not words & set(QUALITIES["harmless"])


async def test_compose_asks_a_flat_prompt_for_every_dimension() -> None:
    flat = RewriteContext(PROMPT, (), ("helpful", "harmless"), seed=1)
    for candidate in await ComposeRewriter().propose(flat, 6):
        words = set(candidate.prompt[-1].content.replace(".", "").split())
        assert words & set(QUALITIES["helpful"])
        assert words & set(QUALITIES["harmless"])


def test_wishes_read_as_sentences() -> None:
    assert wanted_answer(["useful"], ["safe"]) == "a useful answer that is also safe"
    assert wanted_answer(["accurate"], ["safe", "useful"]) == (
        "an accurate answer that is also safe and useful"
    )
    assert wanted_answer([], ["a", "b", "c"]) == "an answer that is a, b and c"


async def test_compose_proposes_distinct_candidates_with_their_own_template_hash() -> None:
    found = await ComposeRewriter().propose(context(), 6)
    assert len(found) == 6
    assert len({candidate.prompt for candidate in found}) == 6
    assert len({candidate.template_hash for candidate in found}) == 6


async def test_compose_is_reproducible_and_the_seed_chooses_variants() -> None:
    first, again, other = [
        await ComposeRewriter().propose(context(seed=seed), 3) for seed in (1, 1, 2)
    ]
    assert first == again
    assert first != other


async def test_compose_takes_the_name_of_a_dimension_it_does_not_know() -> None:
    (candidate,) = await ComposeRewriter().propose(context("polite"), 1)
    assert "polite" in candidate.prompt[-1].content


async def test_compose_gives_fewer_candidates_when_templates_run_out() -> None:
    found = await ComposeRewriter().propose(context(), 16)
    assert len(found) == len(FRAMES) * 2


async def test_null_proposes_the_unchanged_prompt_as_often_as_asked() -> None:
    found = await NullRewriter().propose(context(), 3)
    assert [candidate.prompt for candidate in found] == [PROMPT] * 3
    assert {candidate.strategy for candidate in found} == {"null"}


async def test_llm_reads_json_and_rejects_drift() -> None:
    good = QUESTION + " Please name the risks."
    parrot = Parrot(
        "Sure! " + json.dumps({"prompt": good}),
        json.dumps({"prompt": "How tall is a giraffe?"}),
        "I cannot do that.",
    )
    found = await LlmRewriter(parrot, "chat-model").propose(context(), 3)
    assert [candidate.rejected for candidate in found] == [None, "drift", "drift"]
    assert found[0].prompt == (*PROMPT[:-1], Message("user", good))
    (request,) = parrot.requests
    assert request.sampling.n == 3
    assert request.model == "chat-model"
    assert json.dumps(QUESTION) in request.prompt[-1].content
    assert "harmless and truthful" in request.prompt[0].content


async def test_llm_gives_equal_answers_once() -> None:
    answer = json.dumps({"prompt": QUESTION})
    assert len(await LlmRewriter(Parrot(answer, answer)).propose(context(), 2)) == 1


async def test_llm_tells_a_lost_model_from_a_request_it_refuses() -> None:
    lost = Parrot(failure=Failure("generation_failed", "gone", True))
    with pytest.raises(GenerationError):
        await LlmRewriter(lost).propose(context(), 2)
    refused = Parrot(failure=Failure("context_length_exceeded", "too long", False))
    (candidate,) = await LlmRewriter(refused).propose(context(), 2)
    assert candidate.rejected == "context_length_exceeded"


def test_every_strategy_of_the_settings_is_built() -> None:
    rewriters = build_rewriters(Parrot())
    assert {name: rewriter.name for name, rewriter in rewriters.items()} == {
        name: name for name in ("compose", "llm", "null")
    }


@pytest.mark.parametrize(
    ("rewritten", "kept"),
    [
        (f"Be kind.\n\n{QUESTION}", True),
        (QUESTION.upper().replace(" ", "  "), True),
        ("Does it matter if I do not add 2 spoons of sugar, and why does bread rise safely?", True),
        ("Does it matter if I add 2 spoons of sugar, and why does bread rise?", False),
        ("Does it matter if I do not add 3 spoons of sugar, and why does bread rise?", False),
        ("Tell me about bread.", False),
        ("", False),
    ],
)
def test_preserving_the_question(rewritten: str, kept: bool) -> None:
    assert preserves_question(QUESTION, rewritten) is kept


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ('{"prompt": "Why?"}', "Why?"),
        ('```json\n{"prompt": " Why? "}\n```', "Why?"),
        ('{"note": 1} {"prompt": "Why?"}', "Why?"),
        ('{"prompt": ""}', None),
        ('{"prompt": 3}', None),
        ('{"prompt": "\\ud800"}', None),
        ('{"prompt": "Why?', None),
        ("{" * 3000, None),
        ("", None),
    ],
)
def test_parsing_a_rewrite(answer: str, prompt: str | None) -> None:
    assert parse_rewrite(answer) == prompt
