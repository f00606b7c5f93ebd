"""Writes ``helm/values.schema.json``: the chart's own values, and the settings of the service.

``config`` is checked by the JSON schema of :class:`mora_serve.config.Settings`, so that helm itself
refuses a misspelt setting. What the chart decides, and secrets, are left out of it and thereby
refused. ``--check`` exits with 1 when the file is not what would be written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from mora_serve.config import PROFILES, Settings

TARGET = Path(__file__).resolve().parents[1] / "helm" / "values.schema.json"
OURS = {
    "Settings": ("profile", "data_dir", "ray"),
    "ServerSettings": ("host", "port", "api_keys", "haproxy"),
    "RedisSettings": ("url",),
    "BlobSettings": ("url",),
    "RemoteSettings": ("api_key",),
}
"""Settings that the chart sets, or that a Secret holds."""

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
FLAG: Schema = {"type": "boolean"}
ANY_OBJECT: Schema = {"type": "object"}
LABEL: Schema = {
    "type": "string",
    "pattern": "^([A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?)?$",
    "maxLength": 63,
}
QUALIFIED = "^([{0}0-9]([-.{0}0-9]*[{0}0-9])?/)?[A-Za-z0-9]([-._A-Za-z0-9]{{0,61}}[A-Za-z0-9])?$"
"""A name after a domain, if any, whose letters are ``{0}``."""
# Not propertyNames: of a key that these refuse, helm 4 tells the path of another value.
LABELS: Schema = {
    "type": "object",
    "additionalProperties": False,
    "patternProperties": {QUALIFIED.format("a-z"): LABEL},
}
ANNOTATIONS: Schema = {
    "type": "object",
    "additionalProperties": False,
    "patternProperties": {QUALIFIED.format("a-zA-Z"): TEXT},
}
# Fractions are strings: an API server takes no other number for a resource of a RayService.
CPUS: Schema = {"type": ["string", "integer"], "pattern": r"^[0-9]+(\.[0-9]+)?m?$", "minimum": 0}
# Not zero, and no "m": a thousandth of a byte where a mebibyte was meant.
SIZE: Schema = {
    "type": ["string", "integer"],
    "pattern": r"^([0-9]*[1-9][0-9]*(\.[0-9]+)?|0+\.[0-9]*[1-9][0-9]*)(k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$",
    "minimum": 1,
}
COUNT: Schema = {"type": ["string", "integer"], "pattern": "^[0-9]+(k|M|G)?$", "minimum": 0}
"""Of a device plugin's resource, which has no fractions."""
QUANTITIES: Schema = {
    "type": "object",
    "additionalProperties": False,
    "patternProperties": {
        "^cpu$": CPUS,
        "^(memory|ephemeral-storage|hugepages-.+)$": SIZE,
        "^.+/.+$": COUNT,
    },
}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
PULL_POLICY: Schema = {"enum": ["Always", "IfNotPresent", "Never"]}
NAME: Schema = {
    "type": "string",
    "pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$",
    "maxLength": 253,
}
LABEL_NAME: Schema = {**NAME, "maxLength": 63}
"""A name that is also the value of a label."""
PULL_SECRETS: Schema = {"type": "array", "items": NAME, "uniqueItems": True}
KEY: Schema = {"type": "string", "pattern": r"^[-._a-zA-Z0-9]+$", "maxLength": 253}
# Several pods mount a volume, two clusters' pods during an upgrade: never ReadWriteOncePod.
ACCESS_MODES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"enum": ["ReadWriteOnce", "ReadWriteMany"]},
}


def whole(minimum: int = 0, maximum: int = 2**31 - 1) -> Schema:
    return {"type": "integer", "minimum": minimum, "maximum": maximum}


