"""A run and the batch whose pairs it reads: a reader while it trains, published once it is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from mora_serve.errors import InvalidRequestError, NotFoundError
from trainer.feeds import StoreSession
from trainer.job import TERMINAL, TrainingJob

BATCH_OVER = frozenset({"completed", "failed", "expired", "cancelled"})
BATCH_POLL_S = 1.0
Train = Callable[[TrainingJob], Path | None]
"""Runs DPO to its end and returns the last checkpoint; ``None`` when there was no pair."""


def train_on(session: StoreSession, run: TrainingJob, train: Train) -> Path | None:
    """Train while the run is a reader of its pairs, so that none goes before it was read."""
    if not run.reads_stream:
        return train(run)
    pairs = session.stores.pairs
    session.call(pairs.register_reader(run.training_file, run.id, -1))
    try:
        return train(run)
    finally:
        session.call(pairs.unregister_reader(run.training_file, run.id))


def await_batch(
    session: StoreSession, job: TrainingJob, wait: Callable[[float], None] = time.sleep
) -> None:
    """Return when the batch that a job was trained on is over, or the job is.

    Its rows may name the version that they are sampled from, and an engine that holds one version
    could not go on with them once another is current.
    """
    stores = session.stores
    is_told = False
    while True:
        try:
            batch = session.call(stores.batches.get_batch(job.training_file))
        except NotFoundError:
            return
        stored = session.call(stores.jobs.get_job(job.id))
        if batch["status"] in BATCH_OVER or stored["status"] in TERMINAL:
            return
        if not is_told:
            is_told = True
            event = {
                "id": f"ftevent-{job.run_name}-waits",
                "message": f"Trained; the version is published when batch {job.training_file} "
                "is over, whose rows are sampled from one version",
            }
            session.call(stores.jobs.add_event(job.id, event))
        wait(BATCH_POLL_S)


def no_pairs() -> InvalidRequestError:
    """The error of a job without data for a single row of each worker."""
    return InvalidRequestError(
        "training_file must yield at least one pair for each training worker "
        "(trainer.num_workers) that fits max_length and the chat template, got fewer",
        "training_file",
        "no_pairs",
    )
