"""Scored groups and preference pairs of a batch as a Hugging Face dataset directory.

::

    batch output (rows with rollouts) --> groups.jsonl --.  python -m api.dataset_files
    batch pairs, or a file of pairs   --> pairs.jsonl  --+--> pairs/*.parquet, groups/*.parquet
    settings, counts, revisions ------> README.md (data card) with the configurations

A *group* is one prompt with all its scored answers under one policy version: vector rewards,
nothing reduced, for trainers that want more than pairs. A batch's output has groups only if it was
run with ``include_rollouts``. Rollouts that confirm a rewrite are shown for the chosen candidate;
those drawn again of the original are not part of a batch's output.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mora_serve.client import Client
from mora_serve.data_files import read_rows
from mora_serve.divergence import RunCommand
from mora_serve.errors import MoraError
from mora_serve.requests import REWRITES_URL, SCORES_URL

Json = dict[str, Any]
DATA_FILE = "train-00000-of-00001.parquet"
PAIR_FIELDS = ("prompt", "chosen", "rejected")


@dataclass(slots=True)
class ExportCounts:
    """What was exported, and what the data card says of it."""

    rows: Counter[str] = field(default_factory=Counter)
    """Rows by configuration: ``pairs``, ``groups``."""
    without_rollouts: int = 0
    """Diagnostics of the batch that hold no answers."""
    failed: int = 0
    """Batch rows without a result."""
    answers: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    """Scores by ``dimension: status``."""
    classes: Counter[str] = field(default_factory=Counter)
    """Groups of original prompts by class."""
    strategies: Counter[str] = field(default_factory=Counter)
    """Pairs by the strategy of their prompt."""
    policies: set[str] = field(default_factory=set)
    scorers: dict[str, set[tuple[str, str]]] = field(default_factory=dict)
    """Dimension -> (model, revision)s."""
    calibrators: set[str] = field(default_factory=set)
    """Versions, as the pairs' provenance has them."""


def finished_batch(client: Client, batch_id: str) -> Json:
    """The batch, once it can be exported. Raises :class:`MoraError` otherwise."""
    batch = client.get(f"/v1/batches/{batch_id}")
    if batch["endpoint"] == SCORES_URL:
        raise MoraError(f"--batch must be one that samples answers, got one on {SCORES_URL}")
    if batch["status"] not in ("completed", "cancelled", "expired"):
        raise MoraError(f"--batch must be finished, got {batch_id} in {batch['status']}")
    return batch


