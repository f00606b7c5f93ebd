"""The operations guide: helm, kubectl and ours take its commands, and what it names is there."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.chart.charts import CHART, ROOT, SECRET, TOOLS, profile, run_helm
from tests.chart.test_drift import parse

README = (CHART / "README.md").read_text("utf-8")
FENCED = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
INLINE = re.findall(r"`([^`]+)`", re.sub(r"^```\n.*?^```", "", README, flags=re.M | re.DOTALL))
PROGRAMS = ("helm", "kubectl", "mora-serve", "make")


def commands(program: str) -> list[list[str]]:
    """The words of each command of a program, in order."""
    lines = [line for block in FENCED for line in block.replace("\\\n", " ").splitlines()]
    parts = [part for line in lines for part in line.split("&&")] + INLINE
    words = [shlex.split(part, comments=True) for part in parts if part.startswith(PROGRAMS)]
    return [found for found in words if found[0] == program and len(found) > 1]


def kubectl(*arguments: str) -> str:
    done = subprocess.run(
        [TOOLS / "4" / "kubectl", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{arguments}: {done.stderr}"
    return done.stdout


@pytest.mark.parametrize("words", commands("helm"), ids=" ".join)
def test_helm_takes_the_command(words: list[str], helm_version: str) -> None:
    verb, *arguments = words[1:]
    run_helm(verb, "--help", *arguments, version=helm_version)
    if verb in ("install", "upgrade"):
        given = [word for word in arguments if word != "--reset-then-reuse-values"]
        given = [word.replace("helm/", f"{CHART}/") for word in given]
        given[given.index("helm")] = str(CHART)
        kept = [f"--set={key}={value}" for key, value in SECRET.items()] * (verb == "upgrade")
        assert "kind: RayService" in run_helm("template", *given, *kept, version=helm_version)


@pytest.mark.parametrize(
    "words", [words for words in commands("kubectl") if words[1] != "create"], ids=" ".join
)
def test_kubectl_takes_the_command(words: list[str]) -> None:
    verb, *arguments = words[1:]
    kubectl(verb, "--help", *arguments)


def test_the_secrets_that_the_guide_creates_are_the_ones_it_installs_with(tmp_path: Path) -> None:
    (tmp_path / "calibrator.json").write_text("{}")
    made = {}
    for words in commands("kubectl"):
        if words[1] == "create":
            local = [
                word.replace("=calibrator.json", f"={tmp_path}/calibrator.json") for word in words
            ]
            made_now = yaml.safe_load(kubectl(*local[1:], "--dry-run=client", "--output=yaml"))
            made[made_now["metadata"]["name"]] = set(made_now.get("data", {}))
    values = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
    assert made == {
        "mora-store": {values["valkey"]["auth"]["key"]},
        "mora-keys": {values["secrets"]["apiKeys"][key] for key in ("key", "clientKey")},
        "hub": {values["secrets"]["huggingFace"]["key"]},
        "mora-calibrator": {values["calibrator"]["key"]},
    }
    assert values["gcsFaultTolerance"]["external"]["key"] == values["valkey"]["auth"]["key"]
    named = {
        word.partition("=")[2] for words in commands("helm") for word in words if "xisting" in word
    }
    assert named == set(made)


def test_the_guides_patch_changes_the_bounds_of_the_group_it_means(tmp_path: Path) -> None:
    (words,) = [words for words in commands("kubectl") if words[1] == "patch"]
    cluster = {"apiVersion": "ray.io/v1", "kind": "RayCluster", "metadata": {"name": "NAME"},
               "spec": profile("default").cluster}  # fmt: skip
    (tmp_path / "cluster.yaml").write_text(json.dumps(cluster))
    options = words[words.index("--type") :]
    local = ("--local", "--filename", str(tmp_path / "cluster.yaml"), "--output=json")
    changed = json.loads(kubectl("patch", *local, *options))["spec"]["workerGroupSpecs"]
    assert (changed[1]["groupName"], changed[1]["maxReplicas"]) == ("generator", 8)
    assert "groups in the order " + ", ".join(g["groupName"] for g in changed) in README


@pytest.mark.parametrize("words", commands("mora-serve"), ids=" ".join)
def test_our_command_line_takes_the_command(words: list[str]) -> None:
    parse(words[1:])


def test_the_makefile_has_the_targets() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    asked = {words[1] for words in commands("make")}
    assert asked >= {"helm-test", "helm-mutants", "image-check"}
    assert all(f"\n{target}:" in makefile for target in asked)


def test_values_that_the_guide_names_exist() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text("utf-8"))
    paths = {code.partition(":")[0].replace("[]", "") for code in INLINE}
    dotted = {path for path in paths if re.fullmatch(r"[a-z][A-Za-z]*(\.[A-Za-z_]+)+", path)}
    assert len(dotted) > 15
    roots = (schema, schema["$defs"]["Settings"])
    assert [path for path in sorted(dotted) if not any(has(schema, r, path) for r in roots)] == []


def has(schema: dict[str, Any], node: dict[str, Any], path: str) -> bool:
    """Whether a dotted path leads to a property, through references, lists and alternatives."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rpartition("/")[2]]
    if not path or node.get("additionalProperties") is True:
        return True
    inner = [*node.get("anyOf", ()), *([node["items"]] if "items" in node else ())]
    name, _, rest = path.partition(".")
    found = node.get("properties", {}).get(name)
    return (found is not None and has(schema, found, rest)) or any(
        has(schema, item, path) for item in inner
    )
