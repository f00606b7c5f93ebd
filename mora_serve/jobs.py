"""A fine-tuning job through the REST API: its request body, state, events and results."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mora_serve.client import Client
from mora_serve.errors import MoraError

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
EVENTS_PER_PAGE = 100


def job_body(
    model: str,
    training_file: str,
    *,
    max_steps: int | None = None,
    beta: float | None = None,
    num_epochs: int | None = None,
    mode: str | None = None,
    dimensions: Sequence[str] | None = None,
    resample: bool | None = None,
    seed: int | None = None,
) -> dict[str, Any]:
    """Body of ``POST /v1/fine_tuning/jobs``; what is ``None`` keeps the server's default."""
    method: dict[str, Any] = {"type": "dpo"}
    given = {"beta": beta, "n_epochs": num_epochs}
    if hyperparameters := {key: value for key, value in given.items() if value is not None}:
        method["dpo"] = {"hyperparameters": hyperparameters}
    options: dict[str, Any] = {"max_steps": max_steps, "mode": mode, "resample": resample}
    options["dimensions"] = list(dimensions) if dimensions else None
    body: dict[str, Any] = {"model": model, "training_file": training_file, "method": method}
    if extensions := {key: value for key, value in options.items() if value is not None}:
        body["mora"] = extensions
    return body if seed is None else {**body, "seed": seed}


class JobFollower:
    """Reads a job's state and the events that are new since the last look."""

    def __init__(self, client: Client, job_id: str) -> None:
        self._client = client
        self._path = f"/v1/fine_tuning/jobs/{job_id}"
        self._seen: set[str] = set()
        self.job: dict[str, Any] = {"id": job_id, "status": "queued"}
        """The job object as of the last look."""
        self.events: list[dict[str, Any]] = []
        """All events so far, oldest first."""

    @property
    def ended(self) -> bool:
        return self.job["status"] in TERMINAL

    def poll(self) -> list[dict[str, Any]]:
        """Look once; returns the new events, oldest first.

        The state is read first, so that an ended job has no event left unread.
        """
        self.job = self._client.get(self._path)
        fresh = []
        for event in self._client.pages(f"{self._path}/events", limit=EVENTS_PER_PAGE):
            if event["id"] in self._seen:
                break
            fresh.append(event)
        fresh.reverse()
        self._seen.update(event["id"] for event in fresh)
        self.events.extend(fresh)
        return fresh


def fetch_results(client: Client, job: Mapping[str, Any], target: Path) -> None:
    """Download the result files of a job into ``target`` (created), archives unpacked.

    Raises :class:`MoraError` when there is none.
    """
    target.mkdir()
    for file_id in job.get("result_files") or []:
        name = Path(str(client.get(f"/v1/files/{file_id}")["filename"])).name
        path = target / name
        client.download(f"/v1/files/{file_id}/content", path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(target)
            path.unlink()
    if not any(target.iterdir()):
        raise MoraError(f"fine-tuning job {job['id']} left no result file")


def describe_event(event: Mapping[str, Any]) -> str:
    """One line for a person."""
    level = "" if event.get("level") == "info" else f"{event.get('level')}: "
    return f"{level}{event.get('message')}"
