"""The data card of an exported dataset: ``README.md`` with the header that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mora_serve import __version__
from mora_serve.dataset_export import DATA_FILE, ExportCounts

Json = Mapping[str, Any]

DESCRIPTIONS = {
    "pairs": "Preference pairs as TRL's conversational preference format has them (`prompt`, "
    "`chosen`, `rejected`), with the rewards of both sides, the margin and the provenance. "
    "`trl.DPOTrainer` trains on them unchanged.",
    "groups": "Scored groups: one prompt with all its answers, and per answer and dimension the "
    "calibrated reward `value` (z), the scorer's own `raw`, its `status` and `reason`. A score "
    "whose status is not `ok` has no value; it is null and never 0.",
}


def card(
    directory: Path, counts: ExportCounts, *, batch: Json | None, configuration: Json | None
) -> str:
    """The whole card. ``configuration`` has its secrets masked; ``None`` is said to be unknown."""
    header = {
        "configs": [
            {
                "config_name": name,
                "data_files": [{"split": "train", "path": f"{name}/*.parquet"}],
                **({"default": True} if position == 0 else {}),
            }
            for position, name in enumerate(counts.rows)
        ],
        "dataset_info": [_info(directory, name, rows) for name, rows in counts.rows.items()],
        "tags": ["mora-serve", "preference", "multi-reward"],
    }
    # Whose prompts and answers these are, only the user knows.
    licence = "# license: to be chosen by the owner of the prompts and of the policy's answers\n"
    text = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    sections = [
        f"---\n{licence}{text}---\n\n# Dataset exported by mora-serve {__version__}\n",
        *(f"## `{name}`\n\n{DESCRIPTIONS[name]}\n" for name in counts.rows),
        _missing(counts),
        f"## Origin\n\n```yaml\n{_dump(_origin(counts, batch))}```\n",
        f"## Counts\n\n```yaml\n{_dump(_counts(counts))}```\n",
        _configuration(configuration),
        "## Licence\n\nNot stated by the exporter. Prompts, policy and reward models each have "
        "terms of their own; fill in `license` above before sharing.\n",
    ]
    return "\n".join(part for part in sections if part)


def _info(directory: Path, name: str, rows: int) -> Json:
    size = (directory / name / DATA_FILE).stat().st_size
    return {
        "config_name": name,
        "splits": [{"name": "train", "num_bytes": size, "num_examples": rows}],
        "download_size": size,
        "dataset_size": size,
    }


def _missing(counts: ExportCounts) -> str:
    """What one may look for here and does not find."""
    found = []
    if "groups" not in counts.rows and counts.without_rollouts:
        found.append("The batch was run without `include_rollouts`, so it holds no scored groups.")
    elif counts.without_rollouts:
        found.append(f"{counts.without_rollouts} diagnostics hold no answers and are left out.")
    if counts.failed:
        found.append(f"{counts.failed} rows of the batch failed and are left out.")
    return "## Not in here\n\n" + "\n".join(f"- {item}" for item in found) + "\n" if found else ""


def _origin(counts: ExportCounts, batch: Json | None) -> Json:
    named = ("id", "endpoint", "model", "status", "created_at", "request_counts", "usage")
    return {
        "batch": None if batch is None else {name: batch.get(name) for name in named},
        "policy_versions": sorted(counts.policies),
        "scorers": {
            k: [{"model": model, "revision": revision} for model, revision in sorted(found)]
            for k, found in counts.scorers.items()
        },
        "calibrators": sorted(counts.calibrators),
    }


def _counts(counts: ExportCounts) -> Json:
    return {
        "rows": dict(counts.rows),
        "answers": counts.answers,
        "classes": dict(counts.classes.most_common()),
        "scores": dict(sorted(counts.statuses.items())),
        "pairs_by_strategy": dict(counts.strategies.most_common()),
    }


def _configuration(configuration: Json | None) -> str:
    if configuration is None:
        return (
            "## Configuration\n\nUnknown to the exporter: it was given neither `--profile` nor "
            "`--config` of the server.\n"
        )
    return (
        "## Configuration\n\nResolved settings of the service, secrets masked; a row's own fields "
        f"override `sampling` and `method`.\n\n```yaml\n{_dump(configuration)}```\n"
    )


def _dump(value: Json) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True)
    return text
