"""Throughput and parity of the scorers: engines, precisions, batch policies, and the plain loop.

``make bench-scorers``, or ``python -m benchmarks.scorers``. All arms score the same rows: prompts
of log-normal length with several answers each, made of words without meaning, since only their
number of tokens counts. Two models on the embedded backbone:

* *seqcls*: all layers with a random one-logit head, as a reward model from a hub would be served.
  Arms: the loop that people write with transformers (batches of 16 in order of arrival, padded,
  every answer with its prompt), our ``transformers`` engine with each batch policy, and ``vllm``;
* *heads*: the shipped heads, three dimensions in one pass against three scorers of one dimension.

Arms take turns in every round, so that a ratio compares what ran under the same conditions; a
ratio is the median over rounds, with the lowest and the highest. A parity error is the largest
difference over the probe answers (:mod:`mora_serve.parity`) from a float32 pass over one unpadded
answer at a time, as a share of the rewards' standard deviation.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.deploy import build_scorer
from actors.scoring.stats import ScoringStats
from benchmarks.machine import describe
from mora_serve.config import load_settings
from mora_serve.parity import probe_groups
from mora_serve.scorer_settings import ScorerSettings
from mora_serve.sections import ReplicaSettings
from mora_serve.types import Message, ScoreGroup

WORDS = [
    "river",
    "stone",
    "lamp",
    "window",
    "market",
    "seven",
    "because",
    "before",
    "garden",
    "slow",
    "paper",
    "question",
    "answer",
    "blue",
    "often",
    "table",
    "number",
    "summer",
    "little",
    "machine",
    "letter",
    "morning",
    "under",
    "system",
    "between",
    "point",
    "water",
    "people",
    "simple",
    "early",
    "light",
    "never",
    "method",
    "small",
    "voice",
    "north",
    "open",
    "reason",
    "field",
]
PLAIN_BATCH = 16
PLAIN = "plain loop"

Rows = Sequence[ScoreGroup]
Raws = list[list[float]]
Rounds = Sequence[Rows]
"""The rows of each round: new ones, or a prefix cache would know them."""


@dataclass(slots=True)
class Arm:
    """One way of scoring the rows, with what was measured of it."""

    name: str
    dtype: str
    score: Callable[[Rows], Awaitable[Raws]]
    """Raw rewards of one dimension by group and answer."""
    stats: Sequence[ScoringStats]
    """Of every scorer that the arm runs."""
    close: Callable[[], Awaitable[None]]
    seconds: list[float] = field(default_factory=list)
    """One entry per round."""
    parity: float = 0.0
    """Share of the spread."""


def main() -> int:
    """Command line; returns the exit code."""
    args = _parser().parse_args()
    torch.set_num_threads(args.num_threads)
    found = asyncio.run(_run(args))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scorers", description=__doc__)
    parser.add_argument(
        "--model", type=Path, default=Path(".cache/models/SmolLM2-135M-Instruct"),
        help="directory of the embedded model (mora-serve models prepare)",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--prompt-words", type=float, default=70, help="median length of prompts")
    parser.add_argument("--answer-words", type=float, default=42, help="median length of answers")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--token-budget", type=int, default=2048)
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="run the transformers arms on a GPU")
    parser.add_argument("--no-vllm", action="store_true")
    parser.add_argument("--only", choices=["seqcls", "heads"])
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    return parser


async def _run(args: argparse.Namespace) -> dict[str, Any]:
    rounds = [make_rows(args, seed) for seed in range(args.rounds)]
    print(f"{describe()}\n{args.prompts} prompts with {args.answers} answers each")
    found: dict[str, Any] = {"machine": describe()}
    if args.only != "heads":
        with tempfile.TemporaryDirectory(prefix="mora-bench-") as scratch:
            model = make_reward_model(args.model, Path(scratch))
            found["seqcls"] = await _seqcls(args, model, rounds)
    if args.only != "seqcls":
        found["heads"] = await _heads(args, rounds)
    return found


def make_rows(args: argparse.Namespace, seed: int) -> list[ScoreGroup]:
    """Groups with log-normal lengths (sigma 0.6 in logs), in words."""
    rng = np.random.default_rng(seed)

    def text(median: float) -> str:
        count = int(np.clip(median * np.exp(0.6 * rng.standard_normal()), 3, 400))
        return " ".join(rng.choice(WORDS, count))

    return [
        ScoreGroup(
            (Message("user", text(args.prompt_words)),),
            tuple(text(args.answer_words) for _ in range(args.answers)),
        )
        for _ in range(args.prompts)
    ]


def make_reward_model(backbone: Path, directory: Path) -> Path:
    """The backbone with a random one-logit head, saved as a sequence classification model."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        backbone, num_labels=1, dtype=torch.bfloat16
    )
    tokenizer: Any = AutoTokenizer.from_pretrained(backbone)
    # No text ends with it: a pad token that is also the end of turn would move the scored token.
    model.config.pad_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


