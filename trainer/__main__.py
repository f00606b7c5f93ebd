"""``python -m trainer --job ID``: runs one fine-tuning job to its end on Ray Train.

The composition root of the package. Settings come in the environment (``MORA_CONFIG_JSON``), the
cluster's address in ``RAY_ADDRESS`` or in the settings; without either a local Ray is started.
Killed at any point, the same command goes on from the last checkpoint. Exit status: 0 when the job
is in a terminal state that it should be in (``succeeded``, ``cancelled``, or ``failed`` because of
its data), anything else when starting it again may help.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchTrainer

from mora_serve.config import ENV_CONFIG, Settings, dump_settings, settings_from_dump
from mora_serve.errors import ConfigError, InvalidRequestError
from mora_serve.openmp import torch_environment
from mora_serve.policies import cancel_stage_batches
from mora_serve.store import open_stores
from trainer.feeds import StoreSession
from trainer.job import TERMINAL, TrainingJob, read_job
from trainer.loop import train_worker
from trainer.publish import finish, publish
from trainer.run_batch import await_batch, no_pairs, train_on
from trainer.stages import StagedRun
from trainer.tiny_model import ensure_tiny_model

logger = logging.getLogger("trainer")


def main(arguments: list[str] | None = None) -> int:
    """Run the job named on the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    parser.add_argument("--job", required=True, help="id of a fine-tuning job")
    job_id = parser.parse_args(arguments).job
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    settings = settings_from_environment(os.environ)
    with StoreSession(open_stores(settings)) as session:
        return run_job(session, settings, job_id)


def settings_from_environment(environ: Mapping[str, str]) -> Settings:
    """The settings that the parent process resolved."""
    if ENV_CONFIG not in environ:
        raise ConfigError(
            f"{ENV_CONFIG} must hold resolved settings; trainers start from the stack"
        )
    return settings_from_dump(json.loads(environ[ENV_CONFIG]))


def run_job(session: StoreSession, settings: Settings, job_id: str) -> int:
    """Validate, train, publish; returns the exit status."""
    jobs = session.stores.jobs
    stored = session.call(jobs.get_job(job_id))
    if stored["status"] in TERMINAL:
        return 0
    try:
        job = read_job(stored, settings.trainer)
        resolve_model(session, settings, job)
        session.call(jobs.update_job(job_id, status="running"))
        _join_ray(settings)
        train_and_publish(session, settings, job)
    except InvalidRequestError as error:
        fail(session, job_id, error)
    except TrainingFailedError as error:
        return _after_failed_fit(session, job_id, error)
    return 0


def train_and_publish(session: StoreSession, settings: Settings, job: TrainingJob) -> None:
    """One run, or stage after stage; leaves a job alone that was ended meanwhile."""

    def train(run: TrainingJob) -> Path | None:
        return fit(settings, run, resolve_model(session, settings, run))

    stores = session.stores
    if job.resample:
        staged = StagedRun(session, job, settings, train)
        last, trained_tokens = staged.run()
        if not staged.is_over():
            session.call(finish(stores, last, trained_tokens=trained_tokens))
        return
    checkpoint = train_on(session, job, train)
    if session.call(stores.jobs.get_job(job.id))["status"] in TERMINAL:
        return
    if checkpoint is None:
        raise no_pairs()
    if job.reads_stream and job.make_current:
        await_batch(session, job)
    session.call(publish(stores, job, checkpoint, data_dir=settings.data_dir.absolute()))


def fit(settings: Settings, job: TrainingJob, model: Mapping[str, str | None]) -> Path | None:
    """Run the job on Ray Train; returns its last checkpoint, ``None`` without any."""
    trainer = settings.trainer
    config = {"settings": dump_settings(settings, reveal=True), "job": job, **model}
    result = TorchTrainer(
        # Not as train_loop_config, which Ray's dashboard can show: the settings hold keys.
        partial(train_worker, config),
        scaling_config=ScalingConfig(
            num_workers=trainer.num_workers,
            use_gpu=trainer.use_gpu,
            resources_per_worker={"CPU": trainer.num_cpus_per_worker}
            | ({"GPU": 1} if trainer.use_gpu else {})
            | trainer.resources,
        ),
        run_config=run_config(settings, job),
    ).fit()
    return None if result.checkpoint is None else Path(result.checkpoint.path)


