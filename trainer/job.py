"""The fine-tuning job as the trainer reads it.

A job is stored as OpenAI's ``fine_tuning.job`` object; what OpenAI has no field for rides under
``mora``. This module only reads: it turns the object plus :class:`TrainerSettings` into one frozen
record in which every ``"auto"`` and every absent value is resolved.

Shape of what is read (everything else is left alone)::

    {"id": "ftjob-...", "model": "<policy version to start from>", "seed": 7,
     "training_file": "batch_... | file-...",
     "method": {"type": "dpo", "dpo": {"hyperparameters": {
         "beta": 0.1, "batch_size": 4, "learning_rate_multiplier": 1.0, "n_epochs": 1}}},
     "mora": {"mode": "simultaneous | sequential | null", "dimensions": ["harmless"],
              "resample": true, "lora": true,
              "lora_rank": 8, "loss": {"loss_type": ["sigmoid"]}, "max_steps": 20,
              "max_length": 256, "checkpoint_steps": 10, "make_current": true}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mora_serve.config import TrainerSettings
from mora_serve.dpo_loss import DpoLoss
from mora_serve.errors import InvalidRequestError
from mora_serve.validation import request_error

TERMINAL = frozenset({"succeeded", "failed", "cancelled"})
"""Job states that nothing leaves."""

PositiveInt = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
ModelT = TypeVar("ModelT", bound=BaseModel)


class Hyperparameters(BaseModel):
    """OpenAI's DPO hyperparameters; ``None`` takes the configured default, as ``"auto"`` does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    beta: PositiveFloat | None = None
    batch_size: PositiveInt | None = None
    learning_rate_multiplier: PositiveFloat | None = None
    n_epochs: PositiveInt | None = None


class MoraOptions(BaseModel):
    """What a job may ask for beyond OpenAI's fields; ``None`` is the configured default."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    mode: Literal["simultaneous", "sequential"] | None = None
    """``sequential`` trains one stage after another, in the order of ``dimensions``."""
    dimensions: tuple[str, ...] | None = None
    """Stages of a sequential run; ``None`` takes every pair in stream order."""
    resample: bool | None = None
    """Whether the pairs of each stage are sampled from the version before it (the default of a
    sequential run), or all stages train on the pairs that ``training_file`` has."""
    lora: bool | None = None
    lora_rank: PositiveInt | None = None
    loss: DpoLoss | None = None
    max_steps: PositiveInt | None = None
    """Optimizer steps at most; ``None`` (and no configured limit) trains until the data ends."""
    max_length: Annotated[int, Field(ge=16)] | None = None
    checkpoint_steps: PositiveInt | None = None
    make_current: bool = True
    """Whether the published version becomes the one that requests sample by default."""


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A job with every default resolved, for example ``read_job(job, settings.trainer)``."""

    id: str
    model: str
    """Policy version that training starts from, which is also the reference model."""
    training_file: str
    seed: int
    beta: float
    loss: DpoLoss
    batch_size: int
    """Pairs per optimizer step and worker."""
    learning_rate: float
    n_epochs: int
    stages: tuple[str, ...]
    """Stages trained one after another; empty takes every pair in stream order."""
    resample: bool
    """Whether ``training_file`` names prompts, from which each stage has its own pairs sampled."""
    lora: bool
    lora_rank: int
    lora_alpha: int
    max_steps: int | None
    """Of the run, or of each stage where stages are sampled."""
    max_length: int
    """Tokens of prompt plus answer; longer answers are cut, longer prompts are skipped."""
    checkpoint_steps: int
    make_current: bool
    suffix: str | None = None
    stage: int | None = None
    """Which sampled stage this is, from 1; ``None`` for a job that is one run."""
    first_step: int = 0
    """Steps of the stages before this one."""
    earlier_tokens: int = 0
    """Tokens trained on in the stages before this one."""

    @property
    def policy_id(self) -> str:
        """Name of the version this run publishes: the same after every restart of the job."""
        tail = self.id.removeprefix("ftjob-").removeprefix("ftjob_")
        name = f"policy-{self.suffix}-{tail}" if self.suffix else f"policy-{tail}"
        return name if self.stage is None else f"{name}-stage-{self.stage}"

    @property
    def run_name(self) -> str:
        """Under which Ray Train keeps the run, and finds it again."""
        return self.id if self.stage is None else f"{self.id}-stage-{self.stage}"

    def stage_run(
        self, number: int, model: str, batch_id: str, *, first_step: int, earlier_tokens: int
    ) -> TrainingJob:
        """The run of stage ``number`` (from 1): from ``model``, on what a batch sampled of it."""
        return replace(
            self,
            model=model,
            training_file=batch_id,
            stages=(self.stages[number - 1],),
            resample=False,
            stage=number,
            first_step=first_step,
            earlier_tokens=earlier_tokens,
        )

    @property
    def reads_stream(self) -> bool:
        """True when ``training_file`` names a batch, whose pairs arrive while it runs."""
        return self.training_file.startswith(("batch_", "batch-"))


def read_job(job: Mapping[str, Any], defaults: TrainerSettings) -> TrainingJob:
    """Resolve a stored job object against the configured defaults.

    Raises :class:`~mora_serve.errors.InvalidRequestError` naming the field that cannot be used.
    """
    method = job.get("method") or {"type": "dpo"}
    if method.get("type", "dpo") != "dpo":
        raise InvalidRequestError(
            f"method.type must be dpo, got {method.get('type')!r}", "method.type", "invalid_method"
        )
    section = (method.get("dpo") or {}).get("hyperparameters") or job.get("hyperparameters") or {}
    section = {name: None if value == "auto" else value for name, value in section.items()}
    given = _validated(Hyperparameters, section, "method.dpo.hyperparameters")
    mora = _validated(MoraOptions, job.get("mora") or {}, "mora")
    stages = (mora.dimensions or ()) if mora.mode == "sequential" else ()
    lora = defaults.lora if mora.lora is None else mora.lora
    return TrainingJob(
        id=str(job["id"]),
        model=str(job["model"]),
        training_file=str(job["training_file"]),
        seed=int(job.get("seed") or 0),
        beta=given.beta or defaults.beta,
        loss=mora.loss or defaults.loss,
        batch_size=given.batch_size or defaults.batch_size,
        learning_rate=defaults.learning_rate * (given.learning_rate_multiplier or 1.0),
        n_epochs=given.n_epochs or 1,
        stages=stages,
        resample=bool(stages) and mora.resample is not False,
        lora=lora,
        lora_rank=mora.lora_rank or defaults.lora_rank,
        lora_alpha=defaults.lora_alpha,
        max_steps=mora.max_steps or defaults.max_steps,
        max_length=mora.max_length or defaults.max_length,
        checkpoint_steps=mora.checkpoint_steps or defaults.checkpoint_steps,
        make_current=mora.make_current,
        suffix=job.get("suffix") or None,
    )


def _validated(schema: type[ModelT], value: Any, path: str) -> ModelT:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise request_error(error, prefix=f"{path}.") from None
