"""Scored groups from plain numbers, and a service over the fakes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mora_serve.config import Settings, load_settings
from mora_serve.fakes import FakeGenerator, FakeScorer, fake_calibrator
from mora_serve.service import MoraService
from mora_serve.types import Completion, Message, Rollout, Score, ScoredGroup


def scored(
    columns: Mapping[str, Sequence[float | None]],
    *,
    texts: Sequence[str] | None = None,
    tokens: Sequence[int] | None = None,
) -> ScoredGroup:
    """A calibrated group; ``columns[dimension][r]`` is z of rollout ``r``, None a failed score."""
    count = len(next(iter(columns.values())))
    return ScoredGroup(
        "prompt",
        (Message("user", "Why?"),),
        "base",
        tuple(
            Rollout(
                index,
                Completion(
                    texts[index] if texts else f"answer {index}",
                    "stop",
                    tokens[index] if tokens else 10,
                ),
                {name: z_score(column[index]) for name, column in columns.items()},
            )
            for index in range(count)
        ),
    )


def z_score(value: float | None) -> Score:
    if value is None:
        return Score("failed", None, None, "broken", "model", "rev")
    return Score("ok", value, value, None, "model", "rev")


def settings(**overrides: Any) -> Settings:
    return load_settings("fake", overrides=overrides, environ={})


def service(
    generator: FakeGenerator | None = None,
    scorer: FakeScorer | None = None,
    **overrides: Any,
) -> MoraService:
    configured = settings(**overrides)
    return MoraService(
        generator or FakeGenerator(),
        scorer or FakeScorer(configured.dimensions),
        fake_calibrator(configured.dimensions),
        configured,
    )