async def _seqcls(args: argparse.Namespace, model: Path, rounds: Rounds) -> dict[str, Any]:
    exact = await _exact(model, probe_groups())
    arms = [_plain_arm(args, model)]
    for dtype, batching in (
        ("bfloat16", "single"), ("bfloat16", "padded"), ("bfloat16", "packed"),
        ("float32", "packed"),
    ):  # fmt: skip
        section = _section(args, model, dtype=dtype, batching=batching)
        arms.append(await _our_arm(args, f"transformers, {batching}", section))
    if not args.no_vllm:
        section = _section(args, model, engine="vllm")
        arms.append(await _our_arm(args, "vllm", section))
    for arm in arms:
        arm.parity = parity_error(exact, await arm.score(probe_groups()))
    await _measure(arms, rounds)
    for arm in arms:
        await arm.close()
    print("\nOne-logit reward model, all layers")
    _show(arms, rounds, PLAIN)
    return {
        "arms": [_figures(arm, rounds) for arm in arms],
        "against_plain_loop": _ratios(arms, PLAIN),
    }


async def _heads(args: argparse.Namespace, rounds: Rounds) -> dict[str, Any]:
    names = load_settings("embedded", environ={}).dimensions
    fused = await _our_arm(args, "one pass", _heads_section(args, names))
    separate = [await _our_arm(args, name, _heads_section(args, (name,))) for name in names]

    async def one_after_the_other(groups: Rows) -> Raws:
        for arm in separate[1:]:
            await arm.score(groups)
        return await separate[0].score(groups)

    exact_section = _heads_section(args, names).model_copy(update={"dtype": "float32"})
    exact = await _our_arm(args, "exact", exact_section)
    truth = [
        [(await exact.score([ScoreGroup(group.prompt, (text,))]))[0][0] for text in group.responses]
        for group in probe_groups()
    ]
    three = Arm(
        "three passes",
        "bfloat16",
        one_after_the_other,
        [stats for arm in separate for stats in arm.stats],
        exact.close,
    )
    arms = [three, fused]
    for arm in arms:
        arm.parity = parity_error(truth, await arm.score(probe_groups()))
    await _measure(arms, rounds)
    for arm in (fused, exact, *separate):
        await arm.close()
    print(f"\nShipped heads: {', '.join(names)}")
    _show(arms, rounds, three.name)
    return {
        "arms": [_figures(arm, rounds) for arm in arms],
        "against_separate": _ratios(arms, three.name),
    }


def _section(args: argparse.Namespace, model: Path, **changes: Any) -> ScorerSettings:
    values: dict[str, Any] = {
        "name": "bench", "backend": "seqcls", "model": str(model), "sign": 1, "template": "chat",
        "dimensions": ("reward",), "max_tokens": 1024, "token_budget": args.token_budget,
        "num_threads": args.num_threads, "replica": ReplicaSettings(num_gpus=float(args.gpu)),
    }  # fmt: skip
    return ScorerSettings.model_validate({**values, **changes})


def _heads_section(args: argparse.Namespace, names: Sequence[str]) -> ScorerSettings:
    return ScorerSettings(
        name="bench", dimensions=tuple(names), model=str(args.model), dtype="bfloat16",
        token_budget=args.token_budget, num_threads=args.num_threads,
        replica=ReplicaSettings(num_gpus=float(args.gpu)),
    )  # fmt: skip


async def _our_arm(args: argparse.Namespace, name: str, section: ScorerSettings) -> Arm:
    overrides = {"policy": {"path": str(args.model)}}
    scorer: Any = build_scorer(load_settings("embedded", environ={}, overrides=overrides), section)
    await scorer.start()
    first = section.dimensions[0]

    async def score(groups: Rows) -> Raws:
        table = await scorer.score(groups)
        return [[float(row[first].raw) for row in group] for group in table]

    return Arm(name, section.dtype, score, [scorer.stats], scorer.close)


