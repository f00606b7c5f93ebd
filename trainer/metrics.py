"""Prometheus text of one training run, posted to the stores' metrics board."""

from __future__ import annotations

from collections.abc import Mapping

_GAUGES = {
    "mora_train_step": ("step", "Optimizer steps taken."),
    "mora_train_loss": ("loss", "DPO loss of the last step."),
    "mora_train_reward_margin": ("rewards/margins", "Chosen minus rejected implicit reward."),
    "mora_train_reward_accuracy": (
        "rewards/accuracies",
        "Share of pairs whose chosen answer has the higher implicit reward.",
    ),
}
_TAUGHT = "mora_train_pair_margin"
_WAIT = "mora_train_wait_for_data_seconds"


def exposition(job_id: str, report: Mapping[str, float]) -> str:
    """Exposition text of the run's latest report; absent metrics are left out."""
    lines = []
    for name, (key, text) in _GAUGES.items():
        if key in report:
            lines += _family(name, "gauge", text, job_id, float(report[key]))
    taught = {
        key.removeprefix("margins/"): float(value)
        for key, value in report.items()
        if key.startswith("margins/")
    }
    if taught:
        lines += _head(_TAUGHT, "gauge", "Chosen minus rejected reward of the step's pairs, in z.")
        lines += [
            f'{_TAUGHT}{{job="{job_id}",dimension="{name}"}} {value}'
            for name, value in taught.items()
        ]
    waited_s = float(report.get("wait_for_data_seconds", 0.0))
    lines += _family(_WAIT, "gauge", "Time spent waiting for pairs.", job_id, waited_s)
    return "\n".join(lines) + "\n"


def _family(name: str, kind: str, text: str, job_id: str, value: float) -> list[str]:
    return [*_head(name, kind, text), f'{name}{{job="{job_id}"}} {value}']


def _head(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
