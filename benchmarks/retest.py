"""Do classes repeat? Diagnoses the same prompts twice on fresh rollouts and compares.

``make retest`` asks a running server (``--url``), or starts the embedded one, for two independent
diagnoses of every prompt and prints: the share of prompts that were decided, the agreement of the
class among those decided twice, the agreement of each dimension's state, and the retest correlation
of the statistics the classes are drawn from.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.stack import served
from mora_serve.cli.common import read_prompts
from mora_serve.client import Client
from mora_serve.demo import DEMO_PROMPTS

OPEN = {"uncertain", "unknown"}
STATISTICS = ("mean", "spread", "ceiling", "posterior_mean")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="a running server; by default the embedded one is started")
    parser.add_argument("--prompts", type=Path, help="JSONL with `prompt`; default: the demo's")
    parser.add_argument("--split", default="test", help="rows of another `split` are left out")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--n", type=int, help="rollouts per round (default: configured)")
    parser.add_argument("--n-max", type=int, help="rollouts at most (default: configured)")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write both diagnoses here as JSONL")
    args = parser.parse_args()
    prompts = choose_prompts(args.prompts, args.split, args.limit)
    with ExitStack() as stack:
        url = args.url or stack.enter_context(served("embedded"))
        draws = [
            diagnose(Client(url), prompts, args, seed=args.seed * 1_000_003 + draw)
            for draw in (1, 2)
        ]
    if args.out:
        lines = [json.dumps([first, second]) for first, second in zip(*draws, strict=True)]
        args.out.write_text("\n".join(lines) + "\n", "utf-8")
    print(f"machine: {machine.describe()}")
    for line in report(*draws):
        print(line)


def choose_prompts(path: Path | None, split: str, limit: int) -> list[str]:
    """Prompts of a file, evenly spread over it when there are more than ``limit``."""
    rows = [row for row in read_prompts(path or DEMO_PROMPTS) if row.get("split", split) == split]
    step = max(1, len(rows) // limit)
    return [row["prompt"] for row in rows[::step]][:limit]


def diagnose(
    client: Client, prompts: list[str], args: argparse.Namespace, seed: int
) -> list[dict[str, Any]]:
    """Diagnostics in the order of ``prompts``."""
    found: dict[int, dict[str, Any]] = {}
    for start in range(0, len(prompts), 100):
        body: dict[str, Any] = {
            "prompts": prompts[start : start + 100],
            "seed": seed + start,
            "include_rollouts": False,
            "stream": True,
        }
        optional = {"n": args.n, "n_max": args.n_max, "temperature": args.temperature}
        body |= {name: value for name, value in optional.items() if value is not None}
        for item in client.ndjson("POST", "/v1/diagnostics", body):
            if item.get("object") == "diagnostic":
                found[start + item["index"]] = item
    return [found[index] for index in range(len(prompts))]


def report(first: list[dict[str, Any]], second: list[dict[str, Any]]) -> list[str]:
    """Lines of the table, from two diagnoses of the same prompts."""
    both = [pair for pair in zip(first, second, strict=True) if _decided(*pair)]
    same = sum(a["class"] == b["class"] for a, b in both)
    total = len(first)
    lines = [
        f"prompts {total}, decided in both draws {len(both)} ({len(both) / total:.0%})",
        f"class agreement among the decided: {_share(same, len(both))}",
        f"classes, first draw: {dict(Counter(d['class'] for d in first).most_common())}",
        f"stated confidence of the decided: {_mean([d['class_probability'] for d, _ in both])}",
    ]
    for dimension in first[0]["dimensions"]:
        pairs = [
            (a["dimensions"][dimension], b["dimensions"][dimension])
            for a, b in zip(first, second, strict=True)
        ]
        settled = [
            (a["state"], b["state"])
            for a, b in pairs
            if {a["state"], b["state"]} <= {"reachable", "unreachable"}
        ]
        agree = sum(a == b for a, b in settled)
        retest = ", ".join(f"{name} {_correlation(pairs, name):.2f}" for name in STATISTICS)
        lines.append(
            f"{dimension}: settled twice {len(settled)}, agree {_share(agree, len(settled))}; "
            f"retest r: {retest}"
        )
    return lines


def _decided(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a["class"] not in OPEN | {None} and b["class"] not in OPEN | {None}


def _share(count: int, total: int) -> str:
    if not total:
        return "none to compare"
    share = count / total
    error = (share * (1 - share) / total) ** 0.5
    return f"{share:.2f} ± {error:.2f} ({count} of {total})"


def _mean(values: list[float]) -> str:
    return f"{np.mean(values):.2f}" if values else "none"


def _correlation(pairs: list[tuple[dict[str, Any], dict[str, Any]]], name: str) -> float:
    values = [(a[name], b[name]) for a, b in pairs if a[name] is not None and b[name] is not None]
    if len(values) < 3:
        return float("nan")
    x, y = np.array(values).T
    return float(np.corrcoef(x, y)[0, 1])


if __name__ == "__main__":
    main()
