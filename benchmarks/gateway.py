"""What the service costs over its parts: ``make bench``.

Three things take turns in one run, on the same prompts and sampling:

    gateway   POST /v1/diagnostics: sample n answers per prompt, score them on every dimension
    (a)       vLLM's offline ``LLM.chat`` with the served engine's arguments and threads
    (b)       the scorer's bare batched pass over the texts that the gateway has just returned

(a) and (b) together are the work; whatever the gateway takes longer is the service. Answers differ
between runs, so (a)'s time is scaled by the number of completion tokens. Ratios are medians over
rounds. The gateway's own overhead is measured on engines that do no work (``--profile fake``).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.stack import CACHE, served
from mora_serve.cli.common import read_prompts
from mora_serve.client import Client
from mora_serve.config import ENV_CONFIG, Settings, dump_settings, load_settings
from mora_serve.demo import DEMO_PROMPTS
from mora_serve.types import Message, Messages, ScoreGroup

COUNTERS = (
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "mora_scorer_tokens_total",
    "mora_scorer_padded_tokens_total",
    "mora_scorer_shared_prompt_tokens_total",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--prompts", type=int, default=32, help="prompts per round")
    parser.add_argument("-n", type=int, default=8, help="rollouts per prompt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=10.0, help="per zero-work measurement")
    parser.add_argument("--connections", type=int, default=16)
    parser.add_argument("--out", type=Path, help="write all figures here as JSON")
    args = parser.parse_args()
    figures = {"machine": machine.describe()}
    print(f"machine: {figures['machine']}")
    figures |= throughput(args)
    figures |= overhead(args)
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


# --- throughput -----------------------------------------------------------------------------------


def throughput(args: argparse.Namespace) -> dict[str, Any]:
    """Interleaved rounds of gateway, (a) and (b); prints and returns the figures."""
    path = str((CACHE / "models" / load_settings("embedded").policy.model).resolve())
    settings = load_settings("embedded", overrides={"policy": {"path": path}})
    prompts = [row["prompt"] for row in read_prompts(DEMO_PROMPTS, args.prompts)]
    with served("embedded") as url:
        offline = start_offline(settings)
        scorer = BareScorer(settings)
        try:
            rounds = []
            before: dict[str, float] = {}
            for number in range(args.rounds + 1):  # the first one warms up
                if number == 1:
                    before = counters(url)
                figures = one_round(url, offline, scorer, settings, prompts, args.n, number)
                if number:
                    rounds.append(figures)
                    print_round(number, figures)
            after = counters(url)
        finally:
            stop(offline)
    return summarise(rounds, {name: after[name] - before[name] for name in COUNTERS})


def one_round(
    url: str,
    offline: subprocess.Popen[str],
    scorer: BareScorer,
    settings: Settings,
    prompts: list[str],
    n: int,
    number: int,
) -> dict[str, float]:
    """Seconds of the gateway, (a) and (b) on one set of prompts."""
    sampling = settings.sampling
    conversations = [conversation(text, settings.policy.system_prompt) for text in prompts]
    body = {
        "prompts": prompts, "n": n, "n_max": n, "seed": number, "include_rollouts": True,
    }  # fmt: skip
    began = time.perf_counter()
    answer = Client(url).post("/v1/diagnostics", body)
    gateway = time.perf_counter() - began
    rows = sorted(answer["data"], key=lambda item: int(item["index"]))
    tokens = sum(rollout["num_tokens"] for row in rows for rollout in row["rollouts"])
    job = {
        "conversations": conversations, "n": n, "temperature": sampling.temperature,
        "top_p": sampling.top_p, "max_tokens": sampling.max_tokens, "stop": list(sampling.stop),
    }  # fmt: skip
    alone = ask(offline, job)
    groups = [
        ScoreGroup(messages(turns), tuple(rollout["text"] for rollout in row["rollouts"]))
        for turns, row in zip(conversations, rows, strict=True)
    ]
    return {
        "gateway": gateway,
        "generate": alone["seconds"] * tokens / alone["tokens"],
        "score": scorer.seconds(groups),
        "tokens": float(tokens),
        "rollouts": float(sum(len(group.responses) for group in groups)),
        "prompts": float(len(rows)),
    }


def conversation(prompt: str, system: str | None) -> list[dict[str, str]]:
    turns = [] if system is None else [{"role": "system", "content": system}]
    return [*turns, {"role": "user", "content": prompt}]


def messages(turns: list[dict[str, str]]) -> Messages:
    return tuple(Message(turn["role"], turn["content"]) for turn in turns)  # type: ignore[arg-type]


def start_offline(settings: Settings) -> subprocess.Popen[str]:
    """The offline engine, ready."""
    from actors.runtime import engine_environment

    env = {**os.environ, **engine_environment(settings.policy.engine_env, on_cpu=True)}
    env[ENV_CONFIG] = json.dumps(dump_settings(settings, reveal=True))
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.offline"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=env, start_new_session=True,
    )  # fmt: skip
    assert child.stdout is not None
    if child.stdout.readline().strip() != "ready":
        raise SystemExit("the offline engine did not start")
    return child


def stop(child: subprocess.Popen[str]) -> None:
    """End the offline engine with the processes it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def ask(child: subprocess.Popen[str], job: dict[str, Any]) -> dict[str, float]:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps(job) + "\n")
    child.stdin.flush()
    answer: dict[str, float] = json.loads(child.stdout.readline())
    return answer


