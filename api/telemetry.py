"""What the gateway counts about itself, and the merging of all replicas' metrics into one page.

Each gateway replica owns one registry. Other replicas publish their exposition text to the store
(``actors.metrics``); ``GET /metrics`` adds a ``replica`` label to every sample and groups families,
so that one scrape of any gateway sees the whole service. Names are kept as published.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS_BUCKETS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1,
    2.5,
    5,
    10,
    30,
    60,
    120,
)


class GatewayMetrics:
    """Prometheus instruments of one gateway replica."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "mora_http_requests", "HTTP requests by route template and status",
            ("method", "route", "status"), registry=self.registry,
        )  # fmt: skip
        self.seconds = Histogram(
            "mora_http_request_seconds", "Time from request to the last byte of the response",
            ("route",), buckets=SECONDS_BUCKETS, registry=self.registry,
        )  # fmt: skip
        self.in_flight = Gauge(
            "mora_http_requests_in_flight", "HTTP requests being handled", registry=self.registry
        )
        self.prompts_in_flight = Gauge(
            "mora_gateway_prompts_in_flight", "Prompts being worked on", registry=self.registry
        )
        self.queued_bytes = Gauge(
            "mora_gateway_queued_bytes", "Bytes of the requests being worked on",
            registry=self.registry,
        )  # fmt: skip
        self.rejected = Counter(
            "mora_gateway_rejected", "Requests refused before any work was queued",
            ("reason",), registry=self.registry,
        )  # fmt: skip
        self.disconnects = Counter(
            "mora_gateway_disconnects", "Requests whose client left before the answer",
            registry=self.registry,
        )  # fmt: skip

    def text(self) -> str:
        """This replica's exposition text."""
        return bytes(generate_latest(self.registry)).decode("utf-8")


_NUMBER = r"[+-]?(?:Inf|NaN|[0-9][0-9.eE+-]*)"
_SAMPLE = re.compile(rf"^([a-zA-Z_:][a-zA-Z0-9_:]*)(\{{.*\}})? ({_NUMBER}(?: [0-9-]+)?)$", re.ASCII)


def merge_expositions(texts: Mapping[str, str]) -> str:
    """One exposition text from many: ``texts`` maps a replica name to what it published.

    Every sample gets the label ``replica``; ``HELP`` and ``TYPE`` of a family appear once. Lines
    that are not exposition format are dropped, so that one broken publisher cannot break the page.
    """
    headers: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for replica in sorted(texts):
        family = ""
        for line in texts[replica].splitlines():
            if line.startswith("# "):
                parts = line.split(" ", 3)
                if len(parts) < 3 or parts[1] not in ("HELP", "TYPE"):
                    continue
                family = parts[2]
                _add_header(headers.setdefault(family, []), line, parts[1])
                continue
            labelled = _with_replica(line, replica)
            if labelled is not None:
                name = labelled[0]
                key = family if family and name.startswith(family) else name
                samples.setdefault(key, []).append(labelled[1])
    lines: list[str] = []
    for family, rows in samples.items():
        lines.extend(headers.get(family, ()))
        lines.extend(rows)
    return "\n".join(lines) + "\n"


def _add_header(existing: list[str], line: str, kind: str) -> None:
    if not any(row.startswith(f"# {kind} ") for row in existing):
        existing.append(line)


def _with_replica(line: str, replica: str) -> tuple[str, str] | None:
    match = _SAMPLE.match(line)
    if match is None:
        return None
    name, labels, rest = match.groups()
    escaped = replica.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
    inner = (labels or "{}")[1:-1].rstrip(",")
    joined = f'{inner},replica="{escaped}"' if inner else f'replica="{escaped}"'
    return name, f"{name}{{{joined}}} {rest}"
