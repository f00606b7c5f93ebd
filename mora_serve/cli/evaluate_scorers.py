"""``mora-serve scorers evaluate``: how well the served reward heads judge preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mora_serve import tables
from mora_serve.cli.common import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    client_for,
    out,
    progress_bar,
    say_json,
)
from mora_serve.errors import MoraError
from mora_serve.preference_pairs import read_pairs, score_pairs
from mora_serve.reward_eval import RewardEval, ScoredPair, Share, evaluate
from mora_serve.types import Dimension


def evaluate_pairs(
    *,
    pairs: Annotated[
        Path,
        typer.Option(help="Pairs with prompt, chosen, rejected: JSONL, JSON, CSV (.gz), Parquet."),
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first pairs.")] = None,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Score preference pairs on a running server: accuracy, length bias, agreement of heads."""
    wanted = read_pairs(pairs)[:limit]
    with progress_bar() as progress:
        task = progress.add_task("scoring answers", total=None)
        scored = score_pairs(
            client_for(url, api_key), wanted, lambda done: progress.advance(task, done)
        )
    scorers = served(scored)
    result = evaluate(scored, list(scorers))
    if as_json:
        say_json(_json(result, scorers, pairs))
        return
    for table in (_accuracy(result), _length(result), _agreement(result), *_details(result)):
        out.print(table)


def served(pairs: list[ScoredPair]) -> dict[Dimension, dict[str, str]]:
    """Model and revision by dimension, as the scores name them.

    Raises :class:`MoraError` when a scorer was replaced while it was evaluated.
    """
    found: dict[Dimension, dict[str, str]] = {}
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            for name, score in answer.scores.items():
                scorer = {"model": score.model, "revision": score.revision}
                if found.setdefault(name, scorer) != scorer:
                    raise MoraError(
                        f"the server must score all pairs on {name} by one revision, got "
                        f"{found[name]['revision']} and {score.revision}; evaluate again"
                    )
    return found


def _json(result: RewardEval, scorers: Mapping[str, Any], path: Path) -> dict[str, Any]:
    return {
        "object": "reward_evaluation",
        "pairs": path.name,
        "num_pairs": result.num_pairs,
        "num_prompts": result.num_prompts,
        "dimensions": {k: {**scorers[k], **asdict(v)} for k, v in result.dimensions.items()},
        "agreements": [
            {"dimensions": list(names), **asdict(item)} for names, item in result.agreements.items()
        ],
    }


def _accuracy(result: RewardEval) -> Table:
    made = tables.table(
        f"Accuracy on {result.num_pairs} pairs, {result.num_prompts} prompts",
        "dimension", "accuracy", "longer wins", "similar length", "margin z", "pairs", "ties",
        "invalid", right=range(1, 8),
    )  # fmt: skip
    for name, item in result.dimensions.items():
        tables.add_row(
            made, name, share(item.accuracy), share(item.longer_wins), share(item.similar_length),
            tables.number(item.mean_margin, signed=True), str(item.accuracy.num_pairs),
            str(item.num_ties), str(sum(item.invalid.values())),
        )  # fmt: skip
    made.caption = "95 % intervals clustered by prompt; similar: lengths within a ratio of 1.25"
    return made


def _length(result: RewardEval) -> Table:
    made = tables.table(
        "Length", "dimension", "prefers longer", "r(score, log length)", "within prompts",
        right=range(1, 4),
    )  # fmt: skip
    for name, item in result.dimensions.items():
        tables.add_row(
            made, name, share(item.prefers_longer),
            tables.number(item.length_correlation, signed=True),
            tables.number(item.length_correlation_within, signed=True),
        )  # fmt: skip
    return made


def _agreement(result: RewardEval) -> Table:
    made = tables.table(
        "Agreement", "dimensions", "same preference", "pairs", "r(margins)", "r within prompts",
        right=range(1, 5),
    )  # fmt: skip
    for names, item in result.agreements.items():
        tables.add_row(
            made, " / ".join(names), percent(item.agreement), str(item.num_pairs),
            tables.number(item.margin_correlation, signed=True),
            tables.number(item.within_prompt, signed=True),
        )  # fmt: skip
    return made


def _details(result: RewardEval) -> list[Table]:
    """Accuracy by subset where there are several, and why pairs were left out."""
    found = []
    for name, item in result.dimensions.items():
        if len(item.subsets) > 1:
            made = tables.table(
                f"{name} by subset", "subset", "accuracy", "longer wins", "pairs", right=range(1, 4)
            )
            for subset, figures in item.subsets.items():
                shares = (share(figures.accuracy), share(figures.longer_wins))
                tables.add_row(made, subset, *shares, str(figures.accuracy.num_pairs))
            found.append(made)
        if item.invalid:
            found.append(tables.counts_table(f"{name}: pairs without a valid score", item.invalid))
    return found


def share(item: Share) -> str:
    """A share with its interval in percent, for example ``70.2 [65, 75]``."""
    if item.value is None or item.low is None or item.high is None:
        return tables.MISSING
    return f"{100 * item.value:.1f} [{100 * item.low:.0f}, {100 * item.high:.0f}]"


def percent(value: float | None) -> str:
    return tables.MISSING if value is None else f"{100 * value:.1f}"
