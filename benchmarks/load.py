"""A closed-loop HTTP load on keep-alive connections, as light as Python allows.

``python -m benchmarks.load HOST PORT PATH CONNECTIONS SECONDS`` takes the body from standard input
(empty: GET) and prints one JSON line with the rate and the latencies. It is a process of its own,
since it competes for the cores with the server it measures.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time


async def worker(host: str, port: int, request: bytes, until: float, taken: list[float]) -> int:
    """Send ``request`` again and again until ``until``; returns the number of errors."""
    reader, writer = await asyncio.open_connection(host, port)
    errors = 0
    while (began := time.perf_counter()) < until:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        await read_body(reader, head)
        if head[9:12] == b"200":
            taken.append(time.perf_counter() - began)
        else:
            errors += 1
    writer.close()
    return errors


async def read_body(reader: asyncio.StreamReader, head: bytes) -> None:
    """Consume one response body, counted or chunked."""
    lower = head.lower()
    if b"content-length:" in lower:
        await reader.readexactly(int(lower.split(b"content-length:")[1].split(b"\r\n")[0]))
        return
    while size := int((await reader.readline()).strip(), 16):
        await reader.readexactly(size + 2)
    await reader.readline()


async def main() -> None:
    host, port, path, connections, seconds = sys.argv[1:6]
    body = sys.stdin.buffer.read()
    method = "POST" if body else "GET"
    request = (
        f"{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    await worker(host, int(port), request, time.perf_counter() + 2.0, [])
    taken: list[float] = []
    began = time.perf_counter()
    until = began + float(seconds)
    errors = sum(
        await asyncio.gather(
            *(worker(host, int(port), request, until, taken) for _ in range(int(connections)))
        )
    )
    elapsed = time.perf_counter() - began
    taken.sort()
    quantile = {q: 1e3 * taken[int(q / 100 * (len(taken) - 1))] for q in (50, 95)} if taken else {}
    print(json.dumps({"rate": len(taken) / elapsed, "errors": errors, "ms": quantile}))


if __name__ == "__main__":
    asyncio.run(main())
