"""KubeRay's CRDs as JSON schemas: what an API server checks of an object's structure.

That includes lists which it keeps by key, such as variables by name: each key comes once.

The CRD files are third-party and not in this repository. ``KUBERAY_CRDS`` names their folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import yaml

from tests.chart.charts import ROOT

VERSION = "v1"


def folder() -> Path | None:
    """Where the CRDs are, ``None`` when they are not at hand."""
    named = os.environ.get("KUBERAY_CRDS")
    path = Path(named) if named else ROOT.parent / "shared" / "kuberay-crds"
    return path if (path / "ray.io_rayservices.yaml").is_file() else None


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The OpenAPI schema of a KubeRay kind."""
    place = folder()
    assert place is not None
    text = (place / f"ray.io_{kind.lower()}s.yaml").read_text("utf-8")
    definition = yaml.load(text, yaml.CSafeLoader)
    (version,) = [v for v in definition["spec"]["versions"] if v["name"] == VERSION]
    found: dict[str, Any] = version["schema"]["openAPIV3Schema"]
    return found


@functools.cache
def validator(kind: str) -> jsonschema.protocols.Validator:
    """Validates objects of a KubeRay kind."""
    return jsonschema.Draft202012Validator(_closed(schema(kind), top=True))


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with an object, one line each with its place."""
    found = validator(document["kind"]).iter_errors(document)
    return [
        *(f"{'.'.join(map(str, e.absolute_path))}: {e.message}" for e in found),
        *_repeated(schema(document["kind"]), document, document["kind"]),
    ]


def _repeated(node: dict[str, Any], value: Any, at: str) -> Iterator[str]:
    """Lists that hold a key twice, of those that an API server keeps by key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            child = node.get("properties", {}).get(name)
            yield from _repeated(child, inner, f"{at}.{name}") if child else ()
    elif isinstance(value, list):
        keys = node.get("x-kubernetes-list-map-keys", ())
        found = [tuple(item.get(key) for key in keys) for item in value] if keys else []
        yield from (f"{at}: {key} comes twice" for key in set(found) if found.count(key) > 1)
        for item in value:
            yield from _repeated(node.get("items", {}), item, at)


def _closed(schema: dict[str, Any], *, top: bool = False) -> dict[str, Any]:
    """An OpenAPI schema as an API server applies it with strict field validation: unknown fields
    are errors, fields with a default need not be given."""
    node = {key: value for key, value in schema.items() if not key.startswith("x-kubernetes")}
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    properties = node.get("properties")
    if properties is not None:
        node["properties"] = {name: _closed(value) for name, value in properties.items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            node["additionalProperties"] = False
        if top:
            node["properties"]["metadata"] = {"type": "object"}
        defaulted = {name for name, value in properties.items() if "default" in value}
        node["required"] = [name for name in node.get("required", []) if name not in defaulted]
    if isinstance(node.get("additionalProperties"), dict):
        node["additionalProperties"] = _closed(node["additionalProperties"])
    if isinstance(node.get("items"), dict):
        node["items"] = _closed(node["items"])
    return node
