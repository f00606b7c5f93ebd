"""An evaluation from the server to its files: sample every version, compare, measure KL, write.

::

    per version:  current where needed -> answers with scores -> answers-<place>.jsonl
    then:         statistics (mora_serve.evaluation) + KL (mora_serve.divergence)
                  -> evaluation.json, report.html
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from mora_serve import __version__
from mora_serve.bootstrap import CONFIDENCE, NUM_RESAMPLES
from mora_serve.calibration import Calibrator
from mora_serve.calibrators import SHIPPED, fake_calibrator
from mora_serve.client import Client
from mora_serve.divergence import DivergenceMeter, DivergenceSettings, RunCommand
from mora_serve.errors import MoraError
from mora_serve.evaluation import (
    Comparison,
    Evaluation,
    VersionSample,
    evaluate_versions,
)
from mora_serve.evaluation_page import write_page
from mora_serve.identity import content_hash
from mora_serve.types import Dimension
from mora_serve.version_sampling import SamplingPlan, Served, draw, sample_of

Json = dict[str, Any]


class View(Protocol):
    """What an evaluation tells a person while it runs."""

    def step(self, title: str) -> None: ...
    def progress(self, done: int, total: int, detail: str) -> None: ...
    def note(self, text: str) -> None: ...


@dataclass(frozen=True, slots=True)
class EvaluationOptions:
    """What is compared, and how."""

    policies: Sequence[str]
    """Versions; the first one is what the others are compared with."""
    prompts: Sequence[Any]
    """Held-out prompts: strings or message lists."""
    plan: SamplingPlan
    calibrator: Calibrator | None = None
    """``None`` takes a shipped one that belongs to the scorers, if there is one."""
    activate: bool = False
    reference: str | None = None
    """Version that KL refers to; ``None`` is the first one."""
    divergence: DivergenceSettings | None = None
    """``None`` measures no KL."""


def run_evaluation(
    client: Client,
    options: EvaluationOptions,
    directory: Path,
    view: View,
    run_command: RunCommand,
) -> Json:
    """Evaluate and write the files into ``directory``, which must exist; returns the JSON."""
    names = distinct(options.policies)
    meter = None
    if options.divergence is not None:
        reference = options.reference or options.policies[0]
        meter = DivergenceMeter(client, options.divergence, reference, directory, run_command)
        meter.fetch(options.policies)
    drawn = sample_all(client, options, names, view)
    for place, diagnostics in enumerate(drawn):
        write_lines(directory / f"answers-{place}.jsonl", diagnostics)
    calibrator, reason = _calibrator(options, names, drawn)
    samples = [sample_of(*item, calibrator) for item in zip(names, drawn, strict=True)]
    found = evaluate_versions(samples, options.plan.n, options.plan.seed)
    result = evaluation_json(found, samples, options.plan, calibrator)
    result["percent_missing"] = reason
    result["prompts_hash"] = content_hash(list(options.prompts))
    result["versions_kl"] = _divergences(meter, options, drawn, view)
    text = json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False)
    (directory / "evaluation.json").write_text(text + "\n", "utf-8")
    write_page(result, directory / "report.html")
    return result


def distinct(policies: Sequence[str]) -> list[str]:
    """Names of the versions; the second time, a version is ``name (2)``."""
    return [
        name if name not in policies[:place] else f"{name} ({policies[: place + 1].count(name)})"
        for place, name in enumerate(policies)
    ]


def sample_all(
    client: Client, options: EvaluationOptions, names: Sequence[str], view: View
) -> list[list[Json]]:
    """Diagnostics of every version, one version after the other."""
    drawn = []
    total = len(options.prompts)
    with Served(client, activate=options.activate, note=view.note) as served:
        for version, name in zip(options.policies, names, strict=True):
            view.step(f"Sampling {name}")
            served.require(version)
            progress: Callable[[int], None] = lambda done: view.progress(done, total, "")  # noqa: E731
            drawn.append(draw(client, version, options.prompts, options.plan, progress))
    return drawn


def write_lines(path: Path, rows: Sequence[Json]) -> None:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", "utf-8")


def _calibrator(
    options: EvaluationOptions, names: Sequence[str], drawn: Sequence[Sequence[Json]]
) -> tuple[Calibrator | None, str | None]:
    """The calibrator that gives percents, or why there is none."""
    scorers = sample_of(names[0], drawn[0], None).scorers
    if options.calibrator is not None:
        options.calibrator.check(scorers)
        return options.calibrator, None
    for known in shipped_calibrators(tuple(scorers)):
        try:
            known.check(scorers)
            sample_of(names[0], drawn[0], known)
        except MoraError:
            continue
        return known, None
    return None, "no shipped calibrator belongs to the server's scorers; give --calibrator"


def shipped_calibrators(dimensions: tuple[Dimension, ...]) -> list[Calibrator]:
    """Calibrators that come with the project: of the embedded heads and of the fakes."""
    with resources.as_file(resources.files("mora_serve").joinpath(SHIPPED)) as path:
        return [Calibrator.load(path), fake_calibrator(dimensions)]


def evaluation_json(
    found: Evaluation,
    samples: Sequence[VersionSample],
    plan: SamplingPlan,
    calibrator: Calibrator | None,
) -> Json:
    """The evaluation as plain JSON values; what was not measured is null."""
    return {
        "object": "evaluation",
        "version": __version__,
        "num_prompts": found.num_prompts,
        "sampling": asdict(plan),
        "confidence": CONFIDENCE,
        "num_resamples": NUM_RESAMPLES,
        "dimensions": list(found.dimensions),
        "scorers": {k: list(scorer) for k, scorer in samples[0].scorers.items()},
        "calibrator": None if calibrator is None else calibrator.version,
        "calibrator_length_slopes": None
        if calibrator is None
        else {k: calibrator[k].length_slope for k in found.dimensions},
        "versions": [asdict(item) for item in found.versions],
        "comparisons": [_comparison_json(item) for item in found.comparisons],
    }


def _comparison_json(item: Comparison) -> Json:
    changes = {k: {**asdict(v), "verdict": v.verdict} for k, v in item.changes.items()}
    return {**asdict(item), "changes": changes}


def _divergences(
    meter: DivergenceMeter | None,
    options: EvaluationOptions,
    drawn: Sequence[Sequence[Json]],
    view: View,
) -> list[Json | None]:
    """KL of every version in order; ``None`` where it was not asked for, or is the reference."""
    if meter is None:
        return [None] * len(drawn)
    found: list[Json | None] = []
    for version, diagnostics in zip(options.policies, drawn, strict=True):
        if version == meter.reference:
            found.append(None)
            continue
        view.step(f"Log-probabilities of the answers of {version}, its own and {meter.reference}'s")
        measured = meter.measure(version, diagnostics, options.plan.seed)
        found.append(asdict(measured))
    return found
