"""Rendering the chart with real helm, and reading what came out."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
CHART = Path(os.environ.get("CHART_UNDER_TEST", ROOT / "helm"))
"""``tests.chart.mutants`` names copies with a mistake in them."""
TOOLS = ROOT / ".cache" / "helm"
RELEASE, NAMESPACE = "mora", "serving"
SECRET: Mapping[str, Any] = {"valkey.auth.existingSecret": "store"}
"""The one value without a default."""
PROFILES = ("default", *sorted(path.stem for path in (CHART / "profiles").glob("*.yaml")))
HELM_VERSIONS = ("4", "3")
KUBERNETES = tuple(f"1.{minor}" for minor in range(29, 38))
EVERYTHING: Mapping[str, Any] = {
    "secrets": {
        "apiKeys": {"existingSecret": "keys"},
        "huggingFace": {"existingSecret": "hub"},
        "s3": {"existingSecret": "bucket"},
    },
    "blobs": {"s3": {"url": "s3://mora/blobs", "endpoint": "http://minio:9000", "region": "eu"}},
    "calibrator": {"existingConfigMap": "calibrator"},
    "image": {"digest": "sha256:" + 64 * "0", "pullSecrets": ["registry"]},
    "ingress": {
        "enabled": True,
        "className": "nginx",
        "hosts": [{"host": "mora.example.org"}],
        "tls": [{"secretName": "tls", "hosts": ["mora.example.org"]}],
    },
    "monitoring": {
        kind: {"enabled": True}
        for kind in ("serviceMonitor", "podMonitor", "prometheusRule", "grafanaDashboard")
    },
    "priorityClasses": {"create": True},
    "kueue": {"queueName": "gpus", "priorityClass": "serving"},
    "ray": {"authMode": "token"},
    "gcsFaultTolerance": {"external": {"existingSecret": "store"}},
    "extraEnv": [{"name": "NCCL_DEBUG", "value": "WARN"}],
}
"""Values that switch on every optional object, apart from those that exclude each other."""


@dataclass
class Tally:
    """What a test session rendered and checked, for its last line."""

    render_s: list[float] = field(default_factory=list)
    objects: int = 0
    checks: int = 0
    kubernetes: set[str] = field(default_factory=set)
    helm: set[str] = field(default_factory=set)


TALLY = Tally()


class RefusedError(Exception):
    """Helm refused the values; the message is what a user reads."""


@dataclass(frozen=True)
class Rendered:
    documents: tuple[dict[str, Any], ...]

    def all(self, kind: str) -> list[dict[str, Any]]:
        return [item for item in self.documents if item["kind"] == kind]

    def one(self, kind: str, suffix: str = "") -> dict[str, Any]:
        (found,) = [i for i in self.all(kind) if i["metadata"]["name"].endswith(suffix)]
        return found

    @property
    def ray_service(self) -> dict[str, Any]:
        return self.one("RayService")

    @property
    def cluster(self) -> dict[str, Any]:
        spec: dict[str, Any] = self.ray_service["spec"]["rayClusterConfig"]
        return spec

    @property
    def serve_config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(self.ray_service["spec"]["serveConfigV2"])
        return config

    @property
    def groups(self) -> dict[str, dict[str, Any]]:
        return {item["groupName"]: item for item in self.cluster["workerGroupSpecs"]}

    def ray_pods(self) -> dict[str, dict[str, Any]]:
        """Pod templates of the Ray cluster by group, the head's as ``head``."""
        heads = {"head": self.cluster["headGroupSpec"]["template"]}
        return heads | {name: group["template"] for name, group in self.groups.items()}

    def pods(self) -> Iterator[dict[str, Any]]:
        """Every pod template of the release."""
        yield from self.ray_pods().values()
        yield from (item["spec"]["template"] for item in self.all("StatefulSet"))
        yield from self.all("Pod")


def environment(pod: Mapping[str, Any]) -> dict[str, str | None]:
    """Variables of a pod's first container; ``None`` for those that a Secret holds."""
    return {item["name"]: item.get("value") for item in pod["spec"]["containers"][0]["env"]}


def run_helm(*arguments: str, version: str = "4", stdin: str = "") -> str:
    """What helm prints. Raises :class:`RefusedError` with what it says when it fails."""
    done = subprocess.run(
        [str(TOOLS / version / "helm"), *arguments],
        input=stdin, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RefusedError(done.stderr.strip() or done.stdout.strip())
    return done.stdout


def options(
    profile: str, sets: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> list[str]:
    """Helm's options for a profile with other values, whose keys may be dotted."""
    given = (
        [] if profile == "default" else ["--values", str(CHART / "profiles" / f"{profile}.yaml")]
    )
    for item in sets:
        given += ["--set", item]
    for key, value in {**SECRET, **(values or {})}.items():
        given += ["--set-json", f"{key}={json.dumps(value)}"]
    return given


def render(
    profile: str = "default",
    *sets: str,
    values: Mapping[str, Any] | None = None,
    version: str = "4",
    kubernetes: str = "1.35",
    release: str = RELEASE,
) -> Rendered:
    """The documents of ``helm template``. Raises :class:`RefusedError`."""
    started = time.perf_counter()
    text = run_helm(
        "template", release, str(CHART), "--namespace", NAMESPACE,
        "--kube-version", f"{kubernetes}.0", *options(profile, sets, values),
        version=version,
    )  # fmt: skip
    TALLY.render_s.append(time.perf_counter() - started)
    documents = tuple(item for item in yaml.load_all(text, yaml.CSafeLoader) if item)
    TALLY.objects += len(documents)
    TALLY.helm.add(version)
    return Rendered(documents)


@functools.cache
def profile(name: str) -> Rendered:
    """A profile as it is, rendered once per session."""
    return render(name)


@functools.cache
def everything() -> Rendered:
    """The default profile with every optional object."""
    return render(values=EVERYTHING)


def in_cluster(rendered: Rendered) -> dict[str, Any]:
    """Settings arguments of the Serve application."""
    (application,) = rendered.serve_config["applications"]
    arguments: dict[str, Any] = application["args"]
    return arguments
