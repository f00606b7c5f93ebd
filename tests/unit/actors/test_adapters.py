"""Ports over Serve handles: chunks, retries, cancellation, and what Ray's errors become."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Sequence
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, WorkerCrashedError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from actors import adapters
from actors.adapters import ServeGenerator, ServeScorer, Tries, translate
from mora_serve.errors import (
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ScoringError,
)
from mora_serve.fakes import FakeGenerator, FakeScorer
from mora_serve.types import Failure, Generation, GenerationRequest, Message, Sampling, ScoreGroup
from tests.unit.actors.serve_stand_in import Handle


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapters, "FIRST_BACKOFF_S", 0.0)


def request(text: str = "Hi") -> GenerationRequest:
    return GenerationRequest((Message("user", text),), Sampling(n=1, seed=1))


def group(text: str = "Hi") -> ScoreGroup:
    return ScoreGroup((Message("user", text),), ("yes", "no"))


def lost() -> Exception:
    error: Exception = ActorUnavailableError("the actor is unavailable", None)
    return error


def broken() -> Exception:
    error: Exception = raised_remotely(ValueError("a bug"))
    return error


def raised_remotely(cause: Exception) -> RayTaskError:
    return RayTaskError("generate", "traceback", cause, proctitle="x", pid=1, ip="x")


def port(handle: Handle, **options: Any) -> ServeGenerator:
    return ServeGenerator(cast(Any, handle), **options)


async def test_a_list_is_cut_into_chunks_and_comes_back_in_order() -> None:
    handle = Handle(FakeGenerator())
    requests = [request(f"Question {index}") for index in range(5)]
    results = await port(handle, chunk=2).generate(requests)
    assert [len(args[0]) for _, args in handle.calls] == [2, 2, 1]
    assert results == await FakeGenerator().generate(requests)


async def test_a_replica_that_fails_is_tried_again() -> None:
    handle = Handle(FakeGenerator(), [broken(), broken()])
    (result,) = await port(handle, tries=Tries(3)).generate([request()])
    assert isinstance(result, Generation)
    assert len(handle.calls) == 3


async def test_the_retry_budget_is_kept() -> None:
    handle = Handle(FakeGenerator(), [broken(), broken(), broken()])
    with pytest.raises(GenerationError) as caught:
        await port(handle, tries=Tries(2)).generate([request()])
    assert not caught.value.lost
    assert len(handle.calls) == 2


@pytest.mark.parametrize("repeats", [0, 1])
async def test_a_call_under_which_replicas_end_is_repeated_as_often_as_allowed(
    repeats: int,
) -> None:
    handle = Handle(FakeGenerator(), [lost() for _ in range(5)])
    with pytest.raises(GenerationError) as caught:
        await port(handle, tries=Tries(5, lost_repeats=repeats)).generate([request()])
    assert caught.value.lost
    assert len(handle.calls) == 1 + repeats


async def test_a_caller_who_waits_does_not_see_that_one_replica_was_lost() -> None:
    handle = Handle(FakeGenerator(), [lost()])
    (result,) = await port(handle).generate([request()])
    assert isinstance(result, Generation)


@pytest.mark.parametrize(
    "error", [ActorDiedError(), ActorUnavailableError("away", None), WorkerCrashedError()]
)
def test_the_end_of_a_process_under_a_call_is_told_apart(error: Exception) -> None:
    for cause in (error, raised_remotely(error)):
        translated = translate(cause, GenerationError)
        assert isinstance(translated, GenerationError)
        assert translated.lost
    assert not translate(ValueError(), GenerationError).lost  # type: ignore[attr-defined]


def test_an_engine_that_died_inside_its_replica_stays_lost_on_its_way() -> None:
    error = pickle.loads(pickle.dumps(GenerationError("the engine died", lost=True)))
    translated = translate(raised_remotely(error), GenerationError)
    assert isinstance(translated, GenerationError)
    assert (translated.lost, str(translated)) == (True, "the engine died")


def test_a_deployment_without_any_replica_is_overload_and_not_loss() -> None:
    missing = DeploymentUnavailableError(DeploymentID("generator", "mora"))
    assert isinstance(translate(missing, GenerationError), OverloadedError)


async def test_a_request_at_fault_is_not_tried_again() -> None:
    error = InvalidRequestError("n must be at least 1, got 0", "n", "out_of_range")
    handle = Handle(FakeGenerator(), [raised_remotely(error)])
    with pytest.raises(InvalidRequestError) as caught:
        await port(handle).generate([request()])
    assert caught.value is error
    assert len(handle.calls) == 1


async def test_a_full_queue_is_not_tried_again() -> None:
    handle = Handle(FakeGenerator(), [BackPressureError(4, 4, 503, 2.5)])
    with pytest.raises(OverloadedError) as caught:
        await port(handle).generate([request()])
    assert caught.value.retry_after_s == 2.5
    assert len(handle.calls) == 1


def test_foreign_messages_are_never_repeated() -> None:
    error = translate(raised_remotely(ValueError("my secret prompt")), ScoringError)
    assert type(error) is ScoringError
    assert "secret" not in str(error)


class Waiting:
    """Answers nothing until it is released."""

    def __init__(self) -> None:
        self.started = asyncio.Event()

    async def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation | Failure]:
        self.started.set()
        await asyncio.Event().wait()
        raise AssertionError


async def test_cancelling_the_call_cancels_it_on_the_replica() -> None:
    target = Waiting()
    handle = Handle(target)
    call = asyncio.create_task(port(handle, chunk=1).generate([request(), request()]))
    await target.started.wait()
    await asyncio.sleep(0)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    assert [response.was_cancelled for response in handle.responses] == [True, True]


async def test_the_first_error_cancels_the_other_chunks() -> None:
    error = raised_remotely(NotFoundError("no such model"))
    handle = Handle(Waiting(), [error])
    with pytest.raises(NotFoundError):
        await port(handle, chunk=1).generate([request(), request()])
    assert handle.responses[1].was_cancelled


async def test_a_stream_passes_deltas_and_frees_the_replica_when_left() -> None:
    handle = Handle(FakeGenerator())
    stream = port(handle).stream(request())
    first = await anext(stream)
    assert first.text
    await cast(Any, stream).aclose()
    assert handle.responses[0].was_cancelled


async def test_a_lost_replica_ends_a_stream_with_our_error() -> None:
    with pytest.raises(GenerationError):
        await anext(port(Handle(FakeGenerator(), [lost()])).stream(request()))


def scorers(**failures: list[Exception]) -> tuple[dict[str, Handle], ServeScorer]:
    handles = {
        "one": Handle(FakeScorer(("helpful", "harmless")), failures.get("one")),
        "two": Handle(FakeScorer(("truthful",)), failures.get("two")),
    }
    return handles, ServeScorer(cast(Any, handles), chunk=2)


async def test_scores_of_several_deployments_are_merged() -> None:
    _, scorer = scorers()
    groups = [group(f"Question {index}") for index in range(5)]
    assert await scorer.score(groups) == await FakeScorer().score(groups)


async def test_only_the_deployments_that_serve_a_dimension_are_asked() -> None:
    handles, scorer = scorers()
    await scorer.dimensions()
    rows = await scorer.score([group()], ["truthful"])
    assert set(rows[0][0]) == {"truthful"}
    assert [name for name, _ in handles["one"].calls] == ["dimensions"]


async def test_an_unknown_dimension_is_refused_by_name() -> None:
    _, scorer = scorers()
    with pytest.raises(InvalidRequestError) as caught:
        await scorer.score([group()], ["brief"])
    assert (caught.value.param, caught.value.code) == ("dimensions", "unknown_dimension")


async def test_a_scorer_that_stays_away_fails_the_call() -> None:
    _, scorer = scorers()
    await scorer.dimensions()
    handles, scorer = scorers(two=[broken()] * 9)
    with pytest.raises(ScoringError):
        await scorer.score([group()])
    assert len(handles["two"].calls) == adapters.DEFAULT_TRIES
