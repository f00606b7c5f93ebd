"""Every value has an effect: each is set to something found nowhere else, and looked for.

Three renderings hold them all, since some values exclude others. Settings under ``config`` are left
out (they are read by the settings' loader, see ``test_drift``), and so are flags and choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import yaml

from tests.chart.charts import CHART, Rendered, render

Path = tuple[str, ...]
WHOLE = ("operatorPodSelector", "labels")
"""Mappings whose keys are the user's."""
CHOICES = {
    "profile", "image.pullPolicy", "valkey.image.pullPolicy", "ray.upgradeStrategy", "ray.authMode",
    "service.type", "modelCache.type", "data.accessModes", "modelCache.accessModes",
    "podSecurityContext.fsGroupChangePolicy", "podSecurityContext.seccompProfile.type",
    "valkey.podSecurityContext.seccompProfile.type",
}  # fmt: skip
ELSEWHERE = (
    "image.digest", "externalRedis.", "httpRoute.", "data.existingClaim",
    "modelCache.existingClaim", "gcsFaultTolerance.external.",
)  # fmt: skip
LAST = ("modelCache.hostPath", "valkey.image.digest")
FORMS: Mapping[str, Callable[[int, str], Any]] = {
    "digest": lambda n, _: f"sha256:{n:064}",
    "version": lambda n, _: f"{n}.0.0",
    "size": lambda n, _: f"{n}Gi",
    "shmSize": lambda n, _: f"{n}Mi",
    "tmpSizeLimit": lambda n, _: f"{n}Gi",
    "requests.cpu": lambda n, _: f"{n}m",
    "requests.memory": lambda n, _: f"{n}Mi",
    "limits.memory": lambda n, _: f"{n}Gi",
    "limits.cpu": lambda n, _: f"{n}",
    "hostPath": lambda _, token: f"/{token}",
    "gpuResource": lambda _, token: f"{token}/{token}",
    "interval": lambda n, _: f"{n}s",
    "s3.url": lambda _, token: f"s3://{token}",
    "address": lambda _, token: f"redis://{token}:6379",
    "minReplicas": lambda n, _: n + 1000,
    "maxReplicas": lambda n, _: n + 2000,
    "terminationGracePeriodSeconds": lambda n, _: n + 1000,
    "tolerations": lambda _, token: [{"key": token}],
    "affinity": lambda _, token: {"nodeAffinity": {token: 1}},
    "topologySpreadConstraints": lambda _, token: [
        {"topologyKey": token, "maxSkew": 1, "whenUnsatisfiable": "DoNotSchedule"}
    ],
    "env": lambda _, token: [{"name": token, "value": token}],
    "extraEnv": lambda _, token: [{"name": token, "value": token}],
    "hosts": lambda _, token: [{"host": token, "path": f"/{token}"}],
    "tls": lambda _, token: [{"secretName": token}],
    "parentRefs": lambda _, token: [{"name": token}],
    "clients": lambda _, token: [{"podSelector": {"matchLabels": {token: token}}}],
    "monitoring": lambda _, token: [{"podSelector": {"matchLabels": {token: token}}}],
    "operatorNamespaceSelector": lambda _, token: {"matchLabels": {token: token}},
    "operatorPodSelector": lambda _, token: {"matchLabels": {token: token}},
    "extraObjects": lambda _, token: [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": token}}
    ],
}
"""Valid values where neither a word nor a number is one, by the end of the path."""
EXTRAS = {
    f"monitoring.{kind}.enabled": True
    for kind in ("serviceMonitor", "podMonitor", "prometheusRule", "grafanaDashboard")
} | {"priorityClasses.create": True, "ingress.enabled": True, "workerGroups.trainer.enabled": True}


def leaves(node: Mapping[str, Any], at: Path = ()) -> Iterator[tuple[str, Any]]:
    """Dotted paths and defaults of what a user may set."""
    for name, value in node.items():
        inner = (*at, name)
        if isinstance(value, dict) and value and name not in WHOLE:
            yield from leaves(value, inner)
        elif inner != ("config",) and not isinstance(value, bool):
            yield ".".join(inner), value


def given() -> dict[str, Any]:
    """A value of its own for every path."""
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    del values["config"]
    found = [(path, old) for path, old in leaves(values) if path not in CHOICES]
    return {path: _value(path, old, number) for number, (path, old) in enumerate(found, 3001)}


def _value(path: str, default: Any, number: int) -> Any:
    token = f"zq{number}"
    for ending, form in FORMS.items():
        if path == ending or path.endswith(f".{ending}"):
            return form(number, token)
    if isinstance(default, int):
        return number
    if isinstance(default, list):
        return [token]
    return {token: token} if isinstance(default, dict) else token


def traces(value: Any) -> Iterator[str]:
    """The texts by which a value is found again."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from (name,) if name.startswith("zq") else ()
            yield from traces(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from traces(inner)
    else:
        yield str(value)


def missing(rendered: Rendered, values: Mapping[str, Any]) -> list[str]:
    text = yaml.safe_dump_all(rendered.documents, width=10_000)
    return [path for path, value in values.items() if not all(t in text for t in traces(value))]


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return given()


def test_values_reach_what_is_rendered(values: dict[str, Any]) -> None:
    chosen = {path: v for path, v in values.items() if not path.startswith((*ELSEWHERE, *LAST))}
    assert len(chosen) > 150
    assert missing(render(values=chosen | EXTRAS), chosen) == []


def test_values_that_replace_others_reach_what_is_rendered(values: dict[str, Any]) -> None:
    chosen = {path: v for path, v in values.items() if path.startswith(ELSEWHERE)}
    switches = {"valkey.enabled": False, "httpRoute.enabled": True}
    assert missing(render(values=chosen | switches), chosen) == []


def test_values_of_the_rest_reach_what_is_rendered(values: dict[str, Any]) -> None:
    chosen = {path: values[path] for path in LAST}
    assert missing(render(values={**chosen, "modelCache.type": "hostPath"}), chosen) == []


def test_the_passwords_secret_is_rays_own_stores_too(values: dict[str, Any]) -> None:
    own = {"existingSecret": "zq1", "key": "zq2"}
    rendered = render(values={f"gcsFaultTolerance.external.{key}": v for key, v in own.items()})
    assert missing(rendered, own) == []
    store = rendered.one("StatefulSet", "-gcs-valkey")["spec"]["template"]["spec"]
    (reference,) = [
        item["valueFrom"]["secretKeyRef"]
        for item in store["containers"][0]["env"]
        if "valueFrom" in item
    ]
    assert reference == {"name": "zq1", "key": "zq2"}


def test_volumes_are_shared_as_their_values_say() -> None:
    modes = {"data": ["ReadWriteOnce"], "modelCache": ["ReadWriteMany"]}
    rendered = render(values={f"{name}.accessModes": mode for name, mode in modes.items()})
    for name, suffix in (("data", "-data"), ("modelCache", "-models")):
        assert rendered.one("PersistentVolumeClaim", suffix)["spec"]["accessModes"] == modes[name]


@pytest.mark.parametrize("kind", ["NodePort", "LoadBalancer"])
def test_the_services_type_is_the_value(kind: str) -> None:
    service = render("default", f"service.type={kind}").ray_service["spec"]["serveService"]
    assert service["spec"]["type"] == kind
