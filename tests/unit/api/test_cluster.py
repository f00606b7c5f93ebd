"""The application builder that Ray Serve configuration files name."""

from __future__ import annotations

from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve._private.utils import import_attr

from api.cluster import cluster_settings
from mora_serve.errors import CalibrationError, ConfigError

REDIS = {"MORA_REDIS__URL": "redis://:hush@store:6379/0"}
SEQCLS = {"name": "one", "preset": "gpt2-large-helpful", "dimensions": ["helpful"]}


def test_arguments_are_settings_and_secrets_come_from_the_environment() -> None:
    arguments = {"profile": "fake", "settings": {"server": {"port": 1234}}}
    settings = cluster_settings(arguments, REDIS)
    assert (settings.profile, settings.server.port) == ("fake", 1234)
    assert settings.redis.url is not None
    assert settings.redis.url.get_secret_value() == "redis://:hush@store:6379/0"


def test_paths_are_absolute_as_for_a_local_stack() -> None:
    settings = cluster_settings({"profile": "fake", "settings": {"data_dir": "/d"}}, REDIS)
    assert settings.blobs.url == "file:///d/blobs"


@pytest.mark.parametrize(("haproxy", "limit"), [("1", 512 * 2**20), ("0", 64 * 2**20)])
def test_uploads_are_as_large_as_the_proxy_can_take(haproxy: str, limit: int) -> None:
    environ = {**REDIS, "RAY_SERVE_ENABLE_HA_PROXY": haproxy}
    assert cluster_settings({"profile": "fake"}, environ).server.max_upload_bytes == limit


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        ({"profile": "fake"}, {}, "redis.url must be set"),
        ({"profile": "fake", "setings": {}}, REDIS, "got setings"),
        ({"profile": "fake", "settings": {"polcy": {}}}, REDIS, "nearest valid key is policy"),
    ],
)
def test_what_cannot_be_served_is_refused_before_a_replica_starts(
    arguments: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        cluster_settings(arguments, environ)


def test_scorers_without_a_calibrator_are_refused_before_a_replica_starts() -> None:
    settings = {"dimensions": ["helpful"], "scorers": [SEQCLS]}
    with pytest.raises(CalibrationError, match="scorers calibrate"):
        cluster_settings({"profile": "gpu", "settings": settings}, REDIS)


def test_serve_builds_the_whole_service_from_the_import_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MORA_REDIS__URL", "redis://store:6379/0")
    server = {"replicas": 2, "num_cpus": 1, "resources": {"pool": 1}}
    application = import_attr("api.cluster:build")(
        {"profile": "fake", "settings": {"server": server}}
    )
    built = build_app(application, name="mora", default_runtime_env={})
    deployments = {item.name: item for item in built.deployments}
    assert set(deployments) == {
        "gateway", "generator", "runner", "launcher",
        "scorer-fake-helpful", "scorer-fake-harmless", "scorer-fake-truthful",
    }  # fmt: skip
    assert built.ingress_deployment_name == "gateway"
    gateway = deployments["gateway"]
    assert gateway.num_replicas == 2
    assert gateway.ray_actor_options["num_cpus"] == 1
    assert gateway.ray_actor_options["resources"] == {"pool": 1}
