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
from scripts.chart_types import (
    AFFINITY,
    ANNOTATIONS,
    ANY_OBJECT,
    CLASS,
    CONFINEMENT,
    DISK,
    FLAG,
    GROUP,
    HOST,
    HOSTNAME,
    IMAGE,
    KEY,
    LABEL_NAME,
    LABELS,
    MONITOR,
    NAME,
    NAMED_IMAGE,
    OBJECT,
    PARENT,
    PEER,
    POD,
    PROBE,
    PULL_POLICY,
    PULL_SECRETS,
    RESOURCES,
    SCHEDULING,
    SECURITY,
    SELECTOR,
    SIZE,
    SPREAD,
    STORE,
    TEXT,
    TOLERATION,
    TRAINERS,
    VARIABLE,
    VOLUME,
    Schema,
    choice,
    listed,
    ref,
    section,
    whole,
)

TARGET = Path(__file__).resolve().parents[1] / "helm" / "values.schema.json"
OURS = {
    "Settings": ("profile", "data_dir", "ray"),
    "ServerSettings": ("host", "port", "api_keys", "haproxy"),
    "RedisSettings": ("url",),
    "BlobSettings": ("url",),
    "RemoteSettings": ("api_key",),
}
"""Settings that the chart sets, or that a Secret holds."""

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
