"""``python -m benchmarks.batch``: how fast are batches, and does their size cost memory?

For each number of rows a stack of its own is started on the fake backend with zero delay, warmed up
with a small batch, and given one batch of ``/v1/rewrites`` (n = 4, one candidate, rollouts left
out) over REST. Printed per size: rows a second from the request that creates the batch to its
``completed``, the peak of resident memory of every process, Redis's own count of its memory, and
the processor time that each kind of process spent on a row, which says where the time goes. The
output file is read back: every ``custom_id`` once, every ``seq`` once. Exit status 1 when a row is
missing or repeated, or when memory is not flat: the largest batch may need at most ``FLAT`` times
what the one before it needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.processes import cpu_seconds, stack_pids, total, watching
from benchmarks.stack import running
from mora_serve.client import Client
from mora_serve.stack import Stack
from mora_serve.store.redis_client import RedisClient

SIZES = (1_000, 10_000, 100_000)
WARM_UP_ROWS = 1_000
FLAT = 1.10
MIB = 2**20
POLL_S = 0.1
TOPICS = ("sleep", "bread", "rivers", "taxes", "violins", "moss", "glass", "bees", "salt", "maps")


@dataclass(frozen=True)
class Measured:
    """One batch."""

    rows: int
    seconds: float
    """From the request that created it to ``completed``."""
    pairs: int
    classes: dict[str, int]
    peak_mib: dict[str, float]
    """Resident memory by kind of process, all processes of the kind together."""
    redis_used_mib: float
    """Largest ``used_memory`` that Redis reported while the batch ran."""
    redis_left_mib: float
    """``used_memory`` once the batch was finished, above what it was before."""
    cpu_ms_per_row: dict[str, float]
    missing: int
    repeated: int

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=SIZES, help="rows per batch")
    parser.add_argument("--runners", type=int, default=2)
    parser.add_argument("--generators", type=int, default=1)
    parser.add_argument("--in-flight", type=int, default=128, help="rows per runner at a time")
    parser.add_argument("--out", type=Path, help="write all figures here as JSON")
    args = parser.parse_args()
    print(f"machine: {machine.describe()}", flush=True)
    figures = []
    for rows in args.rows:
        with running("fake", overrides(args.runners, args.generators, args.in_flight)) as stack:
            measure(stack, WARM_UP_ROWS)
            figures.append(measure(stack, rows))
            show(figures[-1])
    if args.out:
        found = [{**asdict(item), "rows_per_s": item.rows_per_s} for item in figures]
        text = json.dumps({"machine": machine.describe(), "batches": found}, indent=2)
        args.out.write_text(text + "\n", "utf-8")
    return verdict(figures)


def overrides(runners: int, generators: int, in_flight: int) -> dict[str, Any]:
    """A fixed number of replicas, so that a run measures rows and not starting processes."""
    return {
        "policy": {"replica": {"min_replicas": generators, "max_replicas": generators}},
        "runner": {
            "max_in_flight_rows": in_flight,
            "replica": {"min_replicas": runners, "max_replicas": runners},
        },
    }


def lines(num: int) -> Iterator[bytes]:
    """Batch rows with distinct prompts."""
    for index in range(num):
        topic = TOPICS[index % len(TOPICS)]
        prompt = f"Tell me what I should know about {topic} number {index}, please."
        body = {"prompt": prompt, "n": 4, "candidates": 1}
        row = {"custom_id": f"row-{index}", "method": "POST", "url": "/v1/rewrites", "body": body}
        yield json.dumps(row).encode() + b"\n"


def measure(stack: Stack, rows: int) -> Measured:
    """Run one batch and read its results back."""
    client = Client(stack.url, timeout_s=120.0)
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.writelines(lines(rows))
        file.flush()
        uploaded = client.upload(Path(file.name), "rows.jsonl")
    pids = stack_pids()
    before, idle = redis_bytes(stack), total(cpu_seconds, pids)
    largest = before
    body = {
        "input_file_id": uploaded["id"],
        "endpoint": "/v1/rewrites",
        "completion_window": "24h",
    }
    with watching(pids, 0.1) as peaks:
        began = time.perf_counter()
        batch = client.post("/v1/batches", body)
        while batch["status"] not in ("completed", "failed", "expired", "cancelled"):
            time.sleep(POLL_S)
            batch = client.get(f"/v1/batches/{batch['id']}")
            largest = max(largest, redis_bytes(stack))
        seconds = time.perf_counter() - began
        peak = peaks.take()
    spent = total(cpu_seconds, pids)
    found = read_back(client, batch, rows)
    return Measured(
        rows=rows,
        seconds=seconds,
        peak_mib={name: value / MIB for name, value in sorted(peak.items())},
        redis_used_mib=largest / MIB,
        redis_left_mib=(redis_bytes(stack) - before) / MIB,
        cpu_ms_per_row={name: 1e3 * (spent[name] - idle[name]) / rows for name in sorted(spent)},
        **found,
    )


def read_back(client: Client, batch: dict[str, Any], rows: int) -> dict[str, Any]:
    """Every row once in the output file, every pair once in the stream."""
    seen: set[str] = set()
    repeated = in_rows = 0
    classes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("output_file_id", "error_file_id"):
            if batch[name] is None:
                continue
            path = Path(folder, name)
            client.download(f"/v1/files/{batch[name]}/content", path)
            with path.open("rb") as file:
                for line in file:
                    row = json.loads(line)
                    repeated += row["custom_id"] in seen
                    seen.add(row["custom_id"])
                    if row["response"] is not None:
                        answer = row["response"]["body"]
                        in_rows += len(answer["pairs"])
                        label = answer["original"]["class"]
                        classes[label] = classes.get(label, 0) + 1
    pairs = 0
    for pair in client.ndjson("GET", f"/v1/batches/{batch['id']}/pairs"):
        repeated += pair["seq"] != pairs
        pairs += 1
    missing = rows - len(seen) + abs(in_rows - pairs)
    return {"pairs": pairs, "classes": classes, "missing": missing, "repeated": repeated}


def redis_bytes(stack: Stack) -> int:
    """Redis's ``used_memory``."""
    url = stack.settings.redis.url
    assert url is not None

    async def ask() -> Any:
        client = RedisClient(url.get_secret_value())
        try:
            return await client.command("INFO", "memory")
        finally:
            await client.aclose()

    return int(asyncio.run(ask())["used_memory"])


