"""``python -m tests.chart.footprint``: what each profile asks a cluster for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.chart.charts import PROFILES, Rendered, profile

UNITS = {"m": 1e-3, "": 1.0, "Mi": 2.0**-10, "Gi": 1.0, "Ti": 2.0**10}
"""CPUs and GiB per unit."""


@dataclass(frozen=True)
class Footprint:
    """Requests of all pods of a release, with the autoscaler beside the head."""

    gpus: int
    cpus: float
    memory_gib: float
    pods: int

    def __str__(self) -> str:
        return f"{self.cpus:.4g} CPUs, {self.memory_gib:.4g} GiB"


def quantity(text: str | int | float) -> float:
    """CPUs, GPUs, or GiB of a Kubernetes quantity."""
    number = str(text).rstrip("mMGTi")
    return float(number) * UNITS[str(text)[len(number) :]]


def footprint(rendered: Rendered, *, at_most: bool = False) -> Footprint:
    """Of every group at its smallest, or ``at_most`` at its largest."""
    counted = list(_pods(rendered, "maxReplicas" if at_most else "minReplicas"))
    sidecar = rendered.cluster.get("autoscalerOptions", {}).get("resources", {})
    totals = {
        name: sum(number * quantity(requests.get(name, 0)) for number, requests in counted)
        + quantity(sidecar.get("requests", {}).get(name, 0))
        for name in ("nvidia.com/gpu", "cpu", "memory")
    }
    pods = sum(number for number, _ in counted)
    return Footprint(int(totals["nvidia.com/gpu"]), totals["cpu"], totals["memory"], pods)


def _pods(rendered: Rendered, key: str) -> Iterator[tuple[int, dict[str, str]]]:
    templates = rendered.ray_pods()
    numbers = {name: int(group[key]) for name, group in rendered.groups.items()}
    for name, template in templates.items():
        yield numbers.get(name, 1), template["spec"]["containers"][0]["resources"]["requests"]
    for store in rendered.all("StatefulSet"):
        yield 1, store["spec"]["template"]["spec"]["containers"][0]["resources"]["requests"]


def row(name: str) -> str:
    """The first cells of a profile's line in the README."""
    rest, most = footprint(profile(name)), footprint(profile(name), at_most=True)
    gpus = f"{rest.gpus}, {most.gpus}" if most.gpus else "none"
    label = "default" if name == "default" else f"`{name}`"
    return f"| {label} | {gpus} | {rest} | {rest.pods} |"


def main() -> None:
    for name in PROFILES:
        print(row(name))


if __name__ == "__main__":
    main()
