"""One rank of a DPO run over gloo, told by torch's environment which: prints what it did as JSON.

A process of its own, as a rank of Ray Train is; started by ``test_trainer_ranks``.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from mora_serve.config import TrainerSettings
from trainer.dpo import load_policy, load_tokenizer, prompt_fits, run_dpo
from trainer.job import read_job
from trainer.source import Feed, ListFeed, PairSource, Position, ResumableRows

NUM_PAIRS = 27
LONG = {4, 5, 11, 20}
"""Pairs whose prompt fills the context, so that the filter refuses them on every rank."""
MAX_LENGTH = 96


class Recorder:
    """Hooks that keep the metrics of every step."""

    def __init__(self) -> None:
        self.steps: dict[int, Mapping[str, float]] = {}

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.steps[step] = metrics

    def checkpoint(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        return

    def should_stop(self) -> bool:
        return False


class Audited(ResumableRows):
    """Rows that remember which were handed out last."""

    def __init__(self, source: PairSource) -> None:
        super().__init__(source, Position())
        self.prompts: list[str] = []

    def __call__(self) -> Iterator[dict[str, Any]]:
        self.prompts = []
        for row in super().__call__():
            self.prompts.append(row["prompt"][0]["content"])
            yield row


def pair(number: int) -> dict[str, Any]:
    words = "word " * MAX_LENGTH if number in LONG else ""
    return {
        "prompt": [{"role": "user", "content": f"question {number} {words}".strip()}],
        "chosen": [{"role": "assistant", "content": "yes, gladly"}],
        "rejected": [{"role": "assistant", "content": "no, never"}],
        "chosen_scores": {"helpful": {"value": float(number), "raw": 0.0}},
        "rejected_scores": {"helpful": {"value": 0.0, "raw": 0.0}},
    }


def feed() -> Feed:
    return ListFeed([pair(number) for number in range(NUM_PAIRS)])


def main(model_dir: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    stored = {"id": "ftjob-1", "model": "m", "training_file": "file-1", "seed": 3,
              "mora": {"max_length": MAX_LENGTH, "checkpoint_steps": 100}}  # fmt: skip
    job = read_job(stored, TrainerSettings(learning_rate=1e-2, batch_size=2))
    tokenizer = load_tokenizer(model_dir)
    source = PairSource(
        feed(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        accept=prompt_fits(tokenizer, job.max_length),
    )
    rows, hooks = Audited(source), Recorder()
    with tempfile.TemporaryDirectory() as folder:
        state = run_dpo(
            job, rows, load_policy(model_dir, lora=True, use_gpu=False), tokenizer, hooks,
            output_dir=Path(folder), dimensions=("helpful", "harmless"),
        )  # fmt: skip
    assert state is not None
    done = {
        "prompts": rows.prompts, "steps": hooks.steps, "position": state.position.to_json(),
        "trained_tokens": state.trained_tokens, "skipped": source.counts.skipped,
        "left_over": source.counts.left_over, "done": state.done,
        "threads": [thread.name for thread in threading.enumerate()],
    }  # fmt: skip
    Path(sys.argv[2], os.environ["RANK"]).write_text(json.dumps(done), "utf-8")
    distributed.destroy_process_group()
    # A thread of gloo that lets go of its last tensor while the interpreter is being torn down
    # aborts the process (pytorch/pytorch#190489). All is written and nothing is left to tear down.
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
