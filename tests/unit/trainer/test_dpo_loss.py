"""DPO variants: what fits together, and what is refused with the field and the rule."""

from __future__ import annotations

from typing import Any

import pytest

from mora_serve.config import TrainerSettings, load_settings
from mora_serve.dpo_loss import DpoLoss
from mora_serve.errors import ConfigError, InvalidRequestError
from trainer.job import read_job

BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"loss_type": ["dpop"]}, "loss_type.0", "must be 'sigmoid'"),
    ({"loss_type": "ipo"}, "loss_type", "must be a list"),
    ({"loss_type": []}, "loss_type", "at least 1"),
    ({"loss_type": ["ipo", "ipo"]}, "loss_type", "each loss once"),
    ({"loss_type": ["ipo", "sft"], "loss_weights": [1.0]}, "loss_weights", "one weight per"),
    ({"loss_type": ["exo_pair"]}, "label_smoothing", "above 0"),
    ({"label_smoothing": 0.1}, "label_smoothing", "called robust"),
    ({"loss_type": ["robust"], "label_smoothing": 0.5}, "label_smoothing", "below 0.5"),
    ({"ld_alpha": 1.5}, "ld_alpha", "at most 1"),
    ({"loss_type": ["apo_zero"], "f_divergence_type": "forward_kl"}, "f_divergence_type",
     "reverse_kl with the loss apo_zero"),
    ({"loss_type": ["aot"], "use_weighting": True}, "use_weighting", "sorts pairs"),
    ({"simpo_gamma": 1.0}, "simpo_gamma", ""),
]  # fmt: skip


def stored(loss: dict[str, Any]) -> dict[str, Any]:
    return {"id": "ftjob-1", "model": "m", "training_file": "batch_1", "mora": {"loss": loss}}


@pytest.mark.parametrize(("loss", "param", "rule"), BAD)
def test_a_job_with_a_loss_that_cannot_be_trained_is_refused_by_field(
    loss: dict[str, Any], param: str, rule: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read_job(stored(loss), TrainerSettings())
    assert caught.value.param == f"mora.loss.{param}"
    assert rule in caught.value.message
    assert caught.value.message.startswith("mora.loss.")


def test_a_jobs_loss_replaces_the_configured_one_as_a_whole() -> None:
    defaults = TrainerSettings(loss=DpoLoss(loss_type=("robust",), label_smoothing=0.2))
    assert read_job(stored({"ld_alpha": 0.5}), defaults).loss == DpoLoss(ld_alpha=0.5)
    assert read_job({**stored({}), "mora": {}}, defaults).loss == defaults.loss


def test_the_loss_is_configured_like_every_setting() -> None:
    environ = {"MORA_TRAINER__LOSS__LOSS_TYPE": '["ipo", "sft"]'}
    settings = load_settings("fake", environ=environ)
    assert settings.trainer.loss.loss_type == ("ipo", "sft")
    with pytest.raises(ConfigError, match=r"trainer\.loss.*label_smoothing must be above 0"):
        load_settings("fake", environ={"MORA_TRAINER__LOSS__LOSS_TYPE": '["exo_pair"]'})


def test_options_are_those_of_trls_configuration() -> None:
    loss = DpoLoss(loss_type=("sigmoid", "sft"), loss_weights=(1.0, 0.2), ld_alpha=0.5)
    options = loss.options()
    assert options["loss_type"] == ["sigmoid", "sft"]
    assert options["loss_weights"] == [1.0, 0.2]
    assert options["ld_alpha"] == 0.5
