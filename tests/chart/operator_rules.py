"""What KubeRay 1.7 refuses beyond its CRDs (``ray-operator/controllers/ray/utils/validation.go``).

The operator checks these when it reconciles: an object that breaks one is accepted by the API
server and then never becomes a cluster.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

MAX_NAME = 47
"""53 for a RayCluster's services, less the six characters that a RayService adds."""
UPGRADES = ("NewCluster", "None")
"""Of KubeRay's three: an incremental upgrade makes no Service of the name that ours lead to."""
TOKENS_SINCE = (2, 52)
DNS_LABEL = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
RESOURCE_PARAMETERS = ("num-cpus", "num-gpus", "memory", "resources")
REDIS_VARIABLES = ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME")


def violations(service: Mapping[str, Any]) -> list[str]:
    """The rules that a RayService breaks, in words; empty when the operator would take it."""
    spec = service["spec"]
    return [
        *_name(service["metadata"]["name"]),
        *_upgrade(spec),
        *_groups(spec["rayClusterConfig"]),
        *_fault_tolerance(spec["rayClusterConfig"], service["metadata"]),
        *_autoscaler(spec["rayClusterConfig"]),
        *_authentication(spec["rayClusterConfig"]),
    ]


def _name(name: str) -> Iterator[str]:
    if len(name) > MAX_NAME or not DNS_LABEL.fullmatch(name):
        yield f"metadata.name must be a DNS label of at most {MAX_NAME} characters, got {name}"


def _upgrade(spec: Mapping[str, Any]) -> Iterator[str]:
    strategy = spec.get("upgradeStrategy", {})
    kind = strategy.get("type", "NewCluster")
    if kind not in UPGRADES:
        yield f"upgradeStrategy.type must be one of {UPGRADES}, got {kind}"
    if "upgradeStrategy" in spec["rayClusterConfig"]:
        yield "rayClusterConfig.upgradeStrategy must not be set in a RayService"
    if "name" in spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get(
        "metadata", {}
    ):
        yield "headService.metadata.name must not be set"


def _groups(cluster: Mapping[str, Any]) -> Iterator[str]:
    for group in (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ())):
        name, parameters = group.get("groupName", "head"), group.get("rayStartParams", {})
        if not group["template"]["spec"]["containers"]:
            yield f"{name} must have a container"
        if group.get("resources") and any(item in parameters for item in RESOURCE_PARAMETERS):
            yield f"{name} must have resources in one place only"
        if "labels" in parameters:
            yield f"{name} must not have rayStartParams.labels"
        if not all(isinstance(value, str) for value in parameters.values()):
            yield f"{name} must have text in rayStartParams"


def _fault_tolerance(cluster: Mapping[str, Any], metadata: Mapping[str, Any]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    variables = {item["name"] for item in head["template"]["spec"]["containers"][0].get("env", ())}
    for name in REDIS_VARIABLES:
        if name in variables:
            yield f"the head's environment must not hold {name}"
    for name in ("redis-password", "redis-username"):
        if name in head.get("rayStartParams", {}):
            yield f"the head's rayStartParams must not hold {name}"
    if "ray.io/ft-enabled" in metadata.get("annotations", {}):
        yield "ray.io/ft-enabled must not be set beside gcsFaultToleranceOptions"


def _autoscaler(cluster: Mapping[str, Any]) -> Iterator[str]:
    groups = (cluster["headGroupSpec"], *cluster.get("workerGroupSpecs", ()))
    variables = {
        item["name"] for item in groups[0]["template"]["spec"]["containers"][0].get("env", ())
    }
    if "RAY_enable_autoscaler_v2" in variables:
        yield "autoscalerOptions.version must say which autoscaler runs, not a variable"
    if not cluster.get("enableInTreeAutoscaling"):
        return
    for group in groups:
        name = group.get("groupName", "head")
        if group.get("suspend"):
            yield f"{name} must not be suspended with the autoscaler"
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if cluster.get("autoscalerOptions", {}).get("version") == "v2" and policy != "Never":
            yield f"{name} must have restartPolicy Never with autoscaler v2, got {policy}"
        if "replicas" in group:
            yield f"{name} must leave replicas to the autoscaler"


def _authentication(cluster: Mapping[str, Any]) -> Iterator[str]:
    if cluster.get("authOptions", {}).get("mode") != "token":
        return
    version = tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
    if version < TOKENS_SINCE:
        yield f"authOptions.mode token needs Ray 2.52, got {cluster.get('rayVersion')}"
