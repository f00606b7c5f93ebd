"""TRL on the tiny model: falling loss, data that ends the run, resuming, stopping, full weights."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from mora_serve.config import TrainerSettings
from mora_serve.dpo_loss import SMOOTHED, LossType
from mora_serve.errors import InvalidRequestError
from trainer.dpo import load_policy, load_tokenizer, prompt_fits, run_dpo
from trainer.job import TrainingJob, read_job
from trainer.run_state import RunState
from trainer.source import ListFeed, PairSource, Position, ResumableRows
from trainer.tiny_model import ensure_tiny_model

pytestmark = pytest.mark.slow


class Recorder:
    """Hooks that keep what they are told, and ask for a stop behind a step."""

    def __init__(self, keep: Path, stop_after: int | None = None) -> None:
        self.keep = keep
        self.stop_after = stop_after
        self.losses: dict[int, float] = {}
        self.metrics: dict[int, Mapping[str, float]] = {}
        self.margins: dict[int, float] = {}
        self.checkpoints: list[int] = []
        self.draws: dict[int, float] = {}
        """A number drawn in every step, as dropout would draw it."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.draws[step] = float(torch.rand(()))
        self.losses[step] = metrics["loss"]
        self.metrics[step] = metrics
        self.margins[step] = metrics["rewards/margins"]

    def checkpoint(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        self.checkpoints.append(step)
        shutil.copytree(folder, self.keep / str(step), dirs_exist_ok=True)

    def should_stop(self) -> bool:
        return self.stop_after is not None and len(self.losses) + 1 >= self.stop_after


def pair(number: int) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": f"question {number}"}],
        "chosen": [{"role": "assistant", "content": "yes, gladly"}],
        "rejected": [{"role": "assistant", "content": "no, never"}],
        "chosen_scores": {"helpful": {"value": 1.0}, "harmless": {"value": 0.5}},
        "rejected_scores": {"helpful": {"value": 0.0}, "harmless": {"value": 0.25 * number}},
    }


PAIRS = [pair(number) for number in range(22)]


def job(**mora: Any) -> TrainingJob:
    options = {"max_length": 96, "checkpoint_steps": 2, **mora}
    stored = {"id": "ftjob-1", "model": "m", "training_file": "file-1", "seed": 3, "mora": options}
    return read_job(stored, TrainerSettings(learning_rate=1e-2, batch_size=4))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(ensure_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def train(
    model_dir: str,
    work: Path,
    run: TrainingJob,
    hooks: Recorder,
    resume_from: Path | None = None,
    adapter: Path | None = None,
) -> RunState | None:
    tokenizer = load_tokenizer(model_dir)
    adapter_dir = None if adapter is None else str(adapter)
    source = PairSource(
        ListFeed(PAIRS), num_epochs=run.n_epochs, accept=prompt_fits(tokenizer, run.max_length)
    )
    start = Position() if resume_from is None else RunState.load(resume_from).position
    return run_dpo(
        run,
        ResumableRows(source, start),
        load_policy(model_dir, lora=run.lora, use_gpu=False, adapter_dir=adapter_dir),
        tokenizer,
        hooks,
        output_dir=work,
        resume_from=resume_from,
        dimensions=("helpful", "harmless", "truthful"),
    )


def test_loss_falls_and_the_run_ends_with_its_data(model_dir: str, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path / "kept")
    state = train(model_dir, tmp_path / "out", job(), hooks)
    assert sorted(hooks.losses) == [1, 2, 3, 4, 5, 6]
    assert hooks.losses[1] == pytest.approx(0.6931, abs=1e-3)
    assert hooks.losses[6] < 0.5 * hooks.losses[1]
    assert hooks.margins[6] > 0
    assert hooks.checkpoints == [2, 4, 6]
    assert state is not None
    assert (state.done, state.position) == (True, Position(0, 21))
    assert state.trained_tokens > 22 * 2 * 20


def test_a_resumed_run_repeats_an_unbroken_one_step_by_step(model_dir: str, tmp_path: Path) -> None:
    unbroken = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(), unbroken)
    resumed = Recorder(tmp_path / "kept2")
    train(model_dir, tmp_path / "out2", job(), resumed, resume_from=tmp_path / "kept" / "2")
    assert sorted(resumed.losses) == [3, 4, 5, 6]
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(unbroken.losses[step], rel=1e-3)
    assert resumed.draws == {step: unbroken.draws[step] for step in resumed.draws}


def test_a_finished_run_is_not_trained_again(model_dir: str, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(max_steps=2), hooks)
    assert hooks.checkpoints == [2]
    again = Recorder(tmp_path / "kept2")
    state = train(
        model_dir, tmp_path / "out2", job(max_steps=2), again, resume_from=tmp_path / "kept" / "2"
    )
    assert state is not None
    assert state.done
    assert again.losses == {}


def test_a_stopped_run_is_left_resumable(model_dir: str, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path / "kept", stop_after=3)
    state = train(model_dir, tmp_path / "out", job(), hooks)
    assert max(hooks.losses) == 3
    assert state is not None
    assert (state.done, state.position) == (False, Position(0, 11))


