"""Sequential jobs whose stages are sampled: dimension by dimension, each from the last version.

::

    per stage k:  make version k-1 current -> batch of the prompts, pinned to version k-1
                  -> DPO from version k-1 on that batch's pairs of dimension k, while it runs
                  -> batch is over, publish version k

Nothing of this is in memory: the batch has an idempotency key of job and stage, the run is found
again by its name, the version by its id, and what a stage has reached is on the job (``stages``).
A trainer that dies anywhere is started again and repeats at most the step that it was in, without
effect. Generators load a version when it becomes current or is first asked for, so that the rows
of a stage, which name their version, never come from another one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mora_serve.config import Settings
from mora_serve.errors import InvalidRequestError, OverloadedError
from mora_serve.identity import content_hash
from mora_serve.policies import LEFT_OUT, RUNNING, SUCCEEDED, activate, cancel_stage_batches
from mora_serve.requests import REWRITES_URL
from trainer.feeds import StoreSession
from trainer.job import TERMINAL, TrainingJob
from trainer.publish import publish_version
from trainer.run_batch import BATCH_OVER, Train, no_pairs, train_on
from trainer.run_state import RunState


class StagedRun:
    """The stages of one job."""

    def __init__(
        self,
        session: StoreSession,
        job: TrainingJob,
        settings: Settings,
        train: Train,
        *,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self._session = session
        self._stores = session.stores
        self._job = job
        self._base = settings.policy.model
        self._dimensions = settings.dimensions
        self._train = train
        self._data_dir = settings.data_dir.absolute()
        self._wait = wait

    def run(self) -> tuple[TrainingJob, int]:
        """Go on where the job stands; returns the run of the last version, and tokens trained on.

        Ends early once the job is over. Raises :class:`~mora_serve.errors.InvalidRequestError` when
        no stage had a pair, or a stage cannot be sampled.
        """
        last, tokens = self._job, 0
        for number in range(1, len(self._job.stages) + 1):
            stage = self._begun(number, last)
            if stage is None:
                return last, tokens
            run = self._job.stage_run(
                number, stage["model"], stage["batch_id"],
                first_step=self._steps(number), earlier_tokens=tokens,
            )  # fmt: skip
            if stage["status"] == RUNNING:
                stage = self._trained(number, stage, run)
            if self.is_over():
                return last, tokens
            if stage["status"] == SUCCEEDED:
                last, tokens = run, stage["trained_tokens"]
        if last is self._job:
            raise no_pairs()
        return last, tokens

    def is_over(self) -> bool:
        """Whether the job was ended by someone else."""
        return bool(self._stored()["status"] in TERMINAL)

    def _stored(self) -> dict[str, Any]:
        return self._session.call(self._stores.jobs.get_job(self._job.id))

    def _stages(self) -> list[dict[str, Any]]:
        return list(self._stored().get("stages") or [])

    def _steps(self, number: int) -> int:
        """Steps of the stages before ``number``."""
        return sum(stage["steps"] for stage in self._stages()[: number - 1])

    # --- a stage's begin --------------------------------------------------------------------------

    def _begun(self, number: int, last: TrainingJob) -> dict[str, Any] | None:
        """The stage as recorded, with its batch; ``None`` once the job is over."""
        known = self._stages()
        call = self._session.call
        if len(known) >= number:
            stage = known[number - 1]
            if stage["status"] == RUNNING and not self._is_published(number):
                call(activate(self._stores.jobs, stage["model"], self._base))
            return stage
        model = self._job.model if last is self._job else last.policy_id
        if self.is_over():
            return None
        call(activate(self._stores.jobs, model, self._base))
        batch_id = self._create_batch(number, model)
        if batch_id is None:
            return None
        dimension = self._job.stages[number - 1]
        stage = {
            "dimension": dimension, "model": model, "batch_id": batch_id, "version": None,
            "steps": 0, "trained_tokens": 0, "status": RUNNING,
        }  # fmt: skip
        self._tell(
            number, "begins",
            f"Stage {number} of {len(self._job.stages)} ({dimension}): batch {batch_id} samples "
            f"{model}",
        )  # fmt: skip
        call(self._stores.jobs.update_job(self._job.id, stages=[*known, stage]))
        if self.is_over():
            # Whoever ended the job meanwhile did not know of this stage's batch.
            call(cancel_stage_batches(self._stores.batches, self._stored()))
            return None
        return stage

    def _is_published(self, number: int) -> bool:
        run = replace(self._job, stage=number)
        versions = self._session.call(self._stores.jobs.list_policies())
        return any(version["id"] == run.policy_id for version in versions)

    def _create_batch(self, number: int, model: str) -> str | None:
        """The stage's batch, created once; waits while the service has no room for it."""
        while not self.is_over():
            try:
                return str(self._session.call(self._batch(number, model))["id"])
            except OverloadedError as error:
                self._wait(error.retry_after_s)
        return None

    async def _batch(self, number: int, model: str) -> dict[str, Any]:
        source = self._job.training_file
        defaults: Mapping[str, Any] = {}
        batches = self._stores.batches
        if self._job.reads_stream:
            defaults = (await batches.batch_options(source)).get("defaults") or {}
            source = (await batches.get_batch(source))["input_file_id"]
        await batches.get_file(source)
        # Their order is that of the stages, since a stage protects those before it; the others
        # follow: classes and rewrites are those of the whole method, whatever is aligned.
        dimensions = list(dict.fromkeys((*self._job.stages, *self._dimensions)))
        fixed = {"model": model, "mode": "sequential", "dimensions": dimensions}
        batch = {
            "endpoint": REWRITES_URL, "input_file_id": source, "model": model,
            "metadata": {"fine_tuning_job_id": self._job.id, "stage": str(number)},
        }  # fmt: skip
        options = {"defaults": defaults, "fixed": fixed}
        key = f"{self._job.id}/stage-{number}"
        return await batches.create_batch(batch, options, key, content_hash([key]))

    # --- its training, and its end ----------------------------------------------------------------

    def _trained(self, number: int, stage: dict[str, Any], run: TrainingJob) -> dict[str, Any]:
        """The stage once it is trained and published, or left out for want of pairs."""
        checkpoint = train_on(self._session, run, self._train)
        if self.is_over():
            return stage
        batch = self._session.call(self._stores.batches.get_batch(stage["batch_id"]))
        if checkpoint is None:
            return self._leave_out(number, stage, batch["status"])
        if batch["status"] not in BATCH_OVER:
            # Its rows name a version that may stop being served when the next one is published.
            self._session.call(self._stores.batches.cancel_batch(stage["batch_id"]))
        state = RunState.load(checkpoint)
        is_published = self._session.call(
            publish_version(
                self._stores, run, checkpoint,
                step=state.step, data_dir=self._data_dir,
            )
        )  # fmt: skip
        if not is_published:
            return stage
        done = {
            "version": run.policy_id, "steps": state.step, "status": SUCCEEDED,
            "trained_tokens": run.earlier_tokens + state.trained_tokens,
        }  # fmt: skip
        return self._record(number, {**stage, **done})

    def _leave_out(self, number: int, stage: dict[str, Any], status: str) -> dict[str, Any]:
        if status != "completed":
            raise InvalidRequestError(
                f"training_file must hold prompts that can be sampled, but the batch "
                f"{stage['batch_id']} of stage {number} ended as {status} without a pair",
                "training_file",
                "stage_failed",
            )
        message = f"Stage {number} ({stage['dimension']}) is left out: its batch has no pair"
        self._tell(number, "left-out", message, level="warn")
        return self._record(number, {**stage, "status": LEFT_OUT})

    def _record(self, number: int, stage: dict[str, Any]) -> dict[str, Any]:
        stages = self._stages()
        stages[number - 1] = stage
        self._session.call(self._stores.jobs.update_job(self._job.id, stages=stages))
        return stage

    def _tell(self, number: int, what: str, message: str, level: str = "info") -> None:
        """An event with a name of its own, so that telling it twice is telling it once."""
        name = f"ftevent-{self._job.id}-stage-{number}-{what}"
        event = {"id": name, "level": level, "message": message}
        self._session.call(self._stores.jobs.add_event(self._job.id, event))