def write_dataset(
    client: Client | None,
    batch: Json | None,
    pairs_file: Path | None,
    directory: Path,
    run_command: RunCommand,
) -> ExportCounts:
    """Write the Parquet files of ``batch``, or of ``pairs_file``, below ``directory``.

    Raises :class:`MoraError` when there is nothing to export.
    """
    counts = ExportCounts()
    pairs: Iterable[Json] = ()
    groups: Iterable[Json] = ()
    if pairs_file is not None:
        pairs = (_checked_pair(*item) for item in read_rows(pairs_file))
    elif batch is not None and client is not None:
        groups = _groups(client, batch, counts)
        if batch["endpoint"] == REWRITES_URL:
            pairs = client.ndjson("GET", f"/v1/batches/{batch['id']}/pairs")
    write = Writer(directory, counts, run_command)
    write("pairs", pairs, _count_pair)
    write("groups", groups, _count_group)
    if not counts.rows:
        raise MoraError(
            "an export must hold at least one pair or scored group, got none; a batch has groups "
            'when it was run with {"defaults": {"include_rollouts": true}}'
        )
    return counts


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes one configuration of the dataset after the other, and counts."""

    directory: Path
    counts: ExportCounts
    run_command: RunCommand

    def __call__(
        self, name: str, rows: Iterable[Json], count: Callable[[Json, ExportCounts], None]
    ) -> None:
        """Rows to JSON lines, and those to Parquet; without a row no file is left."""
        draft = self.directory / f".{name}.jsonl"
        num_rows = 0
        try:
            with draft.open("w", encoding="utf-8") as file:
                for row in rows:
                    count(row, self.counts)
                    num_rows += 1
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            if num_rows:
                self.counts.rows[name] = num_rows
                target = self.directory / name / DATA_FILE
                target.parent.mkdir(exist_ok=True)
                arguments = ["--kind", name, "--rows", str(draft), "--out", str(target)]
                self.run_command([sys.executable, "-m", "api.dataset_files", "write", *arguments])
        finally:
            draft.unlink(missing_ok=True)


# --- pairs --------------------------------------------------------------------------------------


def _checked_pair(place: str, row: Json) -> Json:
    for name in PAIR_FIELDS:
        if not isinstance(row.get(name), list) or not row[name]:
            raise MoraError(f"{place}: {name} must be a list of messages")
        if not all(map(_is_message, row[name])):
            raise MoraError(f"{place}: {name} must hold messages with text as role and content")
    for name in ("chosen_scores", "rejected_scores"):
        scores = row.get(name)
        if not isinstance(scores, dict):
            raise MoraError(
                f"{place}: {name} must be an object by dimension; plain pairs load as is"
            )
        if not all(isinstance(score, dict) for score in scores.values()):
            raise MoraError(f"{place}: {name} must hold an object with value and raw per dimension")
    _require_provenance(place, row)
    return row


def _is_message(turn: Any) -> bool:
    return isinstance(turn, dict) and all(
        isinstance(turn.get(name), str) for name in ("role", "content")
    )


def _require_provenance(place: str, row: Json) -> None:
    try:
        provenance = _provenance(row)
        scorers = dict(provenance.get("scorers") or {})
    except (AttributeError, TypeError, ValueError):
        raise MoraError(f"{place}: provenance must be an object, or one as JSON") from None
    if not all(isinstance(scorer, list) and len(scorer) == 2 for scorer in scorers.values()):
        raise MoraError(f"{place}: provenance.scorers must hold [model, revision] per dimension")


def _provenance(row: Json) -> Json:
    given = row.get("provenance") or {}
    found: Json = json.loads(given) if isinstance(given, str) else given
    return found


def _count_pair(row: Json, counts: ExportCounts) -> None:
    provenance = _provenance(row)
    counts.strategies[str(provenance.get("strategy") or "original")] += 1
    if row.get("policy_version"):
        counts.policies.add(str(row["policy_version"]))
    if provenance.get("calibrator"):
        counts.calibrators.add(str(provenance["calibrator"]))
    for name, scorer in (provenance.get("scorers") or {}).items():
        counts.scorers.setdefault(name, set()).add((str(scorer[0]), str(scorer[1])))


# --- groups -------------------------------------------------------------------------------------


def _groups(client: Client, batch: Json, counts: ExportCounts) -> Iterator[Json]:
    """Every group of a batch's output, originals before their candidates."""
    if batch["error_file_id"] is not None:
        counts.failed = batch["request_counts"]["failed"]
    if batch["output_file_id"] is None:
        return
    for line in client.ndjson("GET", f"/v1/files/{batch['output_file_id']}/content"):
        body = line["response"]["body"]
        for group in _of_row(str(line["custom_id"]), body):
            if group is None:
                counts.without_rollouts += 1
            else:
                yield group


def _of_row(custom_id: str, body: Json) -> Iterator[Json | None]:
    """Groups of one result; ``None`` for a diagnostic that holds no answers."""
    if body["object"] == "list":
        for item in body["data"]:
            if item["status"] == "ok":
                yield _group(custom_id, item, {"role": "original"})
        return
    original = body["original"]
    yield _group(
        custom_id, original, {"role": "original", "accepted": body["accepted"] is not None}
    )
    for candidate in body["candidates"]:
        if candidate["diagnostic"] is not None:
            extra = {
                "role": "candidate",
                "accepted": candidate["accepted"],
                "strategy": candidate["strategy"],
                "targets": candidate["targets"],
                "parent_prompt_id": original["prompt_id"],
            }
            yield _group(custom_id, candidate["diagnostic"], extra)


def _group(custom_id: str, item: Json, extra: Mapping[str, Any]) -> Json | None:
    rollouts = item["rollouts"]
    if not rollouts:
        return None
    dimensions = list(rollouts[0]["scores"])
    fields = ("value", "raw", "status", "reason")
    scores = {k: [rollout["scores"][k] for rollout in rollouts] for k in dimensions}
    return {
        "custom_id": custom_id,
        "prompt_id": item["prompt_id"],
        "prompt": item["prompt"],
        "responses": [rollout["text"] for rollout in rollouts],
        "finish_reasons": [rollout["finish_reason"] for rollout in rollouts],
        "num_tokens": [rollout["num_tokens"] for rollout in rollouts],
        "rewards": {k: {f: [s[f] for s in scores[k]] for f in fields} for k in dimensions},
        "scorers": {k: {f: scores[k][0][f] for f in ("model", "revision")} for k in dimensions},
        "class": item["class"],
        "policy_version": item["policy_version"],
        "accepted": None,
        "strategy": None,
        "targets": [],
        "parent_prompt_id": None,
        **extra,
    }


def _count_group(row: Json, counts: ExportCounts) -> None:
    counts.answers += len(row["responses"])
    if row["role"] == "original":
        counts.classes[str(row["class"])] += 1
    if row["policy_version"]:
        counts.policies.add(row["policy_version"])
    for name, reward in row["rewards"].items():
        counts.statuses.update(f"{name}: {status}" for status in reward["status"])
        scorer = row["scorers"][name]
        counts.scorers.setdefault(name, set()).add((scorer["model"], scorer["revision"]))
