"""Reading the stored job object."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mora_serve.config import TrainerSettings, load_settings
from mora_serve.errors import InvalidRequestError
from trainer.job import read_job

DEFAULTS = TrainerSettings(
    beta=0.2, batch_size=3, learning_rate=1e-4, max_steps=11, max_length=99, checkpoint_steps=5
)


def stored(hyperparameters: dict[str, Any] | None = None, **mora: Any) -> dict[str, Any]:
    return {
        "id": "ftjob-12ab",
        "model": "base",
        "training_file": "batch_1",
        "seed": 7,
        "suffix": None,
        "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters or {}}},
        "mora": mora,
    }


def test_auto_and_absent_values_take_the_configured_defaults() -> None:
    job = read_job(stored({"beta": "auto", "n_epochs": "auto"}), DEFAULTS)
    assert (job.beta, job.batch_size, job.learning_rate, job.n_epochs) == (0.2, 3, 1e-4, 1)
    assert (job.max_steps, job.max_length, job.checkpoint_steps) == (11, 99, 5)


def test_given_hyperparameters_win() -> None:
    given = {"beta": 0.5, "batch_size": 2, "learning_rate_multiplier": 3.0, "n_epochs": 4}
    job = read_job(stored(given), DEFAULTS)
    assert (job.beta, job.batch_size, job.n_epochs) == (0.5, 2, 4)
    assert job.learning_rate == pytest.approx(3e-4)


def test_extensions_win_over_defaults() -> None:
    job = read_job(stored(max_steps=2, lora=False, lora_rank=4, make_current=False), DEFAULTS)
    assert (job.max_steps, job.lora, job.lora_rank, job.make_current) == (2, False, 4, False)


def test_dimensions_are_stages_only_in_sequential_mode() -> None:
    dimensions = ["harmless", "helpful"]
    assert read_job(stored(mode="sequential", dimensions=dimensions), DEFAULTS).stages == (
        "harmless",
        "helpful",
    )
    assert read_job(stored(mode="simultaneous", dimensions=dimensions), DEFAULTS).stages == ()


def test_policy_id_derives_from_the_job_alone() -> None:
    assert read_job(stored(), DEFAULTS).policy_id == "policy-12ab"
    assert read_job({**stored(), "suffix": "kind"}, DEFAULTS).policy_id == "policy-kind-12ab"


@pytest.mark.parametrize(("name", "streams"), [("batch_9", True), ("file-9", False)])
def test_a_batch_id_is_read_as_a_stream(name: str, streams: bool) -> None:
    assert read_job({**stored(), "training_file": name}, DEFAULTS).reads_stream is streams


@pytest.mark.parametrize(
    ("job", "param"),
    [
        (stored({"beta": -1.0}), "method.dpo.hyperparameters.beta"),
        (stored({"gamma": 1.0}), "method.dpo.hyperparameters.gamma"),
        (stored(max_steps=0), "mora.max_steps"),
        ({**stored(), "method": {"type": "supervised"}}, "method.type"),
    ],
)
def test_unusable_values_name_their_field(job: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_job(job, DEFAULTS)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("use_gpu", "variables"),
    [(False, {"OMP_NUM_THREADS": "3", "OMP_WAIT_POLICY": "passive"}), (True, {})],
)
def test_workers_on_cpus_do_not_spin_on_cores_that_an_engine_shares(
    tmp_path: Path, use_gpu: bool, variables: dict[str, str]
) -> None:
    from trainer.__main__ import run_config

    trainer = {"num_threads": 3, "use_gpu": use_gpu}
    settings = load_settings("fake", overrides={"data_dir": str(tmp_path), "trainer": trainer})
    found = run_config(settings, read_job(stored(), settings.trainer))
    assert found.worker_runtime_env == {"env_vars": variables}


def test_what_ray_may_show_of_a_run_holds_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's dashboard can show whatever its trainer is told but the function."""
    from trainer import __main__ as command

    told: dict[str, Any] = {}

    class Told:
        def __init__(self, function: Any, **options: Any) -> None:
            told.update(options, function=function)

        def fit(self) -> SimpleNamespace:
            return SimpleNamespace(checkpoint=None)

    monkeypatch.setattr(command, "TorchTrainer", Told)
    settings = load_settings("fake", overrides={"server": {"api_keys": ["sk-1234"]}})
    assert command.fit(settings, read_job(stored(), settings.trainer), {"model_dir": "m"}) is None
    function = told.pop("function")
    assert function.args[0]["settings"]["server"]["api_keys"] == ["sk-1234"]
    assert function.args[0]["model_dir"] == "m"
    assert "sk-1234" not in repr(told)
    assert set(told) == {"scaling_config", "run_config"}