def test_prompts_that_fill_the_context_are_no_rows(model_dir: str, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path / "kept")
    assert train(model_dir, tmp_path / "out", job(max_length=16), hooks) is None
    assert hooks.checkpoints == []


def test_a_conversation_that_breaks_the_chat_template_is_no_row(model_dir: str) -> None:
    tokenizer = load_tokenizer(model_dir)
    tokenizer.chat_template = (
        "{% for turn in messages %}{% if turn.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ turn.content }}{% endfor %}"
    )
    accept = prompt_fits(tokenizer, 96)
    answer = [{"role": "tool", "content": "ok"}]
    assert accept(pair(0))
    assert not accept({**pair(0), "prompt": answer})
    assert not accept({**pair(0), "rejected": answer})


def test_a_full_run_trains_the_weights_themselves(model_dir: str, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(lora=False, max_steps=3, checkpoint_steps=3), hooks)
    assert hooks.losses[3] < hooks.losses[1]
    assert (tmp_path / "kept" / "3" / "model.safetensors").exists()
    assert not (tmp_path / "kept" / "3" / "adapter_config.json").exists()


def test_a_step_tells_what_its_pairs_teach_on_each_dimension(
    model_dir: str, tmp_path: Path
) -> None:
    hooks = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(max_steps=2), hooks)
    assert hooks.metrics[1]["margins/helpful"] == pytest.approx(1.0)
    assert hooks.metrics[1]["margins/harmless"] == pytest.approx(0.5 - 0.25 * 1.5)
    assert hooks.metrics[2]["margins/harmless"] == pytest.approx(0.5 - 0.25 * 5.5)
    assert "margins/truthful" not in hooks.metrics[1]


@pytest.mark.parametrize("lora", [True, False])
def test_a_run_that_diverges_ends_with_the_reason_and_keeps_no_broken_weights(
    model_dir: str, tmp_path: Path, lora: bool
) -> None:
    run = replace(job(lora=lora, max_steps=5, checkpoint_steps=1), learning_rate=1e12)
    hooks = Recorder(tmp_path / "kept")
    with pytest.raises(InvalidRequestError, match="must keep the run finite") as caught:
        train(model_dir, tmp_path / "out", run, hooks)
    assert caught.value.code == "diverged"
    assert 0.0 not in hooks.losses.values()
    for kept in (tmp_path / "kept").rglob("*model.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(kept).values())


@pytest.mark.parametrize("name", get_args(LossType))
def test_every_loss_that_a_job_may_name_trains(
    model_dir: str, tmp_path: Path, name: LossType
) -> None:
    loss = {"loss_type": [name], "label_smoothing": 0.1 if name in SMOOTHED else 0.0}
    hooks = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(max_steps=2, checkpoint_steps=9, loss=loss), hooks)
    assert all(math.isfinite(value) for value in hooks.losses.values())
    # Both answers have moved: from the second step on, the policy is not its reference.
    assert hooks.metrics[2]["rewards/chosen"] != 0.0


def test_losses_are_added_up_by_their_weights(model_dir: str, tmp_path: Path) -> None:
    losses = {}
    for name, loss in {
        "sigmoid": {"loss_type": ["sigmoid"]},
        "sft": {"loss_type": ["sft"]},
        "both": {"loss_type": ["sigmoid", "sft"], "loss_weights": [2.0, 0.5]},
        "shared": {"ld_alpha": 0.0},
    }.items():
        hooks = Recorder(tmp_path / f"kept-{name}")
        train(model_dir, tmp_path / name, job(max_steps=2, checkpoint_steps=9, loss=loss), hooks)
        losses[name] = hooks.losses
    mixed = 2.0 * losses["sigmoid"][1] + 0.5 * losses["sft"][1]
    assert losses["both"][1] == pytest.approx(mixed, rel=1e-3)
    assert losses["shared"][2] != pytest.approx(losses["sigmoid"][2], rel=1e-3)


def test_a_next_stage_starts_from_the_last_adapter_refers_to_it_and_resumes(
    model_dir: str, tmp_path: Path
) -> None:
    train(model_dir, tmp_path / "first", job(), Recorder(tmp_path / "stage1"))
    adapter = tmp_path / "stage1" / "6"
    unbroken = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(), unbroken, adapter=adapter)
    # The policy is its own reference again, and goes on from a policy that was trained before.
    assert unbroken.losses[1] == pytest.approx(0.6931, abs=1e-3)
    base = Recorder(tmp_path / "base")
    train(model_dir, tmp_path / "base-out", job(max_steps=1), base)
    assert unbroken.metrics[1]["logps/chosen"] > base.metrics[1]["logps/chosen"] + 0.1
    resumed = Recorder(tmp_path / "kept2")
    train(
        model_dir, tmp_path / "out2", job(), resumed,
        resume_from=tmp_path / "kept" / "2", adapter=adapter,
    )  # fmt: skip
    for step, loss in resumed.losses.items():
        assert loss == pytest.approx(unbroken.losses[step], rel=1e-3)
