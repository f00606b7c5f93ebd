"""What a value of the chart may be: quantities, names, labels, parts that several sections have.

Building blocks of :mod:`scripts.chart_schema`, which says where each belongs.
"""

from __future__ import annotations

from typing import Any

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