def show(found: Measured) -> None:
    print(
        f"{found.rows:>7} rows: {found.rows_per_s:.0f} rows/s ({found.seconds:.1f} s), "
        f"{found.pairs} pairs; missing {found.missing}, repeated {found.repeated}"
    )
    print("        classes " + ", ".join(f"{k} {v}" for k, v in sorted(found.classes.items())))
    print("        peak MiB " + ", ".join(f"{k} {v:.0f}" for k, v in found.peak_mib.items()))
    print(
        f"        redis used_memory at most {found.redis_used_mib:.1f} MiB, "
        f"{found.redis_left_mib:.2f} MiB of it left when finished"
    )
    cost = found.cpu_ms_per_row
    print(
        f"        CPU ms per row {sum(cost.values()):.2f}: "
        + ", ".join(f"{k} {v:.2f}" for k, v in cost.items() if v >= 0.005),
        flush=True,
    )


def verdict(figures: list[Measured]) -> int:
    """Exit status: 1 for lost or repeated rows, and for memory that grows with the batch."""
    broken = [item.rows for item in figures if item.missing or item.repeated]
    if broken:
        print(f"FAILED: rows or pairs were lost or repeated at {broken} rows")
    grown = []
    if len(figures) > 1:
        small, large = figures[-2], figures[-1]
        for name in ("runner", "gateway"):
            ratio = large.peak_mib[name] / small.peak_mib[name]
            print(f"memory of {name}: {large.rows} rows need {ratio:.2f} times {small.rows} rows'")
            if ratio > FLAT:
                grown.append(name)
    if grown:
        print(f"FAILED: memory must be flat within {FLAT:.2f}, it is not in {', '.join(grown)}")
    return 1 if broken or grown else 0


if __name__ == "__main__":
    sys.exit(main())
