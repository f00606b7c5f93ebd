"""Drives the arms of the experiment over REST: batches, training files, jobs, held-out answers.

Per seed, all from the base version::

    batches   plain (no rewriting) · all (unmeasured rewriting) · mora (measured) · null (control)
              · more (no rewriting, as many rollouts as mora drew)
    arms      plain, more, all, mora: DPO on equally many pairs of their batch, equally many steps
              sequential: per dimension a mora batch on a share of the prompts, sampled from the
              version before, pairs of that stage alone, a share of the steps: as many rollouts
              in all as simultaneous alignment takes
    answers   base and every arm on the held-out prompts, same seeds; KL of the arm to the base

Versions are published without becoming current. What has to be sampled is made current for as long
as that takes and rolled back afterwards, since an engine that merges adapters holds one version at
a time. Everything that is finished is a cell.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.experiment_cells import Cells
from mora_serve.client import Client
from mora_serve.divergence import DivergenceMeter, DivergenceSettings, RunCommand
from mora_serve.errors import MoraError
from mora_serve.jobs import JobFollower
from mora_serve.openmp import torch_environment
from mora_serve.version_sampling import SamplingPlan, Served, draw

Json = dict[str, Any]
REWRITES = "/v1/rewrites"
BASE, SEQUENTIAL = "base", "sequential"
TRAINED_ON = {"plain": "plain", "more": "more", "unmeasured": "all", "simultaneous": "mora"}
"""Arm of one DPO run -> the batch whose pairs it trains on."""
ARMS = (*TRAINED_ON, SEQUENTIAL)
BATCHES: Mapping[str, Json] = {
    "plain": {"candidates": 0},
    "all": {"acceptance": "all"},
    "mora": {},
    "null": {"strategies": ["null"]},
}
"""What the rows of each batch ask for beside prompt and seed."""
MAX_ROLLOUTS = 256
ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
EVALUATION_SEED = 7_000
"""Far from the seeds of training batches."""
SCREENING_N, SCREENING_SEED = 8, 3_000
KL_ANSWERS = 1
"""Answers per held-out prompt that KL is taken over: a pass outside the engine costs minutes."""


@dataclass(frozen=True, slots=True)
class Design:
    """What the experiment is made of."""

    prompts: tuple[Any, ...]
    held_out: tuple[Any, ...]
    seeds: tuple[int, ...]
    dimensions: tuple[str, ...]
    """Also the order of the sequential stages."""
    num_steps: int
    """DPO steps of every arm; a sequential arm divides them among its stages."""
    batch_size: int
    n_eval: int
    beta: float
    learning_rate_multiplier: float
    max_pairs: int
    """Pairs that an arm trains on at most; all arms of a seed train on equally many."""
    num_single: int | None = None
    """Take this many of the prompts, those that a first diagnosis finds to carry one reward."""
    arms: tuple[str, ...] = ARMS


def run_quietly(command: list[str]) -> None:
    """Run a command of ours; its output is shown only when it fails."""
    env = {**os.environ, **torch_environment(len(os.sched_getaffinity(0)))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise MoraError(f"{command[2]} failed: {done.stderr.strip()[-500:]}")


class Arms:
    """Runs one seed after the other; ``poll_s`` is the pause between two looks at a job.

    ``kl`` measures the arms' divergence from the base with ``run_command``; ``None`` leaves it out.
    """

    def __init__(
        self,
        client: Client,
        design: Design,
        cells: Cells,
        note: Callable[[str], None],
        *,
        kl: DivergenceSettings | None = None,
        run_command: RunCommand = run_quietly,
        poll_s: float = 2.0,
    ) -> None:
        self._kl = kl
        self._run_command = run_command
        self._client = client
        self._design = design
        self._cells = cells
        self._note = note
        self._poll_s = poll_s
        models = client.get("/v1/models")["data"]
        self._base = str(next(model["id"] for model in models if model["kind"] == "base"))

    def run(self) -> None:
        """Every cell that is not finished."""
        if self._design.num_single is not None:
            self._design = replace(self._design, prompts=self._single(self._design.num_single))
        for seed in self._design.seeds:
            batches = {kind: self._batch(seed, kind) for kind in (*BATCHES, "more")}
            num_pairs = self._num_pairs(batches)
            versions = {BASE: self._base}
            for arm in self._design.arms:
                if arm == SEQUENTIAL:
                    versions[arm] = self._sequential(seed, num_pairs)
                else:
                    pairs = chosen_pairs(batches[TRAINED_ON[arm]]["pairs"], num_pairs, seed)
                    versions[arm] = self._train(f"seed-{seed}/{arm}", pairs, self._base, seed)
            for arm, version in versions.items():
                answers = self.answers(seed, arm, version)
                if self._kl is not None and version != self._base:
                    self._divergence(seed, arm, answers)

    def _single(self, num: int) -> tuple[Any, ...]:
        """The first ``num`` prompts that one round under the base puts into a single class.

        Every arm trains on them, so the luck of this round favours none.
        """

        def make() -> Json:
            self._note(f"diagnosing {len(self._design.prompts)} prompts for those of one reward")
            plan = SamplingPlan(n=SCREENING_N, seed=SCREENING_SEED)
            with self._served(self._base):
                data = draw(self._client, self._base, self._design.prompts, plan)
            return {"classes": [item["class"] for item in data]}

        classes = self._cells("screening", make)["classes"]
        found = [
            prompt
            for prompt, label in zip(self._design.prompts, classes, strict=True)
            if str(label).startswith("single:")
        ]
        if len(found) < num:
            raise MoraError(
                f"--screen must be larger: {num} prompts of one reward are needed, got "
                f"{len(found)} of {len(classes)}"
            )
        return tuple(found[:num])

    def _divergence(self, seed: int, arm: str, answers: Json) -> None:
        def make() -> Json:
            assert self._kl is not None
            self._note(f"seed {seed}: KL of {arm} to the base")
            with tempfile.TemporaryDirectory(prefix="mora-kl-") as scratch:
                meter = DivergenceMeter(
                    self._client, self._kl, self._base, Path(scratch), self._run_command
                )
                data = [
                    {**item, "rollouts": item["rollouts"][:KL_ANSWERS]} for item in answers["data"]
                ]
                return asdict(meter.measure(answers["version"], data, seed))

        self._cells(f"seed-{seed}/kl-{arm}", make)

    def answers(self, seed: int, arm: str, version: str) -> Json:
        """Diagnostics of the held-out prompts under an arm's version, with their answers."""

        def make() -> Json:
            self._note(f"seed {seed}: held-out answers of {arm}")
            plan = SamplingPlan(n=self._design.n_eval, seed=EVALUATION_SEED + seed)
            with self._served(version):
                data = draw(self._client, version, self._design.held_out, plan)
            return {"version": version, "data": data}

        return self._cells(f"seed-{seed}/answers-{arm}", make)

    def _num_pairs(self, batches: Mapping[str, Json]) -> int:
        counts = {kind: len(batches[kind]["pairs"]) for kind in TRAINED_ON.values()}
        num = min(self._design.max_pairs, *counts.values())
        if num < self._design.batch_size:
            raise MoraError(
                f"every batch must yield at least {self._design.batch_size} pairs, got {counts}; "
                "take more prompts"
            )
        return num

    def _served(self, version: str) -> Any:
        served = _ServedVersion(self._client, activate=True, note=self._note)
        served.version = version
        return served

    # --- batches --------------------------------------------------------------------------------

    def _batch(self, seed: int, kind: str) -> Json:
        if kind == "more":
            mora = self._batch(seed, "mora")
            each = math.ceil(mora["rollouts"] / len(self._design.prompts))
            fields = {"candidates": 0, "n": min(each, MAX_ROLLOUTS), "n_max": each}
        else:
            fields = dict(BATCHES[kind])
        return self._run_batch(f"seed-{seed}/batch-{kind}", fields, self._base, seed)

    def _run_batch(
        self, name: str, fields: Json, version: str, seed: int, rows: slice = slice(None)
    ) -> Json:
        """Pairs, counts and classes of a batch over training prompts, all or some."""
        file = self._cells(f"{name}-file", lambda: {"id": self._upload(fields, seed, rows)})

        def make() -> Json:
            self._note(f"{name}: {len(self._design.prompts[rows])} prompts")
            body = {
                "input_file_id": file["id"], "endpoint": REWRITES, "completion_window": "7d",
                "defaults": {"model": version},
            }  # fmt: skip
            # A restart finds the batch that the first start created.
            key = {"Idempotency-Key": f"{self._cells.fingerprint[:32]}/{name}"}
            with self._served(version):
                return self._results(self._client.post("/v1/batches", body, **key))

        return self._cells(name, make)

    def _upload(self, fields: Json, seed: int, rows: slice) -> str:
        lines = [
            {
                "custom_id": f"row-{index}", "method": "POST", "url": REWRITES,
                "body": {"prompt": prompt, "seed": 1_000_003 * seed + index, **fields},
            }
            for index, prompt in list(enumerate(self._design.prompts))[rows]
        ]  # fmt: skip
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        return str(self._client.upload(content.encode(), "prompts.jsonl")["id"])

    def _results(self, batch: Json) -> Json:
        path = f"/v1/batches/{batch['id']}"
        while batch["status"] not in ENDED:
            time.sleep(self._poll_s)
            batch = self._client.get(path)
        if batch["status"] != "completed" or batch["output_file_id"] is None:
            raise MoraError(
                f"batch {batch['id']} must complete with results, got {batch['status']}"
            )
        lines = self._client.ndjson("GET", f"/v1/files/{batch['output_file_id']}/content")
        bodies = {line["custom_id"]: line["response"]["body"] for line in lines}
        return {
            "batch_id": batch["id"],
            "rollouts": batch["usage"]["rollouts"],
            "failed": batch["request_counts"]["failed"],
            "classes": {name: body["original"]["class"] for name, body in bodies.items()},
            "confirmations": [
                {**tried["confirmation"], "gain": tried["gain"], "reason": tried["reason"]}
                for body in bodies.values()
                for tried in body["candidates"]
                if tried["confirmation"] is not None
            ],
            "no_pairs": dict(sum((Counter(b["no_pairs"]) for b in bodies.values()), Counter())),
            "pairs": list(self._client.ndjson("GET", f"{path}/pairs")),
        }

    # --- training -------------------------------------------------------------------------------

    def _sequential(self, seed: int, num_pairs: int) -> str:
        version, stages = self._base, self._design.dimensions
        first = 0
        for place, dimension in enumerate(stages):
            name = f"seed-{seed}/stage-{place}-{dimension}"
            rows = slice(first, first + share_of(len(self._design.prompts), place, stages))
            first = rows.stop
            fields = {"mode": "sequential", "dimensions": list(stages)}
            batch = self._run_batch(f"{name}-batch", fields, version, seed, rows)
            found = [pair for pair in batch["pairs"] if pair["stage"] == dimension]
            pairs = chosen_pairs(found, min(len(found), share_of(num_pairs, place, stages)), seed)
            if not pairs:
                self._note(f"{name}: no pair, the stage is left out")
                continue
            steps = share_of(self._design.num_steps, place, stages)
            version = self._train(name, pairs, version, seed, steps)
        return version

    def _train(
        self, name: str, pairs: Sequence[Json], start: str, seed: int, num_steps: int | None = None
    ) -> str:
        """The version that DPO on ``pairs`` makes of ``start``."""
        steps = num_steps or self._design.num_steps

        def create() -> Json:
            self._note(f"{name}: {steps} steps on {len(pairs)} pairs")
            content = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
            file = self._client.upload(content.encode(), "pairs.jsonl", "fine-tune")
            body = self._job(str(file["id"]), len(pairs), start, seed, steps)
            job = self._client.post("/v1/fine_tuning/jobs", body)
            return {"job_id": job["id"], "num_pairs": len(pairs), "num_steps": steps}

        job_id = self._cells(f"{name}-job", create)["job_id"]
        return str(self._cells(f"{name}-version", lambda: self._follow(name, job_id))["version"])

    def _job(self, file_id: str, num_pairs: int, start: str, seed: int, steps: int) -> Json:
        design = self._design
        hyperparameters = {
            "beta": design.beta,
            "batch_size": design.batch_size,
            "learning_rate_multiplier": design.learning_rate_multiplier,
            "n_epochs": math.ceil(steps * design.batch_size / num_pairs) + 1,
        }
        return {
            "model": start,
            "training_file": file_id,
            "method": {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}},
            "seed": seed,
            "mora": {"max_steps": steps, "make_current": False},
        }

    def _follow(self, name: str, job_id: str) -> Json:
        follower = JobFollower(self._client, job_id)
        follower.poll()
        while not follower.ended:
            time.sleep(self._poll_s)
            follower.poll()
        job = follower.job
        if job["status"] != "succeeded":
            reason = (job.get("error") or {}).get("message") or "see its events"
            raise MoraError(f"{name}: job {job_id} {job['status']}: {reason}")
        metrics = [event["data"] for event in follower.events if event["type"] == "metrics"]
        return {"version": job["fine_tuned_model"], "metrics": metrics}


class _ServedVersion(Served):
    """One version that is current, or served beside it, for the length of a block."""

    version = ""

    def __enter__(self) -> Any:
        super().__enter__()
        try:
            self.require(self.version)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self


def stored_answers(cells: Cells, seed: int, arm: str) -> list[Json]:
    """Held-out answers of an arm, as diagnostics with rollouts."""
    found: list[Json] = cells.read(f"seed-{seed}/answers-{arm}")["data"]
    return found


def chosen_pairs(pairs: Sequence[Json], num: int, seed: int) -> list[Json]:
    """``num`` pairs drawn without replacement, in their order."""
    places = sorted(random.Random(seed).sample(range(len(pairs)), num))
    return [pairs[place] for place in places]


def share_of(total: int, place: int, stages: Sequence[str]) -> int:
    """How much of ``total`` stage ``place`` gets; the shares add up, and none is 0."""
    each, left = divmod(total, len(stages))
    return max(1, each + (place < left))
