"""What a worker reports beside its steps."""

from __future__ import annotations

import pytest

from mora_serve.config import TrainerSettings
from mora_serve.store import Stores
from trainer.feeds import StoreSession
from trainer.job import read_job
from trainer.loop import JobControl

STORED = {"id": "ftjob-3", "model": "base", "training_file": "file-1", "mora": {"max_length": 64}}


@pytest.mark.parametrize(("rank", "num_pairs", "num_events"), [(0, 0, 0), (0, 5, 1), (1, 5, 0)])
def test_pairs_that_were_skipped_are_told_once(rank: int, num_pairs: int, num_events: int) -> None:
    with StoreSession(Stores.memory()) as session:
        jobs = session.stores.jobs
        session.call(jobs.create_job(STORED))
        control = JobControl(session, read_job(STORED, TrainerSettings()), rank, 2)
        control.tell_skipped(num_pairs)
        control.tell_skipped(num_pairs)
        events, _ = session.call(jobs.list_events("ftjob-3", after=None, limit=9))
    assert len(events) == num_events
    assert all(event["level"] == "warn" for event in events)
    assert all("5 pairs were skipped" in event["message"] for event in events)
