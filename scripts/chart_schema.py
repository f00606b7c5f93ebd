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
OBJECTS: Schema = {"type": "array", "items": ANY_OBJECT}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}
QUANTITY: Schema = {
    "type": ["string", "number"],
    "pattern": r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$",
}
DIGEST: Schema = {"type": "string", "pattern": "^(sha256:[0-9a-f]{64})?$"}
PULL_POLICY: Schema = {"enum": ["Always", "IfNotPresent", "Never"]}
NAME: Schema = {"type": "string", "pattern": r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}
KEY: Schema = {"type": "string", "pattern": r"^[-._a-zA-Z0-9]+$"}
ACCESS_MODES: Schema = {
    "type": "array",
    "minItems": 1,
    "items": {"enum": ["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"]},
}


def whole(minimum: int = 0, maximum: int | None = None) -> Schema:
    bound = {} if maximum is None else {"maximum": maximum}
    return {"type": "integer", "minimum": minimum, **bound}


def section(**properties: Schema) -> Schema:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def choice(*values: str) -> Schema:
    return {"enum": list(values)}


RESOURCES = section(
    requests={"type": "object", "additionalProperties": QUANTITY},
    limits={"type": "object", "additionalProperties": QUANTITY},
)
SCHEDULING = {
    "nodeSelector": STRINGS,
    "tolerations": OBJECTS,
    "affinity": ANY_OBJECT,
    "priorityClassName": NAME,
}
POD = {
    **SCHEDULING,
    "resources": RESOURCES,
    "shmSize": QUANTITY,
    "runtimeClassName": NAME,
    "podAnnotations": STRINGS,
    "podLabels": STRINGS,
}
TRAINERS = section(
    enabled=FLAG,
    minReplicas=whole(),
    maxReplicas=whole(1),
    gpus=whole(),
    idleTimeoutSeconds=whole(1),
    topologySpreadConstraints=OBJECTS,
    env={"type": "array", "items": {"$ref": "#/$defs/variable"}},
    **POD,
)
GROUP = section(**TRAINERS["properties"], pdbMinAvailable=whole())
"""Trainers come and go: a budget of theirs would hold up every node's drain."""
VARIABLE: Schema = {
    **section(
        # MORA_* would be read as settings, which belong into `config`; KubeRay refuses the others.
        name={
            "type": "string",
            "pattern": "^[A-Za-z_][A-Za-z0-9_]*$",
            "not": {
                "pattern": "^(MORA_|(REDIS_PASSWORD|REDIS_USERNAME|RAY_REDIS_ADDRESS"
                "|RAY_enable_autoscaler_v2)$)"
            },
        },
        value=TEXT,
        valueFrom=ANY_OBJECT,
    ),
    "required": ["name"],
}
IMAGE = {"repository": {"type": "string", "minLength": 1}, "tag": TEXT, "digest": DIGEST}
STORE = {**SCHEDULING, "resources": RESOURCES}
DISK = section(size=QUANTITY, storageClass=TEXT)
PROBE = section(
    initialDelaySeconds=whole(),
    periodSeconds=whole(1),
    timeoutSeconds=whole(1),
    failureThreshold=whole(1),
    successThreshold=whole(1),
)
VOLUME = {
    "existingClaim": NAME,
    "size": QUANTITY,
    "storageClass": TEXT,
    "accessModes": ACCESS_MODES,
}
PATH_TYPE = choice("Prefix", "Exact", "ImplementationSpecific")
HOST = {**section(host=TEXT, path=TEXT, pathType=PATH_TYPE), "required": ["host"]}
CLASS = section(name=NAME, value={"type": "integer", "maximum": 1_000_000_000})
DURATION: Schema = {"type": "string", "pattern": "^[0-9]+(ms|s|m)$"}
MONITOR = section(enabled=FLAG, interval=DURATION, labels=STRINGS)


GENERAL: Schema = {
    "nameOverride": NAME,
    "fullnameOverride": NAME,
    "profile": choice(*PROFILES),
    "config": {"$ref": "#/$defs/Settings"},
    "calibrator": section(existingConfigMap=NAME, key=KEY),
    "image": section(**IMAGE, pullPolicy=PULL_POLICY, pullSecrets={"type": "array", "items": NAME}),
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
        **{name: {"$ref": "#/$defs/group"} for name in ("gateway", "generator", "scorers")},
        trainer={"$ref": "#/$defs/trainers"},
    ),
    "gpuResource": {"type": "string", "minLength": 1},
    "extraEnv": {"type": "array", "items": {"$ref": "#/$defs/variable"}},
    "tmpSizeLimit": QUANTITY,
    "terminationGracePeriodSeconds": whole(1),
    "preStopSleepSeconds": whole(),
    "probes": section(startup=PROBE, readiness=PROBE, liveness=PROBE),
    "podSecurityContext": ANY_OBJECT,
    "serviceAccount": section(create=FLAG, name=NAME, annotations=STRINGS),
}
"""Head, worker groups and what their pods have in common."""
STORAGE: Schema = {
    "data": section(**VOLUME),
    "blobs": section(
        s3=section(url={"type": "string", "pattern": "^(s3://.+)?$"}, endpoint=TEXT, region=TEXT)
    ),
    "modelCache": section(
        type=choice("pvc", "hostPath", "ephemeral"),
        hostPath={"type": "string", "pattern": "^/"},
        **VOLUME,
    ),
    "valkey": section(
        enabled=FLAG,
        image=section(**IMAGE, pullPolicy=PULL_POLICY),
        auth=section(enabled=FLAG, existingSecret=NAME, key=KEY),
        persistence=DISK,
        podSecurityContext=ANY_OBJECT,
        **STORE,
    ),
    "externalRedis": section(existingSecret=NAME, key=KEY),
    "gcsFaultTolerance": section(
        enabled=FLAG,
        external=section(
            address={"type": "string", "pattern": "^(rediss?://.+)?$"},
            existingSecret=NAME,
            key=KEY,
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
        annotations=STRINGS,
        labels=STRINGS,
    ),
    "ingress": section(
        enabled=FLAG,
        className=TEXT,
        annotations=STRINGS,
        hosts={"type": "array", "items": HOST},
        tls=OBJECTS,
    ),
    "httpRoute": section(
        enabled=FLAG,
        parentRefs=OBJECTS,
        hostnames={"type": "array", "items": TEXT},
        annotations=STRINGS,
    ),
    "networkPolicy": section(
        enabled=FLAG,
        operatorNamespaceSelector=ANY_OBJECT,
        operatorPodSelector=ANY_OBJECT,
        clients=OBJECTS,
        monitoring=OBJECTS,
    ),
}
"""How the gateway is reached, and by whom."""
OPERATIONS: Schema = {
    "monitoring": section(
        serviceMonitor=MONITOR,
        podMonitor=MONITOR,
        prometheusRule=section(enabled=FLAG, labels=STRINGS),
        grafanaDashboard=section(enabled=FLAG, labels=STRINGS, annotations=STRINGS),
    ),
    "priorityClasses": section(create=FLAG, serving=CLASS, training=CLASS),
    "kueue": section(queueName=NAME, priorityClass=NAME),
    "test": section(prompt={"type": "string", "minLength": 1}, timeoutSeconds=whole(1)),
    "extraObjects": OBJECTS,
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
