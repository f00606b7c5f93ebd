"""What a worker reports beside its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mora_serve.config import TrainerSettings, load_settings
from mora_serve.store import Stores
from trainer import loop
from trainer.feeds import StoreSession
from trainer.job import read_job
from trainer.loop import JobCancelledError, JobControl
from trainer.run_state import RunState
from trainer.source import ListFeed, PairSource, Position, SourceCounts

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


@pytest.mark.parametrize(
    ("position", "place"), [(Position(0, 41), 41), (Position(1, 3), 2**53), (Position(), -1)]
)
def test_a_checkpoint_moves_the_reader_to_where_a_restart_would_read_on(
    position: Position, place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a second pass nothing is read from the tail any more."""
    monkeypatch.setattr("ray.train.report", lambda *_, **__: None)
    RunState(position, 10, step=2).save(tmp_path)
    moved: list[tuple[str, str, int]] = []

    async def register(batch_id: str, reader: str, at: int) -> None:
        moved.append((batch_id, reader, at))

    stored = {**STORED, "training_file": "batch_1"}
    with StoreSession(Stores.memory()) as session:
        session.call(session.stores.jobs.create_job(stored))
        monkeypatch.setattr(session.stores.pairs, "register_reader", register)
        for rank in (0, 1):
            control = JobControl(session, read_job(stored, TrainerSettings()), rank, 2)
            control.checkpoint(tmp_path, 2, {"loss": 0.5})
    assert moved == [("batch_1", "ftjob-3", place)]


def run_worker(
    stored: dict[str, Any], end: RunState, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Any, list[dict[str, Any]]]:
    """The rows that a worker handed to DPO, resumed from ``end``'s checkpoint, and its events."""
    handed: list[Any] = []
    end.save(tmp_path)

    def run_dpo(_job: Any, rows: Any, *_: Any, **__: Any) -> RunState:
        handed.append((rows.start, rows.source.counts.waited_s))
        return end

    monkeypatch.setattr(loop, "load_tokenizer", lambda _: None)
    monkeypatch.setattr(loop, "load_policy", lambda *_, **__: None)
    monkeypatch.setattr(loop, "_last_checkpoint", lambda _: tmp_path)
    monkeypatch.setattr(loop, "run_dpo", run_dpo)
    with StoreSession(Stores.memory()) as session:
        jobs = session.stores.jobs
        session.call(jobs.create_job(stored))
        control = JobControl(session, read_job(stored, TrainerSettings()), 0, 1)
        settings = load_settings("fake", environ={})
        loop._train(settings, control, {"model_dir": "tiny"}, tmp_path)
        events, _ = session.call(jobs.list_events(stored["id"], after=None, limit=9))
    return handed[0], events


def test_a_resumed_worker_reads_on_and_counts_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = {**STORED, "training_file": "batch_1"}
    state = RunState(Position(0, 41), 10, step=2, waited_s=7.5)
    handed, events = run_worker(stored, state, tmp_path, monkeypatch)
    assert handed == (Position(0, 41), 7.5)
    assert events == []


@pytest.mark.parametrize(
    ("number", "left"),
    [(0, "helpful, truthful"), (1, "helpful, truthful"), (2, "truthful"), (4, None)],
)
def test_stages_that_a_run_ended_before_are_told(
    number: int, left: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = {"dimensions": ["harmless", "helpful", "truthful"], "resample": False}
    stored = {
        **STORED,
        "training_file": "batch_1",
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"n_epochs": 2}}},
        "mora": {"mode": "sequential", **stages},
    }
    end = RunState(Position(number, 5), 10, step=2, done=True)
    _, events = run_worker(stored, end, tmp_path, monkeypatch)
    messages = [event["message"] for event in events]
    assert [message.partition(".")[0] for message in messages] == (
        [] if left is None else [f"Not trained: {left}"]
    )
