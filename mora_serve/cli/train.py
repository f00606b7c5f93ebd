"""``mora-serve train``: start a DPO run on a batch's pairs and follow it."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer

from mora_serve.cli.common import (
    DEFAULT_URL,
    JsonOption,
    KeyOption,
    UrlOption,
    client_for,
    note,
    say,
    say_json,
)
from mora_serve.client import Client
from mora_serve.errors import MoraError
from mora_serve.jobs import JobFollower, describe_event, job_body

POLL_S = 1.0


def train(
    *,
    batch: Annotated[
        str,
        typer.Option(help="Batch (or file) id whose pairs, or in stages prompts, are used."),
    ],
    model: Annotated[
        str | None, typer.Option(help="Version to start from; default: current.")
    ] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps at most.")] = None,
    beta: Annotated[float | None, typer.Option(help="DPO's beta.")] = None,
    mode: Annotated[str | None, typer.Option(help="simultaneous or sequential.")] = None,
    dimension: Annotated[
        list[str] | None, typer.Option(help="A stage of a sequential run; repeat it, in order.")
    ] = None,
    resample: Annotated[
        bool | None,
        typer.Option(help="Sequential: sample each stage's pairs from the version before it."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the run.")] = None,
    follow: Annotated[bool, typer.Option(help="Show events until the job ends.")] = True,
    url: UrlOption = DEFAULT_URL,
    api_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train on the pairs of a batch, finished or still running; publishes a policy version."""
    client = client_for(url, api_key)
    base = model or current_model(client)
    body = job_body(
        base, batch, max_steps=max_steps, beta=beta, mode=mode, dimensions=dimension,
        resample=resample, seed=seed,
    )  # fmt: skip
    job = client.post("/v1/fine_tuning/jobs", body)
    if not follow:
        say_json(job) if as_json else say(job["id"])
        return
    note(f"job {job['id']} on {batch}")
    job = follow_job(client, job["id"])
    if as_json:
        say_json(job)
    if job["status"] != "succeeded":
        reason = (job.get("error") or {}).get("message") or "see its events"
        raise MoraError(f"job {job['id']} {job['status']}: {reason}")
    if not as_json:
        say(f"{job['fine_tuned_model']}")


def current_model(client: Client) -> str:
    """The version that requests without a model sample."""
    models = client.get("/v1/models")["data"]
    if not models:
        raise MoraError("the server lists no model")
    return str(next((model for model in models if model.get("current")), models[0])["id"])


def follow_job(client: Client, job_id: str) -> dict[str, Any]:
    """Show a job's events until it ends; returns its last state."""
    follower = JobFollower(client, job_id)
    while True:
        for event in follower.poll():
            note(describe_event(event))
        if follower.ended:
            return follower.job
        time.sleep(POLL_S)
