"""DPO on TRL: builds model and trainer, runs them over a pair source, checkpoints, resumes.

Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290, equation 7). With LoRA the
reference is the policy with its adapter disabled, so one set of weights serves both. Knows neither
Ray nor the stores: progress leaves through :class:`RunHooks`.
"""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import IterableDataset
from jinja2 import TemplateError
from peft import LoraConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import DPOConfig, DPOTrainer

from mora_serve.errors import InvalidRequestError
from trainer.job import TrainingJob
from trainer.run_state import RunState
from trainer.source import Margins, ResumableRows, Row

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "ref"
"""TRL's name for the frozen copy of an adapter that is trained further."""
UNBOUNDED_STEPS = 10**9
"""``max_steps`` of a run that ends with its data: a streaming dataset needs a number."""
LORA_TARGETS = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)


class RunHooks(Protocol):
    """What a run tells its surroundings; called on every rank in the same order."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of the steps since the last call."""
        ...

    def checkpoint(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        """A complete checkpoint; ``folder`` is removed when a later one is written."""
        ...

    def should_stop(self) -> bool:
        """Asked after each step; every rank must get the same answer."""
        ...


def load_tokenizer(model_dir: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory, with a padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def has_bfloat16(*, use_gpu: bool) -> bool:
    """Whether the device computes in bfloat16; every CPU does, if need be in software."""
    return torch.cuda.is_bf16_supported(including_emulation=False) if use_gpu else True


def load_policy(
    model_dir: str, *, lora: bool, use_gpu: bool, adapter_dir: str | None = None
) -> torch.nn.Module:
    """The policy to train, optionally with the adapter of an earlier version.

    Frozen weights under LoRA are bfloat16 where the device has it, trained weights float32. An
    earlier adapter is trained on with a frozen copy as reference; a full run merges it first.
    """
    dtype = torch.bfloat16 if lora and has_bfloat16(use_gpu=use_gpu) else torch.float32
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
    if use_gpu:
        model = model.to("cuda")
    if adapter_dir is None:
        return model
    adapted = PeftModel.from_pretrained(model, adapter_dir, is_trainable=lora)
    return adapted if lora else adapted.merge_and_unload()


def prompt_fits(tokenizer: PreTrainedTokenizerBase, max_length: int) -> Callable[[Row], bool]:
    """A filter for rows whose prompt leaves room for an answer within ``max_length`` tokens.

    Rows whose turns break the chat template (its rules on roles and their order) are refused too.
    """

    def accept(row: Row) -> bool:
        try:
            ids = tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, tokenize=True, return_dict=True
            )["input_ids"]
            for side in ("chosen", "rejected"):
                tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False)
        except TemplateError:
            return False
        return len(ids) < max_length

    return accept


def build_config(job: TrainingJob, output_dir: Path, *, use_gpu: bool) -> DPOConfig:
    """TRL's configuration of a job.

    A bounded run decays its learning rate linearly to 0; one that ends with its data cannot know
    how long it is and keeps the rate.
    """
    return DPOConfig(
        output_dir=str(output_dir),
        per_device_train_batch_size=job.batch_size,
        max_steps=job.max_steps or UNBOUNDED_STEPS,
        lr_scheduler_type="linear" if job.max_steps else "constant",
        learning_rate=job.learning_rate,
        beta=job.beta,
        **job.loss.options(),
        max_length=job.max_length,
        seed=job.seed,
        data_seed=job.seed,
        bf16=use_gpu and has_bfloat16(use_gpu=use_gpu),
        use_cpu=not use_gpu,
        # Recomputing activations saves memory that short pairs do not need.
        gradient_checkpointing=use_gpu,
        logging_steps=1,
        # Otherwise a loss that is not a number is logged as 0.
        logging_nan_inf_filter=False,
        save_steps=job.checkpoint_steps,
        save_total_limit=1,
        ignore_data_skip=True,
        dataloader_num_workers=0,
        # Every trained weight takes part in every step; looking for others costs a graph walk.
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=use_gpu,
        disable_tqdm=True,
        report_to="none",
    )