def section(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def listed(item: Schema) -> Schema:
    return {"type": "array", "items": item}


RESOURCES = section(requests=QUANTITIES, limits=QUANTITIES)
# An API server drops unknown fields of a RayService's pods: a misspelt one would have no effect.
TOLERATION = section(
    key=TEXT,
    operator=choice("Exists", "Equal", "Lt", "Gt"),
    value=TEXT,
    effect=choice("", "NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=whole(),
)
AFFINITY = section(nodeAffinity=ANY_OBJECT, podAffinity=ANY_OBJECT, podAntiAffinity=ANY_OBJECT)
SPREAD: Schema = {
    **section(
        maxSkew=whole(1),
        topologyKey=TEXT,
        whenUnsatisfiable=choice("DoNotSchedule", "ScheduleAnyway"),
        labelSelector=ANY_OBJECT,
        matchLabelKeys=listed(TEXT),
        minDomains=whole(1),
        nodeAffinityPolicy=choice("Honor", "Ignore"),
        nodeTaintsPolicy=choice("Honor", "Ignore"),
    ),
    "required": ["maxSkew", "topologyKey", "whenUnsatisfiable"],
}
CONFINEMENT: Schema = {
    **section(type=choice("RuntimeDefault", "Localhost", "Unconfined"), localhostProfile=TEXT),
    # The profile is a file of the node's, which only this type reads.
    "if": {"properties": {"type": {"const": "Localhost"}}, "required": ["type"]},
    "then": {
        "properties": {"localhostProfile": {"minLength": 1}},
        "required": ["localhostProfile"],
    },
    "else": {"not": {"required": ["localhostProfile"]}},
}
SCHEDULING: dict[str, Schema] = {
    "nodeSelector": LABELS,
    "tolerations": listed(ref("toleration")),
    "affinity": ref("affinity"),
    "priorityClassName": NAME,
}
SECURITY = {
    **section(
        runAsNonRoot=FLAG,
        runAsUser=whole(),
        runAsGroup=whole(),
        fsGroup=whole(),
        fsGroupChangePolicy=choice("OnRootMismatch", "Always"),
        supplementalGroups=listed(whole()),
        supplementalGroupsPolicy=choice("Merge", "Strict"),
        seccompProfile=ref("confinement"),
        seLinuxOptions=section(user=TEXT, role=TEXT, type=TEXT, level=TEXT),
        seLinuxChangePolicy=choice("MountOption", "Recursive"),
        appArmorProfile=ref("confinement"),
    ),
    # Kubernetes takes root beside runAsNonRoot, and then starts no container of the pod.
    "if": {"properties": {"runAsNonRoot": {"const": True}}, "required": ["runAsNonRoot"]},
    "then": {"properties": {"runAsUser": {"minimum": 1}}},
}
"""Of a pod: any of its fields can be null, since some platforms choose users themselves."""
SELECTOR = section(
    matchLabels=LABELS,
    matchExpressions=listed(
        {
            **section(
                key=TEXT,
                operator=choice("In", "NotIn", "Exists", "DoesNotExist"),
                values=listed(LABEL),
            ),
            "required": ["key", "operator"],
        }
    ),
)
PEER: Schema = {
    **section(
        podSelector=ref("selector"),
        namespaceSelector=ref("selector"),
        ipBlock={**section(cidr=TEXT, **{"except": listed(TEXT)}), "required": ["cidr"]},
    ),
    "minProperties": 1,
    # A block of addresses stands alone.
    "dependencies": {"ipBlock": {"maxProperties": 1}},
}
POD = {
    **SCHEDULING,
    "resources": RESOURCES,
    "shmSize": SIZE,
    "runtimeClassName": NAME,
    "podAnnotations": ANNOTATIONS,
    # KubeRay's Services find the head by labels of these two kinds.
    "podLabels": {
        **LABELS,
        "propertyNames": {"not": {"pattern": r"^(ray\.io|app\.kubernetes\.io)/"}},
    },
}
TRAINERS = section(
    enabled=FLAG,
    minReplicas=whole(),
    maxReplicas=whole(1),
    gpus=whole(),
    idleTimeoutSeconds=whole(1),
    topologySpreadConstraints=listed(ref("spread")),
    env=listed(ref("variable")),
    **POD,
)
GROUP = section(**TRAINERS["properties"], pdbMinAvailable=whole())
"""Trainers come and go: a budget of theirs would hold up every node's drain."""
KEY_OF: Schema = {
    **section(name={**NAME, "minLength": 1}, key=KEY, optional=FLAG),
    "required": ["name", "key"],
}
SOURCE: Schema = {
    **section(
        secretKeyRef=KEY_OF,
        configMapKeyRef=KEY_OF,
        fieldRef={**section(apiVersion=TEXT, fieldPath=TEXT), "required": ["fieldPath"]},
        resourceFieldRef={
            **section(containerName=TEXT, resource=TEXT, divisor={"type": ["string", "integer"]}),
            "required": ["resource"],
        },
    ),
    "minProperties": 1,
    "maxProperties": 1,
}
VARIABLE: Schema = {
    **section(
        name={"type": "string", "pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
        value=TEXT,
        valueFrom=SOURCE,
    ),
    "required": ["name"],
}
IMAGE: dict[str, Schema] = {
    "repository": {
        "type": "string",
        "pattern": r"^([-.A-Za-z0-9]+(:[0-9]+)?/)?[a-z0-9]+([-._/]+[a-z0-9]+)*$",
    },
    "tag": {"type": "string", "pattern": "^([A-Za-z0-9_][-.A-Za-z0-9_]{0,127})?$"},
    "digest": DIGEST,
}
NAMED_IMAGE: Schema = {
    "anyOf": [
        {"properties": {"tag": {"minLength": 1}}},
        {"properties": {"digest": {"minLength": 1}}, "required": ["digest"]},
    ]
}
"""Of an image whose tag has no default."""
STORE = {**SCHEDULING, "resources": RESOURCES}
DISK = section(size=SIZE, storageClass=NAME)
PROBE = {
    "initialDelaySeconds": whole(),
    "periodSeconds": whole(1),
    "timeoutSeconds": whole(1),
    "failureThreshold": whole(1),
}
VOLUME = {
    "existingClaim": NAME,
    "size": SIZE,
    "storageClass": NAME,
    "accessModes": ACCESS_MODES,
}
PATH_TYPE = choice("Prefix", "Exact", "ImplementationSpecific")
DNS_NAME = r"(\*\.)?[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*"
HOSTNAME: Schema = {"type": "string", "pattern": f"^{DNS_NAME}$", "maxLength": 253}
HOST = {
    **section(
        host={**HOSTNAME, "pattern": f"^({DNS_NAME})?$"},
        path={"type": "string", "pattern": "^(/|$)"},
        pathType=PATH_TYPE,
    ),
    "required": ["host"],
}
PARENT = {
    **section(
        group=TEXT, kind=TEXT, namespace=NAME, name=NAME, sectionName=NAME, port=whole(1, 65535)
    ),
    "required": ["name"],
}
CLASS = section(name={**NAME, "minLength": 1}, value={"type": "integer", "maximum": 1_000_000_000})
DURATION: Schema = {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}
MONITOR = section(enabled=FLAG, interval=DURATION, labels=LABELS)
OBJECT: Schema = {
    "type": "object",
    "properties": {
        "apiVersion": {"type": "string", "minLength": 1},
        "kind": {"type": "string", "minLength": 1},
        "metadata": ANY_OBJECT,
    },
    "required": ["apiVersion", "kind", "metadata"],
}


GENERAL: Schema = {
    "nameOverride": LABEL_NAME,
    "fullnameOverride": NAME,
    "profile": choice(*PROFILES),
    "config": ref("Settings"),
    "calibrator": section(existingConfigMap=NAME, key=KEY),
    "image": section(**IMAGE, pullPolicy=PULL_POLICY, pullSecrets=PULL_SECRETS),
    "secrets": section(
        apiKeys=section(existingSecret=NAME, key=KEY, clientKey=KEY),
        huggingFace=section(existingSecret=NAME, key=KEY),
        s3=section(existingSecret=NAME, accessKeyIdKey=KEY, secretAccessKeyKey=KEY),
    ),
}
"""What is installed, and with which secrets."""
CLUSTER: Schema = {
    "ray": section(
        version={"type": "string", "pattern": r"^[0-9]+\.[0-9]+\.[0-9]+$"},
        autoscaling=FLAG,
        # In an incremental upgrade KubeRay ignores `serveService`, which all else leads to.
        upgradeStrategy=choice("NewCluster", "None"),
        authMode=choice("disabled", "token"),
        haproxy=FLAG,
        deletionDelaySeconds=whole(),
        autoscaler=section(resources=RESOURCES),
    ),
    "head": section(**POD),
    "workerGroups": section(
        **{name: ref("group") for name in ("gateway", "generator", "scorers")},
        trainer=ref("trainers"),
    ),
    "gpuResource": {
        "type": "string",
        "pattern": "^[a-z0-9][-a-z0-9.]*/[A-Za-z0-9]([-._A-Za-z0-9]*[A-Za-z0-9])?$",
    },
    "extraEnv": listed(ref("variable")),
    "tmpSizeLimit": SIZE,
    "terminationGracePeriodSeconds": whole(1),
    "preStopSleepSeconds": whole(),
    # Kubernetes takes one success only from the probes that restart a container.
    "probes": section(
        startup=section(**PROBE),
        readiness=section(**PROBE, successThreshold=whole(1)),
        liveness=section(**PROBE),
    ),
    "podSecurityContext": ref("podSecurityContext"),
    "serviceAccount": section(create=FLAG, name=NAME, annotations=ANNOTATIONS),
}
"""Head, worker groups and what their pods have in common."""
STORAGE: Schema = {
    "data": section(**VOLUME),
    "blobs": section(
        s3=section(url={"type": "string", "pattern": "^(s3://.+)?$"}, endpoint=TEXT, region=TEXT)
    ),
    "modelCache": section(
        type=choice("pvc", "hostPath", "ephemeral"),
        hostPath={"type": "string", "pattern": "^/", "not": {"pattern": r"(^|/)\.\.(/|$)"}},
        **VOLUME,
    ),
    "valkey": section(
        enabled=FLAG,
        image={**section(**IMAGE, pullPolicy=PULL_POLICY), **NAMED_IMAGE},
        auth=section(enabled=FLAG, existingSecret=NAME, key=KEY),
        persistence=DISK,
        podSecurityContext=ref("podSecurityContext"),
        **STORE,
    ),
    "externalRedis": section(existingSecret=NAME, key=KEY),
    "gcsFaultTolerance": section(
        enabled=FLAG,
        external=section(
            address={"type": "string", "pattern": "^(rediss?://.+)?$"},
            existingSecret=NAME,
            key=KEY,
            usernameKey={**KEY, "pattern": r"^[-._a-zA-Z0-9]*$"},
        ),
        persistence=DISK,
        **STORE,
    ),
}
"""Where data, weights and state are kept."""
NETWORK: Schema = {
    "service": section(
        type=choice("ClusterIP", "NodePort", "LoadBalancer"),
        port=whole(1024, 65535),
        annotations=ANNOTATIONS,
        labels=LABELS,
    ),
    "ingress": section(
        enabled=FLAG,
        className=NAME,
        annotations=ANNOTATIONS,
        hosts=listed(HOST),
        tls=listed(section(secretName=NAME, hosts=listed(HOSTNAME))),
    ),
    "httpRoute": section(
        enabled=FLAG,
        parentRefs=listed(PARENT),
        hostnames=listed(HOSTNAME),
        annotations=ANNOTATIONS,
    ),
    "networkPolicy": section(
        enabled=FLAG,
        operatorNamespaceSelector=ref("selector"),
        operatorPodSelector=ref("selector"),
        clients=listed(PEER),
        monitoring=listed(PEER),
    ),
}
"""How the gateway is reached, and by whom."""
OPERATIONS: Schema = {
    "monitoring": section(
        serviceMonitor=MONITOR,
        podMonitor=MONITOR,
        prometheusRule=section(enabled=FLAG, labels=LABELS),
        grafanaDashboard=section(enabled=FLAG, labels=LABELS, annotations=ANNOTATIONS),
    ),
    "priorityClasses": section(create=FLAG, serving=CLASS, training=CLASS),
    "kueue": section(queueName=LABEL_NAME, priorityClass=LABEL_NAME),
    "test": section(
        prompt={"type": "string", "minLength": 1}, timeoutSeconds=whole(1), **SCHEDULING
    ),
    "extraObjects": listed(OBJECT),
    "global": ANY_OBJECT,
}
"""What watches the cluster and shares it out."""


def values_schema() -> Schema:
    """The whole file."""
    root = section(**GENERAL, **CLUSTER, **STORAGE, **NETWORK, **OPERATIONS)
    settings = settings_schema()
    values = yaml.safe_load(TARGET.with_name("values.yaml").read_text("utf-8"))
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **_complete(root, values),
        "$defs": {
            "group": _complete(GROUP, values["workerGroups"]["gateway"]),
            "trainers": _complete(TRAINERS, values["workerGroups"]["trainer"]),
            "variable": VARIABLE,
            "toleration": TOLERATION,
            "affinity": AFFINITY,
            "spread": SPREAD,
            "selector": SELECTOR,
            "podSecurityContext": SECURITY,
            "confinement": CONFINEMENT,
            **settings,
        },
    }


def _complete(schema: Schema, values: Any) -> Schema:
    """Sections require what has a default: only a null, which removes it, can leave it out."""
    if "properties" not in schema or not isinstance(values, dict):
        return schema
    fields = schema["properties"]
    return {
        **schema,
        "required": [name for name in fields if name in values],
        "properties": {name: _complete(field, values.get(name)) for name, field in fields.items()},
    }


def settings_schema() -> dict[str, Schema]:
    """``Settings`` and its sections by class name, without what is the chart's or a secret."""
    schema = Settings.model_json_schema()
    sections: dict[str, Schema] = schema.pop("$defs")
    sections["Settings"] = schema
    for name, fields in OURS.items():
        for field in fields:
            del sections[name]["properties"][field]
    used = json.dumps(sections)
    return {
        name: _bare(body)
        for name, body in sorted(sections.items())
        if name == "Settings" or f"#/$defs/{name}" in used
    }


def _bare(node: Any) -> Any:
    """The schema without titles and defaults, which helm does not use."""
    if isinstance(node, list):
        return [_bare(item) for item in node]
    if not isinstance(node, dict):
        return node
    kept = {key: value for key, value in node.items() if key not in ("title", "default")}
    return {
        key: (
            {name: _bare(field) for name, field in value.items()}
            if key == "properties"
            else _bare(value)
        )
        for key, value in kept.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Write helm/values.schema.json.")
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    text = json.dumps(values_schema(), indent=1) + "\n"
    if not parser.parse_args().check:
        TARGET.write_text(text, "utf-8")
        return 0
    if TARGET.read_text("utf-8") != text:
        sys.stderr.write(f"{TARGET.name} is not current; run make chart-schema\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