class BareScorer:
    """The configured heads without any service around them."""

    def __init__(self, settings: Settings) -> None:
        from actors.scoring.build import model_scorer

        self._loop = asyncio.new_event_loop()
        self._scorer = model_scorer(settings.scorers[0], str(settings.policy.path))
        self._loop.run_until_complete(self._scorer.start())

    def seconds(self, groups: list[ScoreGroup]) -> float:
        began = time.perf_counter()
        self._loop.run_until_complete(self._scorer.score(groups))
        return time.perf_counter() - began


def counters(url: str) -> dict[str, float]:
    """Sums over replicas of the counters this benchmark reports."""
    totals = dict.fromkeys(COUNTERS, 0.0)
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        text = response.read().decode()
    for line in text.splitlines():
        name = line.split("{")[0].split(" ")[0]
        if name in totals:
            totals[name] += float(line.rsplit(" ", 1)[1])
    return totals


def print_round(number: int, figures: dict[str, float]) -> None:
    print(
        f"round {number}: gateway {figures['gateway']:.1f} s, (a) {figures['generate']:.1f} s, "
        f"(b) {figures['score']:.1f} s, {figures['tokens']:.0f} tokens"
    )


def summarise(rounds: list[dict[str, float]], moved: dict[str, float]) -> dict[str, Any]:
    """Medians over rounds, printed and returned."""

    def median(of: Callable[[dict[str, float]], float]) -> float:
        return statistics.median(of(item) for item in rounds)

    asked, hits = moved[COUNTERS[0]], moved[COUNTERS[1]]
    real, padded = moved[COUNTERS[2]], moved[COUNTERS[3]]
    figures = {
        "prompts_per_s": median(lambda r: r["prompts"] / r["gateway"]),
        "rollouts_per_s": median(lambda r: r["rollouts"] / r["gateway"]),
        "tokens_per_s": median(lambda r: r["tokens"] / r["gateway"]),
        "ratio_to_sum": median(lambda r: (r["generate"] + r["score"]) / r["gateway"]),
        "ratio_to_larger": median(lambda r: max(r["generate"], r["score"]) / r["gateway"]),
        "padding_fraction": padded / (real + padded) if real else None,
        "prefix_hit_rate": hits / asked if asked else None,
    }
    for name, value in figures.items():
        print(f"{name}: {value:.3g}" if value is not None else f"{name}: not reported")
    return {**figures, "rounds": rounds}


# --- overhead at zero work ------------------------------------------------------------------------


def overhead(args: argparse.Namespace) -> dict[str, Any]:
    """Requests/s and latency of the gateway over engines that do nothing."""
    prompt = "What does a lighthouse do?"
    requests = {
        "/v1/models": None,
        "/v1/chat/completions": {
            "model": "fake-policy", "messages": [{"role": "user", "content": prompt}],
        },
        "/v1/diagnostics": {
            "prompts": [prompt], "n": 4, "n_max": 4, "include_rollouts": False,
        },
    }  # fmt: skip
    found: dict[str, Any] = {}
    with served("fake") as url:
        for path, body in requests.items():
            full = load(url, path, body, args.connections, args.seconds)
            alone = load(url, path, body, 1, args.seconds / 2)
            found[path] = {"busy": full, "alone": alone}
            print(
                f"zero work {path}: {full['rate']:.0f} requests/s on {args.connections} "
                f"connections (p50 {full['ms']['50']:.1f} ms), alone {alone['ms']['50']:.1f} ms, "
                f"errors {full['errors'] + alone['errors']}"
            )
    return {"zero_work": found}


def load(url: str, path: str, body: Any, connections: int, seconds: float) -> dict[str, Any]:
    host, port = url.removeprefix("http://").split(":")
    command = [sys.executable, "-m", "benchmarks.load", host, port, path]
    done = subprocess.run(
        [*command, str(connections), str(seconds)],
        input=b"" if body is None else json.dumps(body).encode(), capture_output=True, check=True,
    )  # fmt: skip
    result: dict[str, Any] = json.loads(done.stdout)
    return result


if __name__ == "__main__":
    main()
