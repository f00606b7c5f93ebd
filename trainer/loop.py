"""The training loop of one Ray Train worker: connects source, TRL and stores.

Every rank reads the stream itself; rank 0 alone writes events, checkpoints and the reader's place.
"""

from __future__ import annotations

import logging
import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.train.collective import broadcast_from_rank_zero

from mora_serve.config import Settings, settings_from_dump
from mora_serve.errors import InvalidRequestError, MoraError, StorageError
from mora_serve.store import open_stores
from trainer.dpo import load_policy, load_tokenizer, prompt_fits, run_dpo
from trainer.feeds import BatchFeed, StoreSession, read_training_file
from trainer.job import TERMINAL, TrainingJob
from trainer.metrics import exposition
from trainer.publish import checkpoint_id
from trainer.run_state import RunState
from trainer.source import Feed, ListFeed, PairSource, Position, ResumableRows

logger = logging.getLogger(__name__)

METRICS_TTL_S = 300.0
"""Longer than a step; a trainer that waits for data posts every second."""
CANCEL_CHECK_S = 1.0
"""How often a waiting worker asks whether its job is still wanted, and says that it waits."""


class JobCancelledError(MoraError):
    """The job was cancelled while its trainer waited for data."""


@dataclass(slots=True)
class JobControl:
    """A job's status and reports, as one worker sees them."""

    session: StoreSession
    job: TrainingJob
    rank: int
    world_size: int
    source: PairSource | None = None
    _asked_at: float = -math.inf
    _report: dict[str, float] = field(default_factory=dict)
    """Metrics of the last step."""
    _reader_at: Position = field(default_factory=Position)

    def cancelled(self) -> bool:
        """True once the job has reached a terminal status without us."""
        stored = self.session.call(self.session.stores.jobs.get_job(self.job.id))
        return stored["status"] in TERMINAL

    def check(self) -> None:
        """While it waits for data: says for how long, and raises when the job is no longer wanted;
        both at most once a second."""
        if time.monotonic() - self._asked_at < CANCEL_CHECK_S:
            return
        self._asked_at = time.monotonic()
        if self.cancelled():
            raise JobCancelledError(f"job {self.job.id} was cancelled while it waited for pairs")
        if self.rank == 0:
            self._post_metrics()

    def should_stop(self) -> bool:
        """The same answer on every rank: rank 0 asks."""
        answer = self.cancelled() if self.rank == 0 else None
        if self.world_size > 1:
            answer = broadcast_from_rank_zero(answer)
        return bool(answer)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        step += self.job.first_step
        self._report = {"step": step, **finite}
        report = {**self._report, **self._waited()}
        if self.rank == 0:
            self._add_metrics_event(step, report)
            self._post_metrics()
        ray.train.report(report)

    def checkpoint(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        if self.rank != 0:
            # Of a rank that is not the first, its random states are all there is; Ray Train puts
            # the ranks' files into one folder.
            own = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": step}, checkpoint=own)
            return
        state = RunState.load(folder)
        trained_tokens = self.job.earlier_tokens + state.trained_tokens
        ray.train.report(
            {"step": step, "trained_tokens": trained_tokens, **metrics},
            checkpoint=ray.train.Checkpoint.from_directory(folder),
        )
        self._move_reader(state.position)
        jobs = self.session.stores.jobs
        step += self.job.first_step
        record = {
            "id": checkpoint_id(self.job.id, step),
            "step_number": step,
            "metrics": {"step": step, "train_loss": metrics.get("loss")},
        }
        self.session.call(jobs.add_checkpoint(self.job.id, record))
        self.session.call(jobs.update_job(self.job.id, trained_tokens=trained_tokens))

    def tell_skipped(self, num_pairs: int) -> None:
        """Say how many pairs the run could not use; nothing when it used them all."""
        if self.rank != 0 or not num_pairs:
            return
        event = {
            "id": f"ftevent-{self.job.run_name}-skipped",
            "level": "warn",
            "message": f"{num_pairs} pairs were skipped: their prompts leave no room for an answer "
            f"within {self.job.max_length} tokens, or their turns break the chat template",
        }
        self.session.call(self.session.stores.jobs.add_event(self.job.id, event))

    def tell_untrained(self, stages: Sequence[str]) -> None:
        """Say which stages the run ended before; nothing when it came to the last one."""
        if self.rank != 0 or not stages:
            return
        event = {
            "id": f"ftevent-{self.job.run_name}-untrained",
            "level": "warn",
            "message": f"Not trained: {', '.join(stages)}. mora.max_steps ended the run before, or "
            "there was no pair of them",
        }
        self.session.call(self.session.stores.jobs.add_event(self.job.id, event))

    def _add_metrics_event(self, step: int, report: Mapping[str, Any]) -> None:
        data = {**report, "train_loss": report.get("loss")}
        event = {
            "type": "metrics",
            "message": f"Step {step}: loss {report.get('loss', float('nan')):.4f}",
            "data": data,
        }
        self.session.call(self.session.stores.jobs.add_event(self.job.id, event))

    def _waited(self) -> dict[str, float]:
        waited_s = self.source.counts.waited_s if self.source is not None else 0.0
        return {"wait_for_data_seconds": round(waited_s, 3)}

    def _post_metrics(self) -> None:
        board = self.session.stores.metrics
        text = exposition(self.job.id, {**self._report, **self._waited()})
        self.session.call(board.publish(f"trainer-{self.job.id}", text, METRICS_TTL_S))

    def _move_reader(self, position: Position) -> None:
        """Let the stream's tail be trimmed behind what a restart would read again."""
        if self.job.reads_stream:
            place = position.seq if position.number == 0 else 2**53
            pairs = self.session.stores.pairs
            self.session.call(pairs.register_reader(self.job.training_file, self.job.id, place))


def train_worker(config: Mapping[str, Any]) -> None:
    """Ray Train entry point; ``config`` has ``settings`` (a dump), ``job``, and model paths."""
    settings = settings_from_dump(config["settings"])
    torch.set_num_threads(settings.trainer.num_threads)
    context = ray.train.get_context()
    with StoreSession(open_stores(settings)) as session:
        job: TrainingJob = config["job"]
        control = JobControl(session, job, context.get_world_rank(), context.get_world_size())
        with tempfile.TemporaryDirectory(prefix="mora-train-") as scratch:
            _train(settings, control, config, Path(scratch))


def _train(
    settings: Settings, control: JobControl, config: Mapping[str, Any], scratch: Path
) -> None:
    job = control.job
    tokenizer = load_tokenizer(config["model_dir"])
    source = PairSource(
        open_feed(control.session, job),
        rank=control.rank,
        world_size=control.world_size,
        num_epochs=job.n_epochs,
        stages=job.stages,
        accept=prompt_fits(tokenizer, job.max_length),
        check=control.check,
    )
    control.source = source
    model = load_policy(
        config["model_dir"],
        lora=job.lora,
        use_gpu=settings.trainer.use_gpu,
        adapter_dir=config.get("adapter_dir"),
    )
    start, resume_from = Position(), _last_checkpoint(scratch / "resume")
    if resume_from is not None:
        stored = RunState.load(resume_from)
        start, source.counts.waited_s = stored.position, stored.waited_s
        logger.info("job %s resumes behind pair %d", job.id, start.seq)
    state = run_dpo(
        job,
        ResumableRows(source, start),
        model,
        tokenizer,
        control,
        output_dir=scratch / "output",
        use_gpu=settings.trainer.use_gpu,
        resume_from=resume_from,
        dimensions=settings.dimensions,
    )
    control.tell_skipped(source.counts.skipped)
    if state is not None and state.done:
        control.tell_untrained(source.stages_behind(state.position))


def _last_checkpoint(folder: Path) -> Path | None:
    """The run's last checkpoint, copied to ``folder``; ``None`` at its begin."""
    checkpoint = ray.train.get_checkpoint()
    return None if checkpoint is None else Path(checkpoint.to_directory(str(folder)))


def open_feed(session: StoreSession, job: TrainingJob) -> Feed:
    """The feed of a job's training file: a batch's stream, or an uploaded file."""
    if job.reads_stream:
        return BatchFeed(session, session.stores.pairs, job.training_file)
    rows = session.call(read_training_file(session.stores, job.training_file))
    if not rows:
        raise InvalidRequestError(
            "training_file must hold at least one row", "training_file", "invalid_training_file"
        )
    return ListFeed(rows)


__all__ = ["JobCancelledError", "StorageError", "train_worker"]
