"""The main job, run through the REST API as a user would run it.

::

    prompts scored with the base version
        -> upload -> batch on /v1/rewrites -+-> progress events -> results, pairs as Parquet
                                            `-> fine-tuning job on the batch, while it runs
        -> new version listed and current -> the same prompts scored with it
        -> figures -> runs/<time>/{summary.json, report.html, pairs.parquet, adapter/}

The batch names the base version, so that a policy published under way cannot mix into its rollouts.
Both versions are scored on equally many fresh rollouts with the same seeds, the base first: an
engine that merges adapters serves one version at a time. What is shown and how
belongs to the view; figures are made in :mod:`mora_serve.run_summary`. A step that fails raises
:class:`~mora_serve.errors.MoraError` with one line.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from mora_serve.answers import UnreachableError
from mora_serve.client import Client
from mora_serve.errors import MoraError
from mora_serve.jobs import JobFollower, describe_event, fetch_results, job_body
from mora_serve.report import write_report
from mora_serve.run_summary import Collected, Json, summarise

DEMO_PROMPTS = Path(str(resources.files("mora_serve").joinpath("demo_prompts.jsonl")))
REWRITES = "/v1/rewrites"
PARQUET = "application/vnd.apache.parquet"
BATCH_ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
POLL_S = 1.0
PUBLISH_TIMEOUT_S = 180.0
"""From the end of training until every generator has loaded the new version."""
PROMPTS_PER_REQUEST = 64


class View(Protocol):
    """What the demo tells a person while it runs."""

    def step(self, title: str) -> None:
        """A new step begins."""
        ...

    def progress(self, done: int, total: int, detail: str) -> None:
        """How far the present step is."""
        ...

    def note(self, text: str) -> None:
        """A line that stays on the screen."""
        ...


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What a run is made of."""

    prompts: Sequence[Json]
    """Rows with ``prompt`` and optionally ``id`` and ``kind``."""
    seed: int
    max_steps: int
    """DPO steps at most."""
    num_epochs: int
    """Passes over the pairs at most; the first one follows the batch while it runs."""
    n_eval: int
    """Rollouts per prompt and version in the comparison before and after training."""
    directory: Path