def _plain_arm(args: argparse.Namespace, model: Path) -> Arm:
    """What people write: the chat template, batches in order of arrival, padding to the longest."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    device = "cuda" if args.gpu else "cpu"
    tokenizer: Any = AutoTokenizer.from_pretrained(model, padding_side="right")
    tokenizer.pad_token = "<|endoftext|>"
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.bfloat16)
    loaded.to(device).eval()
    stats = ScoringStats()

    @torch.inference_mode()
    def run(texts: list[str]) -> list[float]:
        values: list[float] = []
        for first in range(0, len(texts), PLAIN_BATCH):
            part = texts[first : first + PLAIN_BATCH]
            batch = tokenizer(part, return_tensors="pt", padding=True, add_special_tokens=False)
            values += loaded(**batch.to(device)).logits[:, 0].float().cpu().tolist()
            used = int(batch["attention_mask"].sum())
            stats.texts += len(part)
            stats.tokens += used
            stats.padded_tokens += batch["attention_mask"].numel() - used
            stats.forwards += 1
        return values

    async def score(groups: Rows) -> Raws:
        texts = [_chat(tokenizer, group, text) for group in groups for text in group.responses]
        return _regroup(await asyncio.to_thread(run, texts), groups)

    async def close() -> None:
        return None

    return Arm(PLAIN, "bfloat16", score, [stats], close)


async def _exact(model: Path, rows: Rows) -> Raws:
    """Float32, one unpadded answer at a time, with nothing of ours but the rows."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    loaded: Any = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    values = []
    with torch.inference_mode():
        for group in rows:
            for text in group.responses:
                whole = _chat(tokenizer, group, text)
                batch = tokenizer(whole, return_tensors="pt", add_special_tokens=False)
                values.append(float(loaded(**batch).logits[0, 0]))
    return _regroup(values, rows)


def _chat(tokenizer: Any, group: ScoreGroup, response: str) -> str:
    turns = [{"role": turn.role, "content": turn.content} for turn in group.prompt]
    turns.append({"role": "assistant", "content": response})
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    return text


def _regroup(values: Sequence[float], groups: Rows) -> Raws:
    left = iter(values)
    return [[next(left) for _ in group.responses] for group in groups]


async def _measure(arms: Sequence[Arm], rounds: Rounds) -> None:
    for arm in arms:
        await arm.score(probe_groups()[:1])
        for stats in arm.stats:
            _reset(stats)
    for number, rows in enumerate(rounds):
        first = number % len(arms)
        for arm in (*arms[first:], *arms[:first]):
            began = time.perf_counter()
            await arm.score(rows)
            arm.seconds.append(time.perf_counter() - began)
            print(
                f"  round {number + 1}: {arm.name}, {arm.dtype}: {arm.seconds[-1]:.2f} s",
                file=sys.stderr,
            )


def _reset(stats: ScoringStats) -> None:
    stats.texts = stats.tokens = stats.padded_tokens = stats.shared_prompt_tokens = 0
    stats.forwards = 0
    stats.forward_s = 0.0


def parity_error(exact: Raws, got: Raws) -> float:
    """Largest difference as a share of the exact rewards' standard deviation."""
    flat = np.array([value for row in exact for value in row])
    other = np.array([value for row in got for value in row])
    return float(np.abs(flat - other).max() / flat.std())


def ratio(base: Arm, arm: Arm) -> tuple[float, float, float]:
    """How many times as fast as ``base``: median over rounds, lowest, highest."""
    found = [a / b for a, b in zip(base.seconds, arm.seconds, strict=True)]
    return statistics.median(found), min(found), max(found)


def _ratios(arms: Sequence[Arm], base: str) -> dict[str, Any]:
    first = next(arm for arm in arms if arm.name == base)
    return {f"{arm.name}, {arm.dtype}": ratio(first, arm) for arm in arms if arm is not first}


def _figures(arm: Arm, rounds: Rounds) -> Mapping[str, Any]:
    """Over all rounds. ``tokens_per_s`` counts every answer with its own prompt, so that sharing
    the prompt shows as speed; ``computed_tokens_per_s`` counts what went through the model."""
    seconds = sum(arm.seconds)
    answers = sum(len(group.responses) for rows in rounds for group in rows)
    computed = sum(stats.tokens for stats in arm.stats)
    padded = sum(stats.padded_tokens for stats in arm.stats)
    own = arm.stats[0].tokens + arm.stats[0].shared_prompt_tokens
    return {
        "name": arm.name,
        "dtype": arm.dtype,
        "scores_per_s": answers / seconds,
        "tokens_per_s": own / seconds,
        "computed_tokens_per_s": computed / seconds,
        "padding": padded / (computed + padded),
        "parity_error": arm.parity,
        "seconds": arm.seconds,
    }


def _show(arms: Sequence[Arm], rounds: Rounds, base: str) -> None:
    first = next(arm for arm in arms if arm.name == base)
    header = f"{'':24}{'':10}{'scores/s':>10}{'tokens/s':>10}{'computed':>10}{'padding':>9}"
    print(f"{header}{'parity':>9}{'times ' + base:>28}")
    for arm in arms:
        f = _figures(arm, rounds)
        middle, low, high = ratio(first, arm)
        print(
            f"{arm.name:24}{arm.dtype:10}{f['scores_per_s']:10.1f}{f['tokens_per_s']:10.0f}"
            f"{f['computed_tokens_per_s']:10.0f}{100 * f['padding']:8.1f}%"
            f"{100 * f['parity_error']:8.2f}%{middle:12.2f} ({low:.2f} to {high:.2f})"
        )


if __name__ == "__main__":
    sys.exit(main())
