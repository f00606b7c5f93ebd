"""What a cluster would do to an installation that looks right: Ray's store, keys, first minutes."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import ray._common.utils
import ray._private.utils
from ray._private.services import determine_plasma_store_config
from ray._private.utils import resolve_object_store_memory

from api.cluster import cluster_settings
from tests.chart.charts import in_cluster, profile, render
from tests.chart.test_drift import variables
from tests.chart.test_templates import _bytes


def test_rays_object_store_is_in_shared_memory_and_leaves_a_part_of_it(
    profile_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = profile(profile_name).cluster
    groups = {"head": cluster["headGroupSpec"], **profile(profile_name).groups}
    for name, group in groups.items():
        spec = group["template"]["spec"]
        (shm,) = [item["emptyDir"] for item in spec["volumes"] if item["name"] == "shm"]
        memory = int(_bytes(spec["containers"][0]["resources"]["limits"]["memory"]))
        shared = int(_bytes(shm["sizeLimit"]))
        monkeypatch.setattr(
            ray._private.utils, "get_shared_memory_bytes", functools.partial(int, shared)
        )
        monkeypatch.setattr(ray._common.utils, "get_system_memory", functools.partial(int, memory))
        asked = group["rayStartParams"].get("object-store-memory")
        size = resolve_object_store_memory(memory, None if asked is None else int(asked))
        (directory, *_) = determine_plasma_store_config(size, "/tmp")
        assert directory == "/dev/shm", name
        assert size <= 0.8 * shared, name


def test_the_diagnosis_waits_for_the_models_and_ends_before_its_pod() -> None:
    pod = render("default", "test.timeoutSeconds=900").one("Pod")["spec"]
    (command,) = [item["command"] for item in pod["containers"]]
    waits = float(command[command.index("--ready-timeout") + 1])
    assert waits == pod["activeDeadlineSeconds"] - 60 == 840
    short = render("default", "test.timeoutSeconds=30").one("Pod")["spec"]["containers"][0]
    assert short["command"][-2:] == ["--ready-timeout", "0"]


def test_a_remote_scorers_key_comes_from_a_secret() -> None:
    dimensions = ["helpful", "harmless"]
    remote = {"url": "http://rm/classify", "protocol": "classify", "api_key_env": "REWARD_KEY"}
    scorers: list[dict[str, Any]] = [
        {"name": "others", "backend": "fake", "dimensions": dimensions},
        {"name": "rm", "backend": "remote", "dimensions": ["truthful"], "sign": 1,
         "remote": remote},
    ]  # fmt: skip
    reference = {"secretKeyRef": {"name": "reward", "key": "key"}}
    rendered = render(
        values={
            "config.scorers": scorers,
            "extraEnv": [{"name": "REWARD_KEY", "valueFrom": reference}],
        }
    )
    settings = cluster_settings(in_cluster(rendered), variables(rendered))
    (found,) = [scorer.remote for scorer in settings.scorers if scorer.remote]
    assert found.api_key is not None
    assert found.api_key.get_secret_value() == "secret"