def run_config(settings: Settings, job: TrainingJob) -> RunConfig:
    """Where the run keeps its checkpoints, and what its workers' environment holds."""
    trainer = settings.trainer
    variables = {} if trainer.use_gpu else torch_environment(trainer.num_threads)
    return RunConfig(
        name=job.run_name,
        storage_path=str(settings.data_dir.absolute() / "train"),
        failure_config=FailureConfig(max_failures=0),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
        worker_runtime_env={"env_vars": variables},
    )


def resolve_model(
    session: StoreSession, settings: Settings, job: TrainingJob
) -> dict[str, str | None]:
    """``model_dir`` and ``adapter_dir`` of the version a job starts from.

    Raises :class:`~mora_serve.errors.InvalidRequestError` for a version that is not known.
    """
    base = base_model_dir(settings)
    versions = {item["id"]: item for item in session.call(session.stores.jobs.list_policies())}
    version = versions.get(
        job.model, {"kind": "base"} if job.model == settings.policy.model else {}
    )
    kind, uri = version.get("kind"), version.get("uri")
    if kind == "base":
        return {"model_dir": base, "adapter_dir": None}
    if kind == "lora":
        return {"model_dir": base, "adapter_dir": uri}
    if kind == "merged" and job.lora:
        raise InvalidRequestError(
            f"mora.lora must be false to train {job.model} further, which is full weights: an "
            "adapter of it would be applied to the base model",
            "mora.lora",
            "invalid_value",
        )
    if kind == "merged":
        return {"model_dir": uri, "adapter_dir": None}
    raise InvalidRequestError(
        f"model must name a policy version, got {job.model}", "model", "model_not_found"
    )


def base_model_dir(settings: Settings) -> str:
    """Directory or hub id of the base model; the ``fake`` backend trains a tiny random one."""
    if settings.trainer.test_model is not None:
        return settings.trainer.test_model
    if settings.policy.backend == "fake":
        return str(ensure_tiny_model(settings.data_dir.absolute() / "models" / "tiny-llama"))
    return settings.policy.path or str(
        settings.data_dir.absolute() / "models" / settings.policy.model
    )


def fail(session: StoreSession, job_id: str, error: InvalidRequestError) -> None:
    """Record a fault of the job itself, which no restart can mend."""
    logger.error("job %s failed: %s", job_id, error.message)
    jobs = session.stores.jobs
    session.call(cancel_stage_batches(session.stores.batches, session.call(jobs.get_job(job_id))))
    reason = {"code": error.code, "message": error.message, "param": error.param}
    session.call(jobs.add_event(job_id, {"level": "error", "message": error.message}))
    session.call(jobs.update_job(job_id, status="failed", error=reason))


def _after_failed_fit(session: StoreSession, job_id: str, error: TrainingFailedError) -> int:
    """0 when the job was cancelled or its data is at fault, else 1 so that it is tried again."""
    if session.call(session.stores.jobs.get_job(job_id))["status"] in TERMINAL:
        return 0
    causes: Mapping[int, Exception] = getattr(error, "worker_failures", {})
    for cause in causes.values():
        inner: Any = getattr(cause, "cause", cause)
        if isinstance(inner, InvalidRequestError):
            fail(session, job_id, inner)
            return 0
    logger.error("training stopped: %s", error)
    return 1


def _join_ray(settings: Settings) -> None:
    address = os.environ.get("RAY_ADDRESS") or settings.ray.address
    if address is not None:
        ray.init(address=address, log_to_driver=True, logging_level="warning")
        return
    ray.init(
        address="local",
        num_cpus=settings.ray.num_cpus,
        object_store_memory=settings.ray.object_store_bytes,
        include_dashboard=False,
        logging_level="warning",
    )


if __name__ == "__main__":
    sys.exit(main())
