"""The experiment's second scorer: held-out answers before heads nothing was trained against.

Where an arm pleases the scorer it was trained against and not this one, it has learned the scorer.
Rewards are z with the base's answers of all seeds as pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.experiment_arms import BASE, Design, stored_answers
from benchmarks.experiment_cells import Cells
from benchmarks.stack import prepared_model, running
from mora_serve.client import Client
from mora_serve.config import load_settings
from mora_serve.errors import MoraError
from mora_serve.evaluation import Answer, VersionSample
from mora_serve.identity import content_hash
from mora_serve.pool_statistics import robust_scale
from mora_serve.preference_pairs import score_rows
from mora_serve.version_sampling import sample_of

Json = dict[str, Any]


def judge(
    cells: Cells, design: Design, heads: Path, note: Callable[[str], None]
) -> dict[str, list[VersionSample]]:
    """The same answers scored by other heads; what is scored already is a cell."""
    file = heads / "heads.safetensors"
    if not file.is_file():
        raise MoraError(f"--judge-heads must be a directory of heads, got {heads}")
    name = content_hash({file.name: file.read_bytes().hex()})[:12]
    places = {
        (seed, arm): f"seed-{seed}/judge-{name}-{arm}"
        for seed in design.seeds
        for arm in (BASE, *design.arms)
    }
    missing = [place for place, cell in places.items() if not cells.has(cell)]
    if missing:
        with _judging(heads) as client:
            for seed, arm in missing:
                note(f"seed {seed}: answers of {arm} before the second scorer")
                raw = second_scores(client, stored_answers(cells, seed, arm))
                cells(places[seed, arm], partial(dict, raw=raw))
    raws = {place: cells.read(cell)["raw"] for place, cell in places.items()}
    scale = _pool_scale([raws[seed, BASE] for seed in design.seeds])

    def sample(seed: int, arm: str) -> VersionSample:
        found = sample_of(arm, stored_answers(cells, seed, arm), None)
        return with_scores(found, raws[seed, arm], scale, name)

    return {arm: [sample(seed, arm) for seed in design.seeds] for arm in (BASE, *design.arms)}


@contextmanager
def _judging(heads: Path) -> Iterator[Client]:
    """A stack that scores with other heads and samples nothing."""
    settings = load_settings("embedded")
    path = str(prepared_model())
    scorer = {
        "name": "judge", "backend": "heads", "dimensions": list(settings.dimensions),
        "heads": str(heads.resolve()), "model": path,
    }  # fmt: skip
    overrides = {
        "policy": {"backend": "fake", "path": path},
        "scorers": [scorer],
        "method": {"calibrator": "identity"},
    }
    with running("embedded", overrides) as stack:
        yield Client(stack.url)


def second_scores(client: Client, data: Sequence[Json]) -> list[list[dict[str, float | None]]]:
    """Raw rewards by prompt, answer and dimension; ``None`` where a score is not valid."""
    rows = [(item["prompt"], roll["text"]) for item in data for roll in item["rollouts"] or []]
    flat: dict[int, dict[str, float | None]] = {
        index: {k: score.raw if score.status == "ok" else None for k, score in scores.items()}
        for index, scores in score_rows(client, rows)
    }
    ordered = iter([flat[index] for index in range(len(rows))])
    return [[next(ordered) for _ in item["rollouts"] or []] for item in data]


def _pool_scale(pools: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """Median and robust scale of the base's rewards by dimension, all seeds together."""
    import numpy as np

    rewards: dict[str, list[float]] = {}
    for row in (row for pool in pools for prompt in pool for row in prompt):
        for name, value in row.items():
            if value is not None:
                rewards.setdefault(name, []).append(value)
    return {name: robust_scale(np.array(values), name) for name, values in rewards.items()}


def with_scores(
    sample: VersionSample,
    raw: Sequence[Sequence[Mapping[str, float | None]]],
    scale: Mapping[str, tuple[float, float]],
    revision: str,
) -> VersionSample:
    """The sample with other scores in place of its own."""
    prompts = []
    for prompt, rows in zip(sample.prompts, raw, strict=True):
        answers = []
        for answer, row in zip(prompt.answers, rows, strict=True):
            z = {k: (v - scale[k][0]) / scale[k][1] for k, v in row.items() if v is not None}
            answers.append(Answer(z, {}, answer.num_tokens, answer.is_cut))
        prompts.append(replace(prompt, answers=tuple(answers)))
    return VersionSample(sample.name, tuple(prompts), dict.fromkeys(scale, ("judge", revision)))