def lora_config(job: TrainingJob) -> LoraConfig:
    """Adapters on every linear layer of the blocks, none on embeddings and head."""
    return LoraConfig(
        r=job.lora_rank,
        lora_alpha=job.lora_alpha,
        lora_dropout=0.0,
        target_modules=list(LORA_TARGETS),
        task_type="CAUSAL_LM",
    )


@dataclass(slots=True)
class StepCounts:
    """What went into a step, in a form that ranks can add up."""

    tokens: int
    totals: list[float]
    """Per dimension: rewards of chosen minus rejected, summed over the pairs that have both."""
    num_pairs: list[int]
    """Per dimension: how many pairs have both."""

    @classmethod
    def zero(cls, num_dimensions: int) -> StepCounts:
        return cls(0, [0.0] * num_dimensions, [0] * num_dimensions)

    @classmethod
    def of(cls, numbers: Sequence[float]) -> StepCounts:
        half = (len(numbers) - 1) // 2 + 1
        return cls(int(numbers[0]), list(numbers[1:half]), [int(n) for n in numbers[half:]])

    def tensor(self, device: torch.device) -> torch.Tensor:
        """``[1 + 2 K]``, the inverse of :meth:`of`."""
        numbers = [self.tokens, *self.totals, *self.num_pairs]
        return torch.tensor(numbers, dtype=torch.float64, device=device)

    def add(self, taught: Margins, dimensions: Sequence[str]) -> None:
        for place, name in enumerate(dimensions):
            if name in taught:
                self.totals[place] += taught[name]
                self.num_pairs[place] += 1

    def margins(self, dimensions: Sequence[str]) -> dict[str, float]:
        """Mean margin per dimension, of those that any pair has."""
        counted = zip(dimensions, self.totals, self.num_pairs, strict=True)
        return {name: total / num for name, total, num in counted if num}


class StreamingDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """DPOTrainer whose rows arrive partitioned and in order.

    The stock data loader splits a streaming dataset between ranks and reads one batch ahead. Here
    the source has split the rows already, and a batch that is not there yet must not hold back the
    one that is.
    """

    def __init__(
        self,
        *,
        rows: ResumableRows,
        trained_tokens: int,
        dimensions: Sequence[str],
        **options: Any,
    ) -> None:
        self.rows = rows
        self.trained_tokens = trained_tokens
        """Tokens of prompts and answers in all steps so far, over all ranks."""
        self.dimensions = tuple(dimensions)
        self._step = StepCounts.zero(len(self.dimensions))
        super().__init__(**options)

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(
            self.train_dataset,
            batch_size=self.args.train_batch_size,
            collate_fn=self._collate,
            # Iterating draws a seed for workers, after a resumed run has restored its random state:
            # from the global generator, dropout would go on with other numbers than before.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        """As the stock one, but data that has ended also ends the epoch's loop over steps."""
        samples, num_items = super().get_batch_samples(*args, **options)
        if not samples:
            self.control.should_epoch_stop = True
        return samples, num_items

    def create_model_card(self, *_args: Any, **_options: Any) -> None:
        """Checkpoints carry no card; the published version has its provenance in the store."""

    def _collate(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        batch = self.data_collator([{name: row[name] for name in names} for row in examples])
        for taught in self.rows.consumed(len(examples)):
            self._step.add(taught, self.dimensions)
        self._step.tokens += int(batch["attention_mask"].sum())
        return dict(batch)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to the metrics of a step what its pairs teach, over all ranks: ``margins/<k>``.

        Raises :class:`~mora_serve.errors.InvalidRequestError` for a step whose loss or gradient is
        not finite: its weights are lost, and must become neither a checkpoint nor a version.
        """
        if "loss" in logs:
            require_finite(logs, self.state.global_step)
            counted = self.accelerator.reduce(self._step.tensor(self.accelerator.device), "sum")
            step = StepCounts.of(counted.tolist())
            self._step = StepCounts.zero(len(self.dimensions))
            self.trained_tokens += step.tokens
            logs |= {f"margins/{k}": v for k, v in step.margins(self.dimensions).items()}
        super().log(logs, start_time)

    def run_state(self, *, done: bool) -> RunState:
        """Where the run stands after the last batch that was handed out."""
        waited_s = self.rows.source.counts.waited_s
        step = self.state.global_step
        return RunState(self.rows.position, self.trained_tokens, step, waited_s, done)


def require_finite(logs: Mapping[str, Any], step: int) -> None:
    """Raise for the metrics of a step after which there is no policy any more."""
    for name in ("loss", "grad_norm"):
        value = logs.get(name)
        if value is not None and not math.isfinite(value):
            raise InvalidRequestError(
                f"method.dpo.hyperparameters.learning_rate_multiplier must keep the run finite, "
                f"got {name} {value} in step {step}; take a smaller one",
                "method.dpo.hyperparameters.learning_rate_multiplier",
                "diverged",
            )


class _HookCallback(TrainerCallback):  # type: ignore[misc]
    """Translates Trainer events to hooks, and ends the run when the data does."""

    def __init__(self, hooks: RunHooks) -> None:
        self.hooks = hooks
        self.trainer: StreamingDPOTrainer | None = None
        self.metrics: dict[str, float] = {}
        self._saved_step = -1
        self.done = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.done = state.global_step >= state.max_steps
        if self.hooks.should_stop():
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if logs and "loss" in logs:
            self.metrics = {
                name: float(value)
                for name, value in logs.items()
                if isinstance(value, int | float | str) and name != "epoch"
            }
            self.hooks.log(state.global_step, self.metrics)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        # One epoch spans the whole run, so its end is the end of the data, of max_steps, or a stop.
        # A checkpoint at its last step that was not marked as done finds no row when resumed.
        if not control.should_training_stop:
            self.done = True
            control.should_training_stop = True
        control.should_save = self._saved_step != state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        assert self.trainer is not None, "bound before training starts"
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero:
            # Where a run starts from an adapter, peft saves the frozen copy of it as well, and
            # transformers then resumes by the adapters in folders alone, which leaves out the
            # trained one beside them. The copy is made of the version that the run starts from.
            shutil.rmtree(folder / REFERENCE_ADAPTER, ignore_errors=True)
            self.trainer.run_state(done=self.done).save(folder)
        self._saved_step = state.global_step
        self.hooks.checkpoint(folder, state.global_step, self.metrics)


def run_dpo(
    job: TrainingJob,
    rows: ResumableRows,
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    hooks: RunHooks,
    *,
    output_dir: Path,
    use_gpu: bool = False,
    resume_from: Path | None = None,
    dimensions: Sequence[str] = (),
) -> RunState | None:
    """Train until ``max_steps``, the end of the data, or a stop.

    ``dimensions`` are those whose margins are reported where rows have rewards. Returns the state
    at the end, or ``None`` when there was no row to train on. Every checkpoint holds all that a
    later call needs: weights, optimizer, scheduler, random states, position.
    """
    state = RunState.load(resume_from) if resume_from is not None else None
    if state is not None and state.done:
        return state
    if next(rows(), None) is None:
        return state
    callback = _HookCallback(hooks)
    trainer = StreamingDPOTrainer(
        rows=rows,
        trained_tokens=state.trained_tokens if state is not None else 0,
        dimensions=dimensions,
        model=model,
        args=build_config(job, output_dir, use_gpu=use_gpu),
        train_dataset=IterableDataset.from_generator(rows),
        processing_class=tokenizer,
        peft_config=lora_config(job) if job.lora and not isinstance(model, PeftModel) else None,
        callbacks=[callback],
    )
    trainer.remove_callback(PrinterCallback)
    callback.trainer = trainer
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    return trainer.run_state(done=callback.done)
