"""What every generator must do, whatever engine is behind it.

``GENERATOR_CHECKS`` holds the checks; a suite runs each over its own generator::

    @pytest.mark.parametrize("check", GENERATOR_CHECKS, ids=lambda check: check.__name__)
    async def test_contract(check, generator):
        await check(generator, max_model_len=1024)
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Awaitable, Sequence
from typing import Protocol

import pytest

from mora_serve.errors import InvalidRequestError, NotFoundError
from mora_serve.ports import CompletionDelta, Generator
from mora_serve.types import Failure, Generation, GenerationRequest, Message, Messages, Sampling


class GeneratorCheck(Protocol):
    """One property; ``max_model_len`` is the context length in tokens."""

    __name__: str

    def __call__(self, generator: Generator, *, max_model_len: int) -> Awaitable[None]: ...


def user(text: str) -> Messages:
    return (Message("user", text),)


def asking(
    text: str, *, n: int = 1, max_tokens: int = 8, seed: int | None = 1, temperature: float = 1.0
) -> GenerationRequest:
    sampling = Sampling(n=n, max_tokens=max_tokens, seed=seed, temperature=temperature)
    return GenerationRequest(user(text), sampling)


async def generated(
    generator: Generator, requests: Sequence[GenerationRequest]
) -> list[Generation]:
    """Results of requests that must all succeed."""
    results = await generator.generate(requests)
    for result in results:
        assert isinstance(result, Generation), result
    return [result for result in results if isinstance(result, Generation)]


async def one_result_per_request_in_order(generator: Generator, *, max_model_len: int) -> None:
    counts = [3, 1, 2]
    requests = [asking(f"Name {n} colours.", n=n) for n in counts]
    results = await generated(generator, requests)
    assert [len(result.completions) for result in results] == counts


async def an_empty_list_gives_an_empty_list(generator: Generator, *, max_model_len: int) -> None:
    assert await generator.generate([]) == []


async def samples_of_one_request_differ(generator: Generator, *, max_model_len: int) -> None:
    (result,) = await generated(generator, [asking("Tell me a story.", n=4, max_tokens=24)])
    assert len({completion.text for completion in result.completions}) > 1


async def greedy_samples_are_equal(generator: Generator, *, max_model_len: int) -> None:
    request = asking("Name a colour.", n=2, temperature=0.0)
    (result,) = await generated(generator, [request])
    assert result.completions[0].text == result.completions[1].text


async def completions_respect_max_tokens_and_say_when_cut(
    generator: Generator, *, max_model_len: int
) -> None:
    request = asking("Write a long essay about the sea.", n=4, max_tokens=5)
    (result,) = await generated(generator, [request])
    for completion in result.completions:
        assert 0 < completion.num_tokens <= 5
        assert completion.finish_reason in ("stop", "length")
    assert any(completion.finish_reason == "length" for completion in result.completions)


async def usage_counts_prompt_tokens(generator: Generator, *, max_model_len: int) -> None:
    short, long = await generated(generator, [asking("Hi."), asking("Hi there. " * 20)])
    assert 0 < short.num_prompt_tokens < long.num_prompt_tokens
    assert 0 <= short.num_cached_tokens <= short.num_prompt_tokens


async def a_prompt_over_the_context_fails_alone(
    generator: Generator, *, max_model_len: int
) -> None:
    requests = [asking("Name a colour."), asking("word " * 2 * max_model_len), asking("Hello.")]
    first, second, third = await generator.generate(requests)
    assert isinstance(second, Failure)
    assert second.code == "context_length_exceeded"
    assert not second.retryable
    assert "word word" not in second.message
    assert isinstance(first, Generation)
    assert isinstance(third, Generation)


async def an_unknown_model_fails_alone(generator: Generator, *, max_model_len: int) -> None:
    unknown = GenerationRequest(user("Hello."), Sampling(n=1, max_tokens=4), "no-such-model")
    first, second = await generator.generate([unknown, asking("Hello.")])
    assert isinstance(first, Failure)
    assert first.code == "model_not_found"
    assert not first.retryable
    assert isinstance(second, Generation)


async def the_current_version_is_first_and_the_default(
    generator: Generator, *, max_model_len: int
) -> None:
    models = await generator.models()
    assert models
    assert len(set(models)) == len(models)
    (result,) = await generated(generator, [asking("Hello.")])
    assert result.policy_version == models[0]


async def every_listed_version_can_be_asked_for(
    generator: Generator, *, max_model_len: int
) -> None:
    models = await generator.models()
    requests = [GenerationRequest(user("Hi."), Sampling(n=1, max_tokens=4), m) for m in models]
    results = await generated(generator, requests)
    assert [result.policy_version for result in results] == models


async def stop_strings_end_a_completion(generator: Generator, *, max_model_len: int) -> None:
    sampling = Sampling(n=4, max_tokens=24, seed=3, stop=("e",))
    request = GenerationRequest(user("Tell me a story."), sampling)
    (result,) = await generated(generator, [request])
    assert all("e" not in completion.text for completion in result.completions)


async def results_survive_pickling(generator: Generator, *, max_model_len: int) -> None:
    (result,) = await generated(generator, [asking("Hello.", n=2)])
    assert pickle.loads(pickle.dumps(result)) == result


async def a_stream_ends_each_completion_once_with_its_counts(
    generator: Generator, *, max_model_len: int
) -> None:
    deltas = [delta async for delta in generator.stream(asking("Name colours.", n=2))]
    last = {delta.index: delta for delta in deltas if delta.finish_reason is not None}
    assert sorted(last) == [0, 1]
    assert sum(delta.finish_reason is not None for delta in deltas) == 2
    for delta in last.values():
        assert 0 < delta.num_tokens <= 8
        assert delta.num_prompt_tokens > 0
        assert delta.policy_version == (await generator.models())[0]


async def a_greedy_stream_joins_to_the_generated_text(
    generator: Generator, *, max_model_len: int
) -> None:
    request = asking("Name a colour.", temperature=0.0)
    (result,) = await generated(generator, [request])
    text = "".join([delta.text async for delta in generator.stream(request)])
    assert text == result.completions[0].text


async def a_stream_refuses_what_a_call_would_fail(
    generator: Generator, *, max_model_len: int
) -> None:
    with pytest.raises(InvalidRequestError):
        await _drain(generator, asking("word " * 2 * max_model_len))
    unknown = GenerationRequest(user("Hi."), Sampling(n=1, max_tokens=4), "no-such-model")
    with pytest.raises(NotFoundError):
        await _drain(generator, unknown)


async def a_cancelled_call_leaves_the_generator_usable(
    generator: Generator, *, max_model_len: int
) -> None:
    call = asyncio.ensure_future(generator.generate([asking("Write an essay.", max_tokens=64)]))
    await asyncio.sleep(0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)
    assert await generated(generator, [asking("Hello.")])


async def an_abandoned_stream_leaves_the_generator_usable(
    generator: Generator, *, max_model_len: int
) -> None:
    stream = generator.stream(asking("Write an essay.", max_tokens=64))
    async for _ in stream:
        break
    close = getattr(stream, "aclose", None)
    if close is not None:
        await close()
    assert await generated(generator, [asking("Hello.")])


async def _drain(generator: Generator, request: GenerationRequest) -> list[CompletionDelta]:
    return [delta async for delta in generator.stream(request)]


GENERATOR_CHECKS: tuple[GeneratorCheck, ...] = (
    one_result_per_request_in_order,
    an_empty_list_gives_an_empty_list,
    samples_of_one_request_differ,
    greedy_samples_are_equal,
    completions_respect_max_tokens_and_say_when_cut,
    usage_counts_prompt_tokens,
    a_prompt_over_the_context_fails_alone,
    an_unknown_model_fails_alone,
    the_current_version_is_first_and_the_default,
    every_listed_version_can_be_asked_for,
    stop_strings_end_a_completion,
    results_survive_pickling,
    a_stream_ends_each_completion_once_with_its_counts,
    a_greedy_stream_joins_to_the_generated_text,
    a_stream_refuses_what_a_call_would_fail,
    a_cancelled_call_leaves_the_generator_usable,
    an_abandoned_stream_leaves_the_generator_usable,
)
