"""``mora-serve evaluate``: policy versions against each other on held-out prompts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from mora_serve.calibration import Calibrator
from mora_serve.cli.common import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    client_for,
    err,
    out,
    read_prompts,
    say,
    say_json,
)
from mora_serve.demo_view import ConsoleView
from mora_serve.divergence import DivergenceSettings
from mora_serve.errors import MoraError
from mora_serve.evaluation_run import EvaluationOptions, run_evaluation
from mora_serve.evaluation_tables import evaluation_tables
from mora_serve.processes import StopSignals
from mora_serve.stack import run_child
from mora_serve.version_sampling import SamplingPlan


def evaluate(
    *,
    policy: Annotated[
        list[str], typer.Option(help="A version; repeat it. The first is compared with.")
    ],
    prompts: Annotated[Path, typer.Option(help="Held-out prompts: JSONL with prompt, or text.")],
    split: Annotated[
        str | None, typer.Option(help="Only rows whose field split is this one.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first prompts.")] = None,
    n: Annotated[int, typer.Option("-n", min=1, max=256, help="Answers per prompt.")] = 8,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling and of intervals.")] = 0,
    temperature: Annotated[float | None, typer.Option(help="Default: the server's.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Default: the server's.")] = None,
    calibrator: Annotated[
        Path | None, typer.Option(help="The server's calibrator, for percents.")
    ] = None,
    activate: Annotated[
        bool, typer.Option(help="Make versions current in turn where the engine holds only one.")
    ] = False,
    reference: Annotated[
        str | None, typer.Option(help="Version that KL refers to; default: the first.")
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option(help="Directory of the base model: measures KL on this machine.")
    ] = None,
    directory: Annotated[
        Path | None, typer.Option("--out", help="Directory to make; default runs/evaluation-<time>")
    ] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare versions: rewards, wins, ceilings, lengths, classes, KL; evaluation.json and a page.

    All versions answer the same prompts with the same seeds.
    """
    if reference is not None and base_model is None:
        raise MoraError(f"--base-model must be given with --reference, got {reference} alone")
    rows = [row for row in read_prompts(prompts) if split is None or row.get("split") == split]
    if not rows:
        raise MoraError(f"--prompts must hold at least one row of split {split}, got none")
    options = EvaluationOptions(
        policies=policy,
        prompts=[row["prompt"] for row in rows[:limit]],
        plan=SamplingPlan(n, seed, temperature, _top_p(base_model), max_tokens),
        calibrator=None if calibrator is None else Calibrator.load(calibrator),
        activate=activate,
        reference=reference,
        divergence=_divergence(base_model, temperature),
    )
    made = directory or Path("runs") / f"evaluation-{datetime.now():%Y-%m-%dT%H-%M-%S}"
    if made.exists() and not made.is_dir():
        raise MoraError(f"--out must be a directory, got the file {made}")
    made.mkdir(parents=True, exist_ok=True)
    with StopSignals() as signals, signals.raising(), ConsoleView(err) as view:
        found = run_evaluation(
            client_for(url, api_key),
            options,
            made,
            view,
            lambda command: run_child(command, signals, "measuring KL"),
        )
    if as_json:
        say_json(found)
        return
    for table in evaluation_tables(found):
        out.print(table)
    for item in found["comparisons"]:
        said = ", ".join(f"{name} {change['verdict']}" for name, change in item["changes"].items())
        say(f"{item['name']} against {item['first']}: {said}")
    say(f"report {made / 'report.html'}")


def _top_p(base_model: Path | None) -> float | None:
    """KL needs the whole distribution; otherwise the server's nucleus holds."""
    return None if base_model is None else 1.0


def _divergence(base_model: Path | None, temperature: float | None) -> DivergenceSettings | None:
    if base_model is None:
        return None
    if not (base_model / "config.json").is_file():
        raise MoraError(f"--base-model must be a model directory, got {base_model}")
    if not temperature:
        raise MoraError(
            f"--temperature must be given above 0 with --base-model, got {temperature}: KL is that "
            "of the distributions that were sampled"
        )
    return DivergenceSettings(base_model, temperature)
