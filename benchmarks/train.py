"""``python -m benchmarks.train``: what does a live pair stream cost a DPO step?

One process trains the tiny model again and again, in turn on pairs from memory and on the same
pairs from a batch's stream in a real Redis, into which another process commits them through the
ledger while they are read, a few steps ahead of the trainer. It commits them at the same pace while
the trainer reads from memory, so that the machine is equally busy and what differs is the reading.
Each round has both, in alternating order.
Printed: the median over rounds of the ratio of mean step times (stream over memory) with its 95 %
bootstrap interval over rounds, and the time spent waiting for data. A run's mean and not its median
stands for it, since one read of the stream brings the rows of several steps.

Every row that goes into a step is hashed: exit status 1 when a run trained on other rows than were
committed, on one twice, or out of order, or when both sources trained on unequal numbers of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from mora_serve.config import (
    Settings,
    TrainerSettings,
    dump_settings,
    load_settings,
    settings_from_dump,
)
from mora_serve.ports import RowCommit
from mora_serve.redis_server import RedisServer
from mora_serve.store import Stores, open_stores

BATCH_SIZE = 4
LEAD_STEPS = 4
"""How many steps' pairs are committed before the trainer needs them."""
RESAMPLES = 10_000
AIM = 1.02
WORDS = "the answer is that rivers move stones slowly and bread needs time to rise well".split()  # noqa: SIM905


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40, help="steps of one run")
    parser.add_argument("--full", action="store_true", help="train all weights, not LoRA")
    parser.add_argument("--out", type=Path, help="write all figures here as JSON")
    parser.add_argument("--feed", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.feed:
        asyncio.run(feed(json.loads(args.feed)))
        return 0
    print(f"machine: {machine.describe()}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mora-bench-train-") as folder:
        server = RedisServer(Path(folder, "redis"))
        server.start()
        try:
            settings = load_settings(
                "fake", overrides={"data_dir": folder, "redis": {"url": server.url}}
            )
            runs = measure(settings, args.rounds, args.steps, lora=not args.full)
        finally:
            server.stop()
    found = summarise(runs)
    show(found)
    if args.out:
        text = json.dumps({"machine": machine.describe(), **found}, indent=2)
        args.out.write_text(text + "\n", "utf-8")
    return 1 if found["faults"] else 0


@dataclass
class Run:
    """One training run."""

    source: str
    step_s: list[float]
    """Time from the end of a step to the end of the next, the first step left out."""
    waited_s: float
    seconds: float
    trained: list[str]
    """Hashes of the rows that went into steps, in order."""
    tokens: int
    expected: list[str] = field(default_factory=list)

    def faults(self) -> list[str]:
        """What the audit of the rows found, in words."""
        found = []
        if missing := len(set(self.expected) - set(self.trained)):
            found.append(f"{self.source}: {missing} pairs were skipped")
        if repeated := len(self.trained) - len(set(self.trained)):
            found.append(f"{self.source}: {repeated} pairs were repeated")
        if not found and self.trained != self.expected:
            found.append(f"{self.source}: other pairs, or another order, than were committed")
        return found


def pair(number: int) -> dict[str, Any]:
    """A preference row; no two are equal and most differ in length."""

    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    words = " ".join(WORDS[(number * 7 + place) % len(WORDS)] for place in range(3 + number % 9))
    return {
        "prompt": turn("user", f"question {number}: {words}?"),
        "chosen": turn("assistant", f"gladly, {words}"),
        "rejected": turn("assistant", f"no, {number}"),
        "stage": None,
    }


def row_hash(row: Mapping[str, Any]) -> str:
    text = json.dumps([row[name] for name in ("prompt", "chosen", "rejected")])
    return hashlib.sha256(text.encode()).hexdigest()


# --- the feeder, in a process of its own --------------------------------------------------------


async def feed(task: Mapping[str, Any]) -> None:
    """Commit the pairs of a batch; stdin has one line per step that the trainer has taken."""
    stores = open_stores(settings_from_dump(task["settings"]))
    num_steps = task["num_pairs"] // BATCH_SIZE
    batch = await stores.batches.create_batch(
        {"endpoint": "/v1/rewrites", "input_file_id": "file-in"}, {}, None, "hash"
    )
    shards = [(step, 1, step, 1) for step in range(num_steps)]
    await stores.batches.open_batch(batch["id"], shards, num_steps)
    print(batch["id"], flush=True)
    for step in range(num_steps):
        if step >= LEAD_STEPS:
            await asyncio.to_thread(sys.stdin.readline)
        await _commit(stores, step)
    await stores.batches.finalize_ready("feeder", 60.0)
    await stores.aclose()


async def _commit(stores: Stores, step: int) -> None:
    """One row with a step's pairs, through lease, commit and seal."""
    held = await stores.batches.lease_shard("feeder", 600.0)
    assert held is not None
    first = held.first_line * BATCH_SIZE
    rows = tuple(json.dumps(pair(first + place)).encode() for place in range(BATCH_SIZE))
    await stores.batches.commit_row(held, RowCommit(held.first_line, b"{}", None, rows))
    await stores.batches.seal_shard(held)


@contextmanager
def feeding(settings: Settings, num_pairs: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The batch that is being fed, and the feeder, which is told of steps."""
    task = {"settings": dump_settings(settings, reveal=True), "num_pairs": num_pairs}
    command = [sys.executable, "-m", "benchmarks.train", "--feed", json.dumps(task)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe) as feeder:
        assert feeder.stdout is not None
        try:
            yield feeder.stdout.readline().strip(), feeder
        finally:
            feeder.kill()


# --- the trainer --------------------------------------------------------------------------------


class Recorder:
    """Hooks of a run: notes when steps end, and tells the feeder."""

    def __init__(self, feeder: subprocess.Popen[str] | None) -> None:
        self._feeder = feeder
        self.ended: list[float] = []

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.ended.append(time.perf_counter())
        if self._feeder is not None and self._feeder.poll() is None:
            assert self._feeder.stdin is not None
            try:
                self._feeder.stdin.write("step\n")
                self._feeder.stdin.flush()
            except BrokenPipeError:
                self._feeder = None

    def checkpoint(self, folder: Path, step: int, metrics: Mapping[str, float]) -> None:
        """Nothing is kept."""

    def should_stop(self) -> bool:
        return False


def measure(settings: Settings, rounds: int, steps: int, *, lora: bool) -> list[list[Run]]:
    """Rounds of two runs, after one round that warms up and is thrown away."""
    from trainer.feeds import StoreSession

    measured = []
    with StoreSession(open_stores(settings)) as session:
        for number in range(rounds + 1):
            order = ("memory", "stream") if number % 2 else ("stream", "memory")
            runs = [train(source, settings, session, steps, lora=lora) for source in order]
            if number:
                measured.append(sorted(runs, key=lambda run: run.source))
                print(f"round {number} of {rounds}", file=sys.stderr, flush=True)
    return measured


def train(source: str, settings: Settings, session: Any, steps: int, *, lora: bool) -> Run:
    """One run on pairs from memory or from a batch that is being fed."""
    from trainer.feeds import BatchFeed
    from trainer.source import Feed, ListFeed

    num_pairs = steps * BATCH_SIZE
    expected = [row_hash(pair(number)) for number in range(num_pairs)]
    with feeding(settings, num_pairs) as (batch_id, feeder):
        live: Feed = BatchFeed(session, session.stores.pairs, batch_id)
        if source == "memory":
            live = ListFeed([pair(number) for number in range(num_pairs)])
        run = _train(source, live, feeder, settings, lora)
    run.expected = expected
    return run


def _train(
    source: str,
    live: Any,
    feeder: subprocess.Popen[str] | None,
    settings: Settings,
    lora: bool,
) -> Run:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from trainer.dpo import load_policy, load_tokenizer, prompt_fits, run_dpo
    from trainer.job import read_job
    from trainer.source import PairSource, Position
    from trainer.tiny_model import ensure_tiny_model

    torch.set_num_threads(1)
    disable_progress_bar()
    model_dir = str(ensure_tiny_model(settings.data_dir / "tiny"))
    options = {"max_length": 128, "checkpoint_steps": 10**6, "lora": lora}
    stored = {"id": "ftjob-b", "model": "m", "training_file": "f", "mora": options}
    job = read_job(stored, TrainerSettings(batch_size=BATCH_SIZE))
    tokenizer = load_tokenizer(model_dir)
    pairs = PairSource(live, accept=prompt_fits(tokenizer, job.max_length))
    rows = audited_rows(pairs, Position())
    hooks = Recorder(feeder)
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        state = run_dpo(
            job,
            rows,
            load_policy(model_dir, lora=lora, use_gpu=False),
            tokenizer,
            hooks,
            output_dir=Path(folder),
        )
        seconds = time.perf_counter() - began
    assert state is not None
    step_s = np.diff(hooks.ended).tolist()
    waited_s = pairs.counts.waited_s
    return Run(source, step_s, waited_s, seconds, rows.trained, state.trained_tokens)


def audited_rows(source: Any, start: Any) -> Any:
    """Rows that remember the hashes of those that went into steps."""
    from trainer.source import Margins, ResumableRows

    class AuditedRows(ResumableRows):
        def __init__(self) -> None:
            super().__init__(source, start)
            self.trained: list[str] = []
            self._handed_out: list[str] = []

        def __call__(self) -> Iterator[dict[str, Any]]:
            # What an iteration handed out and nobody consumed, the next one hands out again.
            self._handed_out = []
            for row in super().__call__():
                self._handed_out.append(row_hash(row))
                yield row

        def consumed(self, num_rows: int) -> list[Margins]:
            taught = super().consumed(num_rows)
            self.trained += self._handed_out[:num_rows]
            del self._handed_out[:num_rows]
            return taught

    return AuditedRows()


# --- figures ------------------------------------------------------------------------------------


def summarise(rounds: Sequence[Sequence[Run]]) -> dict[str, Any]:
    """Figures of all rounds; each has the memory run first."""
    ratios = [statistics.fmean(s.step_s) / statistics.fmean(m.step_s) for m, s in rounds]
    low, high = ratio_interval(ratios)
    faults = [fault for runs in rounds for run in runs for fault in run.faults()]
    if any(memory.tokens != stream.tokens for memory, stream in rounds):
        faults.append("both sources must train on equally many tokens")
    by_source = {
        name: [statistics.fmean(runs[index].step_s) for runs in rounds]
        for index, name in enumerate(("memory", "stream"))
    }
    streams = [stream for _, stream in rounds]
    return {
        "rounds": len(rounds),
        "ratios": ratios,
        "steps_per_run": len(rounds[0][0].step_s) + 1,
        "pairs_per_run": len(rounds[0][0].expected),
        "step_ms": {k: 1e3 * statistics.median(v) for k, v in by_source.items()},
        "ratio": statistics.median(ratios),
        "ratio_low": low,
        "ratio_high": high,
        "waited_s": sum(run.waited_s for run in streams),
        "waited_share": sum(run.waited_s for run in streams) / sum(run.seconds for run in streams),
        "faults": faults,
    }


def ratio_interval(ratios: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap of the median over rounds."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(ratios), size=(RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(drawn, axis=1), [2.5, 97.5])
    return float(low), float(high)


def show(found: Mapping[str, Any]) -> None:
    step_ms = found["step_ms"]
    print(
        f"{found['rounds']} rounds of {found['steps_per_run']} steps, {BATCH_SIZE} pairs each; "
        f"step: memory {step_ms['memory']:.1f} ms, stream {step_ms['stream']:.1f} ms"
    )
    print(
        f"ratio stream / memory {found['ratio']:.3f} "
        f"({found['ratio_low']:.3f} to {found['ratio_high']:.3f}), aim {AIM}"
    )
    print(f"waited for data {found['waited_s']:.2f} s, {found['waited_share']:.1%} of the runs")
    for fault in found["faults"]:
        print(f"FAULT: {fault}")
    if not found["faults"]:
        print(f"every run trained on its {found['pairs_per_run']} pairs once, in order")


if __name__ == "__main__":
    sys.exit(main())
