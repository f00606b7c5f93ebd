"""``python -m benchmarks.uploads``: memory of the served stack while large files are uploaded.

As many uploads at once as are allowed, then three times as many, and a body over the limit, through
the real stack and its proxy. Prints the peak of every process beside what it used when idle, and
exits 1 when the processes grew by more than ``--bound-mib`` together, or an answer was not the one
that was due: 200 up to ``server.max_uploads``, 429 with ``Retry-After`` beyond, 413 over the limit.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit

from benchmarks.machine import describe
from benchmarks.processes import Peaks, stack_pids, watching
from benchmarks.stack import served
from mora_serve.config import load_settings
from mora_serve.free_ports import free_port

MIB = 2**20
BOUNDARY = b"benchmark-boundary"
LINE = b'{"custom_id": "a", "method": "POST", "url": "/v1/scores", "body": {}}\n'
CHUNK = (LINE * (MIB // len(LINE) + 1))[:MIB]
IDLE_S = 5.0
BOUND_MIB = 64
"""What does not fit into the application waits in the clients' sockets."""
PYTHON_BOUND_MIB = 768
"""Serve's Python proxy and its replica each hold what is uploaded: twice four files of 64 MiB, and
half as much again for their pieces."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one upload was answered with."""

    status: int
    retry_after_s: int | None
    sent_bytes: int


async def upload(url: str, num_bytes: int) -> Answer:
    """One multipart upload of ``num_bytes``, sent as fast as it is taken; stops when answered."""
    parts = urlsplit(url)
    assert parts.hostname is not None
    head = b"--%b\r\ncontent-disposition: form-data; name=" % BOUNDARY
    begin = head + b'"purpose"\r\n\r\nbatch\r\n' + head + b'"file"; filename="x.jsonl"\r\n\r\n'
    end = b"\r\n--%b--\r\n" % BOUNDARY
    length = len(begin) + num_bytes + len(end)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(
        b"POST /v1/files HTTP/1.1\r\nhost: %b\r\nconnection: close\r\ncontent-length: %d\r\n"
        b"content-type: multipart/form-data; boundary=%b\r\n\r\n"
        % (parts.netloc.encode(), length, BOUNDARY)
    )
    answered = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
    sent = 0

    async def send() -> None:
        nonlocal sent
        writer.write(begin)
        for start in range(0, num_bytes, MIB):
            piece = CHUNK[: min(MIB, num_bytes - start)]
            writer.write(piece)
            await writer.drain()
            sent += len(piece)
        writer.write(end)
        await writer.drain()

    sending = asyncio.create_task(send())
    await asyncio.wait({answered, sending}, return_when=asyncio.FIRST_COMPLETED)
    header = (await answered).decode("latin-1").lower()
    sending.cancel()
    with suppress(asyncio.CancelledError, OSError):
        await sending
    writer.close()
    fields = dict(line.split(": ", 1) for line in header.split("\r\n")[1:] if ": " in line)
    retry = fields.get("retry-after")
    return Answer(int(header.split(" ")[1]), None if retry is None else int(retry), sent)


def run(url: str, count: int, num_bytes: int) -> tuple[list[Answer], float]:
    """Answers to ``count`` uploads at once, and the seconds until the last one."""

    async def all_at_once() -> list[Answer]:
        return await asyncio.gather(*(upload(url, num_bytes) for _ in range(count)))

    started = time.perf_counter()
    answers = asyncio.run(all_at_once())
    return answers, time.perf_counter() - started


def report(name: str, answers: Sequence[Answer], seconds: float) -> None:
    statuses = ", ".join(
        f"{n} x {status}" for status, n in Counter(a.status for a in answers).items()
    )
    stored = sum(answer.sent_bytes for answer in answers if answer.status == 200)
    print(f"{name:<28} {statuses:<24} {seconds:6.1f} s {stored / MIB / seconds:8.0f} MiB/s stored")


def growth(idle: dict[str, int], peaks: Peaks) -> int:
    """Prints idle and peak memory of every process; returns the bytes they grew by together."""
    most = peaks.take()
    for name, peak in sorted(most.items()):
        print(f"    {name:<24} idle {idle[name] / MIB:7.0f} MiB   peak {peak / MIB:7.0f} MiB")
    return sum(max(0, peak - idle[name]) for name, peak in most.items())


def due(answers: Sequence[Answer], allowed: int) -> bool:
    """Whether as many as allowed were stored and the others told when to come back."""
    stored = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    told = all(1 <= (answer.retry_after_s or 0) <= 60 for answer in refused)
    return (
        len(stored) == min(allowed, len(answers))
        and len(stored) + len(refused) == len(answers)
        and told
    )


def measure(url: str, args: argparse.Namespace, allowed: int) -> bool:
    """All three loads; True when memory and answers were as they should."""
    num_bytes, fine = args.mib * MIB, True
    time.sleep(IDLE_S)
    with watching(stack_pids()) as peaks:
        idle = peaks.take()
        for name, count in (("as many as allowed", allowed), ("three times as many", 3 * allowed)):
            answers, seconds = run(url, count, num_bytes)
            report(f"{count} uploads, {name}", answers, seconds)
            grown = growth(idle, peaks)
            print(f"    together they grew by {grown / MIB:.0f} MiB, bound {args.bound_mib} MiB")
            fine &= due(answers, allowed) and grown <= args.bound_mib * MIB
        answers, seconds = run(url, 1, 513 * MIB)
        report("1 upload over the limit", answers, seconds)
        fine &= answers[0].status == 413
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mib", type=int, help="size of one upload, by default the largest")
    parser.add_argument("--bound-mib", type=int, help="growth of all processes")
    parser.add_argument("--python-proxy", action="store_true", help="without HAProxy")
    args = parser.parse_args()
    server = {"port": free_port(), "haproxy": not args.python_proxy}
    data_dir = tempfile.mkdtemp(prefix="mora-uploads-")
    defaults = load_settings("fake").server
    largest = defaults.max_part_bytes if args.python_proxy else defaults.max_upload_bytes
    args.mib = args.mib or largest // MIB
    args.bound_mib = args.bound_mib or (PYTHON_BOUND_MIB if args.python_proxy else BOUND_MIB)
    print(f"{describe()}; {'Python proxy' if args.python_proxy else 'HAProxy'}")
    try:
        with served("fake", {"data_dir": data_dir, "server": server}) as url:
            fine = measure(url, args, defaults.max_uploads)
    finally:
        shutil.rmtree(data_dir, ignore_errors=True)
    print("as it should be" if fine else "NOT as it should be")
    return 0 if fine else 1


if __name__ == "__main__":
    sys.exit(main())
