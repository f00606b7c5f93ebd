"""TRL on the tiny model: falling loss, data that ends the run, resuming, stopping, full weights."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from mora_serve.config import TrainerSettings
from trainer.dpo import RunState, load_policy, load_tokenizer, prompt_fits, run_dpo
from trainer.job import TrainingJob, read_job
from trainer.source import ListFeed, PairSource, Position, ResumableRows
from trainer.tiny_model import ensure_tiny_model

pytestmark = pytest.mark.slow


class Recorder:
    """Hooks that keep what they are told, and ask for a stop behind a step."""

    def __init__(self, keep: Path, stop_after: int | None = None) -> None:
        self.keep = keep
        self.stop_after = stop_after
        self.losses: dict[int, float] = {}
        self.margins: dict[int, float] = {}
        self.checkpoints: list[int] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.losses[step] = metrics["loss"]
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
    model_dir: str, work: Path, run: TrainingJob, hooks: Recorder, resume_from: Path | None = None
) -> RunState | None:
    tokenizer = load_tokenizer(model_dir)
    source = PairSource(
        ListFeed(PAIRS), num_epochs=run.n_epochs, accept=prompt_fits(tokenizer, run.max_length)
    )
    start = Position() if resume_from is None else RunState.load(resume_from).position
    return run_dpo(
        run,
        ResumableRows(source, start),
        load_policy(model_dir, lora=run.lora, use_gpu=False),
        tokenizer,
        hooks,
        output_dir=work,
        resume_from=resume_from,
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


def test_a_full_run_trains_the_weights_themselves(model_dir: str, tmp_path: Path) -> None:
    hooks = Recorder(tmp_path / "kept")
    train(model_dir, tmp_path / "out", job(lora=False, max_steps=3, checkpoint_steps=3), hooks)
    assert hooks.losses[3] < hooks.losses[1]
    assert (tmp_path / "kept" / "3" / "model.safetensors").exists()
    assert not (tmp_path / "kept" / "3" / "adapter_config.json").exists()
