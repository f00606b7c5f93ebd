"""KL of policy versions to a reference, from the log-probabilities of their sampled answers.

The REST API gives texts, not log-probabilities, so both versions read the answers again in an
offline pass (``python -m trainer.kl``, which states the estimators) on the caller's machine: it
needs the base model's directory, and fetches adapters and weights from the jobs that made them.
Reported is Schulman's k3 at the temperature of the sampling, per token and per answer, with a
bootstrap over prompts; k1 beside it, as a check. The trained weights are compared in float32: what
an engine adds by rounding merged weights is not in the figure.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mora_serve.bootstrap import Bootstrap, Estimate
from mora_serve.client import Client
from mora_serve.errors import MoraError
from mora_serve.jobs import fetch_results

Json = dict[str, Any]
BASE = "base"
"""What ``trainer.kl`` calls the base model."""
RunCommand = Callable[[list[str]], None]
"""Runs a command of ours to its end; raises :class:`~mora_serve.errors.MoraError` when it fails."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """``KL(version || reference)`` in nats, on the version's own answers."""

    reference: str
    per_token: Estimate
    per_answer: Estimate
    per_answer_k1: Estimate
    num_answers: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class DivergenceSettings:
    """What the measurement needs beside the answers."""

    base_model: Path
    """Directory of the base model."""
    temperature: float
    """Of the sampling."""


class DivergenceMeter:
    """Measures versions of one server against ``reference``; files are kept in ``scratch``."""

    def __init__(
        self,
        client: Client,
        settings: DivergenceSettings,
        reference: str,
        scratch: Path,
        run_command: RunCommand,
    ) -> None:
        self._client = client
        self._settings = settings
        self.reference = reference
        """Version that the others diverge from."""
        self._scratch = scratch
        self._run_command = run_command
        self._directories: dict[str, str] = {}

    def fetch(self, versions: Sequence[str]) -> None:
        """Have the weights of ``versions`` and of the reference at hand, before hours of sampling.

        Raises :class:`MoraError` for a version whose weights no job hands out.
        """
        for version in (self.reference, *versions):
            self._directory(version)

    def measure(self, version: str, diagnostics: Sequence[Json], seed: int) -> Divergence:
        """Divergence of the answers in ``diagnostics``, which were drawn from ``version``."""
        rows = [
            (item["index"], {"prompt": item["prompt"], "answer": rollout["text"]})
            for item in diagnostics
            for rollout in item["rollouts"] or []
        ]
        answers, out = self._scratch / "kl-answers.jsonl", self._scratch / "kl.jsonl"
        lines = [json.dumps(row, ensure_ascii=False) for _, row in rows]
        answers.write_text("\n".join(lines) + "\n", "utf-8")
        settings = self._settings
        self._run_command(
            [
                sys.executable, "-m", "trainer.kl", "--base", str(settings.base_model),
                "--policy", self._directory(version),
                "--reference", self._directory(self.reference),
                "--temperature", str(settings.temperature),
                "--answers", str(answers), "--out", str(out),
            ]
        )  # fmt: skip
        found = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
        places = [index for index, _ in rows]
        return estimate(self.reference, places, found, Bootstrap(seed))

    def _directory(self, version: str) -> str:
        """Where a version's weights are: fetched from its job, unless it is the base."""
        if version not in self._directories:
            job = self._job_of(version)
            if job is None:
                base = self._client.get("/v1/models")["data"][0]["base"]
                if version != base:
                    raise MoraError(
                        f"KL needs a version whose job hands out its weights, or {base}, got "
                        f"{version}; leave out --base-model"
                    )
                self._directories[version] = BASE
            else:
                target = self._scratch / f"weights-{len(self._directories)}"
                # An evaluation that was broken off may have left another version's there.
                shutil.rmtree(target, ignore_errors=True)
                fetch_results(self._client, job, target)
                self._directories[version] = str(target)
        return self._directories[version]

    def _job_of(self, version: str) -> Json | None:
        """The job whose result files are the version's weights."""
        for job in self._client.pages("/v1/fine_tuning/jobs", limit=100):
            if job["fine_tuned_model"] == version:
                return job
            if version in [stage["version"] for stage in job.get("stages") or []]:
                raise MoraError(
                    f"KL needs the last version of a job, got {version} of an earlier stage of "
                    f"{job['id']}, whose weights are no result file; leave out --base-model"
                )
        return None


def estimate(
    reference: str, places: Sequence[int], found: Sequence[Mapping[str, float]], boot: Bootstrap
) -> Divergence:
    """Figures from ``trainer.kl``'s rows; ``places`` are the prompts that they belong to."""
    sums: dict[int, list[float]] = {}
    for place, row in zip(places, found, strict=True):
        columns = sums.setdefault(place, [0.0] * 4)
        for index, value in enumerate((row["k3"], row["k1"], row["num_tokens"], 1.0)):
            columns[index] += value
    data = list(sums.values())
    return Divergence(
        reference=reference,
        per_token=boot.estimate(data, lambda sums: sums[:, 0] / sums[:, 2]),
        per_answer=boot.estimate(data, lambda sums: sums[:, 0] / sums[:, 3]),
        per_answer_k1=boot.estimate(data, lambda sums: sums[:, 1] / sums[:, 3]),
        num_answers=len(found),
        num_tokens=sum(int(row["num_tokens"]) for row in found),
    )
