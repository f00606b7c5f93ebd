"""Rewriting strategies: propose prompts that keep the original question and add missing intents.

``compose`` writes a wish beside the question from the templates in :mod:`mora_serve.templates`,
naming the missing dimensions and those to keep, and needs no model. ``llm`` asks a chat model for a
rewritten prompt as JSON; an answer that cannot be read, or that lost the question, is proposed as
rejected with reason ``drift``. ``null`` proposes the prompt unchanged: the control whose acceptance
rate says how often chance is taken for a gain. All change the last turn only. Measuring candidates
is the flow's.
"""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from mora_serve.errors import GenerationError
from mora_serve.identity import content_hash
from mora_serve.ports import Candidate, Generator, RewriteContext, Rewriter
from mora_serve.templates import FRAMES, qualities, wanted_answer
from mora_serve.types import Failure, GenerationRequest, Message, Messages, Sampling

DRIFT: Final = "drift"
"""Rejection of a candidate that lost the original question or cannot be read."""
MIN_RECALL: Final = 0.8
"""Share of the question's content words that a rewrite must keep when it is not verbatim."""
LLM_MAX_TOKENS: Final = 256
LLM_TEMPERATURE: Final = 0.9


class ComposeRewriter:
    """Deterministic templates; the original question stays verbatim, in a paragraph of its own."""

    name = "compose"

    async def propose(self, context: RewriteContext, num_candidates: int) -> list[Candidate]:
        """Distinct combinations of frame and adjectives, drawn by ``context.seed``."""
        question = context.prompt[-1].content
        rng = random.Random(f"{context.seed}/{content_hash(question)}")
        named = (*context.present, *context.missing)
        orders = {k: _shuffled(qualities(k), rng) for k in named}
        frames = _shuffled(FRAMES, rng)
        found: dict[str, Candidate] = {}
        for index in range(num_candidates * len(FRAMES)):
            turn, place = divmod(index, len(frames))
            frame = frames[place]
            # The turn is added so that every frame meets every adjective before one comes again.
            words = {k: order[(turn + place) % len(order)] for k, order in orders.items()}
            answer = wanted_answer(
                [words[k] for k in context.present], [words[k] for k in context.missing]
            )
            text = frame.format(question=question, answer=answer)
            template_hash = content_hash({"strategy": self.name, "frame": frame, "answer": answer})
            prompt = _with_last(context.prompt, text)
            found.setdefault(text, Candidate(prompt, self.name, template_hash, context.missing))
            if len(found) == num_candidates:
                break
        return list(found.values())


class NullRewriter:
    """The control: the unchanged prompt, once per candidate asked for."""

    name = "null"

    async def propose(self, context: RewriteContext, num_candidates: int) -> list[Candidate]:
        """Equal candidates: the exception to distinctness, since each is measured by itself."""
        template_hash = content_hash({"strategy": self.name})
        candidate = Candidate(context.prompt, self.name, template_hash, context.missing)
        return [candidate] * num_candidates


class LlmRewriter:
    """Asks ``generator`` (a chat model, ``model`` or its current version) for rewrites as JSON."""

    name = "llm"

    def __init__(self, generator: Generator, model: str | None = None) -> None:
        self._generator = generator
        self._model = model

    async def propose(self, context: RewriteContext, num_candidates: int) -> list[Candidate]:
        """One candidate per sampled answer, equal ones once; unreadable ones are ``drift``.

        A request the model refuses (too long for it) is one candidate rejected with its code.
        Raises :class:`~mora_serve.errors.GenerationError` when the model cannot be reached.
        """
        sampling = Sampling(
            n=num_candidates, temperature=LLM_TEMPERATURE, max_tokens=LLM_MAX_TOKENS,
            seed=context.seed,
        )  # fmt: skip
        request = GenerationRequest(rewrite_instruction(context), sampling, self._model)
        result = (await self._generator.generate([request]))[0]
        template_hash = content_hash({"strategy": self.name, "instruction": _INSTRUCTION})
        if isinstance(result, Failure):
            if result.retryable:
                raise GenerationError(f"the rewriter gave no answer: {result.message}")
            refused = Candidate(context.prompt, self.name, template_hash, context.missing)
            return [replace(refused, rejected=result.code)]
        found: dict[str, Candidate] = {}
        question = context.prompt[-1].content
        for completion in result.completions:
            text = parse_rewrite(completion.text)
            drifted = text is None or not preserves_question(question, text)
            prompt = context.prompt if text is None else _with_last(context.prompt, text)
            candidate = Candidate(prompt, self.name, template_hash, context.missing)
            if drifted:
                candidate = replace(candidate, rejected=DRIFT)
            found.setdefault(text or "", candidate)
        return list(found.values())


def build_rewriters(generator: Generator, model: str | None = None) -> Mapping[str, Rewriter]:
    """The strategies by name; ``generator`` and ``model`` are what ``llm`` asks."""
    strategies = (ComposeRewriter(), NullRewriter(), LlmRewriter(generator, model))
    return {strategy.name: strategy for strategy in strategies}


_INSTRUCTION: Final = (
    "You rewrite a question so that a good answer must also be {missing}. Keep every word of the "
    "original question and add to it. Answer with one JSON object and nothing else, in the form "
    '{{"prompt": "the rewritten question"}}.'
)


def rewrite_instruction(context: RewriteContext) -> Messages:
    """The conversation that asks a model for one rewrite of the context's last turn."""
    missing = " and ".join(context.missing)
    question = json.dumps(context.prompt[-1].content, ensure_ascii=False)
    return (
        Message("system", _INSTRUCTION.format(missing=missing)),
        Message("user", f"Original question: {question}"),
    )


def parse_rewrite(text: str) -> str | None:
    """The non-empty ``prompt`` of the first JSON object in an answer; ``None`` without one."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"\{", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except (ValueError, RecursionError):
            continue
        prompt = value.get("prompt") if isinstance(value, dict) else None
        if isinstance(prompt, str) and prompt.strip() and _encodable(prompt):
            return prompt.strip()
    return None


def preserves_question(original: str, rewritten: str) -> bool:
    """Whether a rewrite still asks the original question.

    True when it holds the original verbatim up to case and whitespace; else when it keeps at least
    ``MIN_RECALL`` of the content words, with all numbers and all negations.
    """
    before, after = _words(original), _words(rewritten)
    if " ".join(original.casefold().split()) in " ".join(rewritten.casefold().split()):
        return True
    kept = Counter(before) & Counter(after)
    must = [word for word in before if word.isdigit() or word in _NEGATIONS]
    if Counter(must) - kept:
        return False
    content = [word for word in before if word not in _FUNCTION_WORDS]
    if not content:
        return False
    return sum((Counter(content) & kept).values()) >= MIN_RECALL * len(content)


_NEGATIONS: Final = frozenset({"not", "no", "never", "without", "don't", "can't", "cannot"})
_FUNCTION_TEXT: Final = (
    "a an and are as at be by can do does for from how i in is it me my of on or please should "
    "so that the this to was what when where which who why will with would you your"
)
_FUNCTION_WORDS: Final = frozenset(_FUNCTION_TEXT.split())


def _words(text: str) -> list[str]:
    return re.findall(r"\d+|[^\W\d_]+(?:'[^\W\d_]+)?", text.casefold())


def _with_last(prompt: Messages, content: str) -> Messages:
    return (*prompt[:-1], Message("user", content))


def _shuffled(items: Sequence[str], rng: random.Random) -> list[str]:
    return rng.sample(list(items), len(items))


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