class Demo:
    """One run. ``configuration`` (secrets masked) is shown in the report when it is known."""

    def __init__(
        self,
        client: Client,
        options: DemoOptions,
        view: View,
        configuration: Mapping[str, Any] | None = None,
    ) -> None:
        self._client = client
        self._options = options
        self._view = view
        self._configuration = configuration
        self._started = time.time()
        self._timings: dict[str, float] = {}
        self._rows = [
            {"id": f"row-{index:04d}", "kind": "prompt", **row}
            for index, row in enumerate(options.prompts)
        ]

    def run(self) -> Json:
        """Run every step and write the run's directory; returns the summary."""
        self._options.directory.mkdir(parents=True, exist_ok=False)
        base = self._current_model()
        before = self._score_all(base, "before training")
        batch_id = self._start_batch(base)
        follower = self._start_training(base, batch_id)
        batch, overlapped = self._follow_batch(batch_id, follower)
        results, failures = self._results(batch)
        pairs = self._fetch_pairs(batch_id)
        tuned = self._finish_training(follower)
        self._await_current(tuned)
        after = self._score_all(tuned, "after training")
        fetch_results(self._client, follower.job, self._options.directory / "adapter")
        collected = Collected(
            rows=self._rows, results=results, failures=failures, batch=batch, pairs=pairs,
            job=follower.job, events=follower.events, overlapped=overlapped, base=base,
            tuned=tuned, before=before, after=after, seed=self._options.seed,
            n_eval=self._options.n_eval, timings=self._timings,
            configuration=self._configuration, started=self._started,
        )  # fmt: skip
        summary = summarise(collected)
        self._write(summary)
        return summary

    # --- steps ----------------------------------------------------------------------------------

    def _current_model(self) -> str:
        models = self._client.get("/v1/models")["data"]
        if not models:
            raise MoraError("the server lists no model that can be sampled")
        return str(next((m for m in models if m.get("current")), models[0])["id"])

    def _start_batch(self, base: str) -> str:
        self._view.step(f"Uploading {len(self._rows)} prompts, starting a rewrite batch")
        content = "".join(json.dumps(self._batch_row(i)) + "\n" for i in range(len(self._rows)))
        file = self._client.upload(content.encode(), "demo-prompts.jsonl")
        batch = self._client.post(
            "/v1/batches",
            {
                "input_file_id": file["id"],
                "endpoint": REWRITES,
                "completion_window": "24h",
                "defaults": {"model": base, "include_rollouts": True},
            },
        )
        self._view.note(f"batch {batch['id']} from {file['id']}")
        return str(batch["id"])

    def _batch_row(self, index: int) -> Json:
        row = self._rows[index]
        body = {"prompt": row["prompt"], "seed": 100_003 * self._options.seed + index}
        return {"custom_id": str(row["id"]), "method": "POST", "url": REWRITES, "body": body}

    def _start_training(self, base: str, batch_id: str) -> JobFollower:
        options = self._options
        body = job_body(
            base,
            batch_id,
            max_steps=options.max_steps,
            num_epochs=options.num_epochs,
            seed=options.seed,
        )
        job = self._client.post("/v1/fine_tuning/jobs", body)
        self._view.note(f"fine-tuning job {job['id']} trains on the batch while it runs")
        return JobFollower(self._client, job["id"])

    def _follow_batch(self, batch_id: str, follower: JobFollower) -> tuple[Json, int]:
        """The finished batch, and how many training events came before its end."""
        started = time.monotonic()
        self._view.step("Pre-sampling, classifying, rewriting, confirming")
        status = ""
        while status not in BATCH_ENDED:
            for event in self._client.events(f"/v1/batches/{batch_id}/events"):
                status = event.data["status"]
                self._show_batch(event.data)
                self._show_job(follower)
            if status not in BATCH_ENDED:
                time.sleep(POLL_S)
        overlapped = sum(event["type"] == "metrics" for event in follower.events)
        batch = self._client.get(f"/v1/batches/{batch_id}")
        self._timings["batch_s"] = time.monotonic() - started
        if status != "completed":
            errors = (batch.get("errors") or {}).get("data") or [{}]
            raise MoraError(f"batch {batch_id} {status}: {errors[0].get('message') or 'no reason'}")
        return batch, overlapped

    def _show_batch(self, event: Json) -> None:
        counts = event["request_counts"]
        classes = ", ".join(f"{name} {count}" for name, count in sorted(event["classes"].items()))
        detail = f"{event['pairs']} pairs · {classes}" if classes else f"{event['pairs']} pairs"
        self._view.progress(counts["completed"] + counts["failed"], counts["total"], detail)

    def _show_job(self, follower: JobFollower) -> None:
        for event in follower.poll():
            self._view.note(f"training: {describe_event(event)}")

    def _results(self, batch: Json) -> tuple[dict[str, Json], dict[str, Json]]:
        """Rewrite objects and errors by ``custom_id``."""
        results: dict[str, Json] = {}
        failures: dict[str, Json] = {}
        for name, target in (("output", results), ("error", failures)):
            if file_id := batch.get(f"{name}_file_id"):
                path = self._options.directory / f"{name}.jsonl"
                self._client.download(f"/v1/files/{file_id}/content", path)
                for line in path.read_text("utf-8").splitlines():
                    row = json.loads(line)
                    body = (row.get("response") or {}).get("body")
                    target[row["custom_id"]] = row["error"] or body or {}
        if not results:
            reason = next(iter(failures.values()), {}).get("message", "no reason given")
            raise MoraError(f"batch {batch['id']} has no result, all rows failed: {reason}")
        return results, failures

    def _fetch_pairs(self, batch_id: str) -> list[Json]:
        path = f"/v1/batches/{batch_id}/pairs"
        pairs = list(self._client.ndjson("GET", path))
        if not pairs:
            raise MoraError(
                f"batch {batch_id} yielded no preference pair, so there is nothing to train on; "
                "try more prompts or another --seed"
            )
        self._client.download(path, self._options.directory / "pairs.parquet", accept=PARQUET)
        self._view.note(f"{len(pairs)} preference pairs in pairs.parquet")
        return pairs

    def _finish_training(self, follower: JobFollower) -> str:
        started = time.monotonic()
        self._view.step("Training (DPO)")
        while True:
            self._show_job(follower)
            steps = [e["data"]["step"] for e in follower.events if "step" in (e["data"] or {})]
            self._view.progress(max(steps, default=0), self._options.max_steps, "")
            if follower.ended:
                break
            time.sleep(POLL_S)
        self._timings["training_after_batch_s"] = time.monotonic() - started
        job = follower.job
        if job["status"] != "succeeded" or not job.get("fine_tuned_model"):
            reason = (job.get("error") or {}).get("message") or "see its events"
            raise MoraError(f"fine-tuning job {job['id']} {job['status']}: {reason}")
        return str(job["fine_tuned_model"])

    def _await_current(self, tuned: str) -> None:
        self._view.step(f"Waiting until {tuned} is served")
        deadline = time.monotonic() + PUBLISH_TIMEOUT_S
        while time.monotonic() < deadline:
            models = {m["id"]: m for m in self._client.get("/v1/models")["data"]}
            if models.get(tuned, {}).get("current"):
                return
            time.sleep(POLL_S)
        raise MoraError(f"{tuned} was not served within {PUBLISH_TIMEOUT_S:g} s of its training")

    def _score_all(self, model: str, what: str) -> list[Json]:
        """Diagnostics of all prompts under one version, on fresh rollouts, in order."""
        started = time.monotonic()
        self._view.step(f"Scoring the prompts {what} ({model})")
        options, total = self._options, len(self._rows)
        found: dict[int, Json] = {}
        for start in range(0, total, PROMPTS_PER_REQUEST):
            piece = self._rows[start : start + PROMPTS_PER_REQUEST]
            body = {
                "prompts": [row["prompt"] for row in piece], "model": model, "n": options.n_eval,
                "n_max": options.n_eval, "seed": options.seed + 1, "include_rollouts": True,
                "stream": True,
            }  # fmt: skip
            for item in self._client.ndjson("POST", "/v1/diagnostics", body):
                if item.get("object") == "diagnostic":
                    found[start + item["index"]] = item
                    self._view.progress(len(found), total, "")
        if len(found) != total:
            raise UnreachableError(f"{len(found)} of {total} prompts came back {what}")
        self._check_version(found.values(), model)
        self._timings[f"scoring_{what.split(maxsplit=1)[0]}_s"] = time.monotonic() - started
        return [found[index] for index in range(total)]

    def _check_version(self, items: Any, model: str) -> None:
        for item in items:
            if item["status"] == "ok" and item["policy_version"] != model:
                raise MoraError(f"asked for {model} but {item['policy_version']} answered")

    def _write(self, summary: Json) -> None:
        text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
        (self._options.directory / "summary.json").write_text(text + "\n", "utf-8")
        write_report(summary, self._options.directory / "report.html")
