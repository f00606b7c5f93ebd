"""Drawing one policy version's scored answers to a list of prompts through the REST API.

Every version gets the same prompts with the same seeds, one round of exactly ``n`` answers each, so
that nothing but the version differs. An engine that holds one set of weights at a time (CPU, where
adapters are merged) samples the current version only: :class:`Served` makes a version current for
as long as it is sampled, when it is allowed to, and puts the former one back. An answer of another
version than the one asked for ends the evaluation: versions are never mixed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from mora_serve.answers import ApiError
from mora_serve.calibration import Calibrator
from mora_serve.client import Client
from mora_serve.errors import MoraError
from mora_serve.evaluation import Answer, PromptSample, VersionSample
from mora_serve.types import Dimension

Json = dict[str, Any]

PROMPTS_PER_REQUEST = 64
SEED_STRIDE = 1_000_003
"""Between the seeds of two requests of one evaluation; the engine adds the prompt's place."""
MAX_ATTEMPTS = 3
"""How often a prompt is asked for whose infrastructure failed."""
ACTIVATION_TIMEOUT_S = 300.0
FIRST_POLL_S, LAST_POLL_S = 0.02, 1.0
"""Pauses between two looks at what is served; they double."""
Z_TOLERANCE = 1e-6


@dataclass(frozen=True, slots=True)
class SamplingPlan:
    """How every version is sampled; ``None`` is the server's default."""

    n: int = 8
    seed: int = 0
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None

    def body(self, prompts: Sequence[Any], model: str, start: int) -> Json:
        """The request for ``prompts``, which begin at place ``start`` of the whole list."""
        optional = {
            "temperature": self.temperature, "top_p": self.top_p, "max_tokens": self.max_tokens
        }  # fmt: skip
        return {
            "prompts": list(prompts),
            "model": model,
            "n": self.n,
            "n_max": self.n,
            "seed": self.seed * SEED_STRIDE + start,
            "include_rollouts": True,
            "stream": True,
            **{name: value for name, value in optional.items() if value is not None},
        }


class Served:
    """Versions of a server, made current one after the other where only that serves them.

    A context manager: on leaving, the version that was current at first is current again.
    """

    def __init__(
        self,
        client: Client,
        *,
        activate: bool,
        note: Callable[[str], None] = lambda text: None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._client = client
        self._activate = activate
        self._note = note
        self._clock = clock
        self._sleep = sleep
        self._original: str | None = None
        self._current: str | None = None

    def __enter__(self) -> Self:
        models = self._client.get("/v1/models")["data"]
        current = [model["id"] for model in models if model.get("current")]
        self._original = self._current = str(current[0]) if current else None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._original is not None and self._current != self._original:
            self._make_current(self._original)

    def require(self, version: str) -> None:
        """Return when ``version`` can be sampled; raises :class:`MoraError` when it cannot be."""
        if self._is_served(version):
            return
        if not self._activate:
            raise MoraError(
                f"--policy must name versions that can be sampled, got {version}; where the engine "
                "holds one set of weights at a time, --activate makes each version the current one "
                "while it is sampled"
            )
        self._make_current(version)

    def _make_current(self, version: str) -> None:
        self._note(f"making {version} the current version")
        self._client.post(f"/v1/models/{version}/activate")
        self._current = version
        deadline, pause_s = self._clock() + ACTIVATION_TIMEOUT_S, FIRST_POLL_S
        while not self._is_served(version):
            if self._clock() > deadline:
                raise MoraError(f"{version} was not served within {ACTIVATION_TIMEOUT_S:g} s")
            self._sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_POLL_S)

    def _is_served(self, version: str) -> bool:
        try:
            self._client.get(f"/v1/models/{version}")
        except ApiError as error:
            if error.status == 404:
                return False
            raise
        return True


def draw(
    client: Client,
    version: str,
    prompts: Sequence[Any],
    plan: SamplingPlan,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Json]:
    """Diagnostics with rollouts of all prompts under ``version``, in order.

    ``progress`` is told how many prompts came back. Raises :class:`MoraError` when another version
    answered, or when prompts did not come back.
    """
    found: dict[int, Json] = {}
    for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
        places = range(start, min(start + PROMPTS_PER_REQUEST, len(prompts)))
        for _ in range(MAX_ATTEMPTS):
            body = plan.body([prompts[place] for place in places], version, start)
            for item in client.ndjson("POST", "/v1/diagnostics", body):
                if item.get("object") == "diagnostic":
                    found[start + item["index"]] = _of_version(item, version)
                    progress(len(found))
            if not any(_is_retryable(found.get(place)) for place in places):
                break
    if len(found) != len(prompts):
        raise MoraError(f"{len(found)} of {len(prompts)} prompts came back from {version}")
    return [{**found[index], "index": index} for index in range(len(prompts))]


def _of_version(item: Json, version: str) -> Json:
    if item["status"] == "ok" and item["policy_version"] != version:
        raise MoraError(
            f"asked for {version} but {item['policy_version']} answered; versions must not change "
            "while they are evaluated"
        )
    return item


def _is_retryable(item: Json | None) -> bool:
    """Whether a prompt has no answer for a reason that may pass."""
    error = None if item is None else item["error"]
    return item is None or (error is not None and error["type"] == "server_error")


def sample_of(
    name: str, diagnostics: Sequence[Json], calibrator: Calibrator | None
) -> VersionSample:
    """What the statistics need of one version's diagnostics.

    Raises :class:`MoraError` when scores of one dimension come from several revisions, or when
    ``calibrator`` is not the one that made their z.
    """
    scorers: dict[Dimension, tuple[str, str]] = {}
    prompts = []
    for item in diagnostics:
        rollouts = item["rollouts"] or []
        for rollout in rollouts:
            _take_scorers(scorers, rollout["scores"])
        label = str(item["class"] or "unknown") if item["status"] == "ok" else "failed"
        answers = tuple(_answer(rollout, calibrator) for rollout in rollouts)
        prompts.append(PromptSample(item["prompt_id"], answers, label))
    if not scorers:
        raise MoraError(f"{name} has no scored answer: every prompt failed; see its diagnostics")
    return VersionSample(name, tuple(prompts), scorers)


def _take_scorers(scorers: dict[Dimension, tuple[str, str]], scores: Mapping[str, Json]) -> None:
    for name, score in scores.items():
        scorer = (score["model"], score["revision"])
        if scorers.setdefault(name, scorer) != scorer:
            raise MoraError(
                f"all answers must be scored on {name} by one revision, got {scorers[name]} and "
                f"{scorer}; evaluate again"
            )


def _answer(rollout: Json, calibrator: Calibrator | None) -> Answer:
    values, percents = {}, {}
    for name, score in rollout["scores"].items():
        if score["status"] != "ok" or score["value"] is None:
            continue
        values[name] = float(score["value"])
        if calibrator is not None:
            _require_same_z(calibrator, name, score)
            percents[name] = calibrator[name].pool_quantile(values[name])
    cut = rollout["finish_reason"] == "length"
    return Answer(values, percents, int(rollout["num_tokens"] or 0), cut)


def _require_same_z(calibrator: Calibrator, name: Dimension, score: Json) -> None:
    if name in calibrator.dimensions and score["raw"] is not None:
        expected = calibrator[name].z(float(score["raw"]))
        if abs(expected - score["value"]) <= Z_TOLERANCE * max(1.0, abs(expected)):
            return
    raise MoraError(
        f"--calibrator must be the one that the server uses, got one that disagrees on {name}"
    )
