"""What a worker reports beside its steps."""

from __future__ import annotations

import pytest

from mora_serve.config import TrainerSettings
from mora_serve.store import Stores
from trainer.feeds import StoreSession
from trainer.job import read_job
from trainer.loop import JobCancelledError, JobControl
from trainer.source import ListFeed, PairSource, SourceCounts

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


def test_a_trainer_that_waits_says_for_how_long_before_its_first_step() -> None:
    with StoreSession(Stores.memory()) as session:
        session.call(session.stores.jobs.create_job(STORED))
        source = PairSource(ListFeed([]), counts=SourceCounts(waited_s=412.5))
        control = JobControl(session, read_job(STORED, TrainerSettings()), 0, 1, source)
        control.check()
        told = session.call(session.stores.metrics.collect())["trainer-ftjob-3"]
        assert 'mora_train_wait_for_data_seconds{job="ftjob-3"} 412.5' in told.splitlines()
        assert "mora_train_step" not in told


def test_a_trainer_that_waits_gives_up_when_its_job_is_cancelled() -> None:
    with StoreSession(Stores.memory()) as session:
        session.call(session.stores.jobs.create_job(STORED))
        session.call(session.stores.jobs.cancel_job("ftjob-3"))
        control = JobControl(session, read_job(STORED, TrainerSettings()), 1, 2)
        with pytest.raises(JobCancelledError):
            control.check()
